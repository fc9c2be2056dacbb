/* Vector operations of the tiers with AVX512_BF16, which multiplies pairs of bf16 into float32. */
#include "simd_avx512.h"

#define TIER_HAS_BF16_DOT
typedef __m512bh vb; /* 16 pairs of bf16 */

static inline vb vb_load(const uint16_t *p) { return (vb)_mm512_loadu_si512(p); }
static inline vb vb_set1_pair(const uint16_t *p)
{
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return (vb)_mm512_set1_epi32(pair);
}
static inline vf vb_dot(vf sum, vb a, vb b) { return _mm512_dpbf16_ps(sum, a, b); }
