/* Steps of a small model by two callers at once, each with teams of several sizes, for ThreadSanitizer to watch: see
 * test_races.py. Every op takes part, and reads what others have written. Ends with 1 where a team of several threads
 * gives other bits than one thread. */
#include "team.h"
#include "grouped_weight.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern const limits LIMITS;
void run(const call *calls, long count, int threads);

enum { D = 32, HKV = 2, G = 2, HQ = HKV * G, H = HQ * D, QKV = (HQ + 2 * HKV) * D, F = 320, VOCABULARY = 50 };
enum { S = 3, PAGE = 16, PAGES = 20, CACHED = S * PAGES * PAGE * HKV * D, SPLITS = 3, LONGEST = 300, BLOCKS = 9 };
enum { TOKENS = 61, TEAM = 4, STEPS = 2, OPS = 12 }; /* TOKENS of the larger batch */

/* What all callers read */
static bf16 table[VOCABULARY * H], w_qkv[QKV * H], w_o[H * H], w_gate[F * H], w_up[F * H], w_down[H * F];
static bf16 bias[QKV], norm[H];
static bf16 old_keys[CACHED], old_values[CACHED];
static uint16_t half_scales[H * H / 32]; /* 16-bit floats */
static float cos_sin[LONGEST * D];
static float largest_logits[TOKENS], settings[4][TOKENS], uniforms[TOKENS]; /* of the draw */
static int32_t pages_of[S * PAGES], lengths[S] = {300, 17, 140};

typedef struct { /* the last tokens of each sequence */
    long tokens;
    int64_t ids[TOKENS], positions[TOKENS], slots[TOKENS];
    int32_t starts[S + 1];
} batch;
static batch batches[STEPS];

typedef struct {
    float logits[TOKENS * H], maxima[TOKENS * (H / 128 + 1)];
    int64_t drawn[TOKENS];
    bf16 x[TOKENS * H], qkv[TOKENS * QKV], q[TOKENS * H], attended[TOKENS * H], projected[TOKENS * H];
    bf16 rotated_q[TOKENS * H], rotated_k[TOKENS * HKV * D], last_sum[TOKENS * H], normed[TOKENS * H];
    bf16 gated[TOKENS * F], gated_again[TOKENS * F], of_codes[TOKENS * H];
    bf16 keys[CACHED], values[CACHED];
} results;

typedef struct {
    int teams[TEAM]; /* the sizes, in turn */
    long turns;
} caller;

static bf16 cut(float x) { /* to bfloat16, towards zero */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits >> 16;
}

static void fill(bf16 *values, long count, float size) {
    static uint32_t state = 1;
    for (long i = 0; i < count; i++) {
        state = state * 1664525 + 1013904223;
        values[i] = cut(((state >> 8) / (float)(1 << 23) - 1) * size);
    }
}

/* `counts` of a batch are the new tokens of each sequence */
static void fill_batch(batch *b, const int *counts) {
    for (int s = 0; s < S; s++) {
        b->starts[s] = b->tokens;
        for (int i = lengths[s] - counts[s]; i < lengths[s]; i++) {
            long token = b->tokens++;
            b->ids[token] = (7 * token + s) % VOCABULARY;
            b->positions[token] = i;
            b->slots[token] = pages_of[s * PAGES + i / PAGE] * PAGE + i % PAGE;
        }
    }
    b->starts[S] = b->tokens;
}

static void fill_all(void) {
    bf16 *weights[] = {table, w_qkv, w_o, w_gate, w_up, w_down, bias, norm, old_keys, old_values};
    long counts[] = {VOCABULARY * H, QKV * H, H * H, F * H, F * H, H * F, QKV, H, CACHED, CACHED};
    for (int i = 0; i < 10; i++) fill(weights[i], counts[i], i ? 0.2f : 1);
    for (long i = 0; i < H * H / 32; i++) half_scales[i] = 0x2000 + i % 512; /* about 0.01 */
    for (long position = 0; position < LONGEST; position++)
        for (long i = 0; i < D / 2; i++) {
            cos_sin[position * D + i] = cosf(position / (1.0f + i));
            cos_sin[position * D + D / 2 + i] = sinf(position / (1.0f + i));
        }
    for (int i = 0; i < S * PAGES; i++) pages_of[i] = (i * 7) % (S * PAGES);
    for (int i = 0; i < TOKENS; i++) {
        largest_logits[i] = 2; /* about */
        settings[0][i] = 1;
        uniforms[i] = i / (float)TOKENS;
        settings[1][i] = i % 2 ? 20 : INFINITY;
        settings[2][i] = 0.9f;
    }
    fill_batch(batches, (int[S]){1, 1, 1});
    fill_batch(batches + 1, (int[S]){20, 4, 37});
}

