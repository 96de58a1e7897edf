/* Stores a head's key and value in the cache, in the pages' format. pages.h includes this file.
 *
 *     m     = the largest |x| of the head (of a key: after each value is divided by its channel)
 *     scale = m / largest
 *     code  = the code nearest to x * (largest / m)
 *
 * A head with a NaN or an infinity gets the scale NaN, so that the model reports it. If all values are below
 * LEAST_VALUE, the scale is 0. */
#ifndef PAGES_STORE_H
#define PAGES_STORE_H
#define LEAST_VALUE 0x1p-100f

ALWAYS floats to_store(const real *x, const real *channels, long d) {
    floats value = load_reals(x + d);
    return channels ? value / load_reals(channels + d) : value;
}

/* The largest |x| of a head, or NaN if the head has one */
ALWAYS float largest_value(const real *x, const real *channels, long D) {
    pairs most = {0}; /* compared as integers, the bits of infinity and NaN are the largest */
    for (long d = 0; d < D; d += LANES) {
        pairs size = (pairs)to_store(x, channels, d) & 0x7FFFFFFF, is_more = (pairs)(size > most);
        most = (is_more & size) | (~is_more & most);
    }
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits = most[i] > bits ? most[i] : bits;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Stores x [D] as a key or a value. scale and channels are null if the format has none. */
ALWAYS void store_head(const int format, void *codes, float *scale, const real *x, const real *channels, long D) {
    if (format == dense_pages) {
        memcpy(codes, x, D * sizeof *x);
        return;
    }
    float inverse = 1;
    if (largest_of(format)) {
        float most = largest_value(x, channels, D), largest = largest_of(format);
        if (!isfinite(most)) {
            *scale = NAN;
            memset(codes, 0, D * code_size(format));
            return;
        }
        *scale = most < LEAST_VALUE ? 0 : most / largest;
        inverse = most < LEAST_VALUE ? 0 : largest / most;
    }
    for (long d = 0; d < D; d += LANES) encode(format, codes, d, to_store(x, channels, d) * inverse);
}

ALWAYS void store_both(const int format, const pages *p, long slot, long head, const real *key, const real *value,
                       long D) {
    store_head(format, codes_of(format, p->k, p, slot, head, D), scale_of(format, p->k_scales, p, slot, head), key,
               channels_of(format, p, head, D), D);
    store_head(format, codes_of(format, p->v, p, slot, head, D), scale_of(format, p->v_scales, p, slot, head), value, 0,
               D);
}

static inline void pages_store(const pages *p, long slot, long head, const real *key, const real *value, long D) {
    switch (p->format) {
#define STORE(FORMAT)                                             \
    case FORMAT##_pages:                                          \
        store_both(FORMAT##_pages, p, slot, head, key, value, D); \
        break;
        EACH_PAGES_FORMAT(STORE)
#undef STORE
    }
}
#endif
