/* The cache format `dense`: keys and values in the type of activations.
 *
 * pages.h lists the functions of a format. Only this file knows the layout of this format. */
#ifndef DENSE_PAGES_H
#define DENSE_PAGES_H
#include "vectors.h"

typedef real dense_code;
enum { dense_largest = 0, dense_channels = 0 };

static inline float dense_decode(real code) { return to_float(code); }

ALWAYS floats dense_load(const real *codes) { return load_reals(codes); }

ALWAYS void dense_encode(real *codes, floats x) { store_reals(codes, x); }
#endif
