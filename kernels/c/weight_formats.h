/* The numbers of the weight formats: dense_weight, WEIGHT_FORMATS (the number of formats that are not grouped),
 * q4_0_weight, ... */
#ifndef WEIGHT_FORMATS_H
#define WEIGHT_FORMATS_H
#include "calls.h"

enum {
#define NUMBER(FORMAT) FORMAT##_weight,
    EACH_WEIGHT_FORMAT(NUMBER) WEIGHT_FORMATS,
    BEFORE_GROUPED = WEIGHT_FORMATS - 1, /* makes the next format's number WEIGHT_FORMATS */
    EACH_GROUPED_FORMAT(NUMBER)
#undef NUMBER
};
#endif
