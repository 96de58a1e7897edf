/* The cache format `dense`: the keys and values of a layer, in the type of activations.
 *
 *     k ──► page 0: token 0 | head 0: D values | head 1: D values | ...      token_bytes from here
 *                   token 1 | head 0: D values | ...                      ◄─ to here
 *                   ...
 *           page 1: token page_size | ...                 slot = page * page_size + place in the page
 *
 * v has the same layout. Only this file knows the format. Another format is another file with the same functions. */
#ifndef DENSE_PAGES_H
#define DENSE_PAGES_H
#include "panels.h"

/* The D values of a head of the token in a slot, in k or in v */
ALWAYS real *dense_head(void *k_or_v, const pages *p, long slot, long head, long D) {
    return (real *)((char *)k_or_v + slot * p->token_bytes) + head * D;
}

/* One value of k or of v. It specifies what the faster functions below read. */
static inline float dense_cached(void *k_or_v, const pages *p, long slot, long head, long D, long d) {
    return to_float(dense_head(k_or_v, p, slot, head, D)[d]);
}

/* Stores a head's key [D] and value [D] */
static inline void dense_store(const pages *p, long slot, long head, const real *key, const real *value, long D) {
    memcpy(dense_head(p->k, p, slot, head, D), key, D * sizeof *key);
    memcpy(dense_head(p->v, p, slot, head, D), value, D * sizeof *value);
}

/* Packs a head's keys and values of BLOCK tokens for `multiply`: keys as panels [PANELS, D / PER, WIDE], values as rows
 * [BLOCK / PER, D] of operands. Tokens from `count` on are set to 0, because their memory may hold anything. Meanwhile
 * the next_count tokens of the next block are prefetched. */
static inline void dense_block(operands *keys, operands *values, const pages *p, const long *slots, long count,
                               const long *next_slots, long next_count, long head, long D) {
    static const real zeros[MAX_HEAD_DIM];
    const real *k_rows[BLOCK], *v_rows[BLOCK];
    for (long i = 0; i < BLOCK; i++) {
        k_rows[i] = i < count ? dense_head(p->k, p, slots[i], head, D) : zeros;
        v_rows[i] = i < count ? dense_head(p->v, p, slots[i], head, D) : zeros;
    }
    for (long panel = 0; panel < PANELS; panel++)
        pack_transposed(keys + panel * (D / PER) * VECTORS, k_rows + panel * WIDE, D);
    for (long i = 0; i < BLOCK; i += PER) {
        for (long j = i; j < i + PER && j < next_count; j++)
            for (long d = 0; d < D; d += LINE) {
                __builtin_prefetch(dense_head(p->k, p, next_slots[j], head, D) + d, 0, 2);
                __builtin_prefetch(dense_head(p->v, p, next_slots[j], head, D) + d, 0, 2);
            }
        for (long d = 0; d < D; d += LANES) {
            operands *to = values + (i / PER * D + d) / LANES;
#ifdef PAIRS
            *to = (pairs)load_reals(v_rows[i] + d) >> 16 | (pairs)load_reals(v_rows[i + 1] + d);
#else
            *to = load_reals(v_rows[i] + d);
#endif
        }
    }
}
#endif
