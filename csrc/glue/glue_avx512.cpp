#define MMLM_ISA avx512
#include "glue/ops.h"
