/* A call of an op, and the team of threads that carries it out.
 *
 * `run` (team.c) goes through any number of calls with one team. Every thread enters each op, so an op shares its loops
 * out, and ends each of them with a barrier:
 *
 *     for (long task = first_task(me, tasks); task >= 0; task = next_task(me)) ...
 *     barrier(me);
 *
 * Which thread does a task changes no bit of its result. */
#ifndef TEAM_H
#define TEAM_H
#include "calls.h"

#define EXPORTED __attribute__((visibility("default"))) /* to Python; other libraries may have names like ours */

typedef struct {
    long op; /* its place in EACH_OP */
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

typedef struct team team;
typedef struct {
    team *team;
    int index, num_threads; /* which thread of how many */
    int loops;              /* that it has begun */
    int victim;             /* whose share of the present loop it takes from: 0 its own, 1 the next thread's, ... */
    long num_tasks;         /* of the present loop */
    long num_taken;         /* where there is one thread: tasks that it has taken */
    long patience;          /* ns that it waits awake for the others */
} worker;

long first_task(worker *me, long num_tasks); /* the first task of a loop that is this thread's, or -1 */
long next_task(worker *me);
void barrier(worker *me); /* goes on when all threads have come here */

#define PROTOTYPE(OP) void OP(const OP##_args *args, worker *me);
EACH_OP(PROTOTYPE)
#undef PROTOTYPE

static inline long least(long a, long b) { return a < b ? a : b; }

static inline long ceil_div(long whole, long part) { return (whole + part - 1) / part; }
#endif
