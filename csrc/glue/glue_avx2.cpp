#define MMLM_ISA avx2
#include "glue/ops.h"
