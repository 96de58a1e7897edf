/* A linear layer. The product with a grouped weight has one implementation. A dense weight is read row by row for few
 * tokens, and packed first for many. torch multiplies many tokens of float by a dense weight. linear.h has the picture.
 */
#include "linear.h"

void linear(const linear_args *args, worker *me) {
    if (args->weight.format >= WEIGHT_FORMATS) linear_grouped(args, me);
#ifndef FLOAT_ACTIVATIONS
    else if (args->num_tokens > MAX_FEW_TOKENS) linear_many_tokens(args, me);
#endif
    else linear_few_tokens(args, me);
}
