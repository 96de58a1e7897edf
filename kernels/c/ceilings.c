/* The limits of this processor, for benchmarks: a loop that only reads, and loops that only multiply and add.
 * They are compiled for the same target as the ops, so a target with narrower vectors has lower limits.
  */
#include "team.h"
#include "vectors.h"

#include <pthread.h>

#define WIDTH (4 * LANES) /* bytes of a vector register */
#if defined(__x86_64__) && LANES == 8
#define SUMS 12 /* in 16 registers: more than latency x throughput of multiply-adds */
#else
#define SUMS 16
#endif
#define STREAMS 8 /* streams that a thread reads at once: a single one does not saturate the memory */
#define MOST_THREADS 256

typedef uint64_t words __attribute__((vector_size(WIDTH)));

typedef struct {
    const char *from;
    long count; /* bytes to read, or rounds of multiply-adds */
    double result;
} work;

static void *read_part(void *given) {
    work *part = given;
    long stream = part->count / STREAMS / (4 * WIDTH) * (4 * WIDTH);
    words sums[STREAMS] = {0}, all = {0};
    for (long at = 0; at < stream; at += 4 * WIDTH)
#pragma GCC unroll 8
        for (int s = 0; s < STREAMS; s++) {
            const words *from = (const words *)(part->from + s * stream + at);
            sums[s] += (from[0] ^ from[1]) + (from[2] ^ from[3]);
        }
    for (int s = 0; s < STREAMS; s++) all += sums[s];
    part->result = (double)all[0];
    return 0;
}

static void *multiply_add_part(void *given) {
    work *part = given;
    long rounds = part->count;
    floats sums[SUMS] = {0}, x = {0}, y = {0};
    x += 0.999f, y += 1e-3f;
    for (long round = 0; round < rounds; round++)
#pragma GCC unroll 16
        for (int s = 0; s < SUMS; s++) {
            KEEP(y); /* without this the compiler moves the product out of the loop */
            sums[s] += x * y;
        }
#pragma GCC unroll 16
    for (int s = 0; s < SUMS; s++) part->result += sums[s][0];
    return 0;
}

#ifdef __AVX512BF16__
static void *multiply_add_pairs_part(void *given) {
    work *part = given;
    long rounds = part->count;
    __m512 sums[SUMS];
    __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80), y = (__m512bh)_mm512_set1_epi32(0x3a803a80);
#pragma GCC unroll 16
    for (int s = 0; s < SUMS; s++) sums[s] = _mm512_set1_ps((float)s); /* the compiler would merge equal sums */
    for (long round = 0; round < rounds; round++)
#pragma GCC unroll 16
        for (int s = 0; s < SUMS; s++) sums[s] = _mm512_dpbf16_ps(sums[s], x, y);
#pragma GCC unroll 16
    for (int s = 0; s < SUMS; s++) part->result += sums[s][0];
    return 0;
}
#endif

/* Runs a function in `threads` threads at once, this one included. If the system allows fewer, this thread does the
 * rest of the work. */
static double in_threads(void *(*function)(void *), work *parts, int threads) {
    pthread_t others[MOST_THREADS];
    int started = 1;
    double result = 0;
    while (started < threads && !pthread_create(&others[started], 0, function, &parts[started])) started++;
    for (int t = started; t < threads; t++) function(&parts[t]);
    function(&parts[0]);
    for (int t = 1; t < threads; t++) {
        if (t < started) pthread_join(others[t], 0);
        result += parts[t].result;
    }
    return result + parts[0].result;
}

static int at_most(int threads) { return threads < MOST_THREADS ? threads : MOST_THREADS; }

/* Reads `bytes` bytes at `data` once; each thread reads a part. The result depends on the data, so the compiler cannot
 * skip a read. */
EXPORTED double read_memory(const void *data, long bytes, int threads) {
    work parts[MOST_THREADS] = {0};
    long part = bytes / (threads = at_most(threads)) / 64 * 64;
    for (int t = 0; t < threads; t++) parts[t] = (work){(const char *)data + t * part, part, 0};
    return in_threads(read_part, parts, threads);
}

/* The number of operations (a multiply-add counts as two) in `rounds` rounds of each thread. This function multiplies
 * float32. The next one multiplies pairs of bfloat16 and adds them to float32; it returns 0 if the processor has no
 * such instruction. */
EXPORTED double multiply_add(long rounds, int threads) {
    work parts[MOST_THREADS] = {0};
    for (int t = 0; t < at_most(threads); t++) parts[t].count = rounds;
    in_threads(multiply_add_part, parts, at_most(threads));
    return 2.0 * SUMS * (WIDTH / 4) * rounds * at_most(threads);
}

EXPORTED double multiply_add_pairs(long rounds, int threads) {
#ifdef __AVX512BF16__
    work parts[MOST_THREADS] = {0};
    for (int t = 0; t < at_most(threads); t++) parts[t].count = rounds;
    in_threads(multiply_add_pairs_part, parts, at_most(threads));
    return 4.0 * SUMS * (WIDTH / 4) * rounds * at_most(threads);
#else
    return 0 * rounds * threads;
#endif
}
