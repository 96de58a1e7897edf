/* The ops for activations in float32. This file compiles every op a second time, with `real` = float (calls.h). Its
 * products are of float too: pairs of bfloat16 would round the operands. */
#define FLOAT_ACTIVATIONS
#undef PAIRS
#include "decode_attention.c"
#include "draw.c"
#include "embedding.c"
#include "linear.c"
#include "linear_few_tokens.c"
#include "linear_grouped.c"
#include "ops.c"
#include "plain.c"
#include "prefill_attention.c"
#include "repack.c"
#include "repack_words.c"
#include "rms_norm.c"
#include "rope.c"
#include "swiglu.c"
