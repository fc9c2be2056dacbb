#ifdef SWA_HAVE_AVX512
#include "simd_avx512.h"

#define TIER avx512
#include "kernels_body.h"
#endif
