/* A decode step on a CPU: embedding; linears of few tokens, behind an optional add + RMSNorm and before an optional
 * SwiGLU; rotary embedding and cache write; attention over the paged cache. bfloat16 in memory, float32 in registers,
 * rounded where kernels/reference.py rounds. An op is a `call`; `run` goes through any number of them in one team of
 * threads.
 *
 * Weights [N, K] are read once for all tokens. A sum over K has its lanes and its order fixed, so a token's bits depend
 * neither on its batch nor on the number of threads. GNU vectors: AVX-512, AVX2 or NEON alike. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define LANES 16
#define STEP (2 * LANES)
#define BLOCK 4 /* rows of w */
#define L1_VALUES 8192 /* of x, half of a cache of 32 KiB */
#define MAX_TOKENS 16
#define MAX_GROUP 16 /* query heads of a key-value head */
#define MAX_HEAD 128
#define SPLIT 256 /* tokens of a sequence that one thread attends to at a time */
typedef uint16_t bf16;

typedef struct {
    long op; /* its place in OPS, at the end of this file */
    void *tensors[10];
    long sizes[8];
    double scalar;
} call;

typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t pairs __attribute__((vector_size(4 * LANES))); /* of bf16, the first in the low half */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float float8 __attribute__((vector_size(32)));
typedef float float4 __attribute__((vector_size(16)));

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline bf16 narrow(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7FC0;
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

static inline float rounded(float x) { return widen(narrow(x)); }

static inline pairs load_pairs(const bf16 *from) {
    pairs values;
    memcpy(&values, from, sizeof values);
    return values;
}

/* sums[i] + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1] */
static inline floats add_products(floats sums, pairs a, pairs b) {
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += (floats)(a << 16) * (floats)(b << 16);
    return sums + (floats)(a & 0xFFFF0000) * (floats)(b & 0xFFFF0000);
#endif
}

static inline floats load_wide(const bf16 *from) {
    halves values;
    memcpy(&values, from, sizeof values);
    return (floats)(__builtin_convertvector(values, pairs) << 16);
}

static inline floats load(const float *from) {
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

static inline float sum(floats x) { /* halves, so that it stays in vector registers */
    float8 eights[2];
    memcpy(eights, &x, sizeof x);
    eights[0] += eights[1];
    float4 fours[2];
    memcpy(fours, eights, sizeof fours);
    fours[0] += fours[1];
    return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}

/* ROWS rows of w times COUNT rows of x, out[token][row]: a sum is two sums of 32 values each that alternate */
#define DEFINE_DOTS(ROWS, COUNT)                                                                                 \
    static void dots_##ROWS##_##COUNT(float *out, const bf16 *x, const bf16 *w, long w_stride, long K) {         \
        floats sums[2][COUNT][ROWS] = {0};                                                                       \
        for (long k = 0; k < K; k += 2 * STEP)                                                                   \
            for (int half = 0; half < 2 && k + half * STEP < K; half++) {                                        \
                pairs weights[ROWS];                                                                             \
                for (int row = 0; row < ROWS; row++) weights[row] = load_pairs(w + row * w_stride + k + half * STEP); \
                for (int i = 0; i < COUNT; i++) {                                                                \
                    pairs values = load_pairs(x + i * K + k + half * STEP);                                      \
                    for (int row = 0; row < ROWS; row++)                                                         \
                        sums[half][i][row] = add_products(sums[half][i][row], weights[row], values);             \
                }                                                                                                \
            }                                                                                                    \
        for (int i = 0; i < COUNT; i++)                                                                          \
            for (int row = 0; row < ROWS; row++) out[i * BLOCK + row] = sum(sums[0][i][row] + sums[1][i][row]);  \
    }
DEFINE_DOTS(4, 2)
DEFINE_DOTS(4, 1)
DEFINE_DOTS(1, 8)
DEFINE_DOTS(1, 4)
DEFINE_DOTS(1, 2)
DEFINE_DOTS(1, 1)

/* Up to BLOCK rows of w [.., K] times x [count, K]: out [count, BLOCK]. Rows side by side use what is loaded of x more
 * often, and halve what the processor fetches ahead where they are short: that pays once x does not fit the L1 cache. */
static void dots(float *out, const bf16 *x, const bf16 *w, long rows, long w_stride, long count, long K) {
    long i = 0;
    if (rows == BLOCK && count * K > L1_VALUES) {
        for (; i + 2 <= count; i += 2) dots_4_2(out + i * BLOCK, x + i * K, w, w_stride, K);
        if (i < count) dots_4_1(out + i * BLOCK, x + i * K, w, w_stride, K);
        return;
    }
    for (long row = 0; row < rows; row++, w += w_stride, out++) {
        for (i = 0; i + 8 <= count; i += 8) dots_1_8(out + i * BLOCK, x + i * K, w, w_stride, K);
        for (; i + 4 <= count; i += 4) dots_1_4(out + i * BLOCK, x + i * K, w, w_stride, K);
        for (; i + 2 <= count; i += 2) dots_1_2(out + i * BLOCK, x + i * K, w, w_stride, K);
        for (; i < count; i++) dots_1_1(out + i * BLOCK, x + i * K, w, w_stride, K);
    }
}

/* One token's row [K], added to the residual and normalised */
static void normalise(bf16 *normed, bf16 *new_residual, const bf16 *x, const bf16 *residual, const bf16 *norm_weight,
                      float eps, long K) {
    floats squares = {0};
    for (long k = 0; k < K; k += LANES) {
        float wide[LANES];
        for (int i = 0; i < LANES; i++) {
            bf16 value = residual ? narrow(widen(residual[k + i]) + widen(x[k + i])) : x[k + i];
            if (new_residual) new_residual[k + i] = value;
            wide[i] = widen(value);
        }
        squares += load(wide) * load(wide);
    }
    const bf16 *from = new_residual ? new_residual : x;
    float scale = 1.0f / sqrtf(sum(squares) / K + eps);
    for (long k = 0; k < K; k++) normed[k] = narrow(rounded(widen(from[k]) * scale) * widen(norm_weight[k]));
}

/* out [T, K] = the rows of w with these numbers */
static void embedding(const call *c) {
    bf16 *out = c->tensors[0];
    const bf16 *w = c->tensors[1];
    const int64_t *ids = c->tensors[2];
    long T = c->sizes[0], K = c->sizes[1], w_stride = c->sizes[2];
#pragma omp for
    for (long token = 0; token < T; token++) memcpy(out + token * K, w + ids[token] * w_stride, K * sizeof *w);
}

/* T up to MAX_TOKENS and K a multiple of 32. May be null: residual and new_residual, norm_weight, up, bias, addend.
 * x, residual, addend, w and up have rows of any stride; out [T, N], new_residual [T, K], rows [T, K] are dense.
 * Without a norm, rows is for x made dense. */
static void few_tokens(const call *c) {
    void *out = c->tensors[0];
    bf16 *new_residual = c->tensors[1], *dense = c->tensors[2];
    const bf16 *x = c->tensors[3], *residual = c->tensors[4], *norm_weight = c->tensors[5], *w = c->tensors[6];
    const bf16 *up = c->tensors[7], *bias = c->tensors[8], *addend = c->tensors[9], *rows = dense;
    long T = c->sizes[0], N = c->sizes[1], K = c->sizes[2], x_stride = c->sizes[3], residual_stride = c->sizes[4];
    long w_stride = c->sizes[5], addend_stride = c->sizes[6], out_is_float = c->sizes[7];
    if (!norm_weight && x_stride == K) rows = x;
    else {
#pragma omp for
        for (long token = 0; token < T; token++)
            if (norm_weight)
                normalise(dense + token * K, new_residual ? new_residual + token * K : 0, x + token * x_stride,
                          residual ? residual + token * residual_stride : 0, norm_weight, c->scalar, K);
            else memcpy(dense + token * K, x + token * x_stride, K * sizeof *x);
    }
#pragma omp for schedule(static)
    for (long first = 0; first < N; first += BLOCK) {
        float sums[MAX_TOKENS][BLOCK], ups[MAX_TOKENS][BLOCK];
        long count = N - first < BLOCK ? N - first : BLOCK;
        dots(sums[0], rows, w + first * w_stride, count, w_stride, T, K);
        if (up) dots(ups[0], rows, up + first * w_stride, count, w_stride, T, K);
        for (long token = 0; token < T; token++)
            for (long i = 0; i < count; i++) {
                long row = first + i;
                float value = sums[token][i] + (bias ? widen(bias[row]) : 0);
                if (up) {
                    value = rounded(value);
                    value = rounded(value / (1 + expf(-value))) * rounded(ups[token][i]);
                }
                if (addend) value = rounded(value) + widen(addend[token * addend_stride + row]);
                if (out_is_float) ((float *)out)[token * N + row] = value;
                else ((bf16 *)out)[token * N + row] = narrow(value);
            }
    }
}

/* qkv [T, Hq + 2 Hkv, D], tokens of any stride: q rotated to q_out [T, Hq, D], k rotated and v to their slots */
static void rope_and_cache(const call *c) {
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

/* exp(x) for x <= 0: 2^n times the Taylor series of exp around 0 on half of an octave */
static inline floats exponential(floats x) {
    pairs normal = (pairs)(x > -87.0f); /* all ones or zero; below, the result is subnormal: zero */
    x = (floats)((pairs)x & normal);
    floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the integer nearest is in the low bits */
    floats n = shifted - 12582912.0f;
    floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f; /* ln 2 in two parts */
    floats series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    pairs power = ((pairs)shifted - 0x4B400000 + 127) << 23;
    return (floats)((pairs)(series * (floats)power) & normal);
}

/* What SPLIT tokens of one sequence add for the G query heads of one key-value head: part [G, D + 2] holds the sum of
 * exp(score - maximum) v, the sum of the exponentials, and the maximum */
static void attend(float *part, const bf16 *q, const bf16 *k, const bf16 *v, const int32_t *table, long start, long end,
                   long page_size, long Hkv, long G, long D, float scale) {
    float scores[MAX_GROUP][SPLIT] __attribute__((aligned(64)));
    const bf16 *values[SPLIT];
    for (long token = start; token < end; token++) {
        long at = (table[token / page_size] * page_size + token % page_size) * Hkv * D;
        float products[MAX_GROUP][BLOCK];
        dots(products[0], q, k + at, 1, 0, G, D);
        for (long g = 0; g < G; g++) scores[g][token - start] = products[g][0] * scale;
        values[token - start] = v + at;
    }
    long count = end - start, padded = (count + LANES - 1) / LANES * LANES;
    for (long g = 0; g < G; g++, part += D + 2) {
        float maximum = scores[g][0];
        for (long i = 1; i < count; i++) maximum = scores[g][i] > maximum ? scores[g][i] : maximum;
        for (long i = count; i < padded; i++) scores[g][i] = -INFINITY;
        floats total = {0}, sums[MAX_HEAD / LANES] = {0};
        for (long i = 0; i < padded; i += LANES) {
            floats weights = load(scores[g] + i);
            weights = exponential(weights - maximum);
            memcpy(scores[g] + i, &weights, sizeof weights);
            total += weights;
        }
        for (long i = 0; i < count; i++)
            for (long d = 0; d < D / LANES; d++) sums[d] += scores[g][i] * load_wide(values[i] + d * LANES);
        memcpy(part, sums, D * sizeof *part);
        part[D] = sum(total);
        part[D + 1] = maximum;
    }
}

/* One query token a sequence: out and q [S, Hkv G, D], q's sequences of any stride; pages [.., page_size, Hkv, D];
 * parts [S, Hkv, splits, G, D + 2]. A split is SPLIT tokens whatever the batch, so company does not change a bit. */
static void decode_attention(const call *c) {
    bf16 *out = c->tensors[0];
    float *parts = c->tensors[1];
    const bf16 *q = c->tensors[2], *k = c->tensors[3], *v = c->tensors[4];
    const int32_t *tables = c->tensors[5], *lengths = c->tensors[6];
    long S = c->sizes[0], splits = c->sizes[1], page_size = c->sizes[2], Hkv = c->sizes[3], G = c->sizes[4];
    long D = c->sizes[5], q_stride = c->sizes[6], table_stride = c->sizes[7];
#pragma omp for schedule(dynamic)
    for (long task = 0; task < S * Hkv * splits; task++) {
        long split = task / Hkv % splits, head = task % Hkv, s = task / splits / Hkv;
        long start = split * SPLIT, end = start + SPLIT < lengths[s] ? start + SPLIT : lengths[s];
        if (start < end)
            attend(parts + ((s * Hkv + head) * splits + split) * G * (D + 2), q + s * q_stride + head * G * D,
                   k + head * D, v + head * D, tables + s * table_stride, start, end, page_size, Hkv, G, D, c->scalar);
    }
#pragma omp for
    for (long row = 0; row < S * Hkv * G; row++) {
        long count = (lengths[row / (Hkv * G)] + SPLIT - 1) / SPLIT, stride = G * (D + 2);
        const float *first = parts + row / G * splits * stride + row % G * (D + 2);
        float maximum = -INFINITY, total = 0, sums[MAX_HEAD] = {0};
        for (long i = 0; i < count; i++)
            if (first[i * stride + D + 1] > maximum) maximum = first[i * stride + D + 1];
        for (long i = 0; i < count; i++) {
            const float *part = first + i * stride;
            float weight = expf(part[D + 1] - maximum);
            total += weight * part[D];
            for (long d = 0; d < D; d++) sums[d] += weight * part[d];
        }
        for (long d = 0; d < D; d++) out[row * D + d] = narrow(sums[d] / total);
    }
}

static void (*const OPS[])(const call *) = {embedding, few_tokens, rope_and_cache, decode_attention};

void run(const call *calls, long count, int threads) {
#pragma omp parallel num_threads(threads)
    for (long i = 0; i < count; i++) OPS[calls[i].op](calls + i);
}
