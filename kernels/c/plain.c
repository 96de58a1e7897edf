/* Every op as the simplest loops that compute it. Read this file first to see what an op does. The tests compare the
 * fast ops with it. It uses one thread, no scratch memory, and no special instructions.
 *
 * Values are rounded to activations where the fast ops round them. Sums are double, so the last bits of the results
 * differ from those of the fast ops. */
#include "blocks.h"
#include "pages.h"
#include "team.h"
#include "weights.h"

/* Rounds to the type of activations */
static float to_activation(float x) { return to_float(to_real(x)); }

static float plain_silu(float x) { return x / (1 + expf(-x)); }

static void plain_embedding(const embedding_args *a) {
    const long K = a->row_size;
    for (long t = 0; t < a->num_tokens; t++)
        for (long i = 0; i < K; i++) a->out[t * K + i] = to_real(weight_value(&a->table, a->ids[t], i, K));
}

/* The scale of a row. Writes the sum to new_residual, unless that is null. */
static float plain_norm_scale(real *new_residual, const real *x, const real *residual, float eps, long K) {
    double squares = 0;
    for (long i = 0; i < K; i++) {
        float sum = residual ? to_activation(to_float(residual[i]) + to_float(x[i])) : to_float(x[i]);
        if (new_residual) new_residual[i] = to_real(sum);
        squares += sum * sum;
    }
    return 1 / sqrtf(squares / K + eps);
}

static float plain_normed(real sum, float scale, real norm_weight) {
    return to_activation(to_activation(to_float(sum) * scale) * to_float(norm_weight));
}

static void plain_add_rms_norm(const add_rms_norm_args *a) {
    const long K = a->row_size;
    for (long t = 0; t < a->num_tokens; t++) {
        const real *x = a->x + t * a->x_stride, *residual = a->residual ? a->residual + t * a->residual_stride : 0;
        real *sum = residual ? a->new_residual + t * K : 0;
        float scale = plain_norm_scale(sum, x, residual, a->eps, K);
        for (long i = 0; i < K; i++)
            a->out[t * K + i] = to_real(plain_normed((sum ? sum : x)[i], scale, a->norm_weight[i]));
    }
}

static void plain_linear(const linear_args *a) {
    const long K = a->in_features, N = a->out_features;
    for (long t = 0; t < a->num_tokens; t++) {
        const real *x = a->x + t * a->x_stride;
        float scale = a->norm_weight ? plain_norm_scale(0, x, 0, a->eps, K) : 0;
        for (long n = 0; n < N; n++) {
            double value = 0, up = 0;
            for (long k = 0; k < K; k++) {
                float row = a->norm_weight ? plain_normed(x[k], scale, a->norm_weight[k]) : to_float(x[k]);
                value += row * weight_value(&a->weight, n, k, K);
                if (a->up.values) up += row * weight_value(&a->up, n, k, K);
            }
            if (a->bias) value += to_float(a->bias[n]);
            if (a->up.values) value = to_activation(plain_silu(to_activation(value))) * to_activation(up);
            if (a->addend) value = to_activation(value) + to_float(a->addend[t * a->addend_stride + n]);
            if (a->out_is_float) ((float *)a->out)[t * a->out_stride + n] = value;
            else ((real *)a->out)[t * a->out_stride + n] = to_real(value);
        }
    }
}

static void plain_silu_mul(const silu_mul_args *a) {
    for (long t = 0; t < a->num_tokens; t++)
        for (long i = 0; i < a->row_size; i++) {
            float gate = to_float(a->gate[t * a->gate_stride + i]), up = to_float(a->up[t * a->up_stride + i]);
            a->out[t * a->row_size + i] = to_real(to_activation(plain_silu(gate)) * up);
        }
}

static void plain_rotate(real *out, const real *head, const float *angles, float sign, long D) {
    for (long i = 0; i < D / 2; i++) {
        float first = to_float(head[i]), second = to_float(head[i + D / 2]);
        float cosine = angles[i], sine = angles[i + D / 2] * sign;
        out[i] = to_real(first * cosine - second * sine);
        out[i + D / 2] = to_real(second * cosine + first * sine);
    }
}

static void plain_apply_rope(const apply_rope_args *a) {
    const long D = a->head_dim;
    for (long t = 0; t < a->num_tokens; t++) {
        const float *angles = a->cos_sin + a->positions[t] * D;
        for (long h = 0; h < a->num_q_heads; h++)
            plain_rotate(a->q_out + (t * a->num_q_heads + h) * D, a->q + t * a->q_stride + h * D, angles, a->sign, D);
        for (long h = 0; h < a->num_kv_heads; h++)
            plain_rotate(a->k_out + (t * a->num_kv_heads + h) * D, a->k + t * a->k_stride + h * D, angles, a->sign, D);
    }
}

