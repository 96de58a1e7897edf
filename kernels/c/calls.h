/* The arguments of every op. C compiles this file, and calls.py reads it, so each struct is declared once.
 *
 *     Python                                    this file                       C
 *     make.silu_mul(out=..., gate=..., ...) ──► silu_mul_args ──► call ──► silu_mul(const silu_mul_args *, worker *)
 *
 * calls.py reads the lists and the structs below as text, so their syntax is simple. An op NAME has a struct NAME_args.
 * A field is a pointer, a long, a double, or a struct of these. A pointer, a long and a double have 8 bytes each. A
 * tensor that an op only reads is const.
 *
 * Shapes: T tokens, S sequences, Hq query heads, Hkv key-value heads, D head_dim, F a row of the MLP. A linear has
 * in_features K and out_features N. Strides count values, not bytes, unless a name says otherwise. */
#ifndef CALLS_H
#define CALLS_H
#include <stdint.h>

typedef uint16_t bf16;

/* The type of activations: of x, q, k, v, the residual stream, norms and biases. The ops are compiled for both types
 * (float_activations.c). */
#ifdef FLOAT_ACTIVATIONS
typedef float real;
#else
typedef bf16 real;
#endif

/* clang-format off */
#define EACH_OP(OP)       \
    OP(embedding)         \
    OP(add_rms_norm)      \
    OP(linear)            \
    OP(silu_mul)          \
    OP(apply_rope)        \
    OP(rope_and_cache)    \
    OP(decode_attention)  \
    OP(prefill_attention) \
    OP(repack)            \
    OP(repack_words)      \
    OP(draw)
/* clang-format on */

/* A format of weights or pages has a file of its name (dense_weight.h, dense_pages.h), and its name is listed here. */
#define EACH_WEIGHT_FORMAT(FORMAT) FORMAT(dense)
#define EACH_PAGES_FORMAT(FORMAT) FORMAT(dense) FORMAT(float16) FORMAT(int8) FORMAT(fp8)

/* The block formats of GGUF files (blocks.h) */
/* clang-format off */
#define EACH_BLOCK_FORMAT(FORMAT) \
    FORMAT(q4_0) FORMAT(q4_1) FORMAT(q5_0) FORMAT(q5_1) FORMAT(q8_0) \
    FORMAT(q2_k) FORMAT(q3_k) FORMAT(q4_k) FORMAT(q5_k) FORMAT(q6_k)
/* clang-format on */

/* Formats of weights that are codes with a scale for each group (grouped_weight.h) */
/* clang-format off */
#define EACH_GROUPED_FORMAT(FORMAT)                                    \
    FORMAT(q4_0) FORMAT(q4_1) FORMAT(q5_0) FORMAT(q5_1) FORMAT(q8_0)   \
    FORMAT(q4_k) FORMAT(q5_k) FORMAT(q6_k) FORMAT(q2_k) FORMAT(q3_k)   \
    FORMAT(int4) FORMAT(int8)
/* clang-format on */

typedef struct {        /* a matrix [rows, columns] in one of the formats of weights.h or grouped_weight.h */
    const void *values; /* null: there is no weight */
    long row_bytes;     /* from a row to the next one; of dense weights */
    long format;        /* its index in EACH_WEIGHT_FORMAT, followed by EACH_GROUPED_FORMAT */
    const void *high, *scales, *minima, *sub_scales, *sub_minima, *zeros; /* of grouped weights; values are the codes */
    long group;                                                           /* columns that share an entry of scales */
    long scales_are_floats;                                               /* 0: scales are 16-bit floats */
} weight;

typedef struct {          /* the keys and values that a layer has cached, in one of the formats of pages.h */
    void *k;              /* [pages, page_size, Hkv, D] */
    void *v;              /* likewise */
    float *k_scales;      /* [pages, page_size, Hkv], or null */
    float *v_scales;      /* likewise */
    const real *channels; /* [Hkv, D], or null */
    long page_size;       /* tokens of a page */
    long num_heads;       /* Hkv */
    long format;          /* its index in EACH_PAGES_FORMAT */
} pages;

typedef struct {        /* out = the rows of table that ids select */
    real *out;          /* [T, K], dense */
    weight table;       /* [V, K] */
    const int64_t *ids; /* [T] */
    long num_tokens, row_size;
} embedding_args;

typedef struct {             /* new_residual = residual + x; out = rms_norm(new_residual) * norm_weight */
    real *out;               /* [T, K], dense */
    real *new_residual;      /* [T, K], dense; null: there is no residual, and x is normalised */
    const real *x;           /* [T, K] */
    const real *residual;    /* [T, K], or null */
    const real *norm_weight; /* [K] */
    long num_tokens, row_size, x_stride, residual_stride;
    double eps;
} add_rms_norm_args;

typedef struct {             /* out = (norm of) x times weight transposed, with an epilogue (linear.h) */
    void *out;               /* [T, N]: real, or float where out_is_float */
    float *scratch;          /* [T, K]; for many tokens also the memory that linear_many_tokens.c describes */
    const real *x;           /* [T, K] */
    const real *norm_weight; /* [K]; null: x is multiplied as it is */
    weight weight;           /* [N, K] */
    weight up;               /* [N, K], or none; with it out = silu(x weight') * (x up') */
    const real *bias;        /* [N], or null */
    const real *addend;      /* [T, N], or null */
    long num_tokens, out_features, in_features, x_stride, addend_stride, out_stride;
    long out_is_float;
    long planes;            /* of a grouped weight: the int8 planes that represent x, 2 or 1 */
    long prefetch_distance; /* bytes in advance that weights are prefetched; 0: no prefetch */
    double eps;
} linear_args;

