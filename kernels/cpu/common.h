/* The ops of a Qwen2 graph on a CPU. bfloat16 in memory, float32 in registers, rounded where kernels/reference.py rounds.
 *
 * An op is a `call`; `run` (step.c) goes through any number of them in one team of threads, so each op shares its loops
 * out with `omp for`. A sum has its lanes and its order fixed: a token's bits depend neither on its batch nor on the
 * number of threads. GNU vectors: AVX-512, AVX2 or NEON alike.
 *
 * PAIRS, which build.py sets where it measures faster, multiplies pairs of bfloat16 as the processor does; without it
 * they are widened to float32 first. */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#define VECTORS 4 /* of a row of a panel: TALL rows of WIDE sums are what fits the registers */
#else
#define VECTORS 1
#endif

#define LANES 16
#define STEP (2 * LANES)
#define RUN 64 /* rows of w that are summed before anything else is done with them */
#define MAX_TOKENS 16
#define WIDE (VECTORS * LANES)
#define TALL 6
#define CHUNK 1024 /* of K: a panel of it stays in the L2 cache */
typedef uint16_t bf16;
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t pairs __attribute__((vector_size(4 * LANES))); /* of bf16, the first in the low half */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float float8 __attribute__((vector_size(32)));
typedef float float4 __attribute__((vector_size(16)));

/* What stands on the other side of a product with bf16 in memory. Of each STEP of floats, those with an even place come
 * first: they lie in the low halves of pairs. */
#ifdef PAIRS
typedef bf16 operand;
typedef pairs column; /* of a panel: of PER of its rows */
#define PER 2
#else
typedef float operand;
typedef floats column;
#define PER 1
#endif

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
void apply_rope(const call *c);
void add_rms_norm(const call *c);
void silu_mul(const call *c);

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

static inline floats low(pairs x) { return (floats)(x << 16); }

static inline floats high(pairs x) { return (floats)(x & 0xFFFF0000); }

static inline floats load(const float *from) {
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

#ifdef PAIRS
static inline floats add_pairs(floats sums, pairs a, pairs b) {
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}
#endif

/* sums + STEP products, two for each lane */
static inline floats add_products(floats sums, pairs w, const operand *x) {
#ifdef PAIRS
    return add_pairs(sums, w, load_pairs(x));
#else
    sums += low(w) * load(x);
    return sums + high(w) * load(x + LANES);
#endif
}

/* Compilers convert between 16 and 32 bits in halves of a vector, with shuffles, where nobody tells them better */
static inline floats widen_halves(halves values) {
#ifdef __AVX512F__
    return (floats)((pairs)_mm512_cvtepu16_epi32((__m256i)values) << 16);
#else
    return (floats)(__builtin_convertvector(values, pairs) << 16);
#endif
}

/* To the nearest, ties to even, in the low half; NaN stays NaN */
static inline pairs nearest(floats x) {
    pairs bits = (pairs)x, ordered = (pairs)(x == x);
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & ordered) | (~ordered & 0x7FC0);
}

static inline halves narrow_floats(floats x) {
#ifdef __AVX512F__
    return (halves)_mm512_cvtepi32_epi16((__m512i)nearest(x));
#else
    return __builtin_convertvector(nearest(x), halves);
#endif
}

static inline floats rounded_floats(floats x) { return (floats)(nearest(x) << 16); }

static inline floats load_wide(const bf16 *from) {
    halves values;
    memcpy(&values, from, sizeof values);
    return widen_halves(values);
}