static void plain_rope_and_cache(const rope_and_cache_args *a) {
    const long D = a->head_dim, Hq = a->num_q_heads, Hkv = a->num_kv_heads;
    for (long t = 0; t < a->num_tokens; t++) {
        const float *angles = a->cos_sin + a->positions[t] * D;
        const real *q = a->qkv + t * a->qkv_stride, *k = q + Hq * D, *v = k + Hkv * D;
        for (long h = 0; h < Hq; h++) plain_rotate(a->q_out + (t * Hq + h) * D, q + h * D, angles, 1, D);
        for (long h = 0; h < Hkv; h++) {
            real key[MAX_HEAD_DIM];
            plain_rotate(key, k + h * D, angles, 1, D);
            pages_store(&a->cache, a->slots[t], h, key, v + h * D, D);
        }
    }
}

/* Attends with one query head to the first `length` tokens of a sequence. The first pass finds the maximum. */
static void plain_attention(real *out, const real *q, const pages *cache, const int32_t *block_table, long length,
                            long head, long D, float scale) {
    float maximum = -INFINITY;
    double total = 0, sums[MAX_HEAD_DIM] = {0};
    for (int pass = 0; pass < 2; pass++)
        for (long t = 0; t < length; t++) {
            long slot = block_table[t / cache->page_size] * cache->page_size + t % cache->page_size;
            double score = 0;
            for (long d = 0; d < D; d++) score += to_float(q[d]) * pages_value(cache, 0, slot, head, D, d);
            score *= scale;
            if (pass == 0) {
                if (score > maximum) maximum = score;
                continue;
            }
            float weight = expf(score - maximum);
            total += weight;
            for (long d = 0; d < D; d++) sums[d] += weight * pages_value(cache, 1, slot, head, D, d);
        }
    for (long d = 0; d < D; d++) out[d] = to_real(sums[d] / total);
}

static void plain_decode_attention(const decode_attention_args *a) {
    const long Hq = a->num_kv_heads * a->group, D = a->head_dim;
    for (long s = 0; s < a->num_sequences; s++)
        for (long h = 0; h < Hq; h++)
            plain_attention(a->out + (s * Hq + h) * D, a->q + s * a->q_stride + h * D, &a->cache,
                            a->block_tables + s * a->block_table_stride, a->lengths[s], h / a->group, D, a->scale);
}

static void plain_prefill_attention(const prefill_attention_args *a) {
    const long Hq = a->num_kv_heads * a->group, D = a->head_dim;
    for (long s = 0; s < a->num_sequences; s++)
        for (long row = a->query_starts[s]; row < a->query_starts[s + 1]; row++)
            for (long h = 0; h < Hq; h++)
                plain_attention(a->out + (row * Hq + h) * D, a->q + row * a->q_stride + h * D, &a->cache,
                                a->block_tables + s * a->block_table_stride,
                                a->lengths[s] - (a->query_starts[s + 1] - row) + 1, h / a->group, D, a->scale);
}

/* Value k of a row goes to byte t of word 4 (k % 32 / 16) + k % 4 of the row in its tile, t = k % 16 / 4. */
static void plain_repack(const repack_args *a) {
    const block_form form = BLOCK_FORMS[a->format];
    const long blocks = a->columns / form.values, tiles = a->columns / 32, groups = form.groups;
    uint8_t *codes = (uint8_t *)a->codes, *high = (uint8_t *)a->high, scales[16], minima[16], read[32];
    for (long n = 0; n < a->rows; n++) {
        const uint8_t *from = a->blocks + n * blocks * form.bytes;
        for (long b = 0; b < blocks; b++) {
            long place = (n / 16 * blocks + b) * 16 + n % 16;
            memcpy(a->scales + place, from + b * form.bytes + form.scale, 2);
            if (a->minima) memcpy(a->minima + place, from + b * form.bytes + form.minimum, 2);
            if (n % 16 == 0 && b == 0) a->finite[n / 16] = 1;
            a->finite[n / 16] &= (a->scales[place] & 0x7C00) != 0x7C00; /* infinite, or no number */
            a->finite[n / 16] &= !a->minima || (a->minima[place] & 0x7C00) != 0x7C00;
            block_sub_scales(scales, minima, a->format, from + b * form.bytes);
            for (long g = 0; g < groups; g++) {
                place = (n / 16 * blocks * groups + b * groups + g) * 16 + n % 16;
                a->sub_scales[place] = scales[g];
                if (a->sub_minima) a->sub_minima[place] = minima[g];
            }
        }
        for (long k = 0; k < a->columns; k++) {
            long tile = n / 16 * tiles + k / 32, word = k % 32 / 16 * 4 + k % 4, byte = n % 16 * 4 + k % 16 / 4;
            const uint8_t *block = from + k / form.values * form.bytes;
            block_codes(read, a->format, block, k % form.values / 32);
            int fifth = block_fifth_bits(a->format, block, k % form.values / 32) >> k % 32 & 1;
            int code = read[k % 32] | fifth << 4, upper = code >> 4;
            if (form.bits == 8) {
                codes[(tile * 8 + word) * 64 + byte] = code;
                continue;
            }
            uint8_t *low = codes + (tile * 4 + word % 4) * 64 + byte;
            *low = word < 4 ? code & 15 : *low | (code & 15) << 4;
            if (form.bits == 5) high[tile * 64 + byte] = (word ? high[tile * 64 + byte] : 0) | upper << word;
            if (form.bits == 6) {
                uint8_t *pair = high + (tile * 2 + word / 4) * 64 + byte;
                *pair = (word % 4 ? *pair : 0) | upper << 2 * (word % 4);
            }
        }
    }
}

