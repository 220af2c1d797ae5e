#define MMLM_ISA avx512
#include "loss/ops.h"
