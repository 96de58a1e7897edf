/* A token id for each row of logits. A task is a row.
 *
 *     at most FEW tokens are kept:   logits ─► the first of them, in order ─► sums of their weights ─► token
 *     else:                          logits ─► counts and weights of INTERVALS of logits ─► the interval in which a sum
 *                                    ends, split by logits until one is left ─► sum or token
 *
 * Tokens are in descending order of their logits, of equal ones the lower id first. A weight is a whole number,
 * 2^40 exp((logit - largest) / temperature) rounded down. So sums of weights do not depend on the order of adding.
 * Tokens of weight 0 are left out. Which of the two ways a row goes depends on its own top_k only. */
#include "draw.h"
#include "team.h"

#define FEW 64 /* tokens that are put in order */

/* The first `count` tokens of a row in order, and how many of them have a logit above -infinity */
static long first_tokens(float *logits, long *ids, const drawn_row *row, long count) {
    long found = 0;
    float least_of_them = -INFINITY;
    for (long start = 0; start < row->vocabulary; start += DRAW_RUN) {
        float padded[DRAW_RUN];
        const float *run = logits_from(row, start, padded);
        pairs above = {0};
        for (long i = 0; i < DRAW_RUN; i += LANES) above |= (pairs)(load(run + i) > least_of_them);
        if (!any(above)) continue;
        for (long i = 0; i < DRAW_RUN; i++) {
            const float logit = run[i];
            if (!(logit > least_of_them)) continue;
            long place = found < count ? found++ : count - 1;
            for (; place > 0 && logits[place - 1] < logit; place--) {
                logits[place] = logits[place - 1];
                ids[place] = ids[place - 1];
            }
            logits[place] = logit;
            ids[place] = start + i;
            if (found == count) least_of_them = logits[count - 1];
        }
    }
    return found;
}

/* The draw of a row that keeps at most `count` <= FEW tokens */
static long drawn_from_few(const drawn_row *row, long count, float top_p, float uniform) {
    float logits[FEW], weights[FEW];
    long ids[FEW] = {0};
    count = first_tokens(logits, ids, row, count);
    for (long i = count; i < FEW; i++) logits[i] = -INFINITY;
    for (long i = 0; i < FEW; i += LANES) store(weights + i, weights_of(distances_of(row, load(logits + i))));
    int64_t total = 0, kept = 0;
    for (long i = 0; i < count; i++) {
        total += (int64_t)weights[i];
        kept += weights[i] >= row->min_p * 0x1p40f ? (int64_t)weights[i] : 0;
    }
    if (top_p < 1) {
        const double part = top_p * (double)total;
        int64_t sum = 0;
        for (long i = 0; i < count && (!i || sum < part); i++) sum += (int64_t)weights[i];
        total = sum;
    }
    const int64_t target = (double)uniform * (total < kept ? total : kept);
    long place = 0;
    for (int64_t sum = (int64_t)weights[0]; sum <= target && place < count - 1; sum += (int64_t)weights[place]) place++;
    return ids[place];
}

/* Some tokens on their way to the sums. They go through memory, from which a token is read alone. */
typedef struct {
    long count;
    float weights[DRAW_RUN];
    int32_t places[DRAW_RUN]; /* the sums they belong to */
} some_tokens;

ALWAYS void put(some_tokens *tokens, floats weights, ints places) {
    store(tokens->weights + tokens->count, weights);
    memcpy(tokens->places + tokens->count, &places, sizeof places);
    tokens->count += LANES;
}

static void add_tokens(token_sums *sums, const some_tokens *tokens, int with_counts) {
    for (long i = 0; i < tokens->count; i++) sums->weights[tokens->places[i]] += (int64_t)tokens->weights[i];
    for (long i = 0; with_counts && i < tokens->count; i++) sums->counts[tokens->places[i]] += tokens->weights[i] >= 1;
}

/* The sums of each interval, and the maxima of runs. Returns the sum of the weights that min_p keeps. */
static int64_t sum_intervals(token_sums *sums, const drawn_row *row, int with_counts) {
    const float least_kept = row->min_p * 0x1p40f;
    int64_t kept = 0;
    for (long start = 0; start < row->vocabulary; start += DRAW_RUN) {
        float padded[DRAW_RUN];
        const float *run = logits_from(row, start, padded);
        floats highest = (floats){0} - INFINITY;
        some_tokens tokens;
        tokens.count = 0;
        for (long i = 0; i < DRAW_RUN; i += LANES) {
            floats logits = load(run + i), distances = distances_of(row, logits);
            highest = larger(logits, highest);
            if (!any((pairs)(distances < WEIGHTLESS))) continue;
            floats weights = weights_of(distances);
            put(&tokens, weights, intervals_of(distances));
            if (least_kept <= 0 || !any((pairs)(weights >= least_kept))) continue;
            for (int lane = 0; lane < LANES; lane++) kept += weights[lane] >= least_kept ? (int64_t)weights[lane] : 0;
        }
        row->maxima[start / DRAW_RUN] = largest(highest);
        add_tokens(sums, &tokens, with_counts);
    }
    return least_kept > 0 ? kept : INT64_MAX;
}