static inline void store_narrow(bf16 *to, floats values) {
    halves near = narrow_floats(values);
    memcpy(to, &near, sizeof near);
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

/* A row [K] of bf16 as operands; K a multiple of STEP */
static inline void to_operands(operand *to, const bf16 *from, long K) {
#ifdef PAIRS
    memcpy(to, from, K * sizeof *from);
#else
    for (long k = 0; k < K; k += STEP) {
        pairs both = load_pairs(from + k);
        floats halves[] = {low(both), high(both)};
        memcpy(to + k, halves, sizeof halves);
    }
#endif
}

#ifdef __AVX512F__
/* 16 x 16 of 32 bits: 2 x 2, 4 x 4, then quarters of a vector */
static inline void transpose(__m512i *a) {
    __m512i b[16];
    for (int i = 0; i < 16; i += 2) {
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
}
#endif

/* WIDE rows [K] of bf16 as a panel [K / PER, WIDE], its rows in the order of operands; K a multiple of STEP */
static inline void pack_transposed(column *panel, const bf16 *const *rows, long K) {
    for (long vector = 0; vector < VECTORS; vector++)
        for (long k = 0; k < K; k += STEP) {
            column *to = panel + k / PER * VECTORS + vector;
            pairs square[LANES];
#ifdef __AVX512F__
            for (int i = 0; i < LANES; i++) square[i] = load_pairs(rows[vector * LANES + i] + k);
            transpose((__m512i *)square);
#else
            for (int lane = 0; lane < LANES; lane++) {
                pairs row = load_pairs(rows[vector * LANES + lane] + k);
                for (int i = 0; i < LANES; i++) square[i][lane] = row[i];
            }
#endif
            for (int i = 0; i < LANES; i++) {
#ifdef PAIRS
                to[i * VECTORS] = square[i];
#else
                to[i * VECTORS] = low(square[i]);
                to[(LANES + i) * VECTORS] = high(square[i]);
#endif
            }
        }
}

#ifdef PAIRS
#define ADD_ROW(SUMS, A, COLUMN)                            \
    do {                                                    \
        uint32_t both;                                      \
        memcpy(&both, A, sizeof both);                      \
        pairs row = (pairs)_mm512_set1_epi32(both);         \
        for (int j = 0; j < VECTORS; j++) SUMS[j] = add_pairs(SUMS[j], row, COLUMN[j]); \
    } while (0)
#else
#define ADD_ROW(SUMS, A, COLUMN) \
    for (int j = 0; j < VECTORS; j++) SUMS[j] += *(A) * COLUMN[j]
#endif

#define DEFINE_MULTIPLY(ROWS)                                                                                          \
    static inline void multiply_##ROWS(float *out, long out_stride, const operand *a, long a_stride, const column *b, \
                                       long b_stride, long steps, int adds) {                                          \
        floats sums[ROWS][VECTORS];                                                                                    \
        for (int i = 0; i < ROWS; i++)                                                                                 \
            for (int j = 0; j < VECTORS; j++)                                                                          \
                sums[i][j] = adds ? load(out + i * out_stride + j * LANES) : (floats){0};                              \
        for (long k = 0; k < steps; k++) {                                                                             \
            column columns[VECTORS];                                                                                   \
            for (int j = 0; j < VECTORS; j++) {                                                                        \
                columns[j] = b[k * b_stride + j];                                                                      \
                KEEP(columns[j]);                                                                                      \
            }                                                                                                          \
            for (int i = 0; i < ROWS; i++) ADD_ROW(sums[i], a + i * a_stride + PER * k, columns);                      \
        }                                                                                                              \
        for (int i = 0; i < ROWS; i++)                                                                                 \
            for (int j = 0; j < VECTORS; j++)                                                                          \
                memcpy(out + i * out_stride + j * LANES, &sums[i][j], sizeof(floats));                                 \
    }
#ifdef __AVX512F__
#define KEEP(VECTOR) __asm__("" : "+v"(VECTOR)) /* loaded once, not again for every row */
#else
#define KEEP(VECTOR)
#endif
DEFINE_MULTIPLY(6)
DEFINE_MULTIPLY(2)
DEFINE_MULTIPLY(1)

/* out [rows, WIDE] = (adds: +=) a [rows, PER steps] times b, whose rows are b_stride vectors apart. A sum is one chain
 * over a's columns, whatever the rows beside it. */
static inline void multiply(float *out, long out_stride, const operand *a, long a_stride, const column *b, long b_stride,
                            long steps, long rows, int adds) {
    if (rows == TALL) {
        multiply_6(out, out_stride, a, a_stride, b, b_stride, steps, adds);
        return;
    }
    for (; rows >= 2; rows -= 2, out += 2 * out_stride, a += 2 * a_stride)
        multiply_2(out, out_stride, a, a_stride, b, b_stride, steps, adds);
    if (rows) multiply_1(out, out_stride, a, a_stride, b, b_stride, steps, adds);
}
