#define NORMSCOPE_ISA_NAMESPACE isa_v3
#define NORMSCOPE_ISA_TABLE kernels_v3
#include "bodies.h"
