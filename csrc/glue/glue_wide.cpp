#define MMLM_ISA wide
#include "glue/ops.h"
