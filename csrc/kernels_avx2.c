#ifdef SWA_HAVE_AVX2
#include "simd_avx2.h"

#define TIER avx2
#include "kernels_body.h"
#endif
