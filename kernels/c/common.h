/* What all of C shares: a call of an op, and the team of threads that carries it out.
 *
 * An op is a `call`; `run` (team.c) goes through any number of them with one team, so each op shares its loops out:
 *
 *     for (long task = first(me, tasks); task >= 0; task = next(me)) ...
 *     meet(me);
 *
 * Which thread does a task changes no bit of it. */
#ifndef COMMON_H
#define COMMON_H
#include "vectors.h"

#define EXPORTED __attribute__((visibility("default"))) /* to Python; other libraries may have names like ours */

typedef struct {
    long op; /* its place in OPS (step.c) */
    void *tensors[10];
    long sizes[8];
    double scalar;
} call;

typedef struct team team;
typedef struct {
    team *team;
    int index, threads; /* which thread of how many */
    int loops, victim;  /* how many loops it has begun, and whose share of the last one it takes from: its own is 0 */
    long tasks, alone;  /* of that loop; without others: how many are done */
    long patience;      /* ns that it waits awake for the others */
} worker;

long first(worker *me, long tasks); /* the first task of a loop that is this thread's, or -1 */
long next(worker *me);
void meet(worker *me); /* goes on when all have come here; every loop ends with it */

typedef void op(const call *c, worker *me);
op embedding, rope_and_cache, few_tokens, many_tokens, decode_attention, prefill_attention, apply_rope, add_rms_norm,
    silu_mul;
void play(const call *calls, long count, worker *me);

/* What a token's row [K], added to the residual, is multiplied by to be normalised; K a multiple of LANES */
static inline float norm_scale(bf16 *new_residual, const bf16 *x, const bf16 *residual, float eps, long K) {
    floats squares = {0};
    for (long k = 0; k < K; k += LANES) {
        floats wide = load_wide(x + k);
        if (residual) wide = rounded(load_wide(residual + k) + wide);
        if (new_residual) store_narrow(new_residual + k, wide);
        squares += wide * wide;
    }
    return 1.0f / sqrtf(sum(squares) / K + eps);
}

/* A part [K] of a row, normalised */
static inline void apply_norm(bf16 *normed, const bf16 *row, const bf16 *norm_weight, float scale, long K) {
    for (long k = 0; k < K; k += LANES)
        store_narrow(normed + k, rounded(load_wide(row + k) * scale) * load_wide(norm_weight + k));
}

static inline long least(long a, long b) { return a < b ? a : b; }

static inline long parts_of(long whole, long part) { return (whole + part - 1) / part; }
#endif
