#include "simd_portable.h"

#define TIER portable
#include "kernels_body.h"