/* The sums of the tokens whose keys are from start to end - 1, by (key - start) >> shift */
static void sum_keys(token_sums *sums, const drawn_row *row, long start, long end, int shift, int with_counts) {
    const float first = logit_of(start), last = logit_of(end - 1);
    for (long at = 0; at < row->vocabulary; at += DRAW_RUN) {
        if (!(row->maxima[at / DRAW_RUN] >= last)) continue;
        float padded[DRAW_RUN];
        const float *run = logits_from(row, at, padded);
        some_tokens tokens;
        tokens.count = 0;
        for (long i = 0; i < DRAW_RUN; i += LANES) {
            floats logits = load(run + i);
            pairs within = (pairs)(logits <= first) & (pairs)(logits >= last);
            if (!any(within)) continue;
            floats weights = weights_of(distances_of(row, logits));
            pairs places = (keys_of(logits) - (uint32_t)start) >> shift;
            put(&tokens, (floats)((pairs)weights & within), (ints)(places & within));
        }
        add_tokens(sums, &tokens, with_counts);
    }
}

/* The first of the sums with which their sum, of counts or of weights, exceeds the target. Adds those before it to
 * *before. */
static long first_above(const token_sums *sums, int by_count, int64_t target, token_sum *before) {
    for (long i = 0; i < INTERVALS - 1; i++) {
        const int64_t count = before->count + sums->counts[i], weight = before->weight + sums->weights[i];
        if ((by_count ? count : weight) > target) return i;
        *before = (token_sum){count, weight};
    }
    return INTERVALS - 1;
}

/* The first key of an interval */
static long first_key(const drawn_row *row, long interval) {
    long low = key_of(INFINITY), high = key_of(-INFINITY);
    while (low < high) {
        const long middle = (low + high) / 2;
        if (intervals_of(distances_of(row, (floats){0} + logit_of(middle)))[0] < interval) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* Where the sum of the tokens, or of their weights, in order, first exceeds the target, which the whole sum exceeds */
static sum_end end_of_sum(const drawn_row *row, const token_sums *intervals, int by_count, int64_t target) {
    token_sum before = {0};
    token_sums sums;
    const long interval = first_above(intervals, by_count, target, &before);
    long start = first_key(row, interval), end = first_key(row, interval + 1);
    while (end - start > 1) {
        int shift = 0;
        while ((end - 1 - start) >> shift >= INTERVALS) shift++;
        memset(&sums, 0, sizeof sums);
        sum_keys(&sums, row, start, end, shift, by_count);
        start += first_above(&sums, by_count, target, &before) << shift;
        end = least(end, start + (1L << shift));
    }
    const int64_t weight = weight_of_one(row, logit_of(start));
    return (sum_end){logit_of(start), weight ? weight : 1, before};
}

/* The token of this logit with `place` of them before it */
static long token_at(const drawn_row *row, float logit, int64_t place) {
    for (long run = 0; run < row->vocabulary; run += DRAW_RUN) {
        if (!(row->maxima[run / DRAW_RUN] >= logit)) continue;
        for (long i = run; i < least(run + DRAW_RUN, row->vocabulary); i++)
            if (row->logits[i] == logit && !place--) return i;
    }
    return 0;
}

/* The draw of a row that may keep any number of tokens */
static long drawn_from_many(const drawn_row *row, float top_k, float top_p, float uniform) {
    const int with_counts = top_k < row->vocabulary;
    token_sums intervals = {0};
    token_sum all = {0};
    const int64_t kept = sum_intervals(&intervals, row, with_counts);
    first_above(&intervals, 0, INT64_MAX, &all);
    int64_t total = all.weight; /* the last interval has none */
    if (!total) return 0;
    if (with_counts && top_k < all.count) {
        const int64_t count = top_k;
        const sum_end end = end_of_sum(row, &intervals, 1, count - 1);
        total = end.before.weight + (count - end.before.count) * end.weight;
    }
    if (top_p < 1) {
        const int64_t part = fmax(ceil((double)top_p * total) - 1, 0);
        const sum_end end = end_of_sum(row, &intervals, 0, part);
        total = end.before.weight + ((part - end.before.weight) / end.weight + 1) * end.weight;
    }
    const int64_t target = (double)uniform * (total < kept ? total : kept);
    const sum_end end = end_of_sum(row, &intervals, 0, target);
    return token_at(row, end.logit, (target - end.before.weight) / end.weight);
}

void draw(const draw_args *args, worker *me) {
    const long V = args->vocabulary;
    for (long r = first_task(me, args->num_rows); r >= 0; r = next_task(me)) {
        const float *settings = args->settings + r;
        const float top_k = settings[args->settings_stride], top_p = settings[2 * args->settings_stride];
        const drawn_row row = {
            .logits = args->logits + r * args->logits_stride,
            .maxima = args->scratch + r * ceil_div(V, DRAW_RUN),
            .vocabulary = V,
            .largest = args->largest[r],
            .temperature = settings[0],
            .min_p = settings[3 * args->settings_stride],
        };
        if (!isfinite(row.largest)) args->out[r] = 0;
        else if (top_k <= FEW) args->out[r] = drawn_from_few(&row, top_k > 1 ? top_k : 1, top_p, args->uniforms[r]);
        else args->out[r] = drawn_from_many(&row, top_k, top_p, args->uniforms[r]);
    }
    barrier(me);
}
