/* Vectors as wide as the machine's registers, and elementwise functions of them.
 *
 *     in memory     real    | 0 | 1 | 2 | ...          activations: bf16 (two bytes each) or float
 *     in a register floats  |   0   |   1   | ...      LANES float32: 16 with AVX-512, 8 with AVX2, else 4 (NEON)
 *                   pairs   | 0 | 1 | 2 | 3 | ...      2 LANES bf16, two in each lane, the first in the low half
 *
 * Values are rounded to `real` where the references of the contracts round them to activations. A sum over a row has
 * LANES partial sums, so its last bits differ between vector widths. On one machine they depend only on the row. */
#ifndef VECTORS_H
#define VECTORS_H
#include "calls.h"

#include <math.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#else
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#define LANES 4
#endif

#define STEP (4 * LANES / (long)sizeof(real)) /* activations in a register */
#define ALWAYS static inline __attribute__((always_inline))

typedef uint8_t bytes __attribute__((vector_size(LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t pairs __attribute__((vector_size(4 * LANES))); /* of bf16, the first in the low half */
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float float8 __attribute__((vector_size(32)));
typedef float float4 __attribute__((vector_size(16)));

/* KEEP(x): the compiler keeps x in a register from here on, and does not load it again at each use */
#if defined(__x86_64__)
#define KEEP(VECTOR) __asm__("" : "+v"(VECTOR))
#elif defined(__aarch64__)
#define KEEP(VECTOR) __asm__("" : "+w"(VECTOR))
#else
#define KEEP(VECTOR)
#endif

ALWAYS pairs load_pairs(const void *from) {
    pairs values;
    memcpy(&values, from, sizeof values);
    return values;
}

ALWAYS floats load(const float *from) {
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

ALWAYS void store(float *to, floats values) { memcpy(to, &values, sizeof values); }

ALWAYS floats low(pairs x) { return (floats)(x << 16); }

ALWAYS floats high(pairs x) { return (floats)(x & 0xFFFF0000); }

/* Written with the processor's instructions, because compilers convert between 16 and 32 bits in more steps */
ALWAYS floats widen_halves(halves values) {
#if LANES == 16
    return (floats)((pairs)_mm512_cvtepu16_epi32((__m256i)values) << 16);
#elif LANES == 8
    return (floats)((pairs)_mm256_cvtepu16_epi32((__m128i)values) << 16);
#else
    return (floats)(__builtin_convertvector(values, pairs) << 16);
#endif
}

/* Rounds to nearest, ties to even; the result is in the low half. NaN stays NaN. */
ALWAYS pairs nearest(floats x) {
    pairs bits = (pairs)x, ordered = (pairs)(x == x);
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & ordered) | (~ordered & 0x7FC0);
}

ALWAYS halves narrow_floats(floats x) {
#if LANES == 16
    return (halves)_mm512_cvtepi32_epi16((__m512i)nearest(x));
#elif LANES == 8
    __m256i near = (__m256i)nearest(x);
    return (halves)_mm_packus_epi32(_mm256_castsi256_si128(near), _mm256_extracti128_si256(near, 1));
#else
    return __builtin_convertvector(nearest(x), halves);
#endif
}

/* Loads activations as floats, stores floats as activations, and rounds floats to the type of activations */
#ifdef FLOAT_ACTIVATIONS
typedef floats reals;
ALWAYS floats widen_reals(reals values) { return values; }
ALWAYS reals narrow_to_reals(floats x) { return x; }
ALWAYS floats rounded(floats x) { return x; }
#else
typedef halves reals;
ALWAYS floats widen_reals(reals values) { return widen_halves(values); }
ALWAYS reals narrow_to_reals(floats x) { return narrow_floats(x); }
ALWAYS floats rounded(floats x) { return (floats)(nearest(x) << 16); }
#endif

/* One activation. Rounds to nearest, ties to even; NaN stays NaN. */
static inline float to_float(real x) {
#ifdef FLOAT_ACTIVATIONS
    return x;
#else
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

static inline real to_real(float x) {
#ifdef FLOAT_ACTIVATIONS
    return x;
#else
    if (isnan(x)) return 0x7FC0;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
#endif
}

ALWAYS floats load_reals(const real *from) {
    reals values;
    memcpy(&values, from, sizeof values);
    return widen_reals(values);
}

ALWAYS void store_reals(real *to, floats values) {
    reals near = narrow_to_reals(values);
    memcpy(to, &near, sizeof near);
}

/* The first `count` of LANES values. memcpy of an unknown size is a call, so count == LANES has its own branch. */
ALWAYS floats load_some(const real *from, long count) {
    if (count == LANES) return load_reals(from);
    reals values = {0};
    memcpy(&values, from, count * sizeof *from);
    return widen_reals(values);
}

ALWAYS void store_some(real *to, floats values, long count) {
    reals near = narrow_to_reals(values);
    if (count < LANES) memcpy(to, &near, count * sizeof *to);
    else memcpy(to, &near, sizeof near);
}

ALWAYS void store_some_floats(float *to, floats values, long count) {
    if (count < LANES) memcpy(to, &values, count * sizeof *to);
    else memcpy(to, &values, sizeof values);
}

ALWAYS float sum(floats x) { /* adds halves, so that the sums stay in vector registers */
#if LANES == 16
    float8 eights[2];
    memcpy(eights, &x, sizeof x);
    float8 eight = eights[0] + eights[1];
#elif LANES == 8
    float8 eight = x;
#endif
#if LANES >= 8
    float4 fours[2];
    memcpy(fours, &eight, sizeof fours);
    float4 four = fours[0] + fours[1];
#else
    float4 four = x;
#endif
    return (four[0] + four[2]) + (four[1] + four[3]);
}

ALWAYS int any(pairs lanes) { /* whether a lane is not zero */
#if LANES == 16
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif LANES == 8
    return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
    uint64_t parts[2];
    memcpy(parts, &lanes, sizeof parts);
    return (parts[0] | parts[1]) != 0;
#endif
}

ALWAYS floats larger(floats a, floats b) { /* b where a is NaN */
    pairs larger = (pairs)(a > b);
    return (floats)((larger & (pairs)a) | (~larger & (pairs)b));
}

ALWAYS float largest(floats x) { /* of numbers, not NaN; compares halves, as sum adds them */
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)x);
#elif LANES == 8
    __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
#else
    float even = x[0] > x[2] ? x[0] : x[2], odd = x[1] > x[3] ? x[1] : x[3];
    return even > odd ? even : odd;
#endif
}

/* exp(x) for x <= 0: 2^n times the Taylor series of exp(r) for |r| <= ln(2) / 2 */
ALWAYS floats exponential(floats x) {
    pairs normal = ~(pairs)(x <= -87.0f); /* a mask; otherwise the result is subnormal and becomes 0. NaN stays NaN */
    x = (floats)((pairs)x & normal);
    floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the nearest integer is in the low bits */
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
ALWAYS floats silu(floats x) {
    pairs negative = (pairs)(x < 0);
    floats e = exponential((floats)((pairs)x | 0x80000000));
    floats numerator = (floats)((negative & (pairs)e) | (~negative & 0x3F800000)); /* e, or 1 */
    return x * numerator / (1 + e);
}
#endif
