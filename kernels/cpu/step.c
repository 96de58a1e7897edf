/* What a step does besides linears and attention, and the way through a list of calls. */
#include "common.h"

#define PART 2048 /* of a row of silu_mul: what a thread does at a time */

/* out [T, K] = the rows of w with these numbers */
void embedding(const call *c) {
    bf16 *out = c->tensors[0];
    const bf16 *w = c->tensors[1];
    const int64_t *ids = c->tensors[2];
    long T = c->sizes[0], K = c->sizes[1], w_stride = c->sizes[2];
#pragma omp for
    for (long token = 0; token < T; token++) memcpy(out + token * K, w + ids[token] * w_stride, K * sizeof *w);
}

/* One head [D], its halves rotated by the angles whose cosines and sines a row of the table has; D a multiple of STEP */
static inline void rotate(bf16 *to, const bf16 *from, const float *row, float sign, long D) {
    for (long i = 0; i < D / 2; i += LANES) {
        floats first = load_wide(from + i), second = load_wide(from + D / 2 + i);
        floats cosines = load(row + i), sines = load(row + D / 2 + i) * sign;
        store_narrow(to + i, first * cosines - second * sines);
        store_narrow(to + D / 2 + i, second * cosines + first * sines);
    }
}

/* q [T, Hq, D] and k [T, Hkv, D], tokens of any stride, rotated to dense q_out and k_out; scalar -1: backwards */
void apply_rope(const call *c) {
    bf16 *q_out = c->tensors[0], *k_out = c->tensors[1];
    const bf16 *q = c->tensors[2], *k = c->tensors[3];
    const int64_t *positions = c->tensors[4];
    const float *cos_sin = c->tensors[5];
    long T = c->sizes[0], Hq = c->sizes[1], Hkv = c->sizes[2], D = c->sizes[3];
    long q_stride = c->sizes[4], k_stride = c->sizes[5];
#pragma omp for collapse(2)
    for (long token = 0; token < T; token++)
        for (long head = 0; head < Hq + Hkv; head++) {
            const float *row = cos_sin + positions[token] * D;
            if (head < Hq)
                rotate(q_out + (token * Hq + head) * D, q + token * q_stride + head * D, row, c->scalar, D);
            else
                rotate(k_out + (token * Hkv + head - Hq) * D, k + token * k_stride + (head - Hq) * D, row, c->scalar, D);
        }
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
            bf16 *to = head < Hq ? q_out + (token * Hq + head) * D : k_pages + slot + (head - Hq) * D;
            rotate(to, from, cos_sin + positions[token] * D, 1, D);
        }
}

/* x [T, K] and residual, rows of any stride: out [T, K] is their sum new_residual [T, K], normalised; without a residual
 * x itself is. K a multiple of LANES */
void add_rms_norm(const call *c) {
    bf16 *out = c->tensors[0], *new_residual = c->tensors[1];
    const bf16 *x = c->tensors[2], *residual = c->tensors[3], *norm_weight = c->tensors[4];
    long T = c->sizes[0], K = c->sizes[1], x_stride = c->sizes[2], residual_stride = c->sizes[3];
#pragma omp for
    for (long token = 0; token < T; token++)
        normalise(out + token * K, residual ? new_residual + token * K : 0, x + token * x_stride,
                  residual ? residual + token * residual_stride : 0, norm_weight, c->scalar, K);
}

/* gate and up [T, F], rows of any stride: out [T, F] = silu(gate) * up, silu rounded */
void silu_mul(const call *c) {
    bf16 *out = c->tensors[0];
    const bf16 *gate = c->tensors[1], *up = c->tensors[2];
    long T = c->sizes[0], F = c->sizes[1], gate_stride = c->sizes[2], up_stride = c->sizes[3];
    long parts = (F + PART - 1) / PART;
#pragma omp for
    for (long task = 0; task < T * parts; task++) {
        long token = task / parts, i = task % parts * PART, end = i + PART < F ? i + PART : F;
        bf16 *to = out + token * F;
        const bf16 *g = gate + token * gate_stride, *u = up + token * up_stride;
        for (; i + LANES <= end; i += LANES) store_narrow(to + i, rounded_floats(silu(load_wide(g + i))) * load_wide(u + i));
        if (i < end) {
            halves last = narrow_floats(rounded_floats(silu(load_some(g + i, end - i))) * load_some(u + i, end - i));
            store_some(to + i, &last, end - i, sizeof *to);
        }
    }
}

static void (*const OPS[])(const call *) = {embedding,   rope_and_cache,   few_tokens,
                                            many_tokens, decode_attention, prefill_attention,
                                            apply_rope,  add_rms_norm,     silu_mul};

void run(const call *calls, long count, int threads) {
#pragma omp parallel num_threads(threads)
    for (long i = 0; i < count; i++) OPS[calls[i].op](calls + i);
}

/* What ops.py lays scratch memory out by */
const long wide = WIDE, chunk = CHUNK;
