/* Packs a block of cached tokens for the products of attention, from the pages' format. pages.h includes this file.
 *
 *     keys     as panels [PANELS, D / PER, WIDE]
 *     values   as rows [BLOCK / PER, D] of operands
 *
 * Both are rounded to activations, as Pages.gather of the format rounds them. */
#ifndef PAGES_BLOCK_H
#define PAGES_BLOCK_H

typedef struct { /* the key or the value of a token's head */
    const void *codes;
    float scale;
} cached;

ALWAYS cached cached_head(const int format, void *k_or_v, float *scales, const pages *p, long slot, long head, long D) {
    cached found = {codes_of(format, k_or_v, p, slot, head, D), 1};
    if (largest_of(format)) found.scale = *scale_of(format, scales, p, slot, head);
    return found;
}

/* LANES values at index d; channels are null for a value, and if keys have none */
ALWAYS floats cached_floats(const int format, const cached *from, const real *channels, long d) {
    floats x = decode(format, from->codes, d);
    if (largest_of(format)) x *= from->scale;
    if (channels) x *= load_reals(channels + d);
    return format == dense_pages ? x : rounded(x);
}

/* A register of activations at index d, in the order of the row */
ALWAYS pairs cached_register(const int format, const cached *from, const real *channels, long d) {
    if (format == dense_pages) return load_pairs((const real *)from->codes + d);
    pairs found;
    reals parts[sizeof found / sizeof(reals)];
    for (unsigned i = 0; i < sizeof parts / sizeof *parts; i++)
        parts[i] = narrow_to_reals(cached_floats(format, from, channels, d + i * LANES));
    memcpy(&found, parts, sizeof found);
    return found;
}

ALWAYS void prefetch_head(const int format, void *k_or_v, const pages *p, long slot, long head, long D) {
    const char *codes = codes_of(format, k_or_v, p, slot, head, D);
    for (long byte = 0; byte < D * code_size(format); byte += 64) __builtin_prefetch(codes + byte, 0, 2);
}

ALWAYS void pack_block(const int format, operands *keys, operands *values, const pages *p, const long *slots,
                       long count, const long *next_slots, long next_count, long head, long D) {
    static const real zeros[MAX_HEAD_DIM]; /* also as codes */
    const real *channels = channels_of(format, p, head, D);
    cached k_rows[BLOCK], v_rows[BLOCK];
    const long some = least(count, BLOCK), last = ceil_div(some, LANES) * LANES;
    for (long i = 0; i < some; i++) {
        k_rows[i] = cached_head(format, p->k, p->k_scales, p, slots[i], head, D);
        v_rows[i] = cached_head(format, p->v, p->v_scales, p, slots[i], head, D);
        prefetch_head(format, p->k, p, slots[i], head, D);
        prefetch_head(format, p->v, p, slots[i], head, D);
    }
    for (long i = some; i < last; i++) {
        k_rows[i].codes = v_rows[i].codes = zeros;
        k_rows[i].scale = v_rows[i].scale = 0;
    }
    for (long vector = 0; vector < last / LANES; vector++) {
        operands *panel = keys + vector / VECTORS * (D / PER) * VECTORS + vector % VECTORS;
        for (long d = 0; d < D; d += STEP) {
            pairs square[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                square[i] = cached_register(format, &k_rows[vector * LANES + i], channels, d);
            pack_square(panel + d / PER * VECTORS, square);
        }
    }
    for (long i = 0; i < some; i += PER) {
        for (long j = i; j < i + PER && j < next_count; j++) {
            prefetch_head(format, p->k, p, next_slots[j], head, D);
            prefetch_head(format, p->v, p, next_slots[j], head, D);
        }
        for (long d = 0; d < D; d += LANES) {
            operands *to = values + (i / PER * D + d) / LANES;
#ifdef PAIRS
            *to = (pairs)cached_floats(format, &v_rows[i], 0, d) >> 16 |
                  (pairs)cached_floats(format, &v_rows[i + 1], 0, d);
#else
            *to = cached_floats(format, &v_rows[i], 0, d);
#endif
        }
    }
}

/* Packs a head's keys and values of BLOCK tokens. Tokens from `count` on are set to 0, because their memory may hold
 * anything. The next_count tokens of the next block are prefetched at the same time. */
static inline void pages_block(operands *keys, operands *values, const pages *p, const long *slots, long count,
                               const long *next_slots, long next_count, long head, long D) {
    switch (p->format) {
#define PACK(FORMAT)                                                                                \
    case FORMAT##_pages:                                                                            \
        pack_block(FORMAT##_pages, keys, values, p, slots, count, next_slots, next_count, head, D); \
        break;
        EACH_PAGES_FORMAT(PACK)
#undef PACK
    }
}
#endif
