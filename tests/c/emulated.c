/* Serves the ops of kernels/c to tests/c/emulated.py from another processor, which qemu-user emulates. Both programs
 * map one file: the calls lie at its start, with offsets in place of pointers, the tensors behind them. A byte on
 * standard input asks for a run, one on standard output says that it is over. */
#include "team.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

extern const limits LIMITS;
void run(const call *calls, long count, int threads);

typedef struct { /* as `Header` in emulated.py */
    limits limits;
    long threads, calls, guards, pointers; /* of a run */
    long fault;                            /* where memory was touched that no tensor has */
    long first[];                          /* calls, offsets of guard pages, offsets of pointers in the calls */
} header;

static char *memory;
static long page;

static void say(char what) {
    if (write(STDOUT_FILENO, &what, 1) != 1) _exit(1);
}

static void on_fault(int number, siginfo_t *about, void *context) {
    (void)number, (void)context;
    ((header *)memory)->fault = (char *)about->si_addr - memory;
    say('f');
    _exit(1);
}

static void protect(const long *guards, long count, int how) {
    for (long i = 0; i < count; i++)
        if (mprotect(memory + guards[i], page, how)) {
            perror("mprotect");
            exit(1);
        }
}

int main(int count, char **words) { /* file descriptor, bytes of the file, bytes of a page */
    if (count != 4) return 2;
    page = atol(words[3]);
    memory = mmap(0, atol(words[2]), PROT_READ | PROT_WRITE, MAP_SHARED, atoi(words[1]), 0);
    if (memory == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, 0);
    sigaction(SIGBUS, &action, 0);
    header *shared = (header *)memory;
    shared->limits = LIMITS;
    say('r');
    for (char what; read(STDIN_FILENO, &what, 1) == 1; say('d')) {
        call *calls = (call *)shared->first;
        const long *guards = (const long *)(calls + shared->calls), *pointers = guards + shared->guards;
        for (long i = 0; i < shared->pointers; i++) {
            char **pointer = (char **)((char *)calls + pointers[i]);
            *pointer = memory + (long)*pointer;
        }
        protect(guards, shared->guards, PROT_NONE);
        run(calls, shared->calls, shared->threads);
        protect(guards, shared->guards, PROT_READ | PROT_WRITE);
    }
    return 0;
}
