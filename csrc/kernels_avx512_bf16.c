#ifdef SWA_HAVE_AVX512_BF16
#include "simd_avx512_bf16.h"

#define TIER avx512_bf16
#include "kernels_body.h"
#endif
