/* A linear layer. Few tokens read the weight row by row; for many tokens it is packed first. torch multiplies many
 * tokens of float. linear.h has the picture. */
#include "linear.h"

void linear(const linear_args *args, worker *me) {
#ifdef FLOAT_ACTIVATIONS
    linear_few_tokens(args, me);
#else
    if (args->num_tokens <= MAX_FEW_TOKENS) linear_few_tokens(args, me);
    else linear_many_tokens(args, me);
#endif
}
