/* A layer's cached keys and values, in any format.
 *
 *     k ──► page 0: token 0 | head 0: D codes | head 1: D codes | ...
 *                   token 1 | head 0: D codes | ...
 *                   ...
 *           page 1: token page_size | ...                 slot = page * page_size + place in the page
 *
 *     k_scales      one float for each D codes: [slots, Hkv]; null if the format has none
 *
 * v has the same layout. A value is the code's number, times its scale, times the factor of its channel.
 *
 * A format FORMAT has a file FORMAT_pages.h, and its name is listed in EACH_PAGES_FORMAT (calls.h). The file defines:
 *
 *     FORMAT_code        the type of a code
 *     FORMAT_largest     the largest number of a code, which a scale maps to the head's largest value; 0: no scales
 *     FORMAT_channels    1: keys have a factor for each channel
 *     FORMAT_decode      the number of one code. It defines what FORMAT_load reads.
 *     FORMAT_load        the numbers of LANES codes
 *     FORMAT_encode      stores the LANES codes of the numbers nearest to x
 *
 * If `format` is a constant, the compiler removes the switches. */
#ifndef PAGES_H
#define PAGES_H
#define MAX_HEAD_DIM 128
#define HEAD_DIM_MULTIPLE 32 /* each half of a head is a multiple of LANES */
#include "dense_pages.h"
#include "float16_pages.h"
#include "fp8_pages.h"
#include "int8_pages.h"
#include "panels.h"
#include "team.h"

enum {
#define NUMBER(FORMAT) FORMAT##_pages,
    EACH_PAGES_FORMAT(NUMBER) PAGES_FORMATS
#undef NUMBER
};

/* Functions of a format's number, from the facts and functions of the formats */
#define CALL_FORMAT(FORMAT) \
    case FORMAT##_pages:    \
        return CALL(FORMAT);
#define SWITCH(FORMAT)                                 \
    switch (FORMAT) { EACH_PAGES_FORMAT(CALL_FORMAT) } \
    __builtin_unreachable()

ALWAYS long code_size(const int format) {
#define CALL(FORMAT) sizeof(FORMAT##_code)
    SWITCH(format);
#undef CALL
}

ALWAYS int largest_of(const int format) {
#define CALL(FORMAT) FORMAT##_largest
    SWITCH(format);
#undef CALL
}

ALWAYS int has_channels(const int format) {
#define CALL(FORMAT) FORMAT##_channels
    SWITCH(format);
#undef CALL
}

ALWAYS float decode_one(const int format, const void *codes, long d) {
#define CALL(FORMAT) FORMAT##_decode(((const FORMAT##_code *)codes)[d])
    SWITCH(format);
#undef CALL
}

ALWAYS floats decode(const int format, const void *codes, long d) {
#define CALL(FORMAT) FORMAT##_load((const FORMAT##_code *)codes + d)
    SWITCH(format);
#undef CALL
}

ALWAYS void encode(const int format, void *codes, long d, floats x) {
#define CALL(FORMAT) FORMAT##_encode((FORMAT##_code *)codes + d, x)
    SWITCH(format);
#undef CALL
}
#undef CALL_FORMAT
#undef SWITCH

/* The D codes of a token's head, in k or in v */
ALWAYS void *codes_of(const int format, void *k_or_v, const pages *p, long slot, long head, long D) {
    return (char *)k_or_v + (slot * p->num_heads + head) * D * code_size(format);
}

ALWAYS float *scale_of(const int format, float *scales, const pages *p, long slot, long head) {
    return largest_of(format) ? scales + slot * p->num_heads + head : 0;
}

ALWAYS const real *channels_of(const int format, const pages *p, long head, long D) {
    return has_channels(format) ? p->channels + head * D : 0;
}

/* One element of a key, or if of_v, of a value. This function defines what pages_block reads. */
static inline float pages_value(const pages *p, int of_v, long slot, long head, long D, long d) {
    const int format = (int)p->format;
    float x = decode_one(format, codes_of(format, of_v ? p->v : p->k, p, slot, head, D), d);
    const float *scale = scale_of(format, of_v ? p->v_scales : p->k_scales, p, slot, head);
    const real *channels = of_v ? 0 : channels_of(format, p, head, D);
    if (scale) x *= *scale;
    if (channels) x *= to_float(channels[d]);
    return to_float(to_real(x));
}
#include "pages_block.h"
#include "pages_store.h"
#endif
