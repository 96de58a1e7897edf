/* Weights of any format. Each function calls the function of the weight's format.
 *
 * To add a format, write a file like dense_weight.h and list its name in EACH_WEIGHT_FORMAT (calls.h). If `format` is a
 * constant, the compiler removes the switch. */
#ifndef WEIGHTS_H
#define WEIGHTS_H
#include "dense_weight.h"
#include "grouped_weight.h"

/* One case of a switch: CALL for the format */
#define CALL_FORMAT(FORMAT) \
    case FORMAT##_weight:   \
        CALL(FORMAT);       \
        break;

static inline float weight_value(const weight *w, long row, long k, long K) {
    if (w->format >= WEIGHT_FORMATS) return grouped_value(w, row, k, K);
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
