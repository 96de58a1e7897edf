/* What a step does besides linears and attention, and the way through a list of calls. */
#include "common.h"
#include "panels.h"

#define PART 2048 /* of a row of silu_mul: what a thread does at a time */

/* out [T, K] = the rows of w with these numbers */
void embedding(const call *c, worker *me) {
    bf16 *out = c->tensors[0];
    const bf16 *w = c->tensors[1];
    const int64_t *ids = c->tensors[2];
    long T = c->sizes[0], K = c->sizes[1], w_stride = c->sizes[2];
    for (long token = first(me, T); token >= 0; token = next(me))
        memcpy(out + token * K, w + ids[token] * w_stride, K * sizeof *w);
    meet(me);
}

/* One head [D], its halves rotated by the angles whose cosines and sines a row of the table has */
static inline void rotate(bf16 *to, const bf16 *from, const float *row, float sign, long D) {
    for (long i = 0; i < D / 2; i += LANES) {
        floats first = load_wide(from + i), second = load_wide(from + D / 2 + i);
        floats cosines = load(row + i), sines = load(row + D / 2 + i) * sign;
        store_narrow(to + i, first * cosines - second * sines);
        store_narrow(to + D / 2 + i, second * cosines + first * sines);
    }
}

/* q [T, Hq, D] and k [T, Hkv, D], tokens of any stride, rotated to dense q_out and k_out; scalar -1: backwards */
void apply_rope(const call *c, worker *me) {
    bf16 *q_out = c->tensors[0], *k_out = c->tensors[1];
    const bf16 *q = c->tensors[2], *k = c->tensors[3];
    const int64_t *positions = c->tensors[4];
    const float *cos_sin = c->tensors[5];
    long T = c->sizes[0], Hq = c->sizes[1], Hkv = c->sizes[2], D = c->sizes[3];
    long q_stride = c->sizes[4], k_stride = c->sizes[5];
    for (long token = first(me, T); token >= 0; token = next(me)) {
        const float *row = cos_sin + positions[token] * D;
        for (long head = 0; head < Hq; head++)
            rotate(q_out + (token * Hq + head) * D, q + token * q_stride + head * D, row, c->scalar, D);
        for (long head = 0; head < Hkv; head++)
            rotate(k_out + (token * Hkv + head) * D, k + token * k_stride + head * D, row, c->scalar, D);
    }
    meet(me);
}

/* qkv [T, Hq + 2 Hkv, D], tokens of any stride: q rotated to q_out [T, Hq, D], k rotated and v to their slots */
void rope_and_cache(const call *c, worker *me) {
    bf16 *q_out = c->tensors[0], *k_pages = c->tensors[1], *v_pages = c->tensors[2];
    const bf16 *qkv = c->tensors[3];
    const int64_t *positions = c->tensors[4], *slots = c->tensors[5];
    const float *cos_sin = c->tensors[6];
    long T = c->sizes[0], Hq = c->sizes[1], Hkv = c->sizes[2], D = c->sizes[3], qkv_stride = c->sizes[4];
    for (long token = first(me, T); token >= 0; token = next(me)) {
        const bf16 *from = qkv + token * qkv_stride;
        const float *row = cos_sin + positions[token] * D;
        long slot = slots[token] * Hkv * D;
        for (long head = 0; head < Hq; head++) rotate(q_out + (token * Hq + head) * D, from + head * D, row, 1, D);
        for (long head = 0; head < Hkv; head++) rotate(k_pages + slot + head * D, from + (Hq + head) * D, row, 1, D);
        memcpy(v_pages + slot, from + (Hq + Hkv) * D, Hkv * D * sizeof *from);
    }
    meet(me);
}

/* x [T, K] and residual, rows of any stride: out [T, K] is their sum new_residual [T, K], normalised; without a
 * residual x itself is. K a multiple of LANES */
void add_rms_norm(const call *c, worker *me) {
    bf16 *out = c->tensors[0], *new_residual = c->tensors[1];
    const bf16 *x = c->tensors[2], *residual = c->tensors[3], *norm_weight = c->tensors[4];
    long T = c->sizes[0], K = c->sizes[1], x_stride = c->sizes[2], residual_stride = c->sizes[3];
    for (long token = first(me, T); token >= 0; token = next(me)) {
        const bf16 *row = x + token * x_stride;
        bf16 *sum = residual ? new_residual + token * K : 0;
        float scale = norm_scale(sum, row, residual ? residual + token * residual_stride : 0, c->scalar, K);
        apply_norm(out + token * K, sum ? sum : row, norm_weight, scale, K);
    }
    meet(me);
}

/* gate and up [T, F], rows of any stride: out [T, F] = silu(gate) * up, silu rounded */
void silu_mul(const call *c, worker *me) {
    bf16 *out = c->tensors[0];
    const bf16 *gate = c->tensors[1], *up = c->tensors[2];
    long T = c->sizes[0], F = c->sizes[1], gate_stride = c->sizes[2], up_stride = c->sizes[3];
    long parts = parts_of(F, PART);
    for (long task = first(me, T * parts); task >= 0; task = next(me)) {
        long token = task / parts, i = task % parts * PART, end = least(i + PART, F);
        bf16 *to = out + token * F;
        const bf16 *g = gate + token * gate_stride, *u = up + token * up_stride;
        for (; i + LANES <= end; i += LANES) store_narrow(to + i, rounded(silu(load_wide(g + i))) * load_wide(u + i));
        if (i < end) {
            halves last = narrow_floats(rounded(silu(load_some(g + i, end - i))) * load_some(u + i, end - i));
            store_some(to + i, &last, end - i, sizeof *to);
        }
    }
    meet(me);
}

static op *const OPS[] = {embedding,         rope_and_cache, few_tokens,   many_tokens, decode_attention,
                          prefill_attention, apply_rope,     add_rms_norm, silu_mul};

void play(const call *calls, long count, worker *me) {
    for (long i = 0; i < count; i++) OPS[calls[i].op](calls + i, me);
}

/* What ops.py lays scratch memory out by */
EXPORTED const long block_columns = BLOCK, chunk = CHUNK;