static weight dense(const bf16 *values, long row_size) { return (weight){values, row_size * sizeof *values, 0}; }

/* The same memory as codes of q4_0, with scales that are finite */
static weight quantised(const bf16 *values) {
    return (weight){.values = values, .format = q4_0_weight, .scales = half_scales, .group = 32};
}

/* The ops of a step, in an order in which one reads what another has written */
static void make_calls(call *calls, results *to, float *scratch, batch *b) {
    const pages cache = {.k = to->keys, .v = to->values, .page_size = PAGE, .num_heads = HKV};
    const double eps = 1e-6, scale = 1 / sqrt(D);
    const long T = b->tokens;
    const call decode = {.op = decode_attention_op,
                         .decode_attention = {.out = to->attended,
                                              .scratch = scratch,
                                              .q = to->rotated_q,
                                              .cache = cache,
                                              .block_tables = pages_of,
                                              .lengths = lengths,
                                              .num_sequences = S,
                                              .num_kv_heads = HKV,
                                              .group = G,
                                              .head_dim = D,
                                              .q_stride = H,
                                              .block_table_stride = PAGES,
                                              .splits = SPLITS,
                                              .scale = scale}};
    const call prefill = {.op = prefill_attention_op,
                          .prefill_attention = {.out = to->attended,
                                                .scratch = scratch,
                                                .q = to->rotated_q,
                                                .cache = cache,
                                                .block_tables = pages_of,
                                                .lengths = lengths,
                                                .query_starts = b->starts,
                                                .num_sequences = S,
                                                .num_kv_heads = HKV,
                                                .group = G,
                                                .head_dim = D,
                                                .q_stride = H,
                                                .block_table_stride = PAGES,
                                                .scale = scale}};
    const call made[OPS] = {
        {.op = embedding_op,
         .embedding = {.out = to->x, .table = dense(table, H), .ids = b->ids, .num_tokens = T, .row_size = H}},
        {.op = linear_op,
         .linear = {.out = to->qkv,
                    .scratch = scratch,
                    .x = to->x,
                    .norm_weight = norm,
                    .weight = dense(w_qkv, H),
                    .bias = bias,
                    .num_tokens = T,
                    .out_features = QKV,
                    .out_stride = QKV,
                    .in_features = H,
                    .x_stride = H,
                    .eps = eps}},
        {.op = rope_and_cache_op,
         .rope_and_cache = {.q_out = to->q,
                            .cache = cache,
                            .qkv = to->qkv,
                            .positions = b->positions,
                            .slots = b->slots,
                            .cos_sin = cos_sin,
                            .num_tokens = T,
                            .num_q_heads = HQ,
                            .num_kv_heads = HKV,
                            .head_dim = D,
                            .qkv_stride = QKV}},
        {.op = apply_rope_op,
         .apply_rope = {.q_out = to->rotated_q,
                        .k_out = to->rotated_k,
                        .q = to->q,
                        .k = to->qkv + H,
                        .positions = b->positions,
                        .cos_sin = cos_sin,
                        .num_tokens = T,
                        .num_q_heads = HQ,
                        .num_kv_heads = HKV,
                        .head_dim = D,
                        .q_stride = H,
                        .k_stride = QKV,
                        .sign = -1}},
        T == S ? decode : prefill,
        {.op = linear_op,
         .linear = {.out = to->projected,
                    .scratch = scratch,
                    .x = to->attended,
                    .weight = dense(w_o, H),
                    .addend = to->x,
                    .num_tokens = T,
                    .out_features = H,
                    .out_stride = H,
                    .in_features = H,
                    .x_stride = H,
                    .addend_stride = H}},
        {.op = linear_op,
         .linear = {.out = to->gated,
                    .scratch = scratch,
                    .x = to->projected,
                    .norm_weight = norm,
                    .weight = dense(w_gate, H),
                    .up = dense(w_up, H),
                    .num_tokens = T,
                    .out_features = F,
                    .out_stride = F,
                    .in_features = H,
                    .x_stride = H,
                    .eps = eps}},
        {.op = linear_op,
         .linear = {.out = to->of_codes,
                    .scratch = scratch,
                    .x = to->projected,
                    .norm_weight = norm,
                    .weight = quantised(w_o),
                    .addend = to->x,
                    .num_tokens = T,
                    .out_features = H,
                    .out_stride = H,
                    .in_features = H,
                    .x_stride = H,
                    .addend_stride = H,
                    .planes = 2,
                    .eps = eps}},
        {.op = silu_mul_op,
         .silu_mul = {.out = to->gated_again,
                      .gate = to->gated,
                      .up = to->gated,
                      .num_tokens = T,
                      .row_size = F,
                      .gate_stride = F,
                      .up_stride = F}},
        {.op = add_rms_norm_op,
         .add_rms_norm = {.out = to->normed,
                          .new_residual = to->last_sum,
                          .x = to->projected,
                          .residual = to->x,
                          .norm_weight = norm,
                          .num_tokens = T,
                          .row_size = H,
                          .x_stride = H,
                          .residual_stride = H,
                          .eps = eps}},
        {.op = linear_op,
         .linear = {.out = to->logits,
                    .scratch = scratch,
                    .x = to->gated_again,
                    .weight = dense(w_down, F),
                    .addend = to->last_sum,
                    .num_tokens = T,
                    .out_features = H,
                    .out_stride = H,
                    .in_features = F,
                    .x_stride = F,
                    .addend_stride = H,
                    .out_is_float = 1}},
        {.op = draw_op,
         .draw = {.out = to->drawn,
                  .scratch = to->maxima,
                  .logits = to->logits,
                  .largest = largest_logits,
                  .settings = settings[0],
                  .uniforms = uniforms,
                  .num_rows = T,
                  .vocabulary = H,
                  .logits_stride = H,
                  .settings_stride = TOKENS}},
    };
    memcpy(calls, made, sizeof made);
}

