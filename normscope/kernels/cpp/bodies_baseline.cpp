#define NORMSCOPE_ISA_NAMESPACE isa_baseline
#define NORMSCOPE_ISA_TABLE kernels_baseline
#include "bodies.h"
