/* Rotary position embedding, half-split: values i and i + D / 2 of a head are rotated together.
 *
 *     a head    | first half: i = 0 .. D/2 | second half |          a row of cos_sin   | cosines [D/2] | sines [D/2] |
 *
 *     for i:    out[i]         = first[i] * cos[i] - second[i] * sin[i]
 *               out[i + D / 2] = second[i] * cos[i] + first[i] * sin[i]              in float32, rounded once */
#include "pages.h"
#include "team.h"

static inline void rotate(real *out, const real *head, const float *angles, float sign, long D) {
    for (long i = 0; i < D / 2; i += LANES) {
        floats first = load_reals(head + i), second = load_reals(head + D / 2 + i);
        floats cosines = load(angles + i), sines = load(angles + D / 2 + i) * sign;
        store_reals(out + i, first * cosines - second * sines);
        store_reals(out + D / 2 + i, second * cosines + first * sines);
    }
}

void apply_rope(const apply_rope_args *args, worker *me) {
    const long Hq = args->num_q_heads, Hkv = args->num_kv_heads, D = args->head_dim;
    for (long token = first_task(me, args->num_tokens); token >= 0; token = next_task(me)) {
        const float *angles = args->cos_sin + args->positions[token] * D;
        const real *q = args->q + token * args->q_stride, *k = args->k + token * args->k_stride;
        for (long head = 0; head < Hq; head++)
            rotate(args->q_out + (token * Hq + head) * D, q + head * D, angles, args->sign, D);
        for (long head = 0; head < Hkv; head++)
            rotate(args->k_out + (token * Hkv + head) * D, k + head * D, angles, args->sign, D);
    }
    barrier(me);
}

void rope_and_cache(const rope_and_cache_args *args, worker *me) {
    const long Hq = args->num_q_heads, Hkv = args->num_kv_heads, D = args->head_dim;
    for (long token = first_task(me, args->num_tokens); token >= 0; token = next_task(me)) {
        const float *angles = args->cos_sin + args->positions[token] * D;
        const real *q = args->qkv + token * args->qkv_stride, *k = q + Hq * D, *v = k + Hkv * D;
        for (long head = 0; head < Hq; head++)
            rotate(args->q_out + (token * Hq + head) * D, q + head * D, angles, 1, D);
        for (long head = 0; head < Hkv; head++) {
            real key[MAX_HEAD_DIM];
            rotate(key, k + head * D, angles, 1, D);
            pages_store(&args->cache, args->slots[token], head, key, v + head * D, D);
        }
    }
    barrier(me);
}
