/* Number formats: bfloat16 and float16 to and from float32, bit for bit. */
#ifndef SWA_NUMERIC_H
#define SWA_NUMERIC_H

#include <stdint.h>
#include <string.h>

#define SWA_LOG2_E 1.44269504088896340736f
#define SWA_LN_2 0.69314718055994530942

static inline float swa_float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t swa_bits_from_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float swa_float_from_bf16(uint16_t value) { return swa_float_from_bits((uint32_t)value << 16); }

/* Round to nearest, ties to even; a NaN stays a (quiet) NaN. */
static inline uint16_t swa_bf16_from_float(float value)
{
    uint32_t bits = swa_bits_from_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float swa_float_from_f16(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000u) << 16;
    uint32_t exponent = (value >> 10) & 0x1fu, mantissa = value & 0x3ffu;
    if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24 is exact */
        float magnitude = (float)mantissa * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    if (exponent == 31)
        return swa_float_from_bits(sign | 0x7f800000u | (mantissa << 13));
    return swa_float_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

static inline int64_t swa_round_up(int64_t value, int64_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

static inline int64_t swa_min(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t swa_max(int64_t a, int64_t b) { return a > b ? a : b; }

#endif