/* With a team of so many threads, in memory that holds NaN and an older cache */
static void take_step(results *to, float *scratch, batch *b, int threads) {
    call calls[OPS];
    memset(to, 0xFF, sizeof *to);
    memcpy(to->keys, old_keys, sizeof old_keys);
    memcpy(to->values, old_values, sizeof old_values);
    make_calls(calls, to, scratch, b);
    run(calls, OPS, threads);
}

static void *work(void *of) {
    const caller *mine = of;
    long linear = TOKENS * F + TEAM * (TOKENS + LIMITS.panel_depth) * LIMITS.panel_columns,
         decode = S * HQ * SPLITS * (D + 2);
    long prefill = 2 * BLOCKS * HKV * D * LIMITS.prefill_block;
    float *scratch = aligned_alloc(64, (linear + decode + prefill) / 16 * 64 + 64);
    results *expected = malloc(STEPS * sizeof *expected), *found = malloc(sizeof *found);
    if (!scratch || !expected || !found) exit(2);
    for (int i = 0; i < STEPS; i++) take_step(expected + i, scratch, batches + i, 1);
    for (long turn = 0; turn < mine->turns; turn++)
        for (int team = 0; team < TEAM; team++)
            for (int i = 0; i < STEPS; i++) {
                take_step(found, scratch, batches + i, mine->teams[team]);
                if (!memcmp(found, expected + i, sizeof *found)) continue;
                printf("the results of %d threads differ from those of one\n", mine->teams[team]);
                exit(1);
            }
    free(scratch);
    free(expected);
    free(found);
    return 0;
}

int main(int count, char **words) { /* how often each caller goes through its teams */
    long turns = count > 1 ? atol(words[1]) : 1;
    caller callers[] = {{{1, 2, 4, 3}, turns}, {{4, 1, 3, 2}, turns}};
    pthread_t other;
    fill_all();
    if (pthread_create(&other, 0, work, callers + 1)) return 2;
    work(callers);
    pthread_join(other, 0);
    return 0;
}
