/* AVX512_BF16, whose bf16 products AMX takes over: 16 rows of A times 16 columns of a panel in one instruction. The
 * panel's layout [k / 2][32][2] serves as it is: 16 pairs of k by 16 columns are a tile with rows 128 bytes apart. */
#include "kernels.h"

#ifdef SWA_HAVE_AMX_BF16
#include "simd_avx512_bf16.h"
#include "tiles.h"

static void panel_bf16_tiles(int64_t m, int64_t k, const uint16_t *a, int64_t a_stride, const uint16_t *b, float *c,
                             int64_t c_stride, bool accumulate);
static void peak_bf16_tiles(int64_t n, double *flops);

#define TIER amx_bf16
#define K_BLOCK 384 /* products are fast enough to need their slice of B in L1: 24 KiB */
#define TIER_PANEL_BF16 panel_bf16_tiles
#define TIER_PEAK_BF16 peak_bf16_tiles
#include "kernels_body.h"

enum { TILE_ROWS = 16, TILE_COLUMNS = 16, TILE_DEPTH = 32, BLOCK_ROWS = 2 * TILE_ROWS };
_Static_assert(PANEL == 2 * TILE_COLUMNS, "a block is two tiles wide");

/* A block of C is 2 x 2 tiles: 0 and 1 above 2 and 3. Tiles 4 above 5 are A, 6 beside 7 B. */
#define SHAPE(upper, lower)                                                                                            \
    {                                                                                                                  \
        .palette = 1,                                                                                                  \
        .row_bytes = {64, 64, (lower) ? 64 : 0, (lower) ? 64 : 0, 64, (lower) ? 64 : 0, 64, 64},                       \
        .rows = {(upper), (upper), (lower), (lower), (upper), (lower), TILE_DEPTH / 2, TILE_DEPTH / 2},                \
    }
#define UPPER(rows) SHAPE(rows, 0)
#define LOWER(rows) SHAPE(TILE_ROWS, rows)
#define EACH(of)                                                                                                       \
    of(1), of(2), of(3), of(4), of(5), of(6), of(7), of(8), of(9), of(10), of(11), of(12), of(13), of(14), of(15),     \
        of(16)
static const tile_shape_t shapes[BLOCK_ROWS] = {EACH(UPPER), EACH(LOWER)}; /* for 1 to 32 rows */

/* c[rows][panel] (+)= a[rows][k] b for up to 32 rows; `lower`: there are more than 16. k is a multiple of 32. */
INLINE void tile_block(const bool lower, int64_t k, const uint16_t *a, int64_t a_stride, const uint16_t *b, float *c,
                       int64_t c_stride, bool accumulate)
{
    const int64_t a_bytes = a_stride * (int64_t)sizeof *a, b_bytes = 2 * PANEL * (int64_t)sizeof *b;
    const int64_t c_bytes = c_stride * (int64_t)sizeof *c;
    const uint16_t *a_lower = lower ? a + TILE_ROWS * a_stride : NULL;
    float *c_lower = lower ? c + TILE_ROWS * c_stride : NULL;
    if (accumulate) {
        tile_load(0, c, c_bytes);
        tile_load(1, c + TILE_COLUMNS, c_bytes);
        if (lower) {
            tile_load(2, c_lower, c_bytes);
            tile_load(3, c_lower + TILE_COLUMNS, c_bytes);
        }
    } else {
        tile_zero(0);
        tile_zero(1);
        if (lower) {
            tile_zero(2);
            tile_zero(3);
        }
    }
    for (int64_t p = 0; p < k; p += TILE_DEPTH) {
        tile_load(6, b + p * PANEL, b_bytes);
        tile_load(4, a + p, a_bytes);
        tile_dot(0, 4, 6);
        tile_load(7, b + p * PANEL + 2 * TILE_COLUMNS, b_bytes);
        tile_dot(1, 4, 7);
        if (lower) {
            tile_load(5, a_lower + p, a_bytes);
            tile_dot(2, 5, 6);
            tile_dot(3, 5, 7);
        }
    }
    tile_store(0, c, c_bytes);
    tile_store(1, c + TILE_COLUMNS, c_bytes);
    if (lower) {
        tile_store(2, c_lower, c_bytes);
        tile_store(3, c_lower + TILE_COLUMNS, c_bytes);
    }
}

/* Every row goes the same way, a lone one too: whole tiles of k through AMX, and the rest as AVX512_BF16 does it; so a
 * row's bits depend neither on m nor on its neighbours.
 *
 * Tile registers are the caller's to save, like vectors, so nothing is owed to other users of AMX in the process
 * (torch, say), whose shape this one replaces; nor may one be expected to be still loaded from the last call. Released
 * tiles need not be saved at a context switch or for a signal. */
static void panel_bf16_tiles(int64_t m, int64_t k, const uint16_t *a, int64_t a_stride, const uint16_t *b, float *c,
                             int64_t c_stride, bool accumulate)
{
    const int64_t whole = k / TILE_DEPTH * TILE_DEPTH;
    if (whole) {
        int64_t shape = 0;
        for (int64_t row = 0; row < m; row += BLOCK_ROWS) {
            const int64_t rows = swa_min(BLOCK_ROWS, m - row);
            const int64_t fitting = rows % TILE_ROWS ? rows : BLOCK_ROWS;
            if (shape != fitting)
                tile_configure(&shapes[fitting - 1]);
            shape = fitting;
            if (rows > TILE_ROWS)
                tile_block(true, whole, a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, accumulate);
            else
                tile_block(false, whole, a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, accumulate);
        }
        tile_release();
    }
    if (whole < k)
        panel_bf16(m, k - whole, a + whole, a_stride, b + whole * PANEL, c, c_stride, accumulate || whole > 0);
}

static void peak_bf16_tiles(int64_t n, double *flops)
{
    static const uint16_t ones[TILE_DEPTH] = {[0 ... TILE_DEPTH - 1] = 0x3f80};
    tile_configure(&shapes[BLOCK_ROWS - 1]);
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    tile_load(4, ones, 0);
    tile_load(5, ones, 0);
    tile_load(6, ones, 0);
    tile_load(7, ones, 0);
    for (int64_t round = 0; round < n; round++) {
        tile_dot(0, 4, 6);
        tile_dot(1, 4, 7);
        tile_dot(2, 5, 6);
        tile_dot(3, 5, 7);
    }
    tile_release();
    *flops = 2.0 * BLOCK_ROWS * PANEL * TILE_DEPTH * (double)n;
}
#endif
