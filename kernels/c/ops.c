/* Enters the op of a call. */
#include "team.h"

#ifdef FLOAT_ACTIVATIONS
#define run_op run_float_op
#endif

void run_op(const call *call, worker *me) {
    switch (call->op) {
#define ENTER(OP)          \
    case OP##_op:          \
        OP(&call->OP, me); \
        break;
        EACH_OP(ENTER)
#undef ENTER
    }
}
