/* A linear layer. A grouped weight has one form of the product. Few tokens read a dense weight row by row; for many
 * tokens it is packed first. torch multiplies many tokens of float by a dense weight. linear.h has the picture. */
#include "linear.h"

void linear(const linear_args *args, worker *me) {
    if (args->weight.format >= WEIGHT_FORMATS) linear_grouped(args, me);
#ifndef FLOAT_ACTIVATIONS
    else if (args->num_tokens > MAX_FEW_TOKENS) linear_many_tokens(args, me);
#endif
    else linear_few_tokens(args, me);
}
