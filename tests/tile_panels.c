/* Panels of the amx_bf16 tier against float64, for every number of rows around its blocks. Built with SWA_EMULATE_AMX,
 * or with the instructions themselves for a CPU, or an emulator of one, that has AMX:
 *
 *   cc -std=c11 -O1 -DSWA_HAVE_AMX_BF16 $FLAGS -I csrc tests/tile_panels.c csrc/dispatch.c csrc/kernels_portable.c -lm
 *
 * where FLAGS are those that setup.py gives to the tier. Prints a digest of all results, which is the same for both. */
#include <stdio.h>
#include <stdlib.h>

#include "kernels_amx_bf16.c" /* with its tile instructions */

enum { MAX_M = 49, MAX_K = 384, MAX_STRIDE = MAX_K + 32, GUARD = 0x7fc12345 };

static void fail(const char *what, int64_t m, int64_t k, int64_t row)
{
    printf("%s: m %lld, k %lld, row %lld\n", what, (long long)m, (long long)k, (long long)row);
    exit(1);
}

static float random_value(void) /* a sum of four: mostly below 2 */
{
    static uint32_t state = 1;
    float sum = -2.0f;
    for (int i = 0; i < 4; i++) {
        state = state * 1664525u + 1013904223u;
        sum += (float)(state >> 8) * 0x1p-24f;
    }
    return sum;
}

static uint64_t digest(uint64_t hash, const void *data, size_t n)
{
    for (size_t i = 0; i < n; i++)
        hash = (hash ^ ((const unsigned char *)data)[i]) * 0x100000001b3u;
    return hash;
}

/* What another library of the process might leave behind: its own shape, and tiles full of NaN. */
static void leave_tiles_behind(void)
{
    static const tile_shape_t foreign = {
        .palette = 1, .row_bytes = {64, 4, 64, 64, 16, 64, 64, 8}, .rows = {3, 16, 16, 16, 9, 1, 16, 16}};
    static unsigned char ones[64];
    memset(ones, 0xff, sizeof ones);
    tile_configure(&foreign);
    tile_load(0, ones, 0);
    tile_load(3, ones, 0);
    tile_load(4, ones, 0);
    tile_load(6, ones, 0);
    tile_load(7, ones, 0);
}

static bool released(void)
{
#ifdef SWA_EMULATE_AMX
    return !emulated.configured;
#else
    tile_shape_t shape;
    __asm__ volatile("sttilecfg %0" : "=m"(shape));
    return shape.palette == 0;
#endif
}

typedef struct {
    int64_t k, a_stride, c_stride;
    bool accumulate;
    uint16_t a[MAX_M * MAX_STRIDE], b[MAX_K * PANEL];
    float start[MAX_M * MAX_STRIDE]; /* C before the product; beyond the panel and the rows it must stay */
    float alone[MAX_M][PANEL];       /* C of each row as the only one */
} product_t;

static uint32_t bits_of(float x) { return swa_bits_from_float(x); }

static void check_rows(const product_t *p, int64_t m, const float *c, bool exact)
{
    for (int64_t row = 0; row < MAX_M; row++)
        for (int64_t n = 0; n < p->c_stride; n++) {
            float found = c[row * p->c_stride + n];
            if (row >= m || n >= PANEL) {
                if (bits_of(found) != bits_of(p->start[row * p->c_stride + n]))
                    fail("written outside", m, p->k, row);
                continue;
            }
            if (bits_of(found) != bits_of(p->alone[row][n]))
                fail("depends on its neighbours", m, p->k, row);
            double sum = p->accumulate ? p->start[row * p->c_stride + n] : 0.0, size = fabs(sum);
            for (int64_t i = 0; i < p->k; i++) {
                double term = (double)swa_float_from_bf16(p->a[row * p->a_stride + i]) *
                              (double)swa_float_from_bf16(p->b[i / 2 * 2 * PANEL + n * 2 + i % 2]);
                sum += term;
                size += fabs(term);
            }
            if (exact && !(fabs((double)found - sum) <= (double)(p->k + 1) * 0x1p-24 * size))
                fail("inexact", m, p->k, row);
        }
}

