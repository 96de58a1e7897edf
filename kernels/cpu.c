/* Linears of few tokens on a CPU, behind an optional add + RMSNorm and before an optional SwiGLU: what reads the weights
 * in a decode step. bfloat16 in memory, float32 in registers, rounded where kernels/reference.py rounds.
 *
 * Weights [N, K] are read once, ROWS rows at a time, for all tokens. A sum over K has 16 lanes, added in a fixed order,
 * so a token's bits depend neither on its batch nor on the number of threads. GNU vectors: AVX-512, AVX2 or NEON alike. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define ROWS 4
#define AHEAD 1 /* blocks of rows */
typedef uint16_t bf16;
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
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

static inline floats load_wide(const bf16 *from) {
    halves narrow_values;
    memcpy(&narrow_values, from, sizeof narrow_values);
    words bits = __builtin_convertvector(narrow_values, words) << 16;
    return (floats)bits;
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

/* ROWS rows of w times TOKENS rows of x [.., K]: out[token][row] */
#define DEFINE_DOTS(TOKENS)                                                                                  \
    static inline void dots_##TOKENS(float out[][ROWS], const float *x, const bf16 *const w[ROWS], long K,   \
                                     long ahead) {                                                           \
        floats sums[TOKENS][ROWS] = {0};                                                                     \
        for (long k = 0; k < K; k += LANES) {                                                                \
            floats weights[ROWS];                                                                            \
            for (int row = 0; row < ROWS; row++) weights[row] = load_wide(w[row] + k);                       \
            if (k % 32 == 0) /* a cache line: rows are short, and the processor's own prefetch ends with them */ \
                for (int row = 0; row < ROWS; row++) __builtin_prefetch(w[row] + k + ahead);                 \
            for (int token = 0; token < TOKENS; token++) {                                                   \
                floats values = load(x + token * K + k);                                                     \
                for (int row = 0; row < ROWS; row++) sums[token][row] += values * weights[row];              \
            }                                                                                                \
        }                                                                                                    \
        for (int token = 0; token < TOKENS; token++)                                                         \
            for (int row = 0; row < ROWS; row++) out[token][row] = sum(sums[token][row]);                    \
    }
DEFINE_DOTS(4)
DEFINE_DOTS(2)
DEFINE_DOTS(1)

static void dots(float out[][ROWS], const float *x, const bf16 *w, long row, long N, long row_stride, long T, long K) {
    const bf16 *rows[ROWS]; /* the last block repeats its last row: nothing beyond the weights is read */
    for (int i = 0; i < ROWS; i++) rows[i] = w + (row + i < N ? row + i : N - 1) * row_stride;
    long token = 0;
    for (; token + 4 <= T; token += 4) dots_4(out + token, x + token * K, rows, K, AHEAD * ROWS * row_stride);
    for (; token + 2 <= T; token += 2) dots_2(out + token, x + token * K, rows, K, AHEAD * ROWS * row_stride);
    for (; token < T; token++) dots_1(out + token, x + token * K, rows, K, AHEAD * ROWS * row_stride);
}

/* One token's row [K]: widened, or with norm_weight added to the residual and normalised */
static void prepare(float *wide, bf16 *new_residual, const bf16 *x, const bf16 *residual, const bf16 *norm_weight,
                    float eps, long K) {
    for (long k = 0; k < K; k++) wide[k] = residual ? rounded(widen(residual[k]) + widen(x[k])) : widen(x[k]);
    if (new_residual)
        for (long k = 0; k < K; k++) new_residual[k] = narrow(wide[k]);
    if (!norm_weight) return;
    floats squares = {0};
    for (long k = 0; k < K; k += LANES) squares += load(wide + k) * load(wide + k);
    float scale = 1.0f / sqrtf(sum(squares) / K + eps);
    for (long k = 0; k < K; k++) wide[k] = rounded(rounded(wide[k] * scale) * widen(norm_weight[k]));
}

/* T up to 16 and K a multiple of 16. Absent: residual, new_residual, norm_weight, up, bias and addend may be null.
 * x, residual, addend, w and up have rows of any stride; out [T, N], new_residual [T, K], wide [T, K] are dense. */
void few_tokens(void *out, bf16 *new_residual, float *wide, const bf16 *x, const bf16 *residual,
                const bf16 *norm_weight, const bf16 *w, const bf16 *up, const bf16 *bias, const bf16 *addend, long T,
                long N, long K, long x_stride, long residual_stride, long row_stride, long addend_stride, float eps,
                int out_is_float, int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long token = 0; token < T; token++)
            prepare(wide + token * K, new_residual ? new_residual + token * K : 0, x + token * x_stride,
                    residual ? residual + token * residual_stride : 0, norm_weight, eps, K);
#pragma omp for
        for (long block = 0; block < (N + ROWS - 1) / ROWS; block++) {
            float sums[16][ROWS], ups[16][ROWS];
            dots(sums, wide, w, block * ROWS, N, row_stride, T, K);
            if (up) dots(ups, wide, up, block * ROWS, N, row_stride, T, K);
            for (long token = 0; token < T; token++)
                for (long row = block * ROWS; row < N && row < (block + 1) * ROWS; row++) {
                    float value = sums[token][row % ROWS] + (bias ? widen(bias[row]) : 0);
                    if (up) {
                        value = rounded(value);
                        value = rounded(value / (1 + expf(-value))) * rounded(ups[token][row % ROWS]);
                    }
                    if (addend) value = rounded(value) + widen(addend[token * addend_stride + row]);
                    if (out_is_float) ((float *)out)[token * N + row] = value;
                    else ((bf16 *)out)[token * N + row] = narrow(value);
                }
        }
    }
}
