/* Vector operations in portable C: four lanes of the compilers' vector extension (SSE2, NEON, or scalars). */
#include <stdbool.h>
#include <string.h>

#include "numeric.h"

#define VECTOR_LANES 4
#define PANEL_VECTORS 2
#define ROW_TILE 6

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

static inline vf vf_load(const float *p)
{
    vf x;
    memcpy(&x, p, sizeof x);
    return x;
}
static inline void vf_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
static inline vf vf_set1(float x) { return (vf){x, x, x, x}; }
static inline vf vf_add(vf a, vf b) { return a + b; }
static inline vf vf_sub(vf a, vf b) { return a - b; }
static inline vf vf_mul(vf a, vf b) { return a * b; }
static inline vf vf_div(vf a, vf b) { return a / b; }
static inline vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf vf_select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
static inline vf vf_max(vf a, vf b) { return vf_select(a > b, a, b); }
static inline vf vf_min(vf a, vf b) { return vf_select(a < b, a, b); }
/* Adding and subtracting 1.5 * 2^23 rounds |x| < 2^22 to the nearest integer. */
static inline vf vf_round(vf x)
{
    vf magic = vf_set1(0x1.8p23f);
    return (x + magic) - magic;
}
static inline vf vf_times_power_of_2(vf x, vf whole)
{
    vi exponent = (vi)(whole + vf_set1(0x1.8p23f)) << 23; /* the sum's low bits are the integer */
    exponent &= whole == whole;                           /* a NaN's are anything: it stays what it is */
    return (vf)(~(whole < vf_set1(-125.0f)) & ((vi)x + exponent));
}
static inline bool vf_any_greater(vf a, vf b)
{
    vi greater = a > b;
    return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
}

static inline vf vf_load_bf16(const uint16_t *p)
{
    return (vf){swa_float_from_bf16(p[0]), swa_float_from_bf16(p[1]), swa_float_from_bf16(p[2]),
                swa_float_from_bf16(p[3])};
}
static inline void vf_store_bf16(uint16_t *p, vf x)
{
    for (int i = 0; i < VECTOR_LANES; i++)
        p[i] = swa_bf16_from_float(x[i]);
}