static void multiply(const product_t *p, int64_t row, int64_t m, float *c)
{
    leave_tiles_behind();
    swa_kernels_amx_bf16.panel_bf16(m, p->k, p->a + row * p->a_stride, p->a_stride, p->b, c, p->c_stride,
                                    p->accumulate);
    if (p->k >= TILE_DEPTH && !released())
        fail("tiles are not released", m, p->k, row);
}

/* Every m at once, each row alone, and what lies around C; returns the digest of the results. */
static uint64_t check(product_t *p, uint64_t hash, bool exact)
{
    static float c[MAX_M * MAX_STRIDE];
    const size_t size = (size_t)(MAX_M * p->c_stride) * sizeof *c;
    for (int64_t row = 0; row < MAX_M; row++) {
        memcpy(c, p->start + row * p->c_stride, (size_t)p->c_stride * sizeof *c);
        multiply(p, row, 1, c);
        memcpy(p->alone[row], c, sizeof p->alone[row]);
    }
    for (int64_t m = 1; m <= MAX_M; m++) {
        memcpy(c, p->start, size);
        multiply(p, 0, m, c);
        check_rows(p, m, c, exact);
        hash = digest(hash, c, size);
    }
    return hash;
}

static void fill(product_t *p, int64_t k, bool accumulate, int64_t a_surplus, int64_t c_surplus)
{
    p->k = k;
    p->accumulate = accumulate;
    p->a_stride = k + a_surplus;
    p->c_stride = PANEL + c_surplus;
    for (int64_t i = 0; i < MAX_M * p->a_stride; i++)
        p->a[i] = i % p->a_stride < k ? swa_bf16_from_float(random_value()) : 0x7fc0; /* NaN: must not be read */
    for (int64_t i = 0; i < k * PANEL; i++)
        p->b[i] = swa_bf16_from_float(random_value());
    for (int64_t i = 0; i < MAX_M * p->c_stride; i++)
        p->start[i] = accumulate && i % p->c_stride < PANEL ? random_value() : swa_float_from_bits(GUARD);
}

int main(void)
{
    static const int64_t depths[] = {2, 30, 32, 34, 62, 64, 66, 96, 128, 160, 290, 384};
    static product_t p;
    if (!swa_tier_supported("amx_bf16")) {
        printf("amx_bf16 is not supported here\n");
        return 2;
    }
    uint64_t hash = 0xcbf29ce484222325u;
    int products = 0;
    for (size_t i = 0; i < sizeof depths / sizeof *depths; i++)
        for (int accumulate = 0; accumulate < 2; accumulate++, products++) {
            fill(&p, depths[i], accumulate, (int64_t)(i % 3) * 15, (int64_t)(i % 2) * 7);
            hash = check(&p, hash, true);
        }
    /* Subnormal inputs, sums and outputs; infinities and NaN. */
    fill(&p, 96, true, 0, 0);
    for (int64_t i = 0; i < MAX_M * 96; i++)
        p.a[i] = (uint16_t)(i % 7 ? p.a[i] & 0x83ff : p.a[i] & 0x9fff); /* about 2^-127 or 2^-62 */
    for (int64_t i = 0; i < 96 * PANEL; i++)
        p.b[i] = (uint16_t)(i % 5 ? p.b[i] : p.b[i] & 0x807f);
    hash = check(&p, hash, false);
    fill(&p, 66, false, 0, 0);
    p.a[3 * 66 + 5] = 0x7f80;
    p.a[17 * 66 + 40] = 0xff80;
    p.a[20 * 66 + 65] = 0x7fc0;
    p.a[33 * 66] = p.a[33 * 66 + 1] = 0x7f7f; /* the largest */
    hash = check(&p, hash, false);
    for (int64_t row = 0; row < MAX_M; row++)
        for (int64_t n = 0; n < PANEL; n++)
            if (!isfinite(p.alone[row][n]) && row != 3 && row != 17 && row != 20 && row != 33)
                fail("a bad number left its row", 1, p.k, row);
    printf("%d products for 1 to %d rows, digest %016llx\n", products + 2, MAX_M, (unsigned long long)hash);
    return 0;
}
