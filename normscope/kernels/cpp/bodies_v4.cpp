#define NORMSCOPE_ISA_NAMESPACE isa_v4
#define NORMSCOPE_ISA_TABLE kernels_v4
#include "bodies.h"
