/* The kernel table of an ISA tier. Kernels know neither Python nor threads. */
#ifndef SWA_KERNELS_H
#define SWA_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

#include "swa.h"

#ifndef __x86_64__
#undef SWA_HAVE_AMX_BF16 /* tiles exist in 64-bit mode alone */
#endif

enum {
    SWA_TILE = 64,      /* keys per attention tile; tiles are aligned to absolute positions */
    SWA_MAX_PANEL = 64, /* widest panel of any tier */
    SWA_MAX_LANES = 16  /* floats in the widest vector of any tier */
};

struct swa_kernels {
    const char *name;
    int64_t panel;   /* output columns of a packed panel */
    int64_t k_block; /* most of k in one call of a panel kernel: a multiple of 32 */
#define SWA_KERNEL(name, parameters) void(*name) parameters;
#include "kernels.inc"
#undef SWA_KERNEL
};

extern const swa_kernels_t swa_kernels_portable;
#ifdef SWA_HAVE_AVX2
extern const swa_kernels_t swa_kernels_avx2;
#endif
#ifdef SWA_HAVE_AVX512
extern const swa_kernels_t swa_kernels_avx512;
#endif
#ifdef SWA_HAVE_AVX512_BF16
extern const swa_kernels_t swa_kernels_avx512_bf16;
#endif
#ifdef SWA_HAVE_AMX_BF16
extern const swa_kernels_t swa_kernels_amx_bf16;
#endif

#endif
