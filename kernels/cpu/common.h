/* The ops of a Qwen2 graph on a CPU. bfloat16 in memory, float32 in registers, rounded where kernels/reference.py rounds.
 *
 * An op is a `call`; `run` (step.c) goes through any number of them in one team of threads, so each op shares its loops
 * out with `omp for`. A sum has its lanes and its order fixed: a token's bits depend neither on its batch nor on the
 * number of threads. GNU vectors: AVX-512, AVX2 or NEON alike. */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define LANES 16
#define STEP (2 * LANES)
#define RUN 64 /* rows of w that are summed before anything else is done with them */
#define MAX_TOKENS 16
#define VECTORS 4 /* of a row of a panel */
#define WIDE (VECTORS * LANES)
#define TALL 6 /* rows times WIDE columns of sums are what fits the registers */
typedef uint16_t bf16;
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t pairs __attribute__((vector_size(4 * LANES))); /* of bf16, the first in the low half */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float float8 __attribute__((vector_size(32)));
typedef float float4 __attribute__((vector_size(16)));

typedef struct {
    long op; /* its place in OPS (step.c) */
    void *tensors[10];
    long sizes[8];
    double scalar;
} call;

void embedding(const call *c);
void rope_and_cache(const call *c);
void few_tokens(const call *c);
void many_tokens(const call *c);
void decode_attention(const call *c);
void prefill_attention(const call *c);

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

static inline floats widen_halves(halves values) { return (floats)(__builtin_convertvector(values, pairs) << 16); }

/* To the nearest, ties to even; NaN stays NaN */
static inline halves narrow_floats(floats x) {
    pairs bits = (pairs)x, ordered = (pairs)(x == x);
    pairs near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((near & ordered) | (~ordered & 0x7FC0), halves);
}

static inline floats rounded_floats(floats x) { return widen_halves(narrow_floats(x)); }

static inline floats load_wide(const bf16 *from) {
    halves values;
    memcpy(&values, from, sizeof values);
    return widen_halves(values);
}

static inline void store_narrow(bf16 *to, floats values) {
    halves near = narrow_floats(values);
    memcpy(to, &near, sizeof near);
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

/* x / (1 + exp(-x)) */
static inline floats silu(floats x) {
    pairs negative = (pairs)(x < 0);
    floats e = exponential((floats)((pairs)x | 0x80000000));
    floats numerator = (floats)((negative & (pairs)e) | (~negative & 0x3F800000)); /* or 1 */
    return x * numerator / (1 + e);
}

/* One token's row [K], added to the residual and normalised */
static inline void normalise(bf16 *normed, bf16 *new_residual, const bf16 *x, const bf16 *residual, const bf16 *norm_weight,
                      float eps, long K) {
    floats squares = {0};
    for (long k = 0; k < K; k += LANES) {
        floats wide = load_wide(x + k);
        if (residual) wide = rounded_floats(load_wide(residual + k) + wide);
        if (new_residual) store_narrow(new_residual + k, wide);
        squares += wide * wide;
    }
    const bf16 *from = new_residual ? new_residual : x;
    float scale = 1.0f / sqrtf(sum(squares) / K + eps);
    for (long k = 0; k < K; k += LANES)
        store_narrow(normed + k, rounded_floats(load_wide(from + k) * scale) * load_wide(norm_weight + k));
}

/* The first of LANES values; a copy of unknown size is a call, so all of them are a case of their own */
static inline floats load_some(const bf16 *from, long count) {
    if (count == LANES) return load_wide(from);
    halves values = {0};
    memcpy(&values, from, count * sizeof *from);
    return widen_halves(values);
}

static inline void store_some(void *to, const void *values, long count, long size) {
    if (count < LANES) memcpy(to, values, count * size);
    else if (size == sizeof(bf16)) memcpy(to, values, LANES * sizeof(bf16));
    else memcpy(to, values, LANES * sizeof(float));
}

#ifdef __AVX512BF16__
/* WIDE rows [K] of bf16 as a panel [K / 2, WIDE] of pairs; K a multiple of 32 */
static inline void pack_transposed(pairs *panel, const bf16 *const *rows, long K) {
    for (long vector = 0; vector < VECTORS; vector++)
        for (long k = 0; k < K; k += STEP) {
            __m512i a[16], b[16];
            for (int i = 0; i < 16; i++) a[i] = (__m512i)load_pairs(rows[vector * LANES + i] + k);
            for (int i = 0; i < 16; i += 2) { /* 2 x 2, 4 x 4, then quarters of a vector */
                b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
                b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
            }
            for (int i = 0; i < 16; i += 4)
                for (int j = 0; j < 2; j++) {
                    a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
                    a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
                }
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 16; j += 8) {
                    b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
                    b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xDD);
                }
            for (int i = 0; i < 8; i++) {
                a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
                a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD);
            }
            for (int i = 0; i < 16; i++) panel[(k / 2 + i) * VECTORS + vector] = (pairs)a[i];
        }
}

#define DEFINE_MULTIPLY(ROWS)                                                                                     \
    static inline void multiply_##ROWS(float *out, long out_stride, const bf16 *a, long a_stride, const pairs *b, \
                                       long b_stride, long steps, int adds) {                                     \
        floats sums[ROWS][VECTORS];                                                                               \
        for (int i = 0; i < ROWS; i++)                                                                            \
            for (int j = 0; j < VECTORS; j++)                                                                     \
                sums[i][j] = adds ? load(out + i * out_stride + j * LANES) : (floats){0};                         \
        for (long k = 0; k < steps; k++) {                                                                        \
            pairs columns[VECTORS];                                                                               \
            for (int j = 0; j < VECTORS; j++) {                                                                   \
                columns[j] = b[k * b_stride + j];                                                                 \
                __asm__("" : "+v"(columns[j])); /* loaded once, not again for every row */                        \
            }                                                                                                     \
            for (int i = 0; i < ROWS; i++) {                                                                      \
                uint32_t both;                                                                                    \
                memcpy(&both, a + i * a_stride + 2 * k, sizeof both);                                             \
                pairs row = (pairs)_mm512_set1_epi32(both);                                                       \
                for (int j = 0; j < VECTORS; j++) sums[i][j] = add_products(sums[i][j], row, columns[j]);         \
            }                                                                                                     \
        }                                                                                                         \
        for (int i = 0; i < ROWS; i++)                                                                            \
            for (int j = 0; j < VECTORS; j++)                                                                     \
                memcpy(out + i * out_stride + j * LANES, &sums[i][j], sizeof(floats));                            \
    }
DEFINE_MULTIPLY(6)
DEFINE_MULTIPLY(2)
DEFINE_MULTIPLY(1)

/* out [rows, WIDE] = (adds: +=) a [rows, 2 steps] times b, whose rows of pairs are b_stride vectors apart. A sum is one
 * chain over a's columns, whatever the rows beside it. */
static inline void multiply(float *out, long out_stride, const bf16 *a, long a_stride, const pairs *b, long b_stride,
                            long steps, long rows, int adds) {
    if (rows == TALL) {
        multiply_6(out, out_stride, a, a_stride, b, b_stride, steps, adds);
        return;
    }
    for (; rows >= 2; rows -= 2, out += 2 * out_stride, a += 2 * a_stride)
        multiply_2(out, out_stride, a, a_stride, b, b_stride, steps, adds);
    if (rows) multiply_1(out, out_stride, a, a_stride, b, b_stride, steps, adds);
}
#endif
