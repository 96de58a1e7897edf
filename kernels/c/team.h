/* A call of an op, and the team of threads that runs it.
 *
 * `run` (team.c) runs any number of calls with one team. Every thread enters each op. An op divides its loops among the
 * threads, and ends each loop with a barrier:
 *
 *     for (long task = first_task(me, tasks); task >= 0; task = next_task(me)) ...
 *     barrier(me);
 *
 * The result of a task does not depend on the thread that runs it. */
#ifndef TEAM_H
#define TEAM_H
#include "calls.h"

#define EXPORTED __attribute__((visibility("default"))) /* for Python; other names are hidden from other libraries */

typedef struct {
    long op;       /* its index in EACH_OP */
    long is_float; /* 1: activations are float, 0: bf16 */
    union {
#define ARGUMENTS(OP) OP##_args OP;
        EACH_OP(ARGUMENTS)
#undef ARGUMENTS
    };
} call;

enum {
#define NUMBER(OP) OP##_op,
    EACH_OP(NUMBER)
#undef NUMBER
};

#define TASKS_PER_THREAD 4 /* the least number of tasks of a loop per thread, if there is enough work */

typedef struct team team;
typedef struct {
    team *team;
    int index, num_threads; /* this thread's number, and the number of threads */
    int loops;              /* loops that this thread has begun */
    int victim;             /* the share from which this thread takes tasks: 0 its own, 1 the next thread's, ... */
    long num_tasks;         /* of the present loop */
    long num_taken;         /* only in a team of one thread: tasks that it has taken */
    long patience;          /* ns that this thread spins before it sleeps */
} worker;

long first_task(worker *me, long num_tasks); /* this thread's first task of a loop, or -1 */
long next_task(worker *me);
void barrier(worker *me); /* returns when all threads have called it */

/* float_activations.c compiles all files of ops together, so there their functions are static. */
#ifdef FLOAT_ACTIVATIONS
#define ACROSS_FILES __attribute__((noinline)) static
#else
#define ACROSS_FILES
#endif

#define PROTOTYPE(OP) ACROSS_FILES void OP(const OP##_args *args, worker *me);
EACH_OP(PROTOTYPE)
#undef PROTOTYPE

/* Enter the op of a call (ops.c). Each is for one type of activations. */
void run_op(const call *call, worker *me);
void run_float_op(const call *call, worker *me);

static inline long least(long a, long b) { return a < b ? a : b; }

static inline long ceil_div(long whole, long part) { return (whole + part - 1) / part; }
#endif
