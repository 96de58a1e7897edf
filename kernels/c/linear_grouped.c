/* A linear with a grouped weight (grouped_weight.h), for any number of tokens. x is converted to planes of int8
 * (planes.h), in blocks of tokens that fit in the L2 cache. A task multiplies the rows of some tiles with one block:
 *
 *     x [T, K] ──► RMSNorm ──► planes of a block [K / 32, tokens, 32]            prologue
 *                                      │
 *     weight [N, K], up [N, K] ──► grouped_products ──► sums [tokens, 16]        for 16 rows at a time
 *                                      │
 *              SwiGLU, + bias, + addend ──► out [T, N]                           epilogue: finish
 *
 * The bits of a token's result do not depend on the other tokens or the number of threads. */
#include "grouped_products.h"
#include "linear.h"

#define RUN_TILES 4    /* tiles of 16 rows in a task, if there is enough work */
#define RUN_LENGTH 256 /* tiles times tokens that are enough for a task: with short tasks, threads end together */
#define X_TILES 16     /* the least number of tiles of a token in a task of the prologue */

/* The planes of all tokens, in the scratch memory, and how they are divided into blocks */
typedef struct {
    int8_t *planes;
    float *factors;
    group_term *terms;
    long blocks;
} grouped_x;

/* Bytes of a token's values in a tile */
static long tile_bytes(const linear_args *args) {
    return X_BYTES(kind_of((int)args->weight.format).bits, args->planes);
}

static grouped_x grouped_x_of(const linear_args *args) {
    const long T = args->num_tokens, tiles = args->in_features / TILE_K;
    int8_t *planes = (int8_t *)args->scratch;
    float *factors = (float *)(planes + T * tiles * tile_bytes(args));
    return (grouped_x){planes, factors, (group_term *)(factors + T * tiles), ceil_div(T, MAX_BLOCK_TOKENS)};
}

/* Block b has the tokens T * b / blocks .. T * (b + 1) / blocks */
static long first_of_block(const linear_args *args, const grouped_x *x, long b) {
    return args->num_tokens * b / x->blocks;
}

static token_block block_of(const linear_args *args, const grouped_x *x, long b) {
    const long first = first_of_block(args, x, b), tiles = args->in_features / TILE_K;
    const grouped_kind kind = kind_of((int)args->weight.format);
    return (token_block){.planes = x->planes + first * tiles * tile_bytes(args),
                         .factors = x->factors + first * tiles,
                         .terms = x->terms + first * tiles * kind.per_tile,
                         .tokens = first_of_block(args, x, b + 1) - first};
}

static group_term term_of(const grouped_kind kind, float factor, int sum) {
    if (kind.has_minima) return (group_term){.sum = factor * sum};
    return kind.zero < 0 ? (group_term){.sum = sum} : (group_term){.start = -(kind.zero - ZERO_OF_BYTES(kind)) * sum};
}

/* Writes the planes of a token's tiles `tile` .. `end`, normalised if there is a norm; it is token t of its block */
ALWAYS void write_planes(const linear_args *args, const int planes, const real *x, const token_block *block, long t,
                         long tile, long end) {
    const grouped_kind kind = kind_of((int)args->weight.format);
    const long K = args->in_features, bytes = tile_bytes(args);
    const real *norm_weight = args->norm_weight;
    const float scale = norm_weight ? norm_scale(0, x, 0, args->eps, K) : 0;
    for (; tile < end; tile++) {
        floats values[TILE_K / LANES];
#pragma GCC unroll 8
        for (int i = 0; i < TILE_K / LANES; i++) {
            long k = tile * TILE_K + i * LANES;
            values[i] = load_reals(x + k);
            if (norm_weight) values[i] = rounded(rounded(values[i] * scale) * load_reals(norm_weight + k));
        }
        const long at = tile * block->tokens + t;
        plane_facts facts = to_planes(block->planes + at * bytes, kind.bits, planes, values);
        block->factors[at] = facts.factor;
        group_term *terms = block->terms + at * kind.per_tile;
        if (kind.per_tile == 2)
            for (int g = 0; g < 2; g++) terms[g] = term_of(kind, facts.factor, facts.sums[g]);
        else terms[0] = term_of(kind, facts.factor, facts.sums[0] + facts.sums[1]);
    }
}

ACROSS_FILES void linear_grouped(const linear_args *args, worker *me) {
    const long T = args->num_tokens, N = args->out_features, K = args->in_features;
    const grouped_x x = grouped_x_of(args);
    /* With fewer tokens than threads, several threads share a token. Each of them computes the whole sum of squares for
     * the norm. */
    const long x_tiles = K / TILE_K, parts = least(ceil_div(me->num_threads, T ? T : 1), ceil_div(x_tiles, X_TILES));
    for (long task = first_task(me, T * parts); task >= 0; task = next_task(me)) {
        const long token = task / parts, part = task % parts;
        const long tile = x_tiles * part / parts, end = x_tiles * (part + 1) / parts;
        long b = token * x.blocks / T;
        while (first_of_block(args, &x, b + 1) <= token) b++;
        token_block block = block_of(args, &x, b);
        const real *row = args->x + token * args->x_stride;
        const long t = token - first_of_block(args, &x, b);
        if (args->planes == 2) write_planes(args, 2, row, &block, t, tile, end);
        else write_planes(args, 1, row, &block, t, tile, end);
    }
    barrier(me);
    const int has_up = args->up.values != 0;
    const long tiles = N / TILE_ROWS, fair = tiles / (TASKS_PER_THREAD * me->num_threads);
    const long enough = ceil_div(RUN_LENGTH, x_tiles * ceil_div(T ? T : 1, x.blocks ? x.blocks : 1));
    const long most = least(RUN_TILES, enough), run = fair < 1 ? 1 : least(most, fair), runs = ceil_div(tiles, run);
    for (long task = first_task(me, runs * x.blocks); task >= 0; task = next_task(me)) {
        const token_block block = block_of(args, &x, task / runs);
        const long first = first_of_block(args, &x, task / runs);
        const long start = task % runs * run * TILE_ROWS, end = least(N, start + run * TILE_ROWS);
        float sums[MAX_BLOCK_TOKENS * TILE_ROWS], ups[MAX_BLOCK_TOKENS * TILE_ROWS];
        for (long row = start; row < end; row += TILE_ROWS) {
            grouped_products(sums, &args->weight, row, K, &block, args->planes, args->prefetch_distance);
            if (has_up) grouped_products(ups, &args->up, row, K, &block, args->planes, args->prefetch_distance);
            for (long t = 0; t < block.tokens; t++)
                for (long i = t * TILE_ROWS, n = row; n < row + TILE_ROWS; i += LANES, n += LANES)
                    finish(args, load(sums + i), has_up ? ups + i : 0, first + t, n, LANES);
        }
    }
    barrier(me);
}
