/* AMX: eight tile registers of 16 rows of 64 bytes, and the instruction that multiplies two into a third. A shape is
 * loaded before use and released after it. Tile numbers are literals. */
#ifndef SWA_TILES_H
#define SWA_TILES_H

#include <stdint.h>

/* The operand of LDTILECFG. Entries from 8 on are reserved and zero; a tile that is not used has neither rows nor
 * bytes. */
typedef struct {
    uint8_t palette; /* 1: eight tiles of up to 16 rows of 64 bytes */
    uint8_t start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shape_t;
_Static_assert(sizeof(tile_shape_t) == 64, "the instruction reads 64 bytes");

#ifdef SWA_EMULATE_AMX
#include "tiles_emulated.h"
#else
/* Not the compilers' intrinsics: GCC 12 believes that _tile_loadconfig reads 8 bytes, and drops stores to the others;
 * _tile_loadd does not say that it reads memory. Strides are in bytes. */
#define tile_configure(shape) __asm__ volatile("ldtilecfg %0" : : "m"(*(shape)))
#define tile_release() __asm__ volatile("tilerelease")
#define tile_zero(tile) __asm__ volatile("tilezero %tmm" #tile)
#define tile_load(tile, from, stride)                                                                                  \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((int64_t)(stride)) : "memory")
#define tile_store(tile, to, stride)                                                                                   \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((int64_t)(stride)) : "memory")
/* c[m][n] += sum over pairs of a[m][k] b[k][n]: bf16 products, summed in float32 for the even and the odd k apart. */
#define tile_dot(c, a, b) __asm__ volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #c)
#endif

#endif
