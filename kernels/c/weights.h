/* Weights of any format: each function here calls the one of the weight's format.
 *
 * A format is one file like dense_weight.h and its name in EACH_WEIGHT_FORMAT (calls.h). Where `format` is a constant,
 * nothing is left of the choice in the machine code. */
#ifndef WEIGHTS_H
#define WEIGHTS_H
#include "dense_weight.h"

enum {
#define NUMBER(FORMAT) FORMAT##_weight,
    EACH_WEIGHT_FORMAT(NUMBER) WEIGHT_FORMATS
#undef NUMBER
};

/* The body of a function: CALL for the format */
#define CALL_FORMAT(FORMAT) \
    case FORMAT##_weight:   \
        CALL(FORMAT);       \
        break;

static inline float weight_value(const weight *w, long row, long k) {
    float value = 0;
    switch (w->format) {
#define CALL(FORMAT) value = FORMAT##_value(w, row, k)
        EACH_WEIGHT_FORMAT(CALL_FORMAT)
#undef CALL
    }
    return value;
}

ALWAYS weight weight_from(const int format, const weight *w, long row, long k) {
    switch (format) {
#define CALL(FORMAT) return FORMAT##_from(w, row, k)
        EACH_WEIGHT_FORMAT(CALL_FORMAT)
#undef CALL
    }
    __builtin_unreachable();
}

ALWAYS void weight_prefetch(const int format, const weight *w, long row, long k, long distance) {
    switch (format) {
#define CALL(FORMAT) FORMAT##_prefetch(w, row, k, distance)
        EACH_WEIGHT_FORMAT(CALL_FORMAT)
#undef CALL
    }
}

ALWAYS operands weight_operands(const int format, const weight *w, long row, long k) {
    switch (format) {
#define CALL(FORMAT) return FORMAT##_operands(w, row, k)
        EACH_WEIGHT_FORMAT(CALL_FORMAT)
#undef CALL
    }
    __builtin_unreachable();
}

static inline void weight_panel(const int format, operands *panel, const weight *first_rows, long K) {
    switch (format) {
#define CALL(FORMAT) FORMAT##_panel(panel, first_rows, K)
        EACH_WEIGHT_FORMAT(CALL_FORMAT)
#undef CALL
    }
}
#undef CALL_FORMAT
#endif
