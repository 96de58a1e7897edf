/* The limits that Python reads. Each is defined in the file that needs it. */
#include "attention.h"
#include "draw.h"
#include "linear.h"
#include "norm.h"

EXPORTED const limits LIMITS = {
    .max_few_tokens = MAX_FEW_TOKENS,
    .in_features_multiple = LINE,
    .norm_multiple = NORM_MULTIPLE,
    .head_dim_multiple = HEAD_DIM_MULTIPLE,
    .max_head_dim = MAX_HEAD_DIM,
    .max_group = MAX_GROUP,
    .decode_split = DECODE_SPLIT,
    .prefill_block = BLOCK,
    .panel_columns = BLOCK,
    .panel_depth = PANEL_DEPTH,
    .draw_run = DRAW_RUN,
};
