/* Linears of few tokens on a CPU, behind an optional add + RMSNorm and before an optional SwiGLU: what reads the weights
 * in a decode step. bfloat16 in memory, float32 in registers, rounded where kernels/reference.py rounds.
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
typedef uint16_t bf16;
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

/* T up to MAX_TOKENS and K a multiple of 32. May be null: residual and new_residual, norm_weight, up, bias, addend.
 * x, residual, addend, w and up have rows of any stride; out [T, N], new_residual [T, K], rows [T, K] are dense.
 * Without a norm, rows is x made dense. */
void few_tokens(void *out, bf16 *new_residual, bf16 *rows, const bf16 *x, const bf16 *residual,
                const bf16 *norm_weight, const bf16 *w, const bf16 *up, const bf16 *bias, const bf16 *addend, long T,
                long N, long K, long x_stride, long residual_stride, long row_stride, long addend_stride, float eps,
                int out_is_float, int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long token = 0; token < T; token++)
            if (norm_weight)
                normalise(rows + token * K, new_residual ? new_residual + token * K : 0, x + token * x_stride,
                          residual ? residual + token * residual_stride : 0, norm_weight, eps, K);
            else memcpy(rows + token * K, x + token * x_stride, K * sizeof *x);
#pragma omp for schedule(static)
        for (long first = 0; first < N; first += BLOCK) {
            float sums[MAX_TOKENS][BLOCK], ups[MAX_TOKENS][BLOCK];
            long count = N - first < BLOCK ? N - first : BLOCK;
            dots(sums[0], rows, w + first * row_stride, count, row_stride, T, K);
            if (up) dots(ups[0], rows, up + first * row_stride, count, row_stride, T, K);
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
}
