#define MMLM_ISA avx2
#include "loss/ops.h"
