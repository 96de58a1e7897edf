/* A layer's cached keys and values, in any format. Each function calls the function of the pages' format.
 *
 * To add a format, write a file like dense_pages.h and list its name in EACH_PAGES_FORMAT (calls.h). */
#ifndef PAGES_H
#define PAGES_H
#define MAX_HEAD_DIM 128
#define HEAD_DIM_MULTIPLE 32 /* each half of a head is a multiple of LANES */
#include "dense_pages.h"

enum {
#define NUMBER(FORMAT) FORMAT##_pages,
    EACH_PAGES_FORMAT(NUMBER) PAGES_FORMATS
#undef NUMBER
};

#define CALL_FORMAT(FORMAT) \
    case FORMAT##_pages:    \
        CALL(FORMAT);       \
        break;

static inline float pages_value(void *k_or_v, const pages *p, long slot, long head, long D, long d) {
    float value = 0;
    switch (p->format) {
#define CALL(FORMAT) value = FORMAT##_cached(k_or_v, p, slot, head, D, d)
        EACH_PAGES_FORMAT(CALL_FORMAT)
#undef CALL
    }
    return value;
}

static inline void pages_store(const pages *p, long slot, long head, const real *key, const real *value, long D) {
    switch (p->format) {
#define CALL(FORMAT) FORMAT##_store(p, slot, head, key, value, D)
        EACH_PAGES_FORMAT(CALL_FORMAT)
#undef CALL
    }
}

static inline void pages_block(operands *keys, operands *values, const pages *p, const long *slots, long count,
                               const long *next_slots, long next_count, long head, long D) {
    switch (p->format) {
#define CALL(FORMAT) FORMAT##_block(keys, values, p, slots, count, next_slots, next_count, head, D)
        EACH_PAGES_FORMAT(CALL_FORMAT)
#undef CALL
    }
}
#undef CALL_FORMAT
#endif
