/* The threads that run calls together.
 *
 *     thread 0   ▒▒▒▒▒▒▒▒ tasks of a loop ▒▒│           ▒▒▒▒▒▒│
 *     thread 1   ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒     │ barrier   ▒▒▒▒  │ barrier   the next call ...
 *     thread 2   ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒  │           ▒▒▒▒▒ │
 *
 * If torch uses OpenMP, they are torch's own threads: Python sets `parallel` to GOMP_parallel of the process, because
 * two thread pools would compete for the cores. Otherwise this file starts its own threads. In both cases this file has
 * the code that waits. A thread spins for at most PATIENCE and then sleeps, so waiting costs little if other programs
 * need the cores. If the thread had to sleep, because there are more threads than cores, it spins for half as long the
 * next time.
 *
 * A loop is divided into equal ranges, one per thread. A thread takes tasks from its own range one by one, and then
 * from the ranges of the other threads. So a thread reads adjacent memory, and a thread that lost its core delays only
 * the task that it is running. */
#include "team.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PATIENCE 100000 /* ns: longer than the differences between a team's tasks, shorter than a time slice */
#define IMPATIENCE 1000 /* ns: patience stays at or above twice this */
#define ON_STACK 16     /* threads whose shares fit in the caller's stack, which may be small */
#define STACK (1 << 20) /* bytes of a thread's stack: attention needs a quarter; the default of some systems is less */

/* OpenMP's functions. Python sets them if torch uses OpenMP; otherwise they are null. */
EXPORTED void (*parallel)(void (*work)(void *), void *of, unsigned threads, unsigned flags) = 0;
EXPORTED int (*present)(void) = 0; /* omp_get_num_threads; a region may have fewer threads than requested */

typedef struct { /* a counter; threads wait for its next change */
    atomic_uint value, sleepers;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
} event_count;

typedef struct {
    _Alignas(128) atomic_uint arrived;
    _Alignas(128) event_count round;
} barrier_state;

typedef struct {
    _Alignas(128) atomic_long taken;
} share;

struct team {
    int threads; /* the most threads */
    const call *calls;
    long count;
    share *shares; /* [2, threads]: for this loop and for the next one */
    atomic_int joined;
    barrier_state barrier;
};

#define NEW_EVENT_COUNT {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER}

static long nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* Waits until the counter is no longer `old`. It spins for *patience ns before it sleeps. */
static void wait_for_change(event_count *n, unsigned old, long *patience) {
    long until = 0;
    for (int turn = 0; atomic_load_explicit(&n->value, memory_order_acquire) == old; turn++) {
        relax();
        if (turn % 64) continue;
        long now = nanoseconds();
        if (!until) until = now + *patience;
        else if (now > until) break;
    }
    int in_vain = atomic_load_explicit(&n->value, memory_order_acquire) == old;
    if (until) *patience = in_vain ? *patience / 2 + IMPATIENCE : least(*patience * 2, PATIENCE);
    if (!in_vain) return;
    pthread_mutex_lock(&n->mutex);
    atomic_fetch_add(&n->sleepers, 1);
    while (atomic_load(&n->value) == old) pthread_cond_wait(&n->changed, &n->mutex);
    atomic_fetch_sub(&n->sleepers, 1);
    pthread_mutex_unlock(&n->mutex);
}

static void signal_change(event_count *n) {
    atomic_fetch_add(&n->value, 1);
    if (!atomic_load(&n->sleepers)) return; /* a thread that sleeps after this load sees the new value */
    pthread_mutex_lock(&n->mutex);
    pthread_cond_broadcast(&n->changed);
    pthread_mutex_unlock(&n->mutex);
}

static void meet_at(barrier_state *b, int threads, long *patience) {
    unsigned round = atomic_load_explicit(&b->round.value, memory_order_acquire);
    if (atomic_fetch_add(&b->arrived, 1) + 1 < (unsigned)threads) {
        wait_for_change(&b->round, round, patience);
        return;
    }
    atomic_store(&b->arrived, 0);
    signal_change(&b->round);
}

void barrier(worker *me) {
    if (me->num_threads > 1) meet_at(&me->team->barrier, me->num_threads, &me->patience);
}

/* The number of tasks taken from a thread's share. A loop's counters are set to 0 during the loop before it. */
static atomic_long *taken_of(const worker *me, int loop, int thread) {
    return &me->team->shares[loop % 2 * me->num_threads + thread].taken;
}

long first_task(worker *me, long num_tasks) {
    me->num_tasks = num_tasks;
    me->num_taken = me->victim = 0;
    me->loops++;
    if (me->num_threads > 1) atomic_store_explicit(taken_of(me, me->loops + 1, me->index), 0, memory_order_relaxed);
    return next_task(me);
}

