/* The tile instructions in plain C, after the operations that Intel's Software Developer's Manual gives for each: for
 * test builds (SWA_EMULATE_AMX), where the machine need not have AMX. What would fault aborts, and says why. */
#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EMULATED_TILES = 8, EMULATED_ROWS = 16, EMULATED_BYTES = 64 };

typedef struct {
    int rows, bytes;
    unsigned char data[EMULATED_ROWS][EMULATED_BYTES];
} emulated_tile_t;

static _Thread_local struct {
    bool configured;
    emulated_tile_t tiles[EMULATED_TILES];
} emulated;

static void emulated_check(bool right, const char *what)
{
    if (!right) {
        fprintf(stderr, "emulated tiles: %s\n", what);
        abort();
    }
}

static emulated_tile_t *emulated_tile(int tile)
{
    emulated_check(emulated.configured, "no shape is loaded");
    emulated_check(emulated.tiles[tile].rows > 0, "the tile is not part of the shape");
    return &emulated.tiles[tile];
}

static void tile_release(void) { memset(&emulated, 0, sizeof emulated); }

static void tile_configure(const tile_shape_t *shape)
{
    static const unsigned char zeros[14];
    emulated_check(shape->palette == 1 && shape->start_row == 0, "the shape is not of palette 1 from row 0");
    emulated_check(!memcmp(shape->reserved, zeros, sizeof zeros), "reserved bytes of the shape are set");
    tile_release();
    emulated.configured = true;
    for (int i = 0; i < 16; i++) {
        int rows = shape->rows[i], bytes = shape->row_bytes[i];
        emulated_check(i < EMULATED_TILES || (!rows && !bytes), "reserved entries of the shape are set");
        emulated_check(rows <= EMULATED_ROWS && bytes <= EMULATED_BYTES, "a tile of the shape is too large");
        emulated_check(!rows == !bytes, "a tile of the shape has rows but no bytes, or bytes but no rows");
        if (i < EMULATED_TILES) {
            emulated.tiles[i].rows = rows;
            emulated.tiles[i].bytes = bytes;
        }
    }
}

static void tile_zero(int tile)
{
    emulated_tile_t *to = emulated_tile(tile);
    memset(to->data, 0, sizeof to->data);
}

static void tile_load(int tile, const void *from, int64_t stride)
{
    emulated_tile_t *to = emulated_tile(tile);
    memset(to->data, 0, sizeof to->data);
    for (int row = 0; row < to->rows; row++)
        memcpy(to->data[row], (const unsigned char *)from + row * stride, (size_t)to->bytes);
}

static void tile_store(int tile, void *to, int64_t stride)
{
    const emulated_tile_t *from = emulated_tile(tile);
    for (int row = 0; row < from->rows; row++)
        memcpy((unsigned char *)to + row * stride, from->data[row], (size_t)from->bytes);
}

/* bf16 is the upper half of a float: of a pair, the even or the odd one. */
static void emulated_widen(const unsigned char *pairs, int odd, float *wide)
{
    for (int i = 0; i < EMULATED_BYTES / 4; i++) {
        uint32_t pair, bits;
        memcpy(&pair, pairs + 4 * i, sizeof pair);
        bits = odd ? pair & 0xffff0000u : pair << 16;
        memcpy(&wide[i], &bits, sizeof bits);
    }
}

/* TDPBF16PS but for its floating-point environment. Not inlined: no operation may leave that environment. */
static __attribute__((noinline)) void emulated_dot(emulated_tile_t *c, const emulated_tile_t *a,
                                                   const emulated_tile_t *b)
{
    enum { COLUMNS = EMULATED_BYTES / 4 };
    float right[EMULATED_ROWS][2][COLUMNS];
    for (int k = 0; k < b->rows; k++)
        for (int odd = 0; odd < 2; odd++)
            emulated_widen(b->data[k], odd, right[k][odd]);
    for (int m = 0; m < c->rows; m++) {
        float left[2][COLUMNS], sums[2][COLUMNS] = {{0}}, out[COLUMNS];
        for (int odd = 0; odd < 2; odd++) {
            emulated_widen(a->data[m], odd, left[odd]);
            for (int k = 0; k < b->rows; k++)
                for (int n = 0; n < COLUMNS; n++) /* columns beyond the shape are zeros */
                    sums[odd][n] = fmaf(left[odd][k], right[k][odd][n], sums[odd][n]);
        }
        memcpy(out, c->data[m], sizeof out);
        for (int n = 0; n < c->bytes / 4; n++)
            out[n] += sums[0][n] + sums[1][n];
        memcpy(c->data[m], out, sizeof out);
    }
}

static void tile_dot(int c, int a, int b)
{
    emulated_tile_t *to = emulated_tile(c), *left = emulated_tile(a), *right = emulated_tile(b);
    emulated_check(c != a && c != b && a != b, "a tile is multiplied with itself");
    emulated_check(to->rows == left->rows && to->bytes == right->bytes && left->bytes == 4 * right->rows,
                   "shapes of a product do not fit");
    const unsigned saved = _mm_getcsr(), masked_nearest = 0x1f80, subnormals_are_zeros = 0x8040;
    _mm_setcsr(masked_nearest | subnormals_are_zeros);
    emulated_dot(to, left, right);
    _mm_setcsr(saved);
}
