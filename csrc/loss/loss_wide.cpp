#define MMLM_ISA wide
#include "loss/ops.h"
