/* The weight format `dense`: values of the type of activations. The values of a row are adjacent.
 *
 *     values ──► row 0   | k = 0 | 1 | 2 | ...        row_bytes from here
 *                row 1   | k = 0 | 1 | 2 | ...     ◄─ to here
 *
 * Only this file knows the layout. Each format has a file with the same functions. */
#ifndef DENSE_WEIGHT_H
#define DENSE_WEIGHT_H
#include "panels.h"

ALWAYS const real *dense_row(const weight *w, long row) {
    return (const real *)((const char *)w->values + row * w->row_bytes);
}

/* One value. This function defines what the faster functions below read. */
static inline float dense_value(const weight *w, long row, long k) { return to_float(dense_row(w, row)[k]); }

/* The part of the weight that begins at this row and at value k, a multiple of LINE */
ALWAYS weight dense_from(const weight *w, long row, long k) {
    weight part = *w;
    part.values = dense_row(w, row) + k;
    return part;
}

/* Prefetches the values `distance` bytes after value k of a row */
ALWAYS void dense_prefetch(const weight *w, long row, long k, long distance) {
    __builtin_prefetch((const char *)(dense_row(w, row) + k) + distance, 0, 2);
}

/* For few tokens: the operands at index k of a row */
ALWAYS operands dense_operands(const weight *w, long row, long k) { return operands_at(dense_row(w, row), k); }

/* For many tokens: packs the first rows of WIDE weights, K values of each, as a panel. K is a multiple of STEP. */
static inline void dense_panel(operands *panel, const weight *first_rows, long K) {
    const real *rows[WIDE];
    for (long i = 0; i < WIDE; i++) rows[i] = dense_row(first_rows + i, 0);
    pack_transposed(panel, rows, K);
}
#endif