static void plain_repack_words(const repack_words_args *a) {
    const long tiles = a->columns / 32, each = 32 / a->bits;
    const int awq_place[8] = {0, 4, 1, 5, 2, 6, 3, 7}; /* of a row's code in a word of eight rows */
    uint8_t *codes = (uint8_t *)a->codes;
    for (long n = 0; n < a->rows; n++)
        for (long k = 0; k < a->columns; k++) {
            const long in_row = n * (a->columns / each) + k / each, in_column = k / each * a->rows + n;
            const long in_eight = k * (a->rows / 8) + n / 8;
            const uint32_t word = a->words[a->order == 0 ? in_row : a->order == 1 ? in_column : in_eight];
            const long place = a->order == 2 ? awq_place[n % 8] : k % each;
            const int code = (word ^ (uint32_t)a->flip) >> place * a->bits & ((1 << a->bits) - 1);
            const long to = n / 16 * tiles + k / 32, b = k % 32 / 16 * 4 + k % 4, byte = n % 16 * 4 + k % 16 / 4;
            uint8_t *low = codes + (to * a->bits + b % a->bits) * 64 + byte;
            *low = b < a->bits ? code : *low | code << 4;
        }
}

/* The token behind one (-1: behind none) in descending order of the logits, of equal ones the lower id first; or -1 */
static long plain_next(const float *logits, long V, long token) {
    long next = -1;
    for (long i = 0; i < V; i++) {
        int equal = token >= 0 && logits[i] == logits[token];
        int is_behind = token < 0 || logits[i] < logits[token] || (equal && i > token);
        if (is_behind && (next < 0 || logits[i] > logits[next])) next = i;
    }
    return next;
}

static void plain_draw(const draw_args *a) {
    const long V = a->vocabulary;
    for (long r = 0; r < a->num_rows; r++) {
        const float *logits = a->logits + r * a->logits_stride, *settings = a->settings + r;
        const float top_k = settings[a->settings_stride], top_p = settings[2 * a->settings_stride];
        int64_t kept = 0, total = 0, sum = 0;
        a->out[r] = 0;
        if (!isfinite(a->largest[r])) continue;
#define WEIGHT(TOKEN) ((int64_t)(0x1p40f * expf((logits[TOKEN] - a->largest[r]) / settings[0])))
        for (long i = 0; i < V; i++)
            if (WEIGHT(i) >= 0x1p40f * settings[3 * a->settings_stride]) kept += WEIGHT(i);
        for (long rank = 0, i = -1; rank < top_k && (i = plain_next(logits, V, i)) >= 0; rank++) total += WEIGHT(i);
        if (top_p < 1) {
            const double part = top_p * (double)total;
            long i = -1;
            do sum += WEIGHT(i = plain_next(logits, V, i));
            while (sum < part);
            total = sum;
        }
        const int64_t target = (double)a->uniforms[r] * (kept < total ? kept : total);
        sum = 0;
        for (long i = -1; sum <= target && (i = plain_next(logits, V, i)) >= 0; a->out[r] = i) sum += WEIGHT(i);
#undef WEIGHT
    }
}

#ifdef FLOAT_ACTIVATIONS
#define plain_op plain_float_op
#endif

void plain_float_op(const call *call);

void plain_op(const call *call) {
    switch (call->op) {
#define ENTER(OP)              \
    case OP##_op:              \
        plain_##OP(&call->OP); \
        break;
        EACH_OP(ENTER)
#undef ENTER
    }
}

#ifndef FLOAT_ACTIVATIONS
/* Like `run` of team.c, and with the same calls */
EXPORTED void run_plain(const call *calls, long count, int threads) {
    (void)threads;
    for (long i = 0; i < count; i++) (calls[i].is_float ? plain_float_op : plain_op)(&calls[i]);
}
#endif