typedef struct {      /* out = silu(gate) * up */
    real *out;        /* [T, F], dense */
    const real *gate; /* [T, F] */
    const real *up;   /* [T, F] */
    long num_tokens, row_size, gate_stride, up_stride;
} silu_mul_args;

typedef struct {              /* q and k, rotated */
    real *q_out;              /* [T, Hq, D], dense */
    real *k_out;              /* [T, Hkv, D], dense */
    const real *q;            /* [T, Hq, D], heads dense */
    const real *k;            /* [T, Hkv, D], heads dense */
    const int64_t *positions; /* [T] */
    const float *cos_sin;     /* [positions, D]: cosines in the first half of a row, sines in the second */
    long num_tokens, num_q_heads, num_kv_heads, head_dim, q_stride, k_stride;
    double sign; /* of the angles: -1 rotates back */
} apply_rope_args;

typedef struct { /* q_out = q, rotated; the rotated k, and v, go to their slots */
    real *q_out; /* [T, Hq, D], dense */
    pages cache;
    const real *qkv;          /* [T, Hq + 2 Hkv, D], heads dense */
    const int64_t *positions; /* [T] */
    const int64_t *slots;     /* [T]: page * page_size + place in the page */
    const float *cos_sin;     /* as in apply_rope_args */
    long num_tokens, num_q_heads, num_kv_heads, head_dim, qkv_stride;
} rope_and_cache_args;

typedef struct {    /* attention of one query token a sequence */
    real *out;      /* [S, Hq, D], dense */
    float *scratch; /* [S, Hkv, splits, Hq / Hkv, D + 2] */
    const real *q;  /* [S, Hq, D], heads dense */
    const pages cache;
    const int32_t *block_tables; /* [S, pages]: the numbers of a sequence's pages */
    const int32_t *lengths;      /* [S]: cached tokens, the query's own included */
    long num_sequences, num_kv_heads, group, head_dim, q_stride, block_table_stride; /* group: Hq / Hkv */
    long splits; /* splits that scratch has room for */
    double scale;
} decode_attention_args;

typedef struct {    /* causal attention of the last tokens of each sequence */
    real *out;      /* [T, Hq, D], dense */
    float *scratch; /* as prefill_attention.c says */
    const real *q;  /* [T, Hq, D], heads dense */
    const pages cache;
    const int32_t *block_tables; /* [S, pages] */
    const int32_t *lengths;      /* [S] */
    const int32_t *query_starts; /* [S + 1]: rows query_starts[s] .. query_starts[s + 1] of q are of sequence s */
    long num_sequences, num_kv_heads, group, head_dim, q_stride, block_table_stride;
    double scale;
} prefill_attention_args;

typedef struct {           /* a matrix [N, K] in blocks of a GGUF file, as the tensors of kernels/weights/grouped.py */
    uint32_t *codes;       /* [N / 16, K / 32, words, 16] */
    uint32_t *high;        /* the same, of the bits above four; null: there are none */
    uint16_t *scales;      /* [N / 16, blocks of a row, 16] */
    uint16_t *minima;      /* the same, or null */
    uint8_t *sub_scales;   /* [N / 16, groups of a row, 16], or null */
    uint8_t *sub_minima;   /* the same, or null */
    uint8_t *finite;       /* [N / 16]: whether the scales and minima of 16 rows are finite numbers */
    const uint8_t *blocks; /* [N, blocks of a row], as the file has them */
    long rows, columns;
    long format; /* its index in EACH_BLOCK_FORMAT */
} repack_args;

typedef struct {           /* the codes of a matrix [N, K] in words of GPTQ, AWQ or compressed-tensors */
    uint32_t *codes;       /* [N / 16, K / 32, bits, 16] */
    const uint32_t *words; /* order 0: [N, K bits / 32], 1: [K bits / 32, N], 2: AWQ's [K, N / 8] */
    long rows, columns;
    long bits; /* 4 or 8 */
    long order;
    long flip; /* bits of each word that are inverted */
} repack_words_args;

typedef struct {           /* out = a token id for each row of logits, drawn as kernels/draw.py says */
    int64_t *out;          /* [R] */
    float *scratch;        /* [R, V / draw_run, rounded up] */
    const float *logits;   /* [R, V] */
    const float *largest;  /* [R] */
    const float *settings; /* [4, R]: temperature, top_k, top_p, min_p */
    const float *uniforms; /* [R] */
    long num_rows, vocabulary, logits_stride, settings_stride;
} draw_args;

typedef struct {         /* limits of the ops, and the sizes that determine their scratch; limits.c has the values */
    long max_few_tokens; /* most tokens of a linear that reads its weights once, row by row */
    long in_features_multiple; /* in_features is a multiple of it */
    long norm_multiple;        /* the size of a normalised row is a multiple of it */
    long head_dim_multiple;    /* the size of a head is a multiple of it */
    long max_head_dim;
    long max_group;     /* most query heads of a key-value head */
    long decode_split;  /* cached tokens of a task of decode_attention */
    long prefill_block; /* cached tokens that are packed at a time */
    long panel_columns; /* rows of a weight that are packed at a time */
    long panel_depth;   /* values of each such row that are packed at a time */
    long draw_run;      /* logits whose largest is kept in scratch */
} limits;
#endif
