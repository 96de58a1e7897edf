/* What a step does besides linears and attention, and the way through a list of calls. */
#include "common.h"

/* out [T, K] = the rows of w with these numbers */
void embedding(const call *c) {
    bf16 *out = c->tensors[0];
    const bf16 *w = c->tensors[1];
    const int64_t *ids = c->tensors[2];
    long T = c->sizes[0], K = c->sizes[1], w_stride = c->sizes[2];
#pragma omp for
    for (long token = 0; token < T; token++) memcpy(out + token * K, w + ids[token] * w_stride, K * sizeof *w);
}

/* qkv [T, Hq + 2 Hkv, D], tokens of any stride: q rotated to q_out [T, Hq, D], k rotated and v to their slots */
void rope_and_cache(const call *c) {
    bf16 *q_out = c->tensors[0], *k_pages = c->tensors[1], *v_pages = c->tensors[2];
    const bf16 *qkv = c->tensors[3];
    const int64_t *positions = c->tensors[4], *slots = c->tensors[5];
    const float *cos_sin = c->tensors[6];
    long T = c->sizes[0], Hq = c->sizes[1], Hkv = c->sizes[2], D = c->sizes[3], qkv_stride = c->sizes[4];
#pragma omp for collapse(2)
    for (long token = 0; token < T; token++)
        for (long head = 0; head < Hq + 2 * Hkv; head++) {
            const bf16 *from = qkv + token * qkv_stride + head * D;
            long slot = slots[token] * Hkv * D;
            if (head >= Hq + Hkv) {
                memcpy(v_pages + slot + (head - Hq - Hkv) * D, from, D * sizeof *from);
                continue;
            }
            const float *cosines = cos_sin + positions[token] * D, *sines = cosines + D / 2;
            bf16 *to = head < Hq ? q_out + (token * Hq + head) * D : k_pages + slot + (head - Hq) * D;
            for (long i = 0; i < D / 2; i++) {
                float low = widen(from[i]), high = widen(from[i + D / 2]);
                to[i] = narrow(low * cosines[i] - high * sines[i]);
                to[i + D / 2] = narrow(high * cosines[i] + low * sines[i]);
            }
        }
}

static void (*const OPS[])(const call *) = {embedding,   rope_and_cache,   few_tokens,
                                            many_tokens, decode_attention, prefill_attention};

void run(const call *calls, long count, int threads) {
#pragma omp parallel num_threads(threads)
    for (long i = 0; i < count; i++) OPS[calls[i].op](calls + i);
}

/* What ops.py lays scratch memory out by */
const long wide = WIDE, chunk = CHUNK;