long next_task(worker *me) {
    int threads = me->num_threads;
    if (threads == 1) return me->num_taken < me->num_tasks ? me->num_taken++ : -1;
    for (; me->victim < threads; me->victim++) {
        int of = (me->index + me->victim) % threads;
        long start = me->num_tasks * of / threads, end = me->num_tasks * (of + 1) / threads;
        atomic_long *taken = taken_of(me, me->loops, of);
        if (atomic_load_explicit(taken, memory_order_relaxed) >= end - start) continue;
        long task = start + atomic_fetch_add_explicit(taken, 1, memory_order_relaxed);
        if (task < end) return task;
    }
    return -1;
}

/* Each thread of a team runs this: it enters the op of every call */
static void run_calls(const call *calls, long count, worker *me) {
    for (long i = 0; i < count; i++) (calls[i].is_float ? run_float_op : run_op)(&calls[i], me);
}

static void work(team *team, int index, int threads) {
    worker me = {.team = team, .index = index, .num_threads = threads, .patience = PATIENCE};
    if (index < threads) run_calls(team->calls, team->count, &me);
}

static void work_in_region(void *of) {
    team *team = of;
    work(team, atomic_fetch_add(&team->joined, 1), present());
}

/* This file's own threads, started when they are first needed. They wait for a team, run it, and wait for its end. */
static struct {
    pthread_mutex_t mutex; /* one caller at a time */
    int threads;
    team *team;
    event_count teams;
    barrier_state end;
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER, .teams = NEW_EVENT_COUNT, .end = {.round = NEW_EVENT_COUNT}};

typedef struct {
    int index;
    unsigned teams; /* number of earlier teams */
} arrival;

static void *wait_for_teams(void *of) {
    arrival mine = *(arrival *)of;
    long patience = PATIENCE, of_end = PATIENCE;
    free(of);
    for (;; mine.teams++) {
        wait_for_change(&pool.teams, mine.teams, &patience);
        work(pool.team, mine.index, pool.team->threads);
        meet_at(&pool.end, pool.threads + 1, &of_end);
    }
    return 0;
}

/* For the child of a fork: it has no other threads (these or OpenMP's), and one of them may have held a lock */
static void forget_threads(void) {
    parallel = 0;
    memset(&pool, 0, sizeof pool);
    pthread_mutex_init(&pool.mutex, 0);
    pthread_mutex_init(&pool.teams.mutex, 0);
    pthread_cond_init(&pool.teams.changed, 0);
    pthread_mutex_init(&pool.end.round.mutex, 0);
    pthread_cond_init(&pool.end.round.changed, 0);
}

__attribute__((constructor)) static void register_fork(void) { pthread_atfork(0, 0, forget_threads); }

/* Starts threads until there are `wanted` of them, or as many as the system allows */
static void make_threads(int wanted) {
    pthread_attr_t large;
    pthread_attr_init(&large);
    pthread_attr_setstacksize(&large, STACK);
    while (pool.threads < wanted) {
        arrival *mine = malloc(sizeof *mine);
        if (!mine) break;
        *mine = (arrival){pool.threads + 1, atomic_load(&pool.teams.value)};
        pthread_t thread;
        if (pthread_create(&thread, &large, wait_for_teams, mine)) {
            free(mine);
            break;
        }
        pthread_detach(thread);
        pool.threads++;
    }
    pthread_attr_destroy(&large);
}

EXPORTED void run(const call *calls, long count, int threads) {
    if (threads <= 1) {
        worker me = {.num_threads = 1};
        run_calls(calls, count, &me);
        return;
    }
    share few[2 * ON_STACK] = {0}, *shares = few, *many = 0;
    if (threads > ON_STACK) {
        if (posix_memalign((void **)&many, sizeof *many, 2 * threads * sizeof *many)) threads = ON_STACK;
        else shares = memset(many, 0, 2 * threads * sizeof *many);
    }
    team team = {
        .threads = threads, .calls = calls, .count = count, .shares = shares, .barrier = {.round = NEW_EVENT_COUNT}};
    if (parallel) {
        parallel(work_in_region, &team, threads, 0);
        free(many);
        return;
    }
    pthread_mutex_lock(&pool.mutex);
    make_threads(threads - 1);
    if (team.threads > pool.threads + 1) team.threads = pool.threads + 1;
    pool.team = &team;
    signal_change(&pool.teams);
    work(&team, 0, team.threads);
    long patience = PATIENCE;
    meet_at(&pool.end, pool.threads + 1, &patience);
    pthread_mutex_unlock(&pool.mutex);
    free(many);
}
