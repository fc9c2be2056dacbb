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
static inline void vb_store(uint16_t *p, vb x) { _mm512_storeu_si512(p, (__m512i)x); }
static inline vb vb_round(vf first, vf second) { return (vb)_mm512_cvtne2ps_pbh(second, first); }
/* x - floor(x); 0 for an infinite x. */
static inline vf vf_fraction(vf x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
