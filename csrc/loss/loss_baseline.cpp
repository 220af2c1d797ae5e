#define MMLM_ISA baseline
#include "loss/ops.h"
