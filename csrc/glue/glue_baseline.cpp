#define MMLM_ISA baseline
#include "glue/ops.h"
