/* Converts between floats and the 8-bit and 16-bit numbers of quantised weights and cache pages. */
#ifndef CODES_H
#define CODES_H
#include "vectors.h"

/* LANES 16-bit floats (half precision) as floats */
ALWAYS floats half_to_float(halves x) {
#if LANES == 16
    return (floats)_mm512_cvtph_ps((__m256i)x);
#elif LANES == 8
    return (floats)_mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
    return (floats)vcvt_f32_f16((float16x4_t)x);
#else
    pairs bits = __builtin_convertvector(x, pairs), size = (bits & 0x7FFF) << 13;
    pairs is_large = (pairs)(size >= 0x0F800000); /* infinity or NaN */
    floats value = (floats)size * 0x1p112f;       /* the biases of the exponents differ by 112; also if subnormal */
    return (floats)((is_large & (size | 0x7F800000)) | (~is_large & (pairs)value) | (bits & 0x8000) << 16);
#endif
}

/* Rounds to nearest, ties to even; NaN stays NaN */
ALWAYS halves float_to_half(floats x) {
#if LANES == 16
    return (halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif LANES == 8
    return (halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
    return (halves)vcvt_f16_f32((float32x4_t)x);
#else
    pairs size = (pairs)x & 0x7FFFFFFF, is_small = (pairs)(size < 0x38800000), is_large = (pairs)(size >= 0x47800000);
    pairs small = (pairs)((floats)size + 0.5f) - 0x3F000000; /* floats from 0.5 on have the spacing 2^-24 */
    pairs normal = (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13;
    pairs large = 0x7C00 | ((pairs)(size > 0x7F800000) & 0x200); /* infinity or NaN */
    pairs near = (is_small & small) | (is_large & large) | (~(is_small | is_large) & normal);
    return __builtin_convertvector(near | ((pairs)x >> 16 & 0x8000), halves);
#endif
}

ALWAYS floats half_floats(const uint16_t *from) {
    halves bits;
    memcpy(&bits, from, sizeof bits);
    return half_to_float(bits);
}

/* A 16-bit float as a float */
static inline float half_float(uint16_t bits) {
    uint32_t size = (uint32_t)(bits & 0x7FFF) << 13, whole;
    float value;
    memcpy(&value, &size, sizeof value);
    value *= 0x1p112f; /* the exponents' biases differ by 112 */
    memcpy(&whole, &value, sizeof whole);
    if (size >= 0x0F800000) whole = size | 0x7F800000; /* infinity or NaN */
    whole |= (uint32_t)(bits & 0x8000) << 16;
    memcpy(&value, &whole, sizeof value);
    return value;
}

/* Bytes as floats */
ALWAYS floats byte_floats(const uint8_t *from, const int are_signed) {
#if LANES == 16
    __m128i bytes = _mm_loadu_si128((const __m128i *)from);
    return (floats)_mm512_cvtepi32_ps(are_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif LANES == 8
    __m128i bytes = _mm_loadl_epi64((const __m128i *)from);
    return (floats)_mm256_cvtepi32_ps(are_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
    floats values;
    for (int i = 0; i < LANES; i++) values[i] = are_signed ? (int8_t)from[i] : from[i];
    return values;
#endif
}
#endif
