/* clang-format off: loops behind macros are laid out by hand. */
/* Every kernel, written once over the vector operations of a tier. The including kernels_*.c names the TIER and
 * brings the type vf, VECTOR_LANES, ROW_TILE (rows of A per register tile), PANEL_VECTORS (vectors per panel) and the
 * vf_*() operations. vf_max and vf_min return their second operand when either is NaN. */
#include <math.h>
#include <stddef.h>

#include "kernels.h"
#include "numeric.h"

#define PANEL (VECTOR_LANES * PANEL_VECTORS)
#ifndef K_BLOCK
#define K_BLOCK (256 * VECTOR_LANES) /* a slice of B stays in L2; smaller ones would load and store C more often */
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* Calls tile(rows, ...) with a compile-time number of rows, so that accumulators live in registers. */
#if ROW_TILE == 12
#define LAST_ROWS(tile)                                                                                                \
    case 11: tile(11); break;                                                                                          \
    case 10: tile(10); break;                                                                                          \
    case 9: tile(9); break;                                                                                            \
    case 8: tile(8); break;                                                                                            \
    case 7: tile(7); break;                                                                                            \
    case 6: tile(6); break;                                                                                            \
    case 5: tile(5); break;                                                                                            \
    case 4: tile(4); break;                                                                                            \
    case 3: tile(3); break;                                                                                            \
    case 2: tile(2); break;                                                                                            \
    case 1: tile(1); break;
#else /* 6 */
#define LAST_ROWS(tile)                                                                                                \
    case 5: tile(5); break;                                                                                            \
    case 4: tile(4); break;                                                                                            \
    case 3: tile(3); break;                                                                                            \
    case 2: tile(2); break;                                                                                            \
    case 1: tile(1); break;
#endif
#define FOR_ROW_TILES(m, tile)                                                                                         \
    int64_t row = 0;                                                                                                   \
    for (; row + ROW_TILE <= (m); row += ROW_TILE)                                                                     \
        tile(ROW_TILE);                                                                                                \
    switch ((m) - row) {                                                                                               \
        LAST_ROWS(tile)                                                                                                \
    }

/* ---- matrix products ------------------------------------------------------------------------------------- */

/* One register tile: rows x PANEL outputs. `load_b` widens one vector of B, so both weight types share the code. */
#define DEFINE_FLOAT_PANEL(name, b_type, load_b)                                                                       \
    INLINE void name##_tile(const int rows, int64_t k, const float *restrict a, int64_t a_stride,                      \
                            const b_type *restrict b, float *restrict c, int64_t c_stride, bool accumulate)            \
    {                                                                                                                  \
        vf sum[ROW_TILE][PANEL_VECTORS];                                                                               \
        UNROLL                                                                                                         \
        for (int r = 0; r < rows; r++)                                                                                 \
            UNROLL                                                                                                     \
        for (int v = 0; v < PANEL_VECTORS; v++)                                                                        \
            sum[r][v] = accumulate ? vf_load(c + r * c_stride + v * VECTOR_LANES) : vf_set1(0.0f);                     \
        for (int64_t p = 0; p < k; p++) {                                                                              \
            vf column[PANEL_VECTORS];                                                                                  \
            UNROLL                                                                                                     \
            for (int v = 0; v < PANEL_VECTORS; v++)                                                                    \
                column[v] = load_b(b + p * PANEL + v * VECTOR_LANES);                                                  \
            UNROLL                                                                                                     \
            for (int r = 0; r < rows; r++) {                                                                           \
                vf value = vf_set1(a[r * a_stride + p]);                                                               \
                UNROLL                                                                                                 \
                for (int v = 0; v < PANEL_VECTORS; v++)                                                                \
                    sum[r][v] = vf_fma(value, column[v], sum[r][v]);                                                   \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL                                                                                                         \
        for (int r = 0; r < rows; r++)                                                                                 \
            UNROLL                                                                                                     \
        for (int v = 0; v < PANEL_VECTORS; v++)                                                                        \
            vf_store(c + r * c_stride + v * VECTOR_LANES, sum[r][v]);                                                  \
    }                                                                                                                  \
    static void name(int64_t m, int64_t k, const float *a, int64_t a_stride, const b_type *b, float *c,                \
                     int64_t c_stride, bool accumulate)                                                                \
    {                                                                                                                  \
        FOR_ROW_TILES(m, CALL_##name)                                                                                  \
    }

#define CALL_panel_f32(rows)                                                                                           \
    panel_f32_tile(rows, k, a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, accumulate)
#define CALL_panel_widening(rows)                                                                                      \
    panel_widening_tile(rows, k, a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, accumulate)
DEFINE_FLOAT_PANEL(panel_f32, float, vf_load)
DEFINE_FLOAT_PANEL(panel_widening, uint16_t, vf_load_bf16)

/* Many rows share B widened once; few widen it on the way, and so do narrow vectors, which have ports to spare for it.
 * The sums are the same. */
static void panel_f32_bf16(int64_t m, int64_t k, const float *a, int64_t a_stride, const uint16_t *b, float *c,
                           int64_t c_stride, bool accumulate)
{
    enum { DEPTH = 256 };
    float wide[DEPTH * PANEL];
    if (VECTOR_LANES < 16 || m < 2 * ROW_TILE) {
        panel_widening(m, k, a, a_stride, b, c, c_stride, accumulate);
        return;
    }
    for (int64_t p = 0; p < k; p += DEPTH) {
        int64_t depth = swa_min(DEPTH, k - p);
        for (int64_t i = 0; i < depth * PANEL; i += VECTOR_LANES)
            vf_store(wide + i, vf_load_bf16(b + p * PANEL + i));
        panel_f32(m, depth, a + p, a_stride, wide, c, c_stride, accumulate || p > 0);
    }
}

#ifdef TIER_HAS_BF16_DOT
INLINE void panel_bf16_tile(const int rows, int64_t k, const uint16_t *restrict a, int64_t a_stride,
                            const uint16_t *restrict b, float *restrict c, int64_t c_stride, bool accumulate)
{
    vf sum[ROW_TILE][PANEL_VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
    for (int v = 0; v < PANEL_VECTORS; v++)
        sum[r][v] = accumulate ? vf_load(c + r * c_stride + v * VECTOR_LANES) : vf_set1(0.0f);
    for (int64_t p = 0; p < k; p += 2) {
        vb column[PANEL_VECTORS];
        UNROLL
        for (int v = 0; v < PANEL_VECTORS; v++)
            column[v] = vb_load(b + p * PANEL + v * 2 * VECTOR_LANES);
        UNROLL
        for (int r = 0; r < rows; r++) {
            vb value = vb_set1_pair(a + r * a_stride + p);
            UNROLL
            for (int v = 0; v < PANEL_VECTORS; v++)
                sum[r][v] = vb_dot(sum[r][v], value, column[v]);
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
    for (int v = 0; v < PANEL_VECTORS; v++)
        vf_store(c + r * c_stride + v * VECTOR_LANES, sum[r][v]);
}
#define CALL_panel_bf16(rows)                                                                                          \
    panel_bf16_tile(rows, k, a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, accumulate)
static void panel_bf16(int64_t m, int64_t k, const uint16_t *a, int64_t a_stride, const uint16_t *b, float *c,
                       int64_t c_stride, bool accumulate){FOR_ROW_TILES(m, CALL_panel_bf16)}
#ifndef TIER_PANEL_BF16 /* a tier may have a better one */
#define TIER_PANEL_BF16 panel_bf16
#endif
#endif

/* ---- elementwise ------------------------------------------------------------------------------------------ */

/* Runs a vector body over [0, n), its last incomplete vector through zero-padded copies. */
#define FOR_VECTORS(n) for (int64_t i = 0; i < (n); i += VECTOR_LANES)

INLINE vf load_some(const float *x, int64_t n)
{
    if (n >= VECTOR_LANES)
        return vf_load(x);
    float padded[VECTOR_LANES] = {0};
    for (int64_t i = 0; i < n; i++)
        padded[i] = x[i];
    return vf_load(padded);
}

INLINE void store_some(float *x, int64_t n, vf value)
{
    if (n >= VECTOR_LANES) {
        vf_store(x, value);
        return;
    }
    float padded[VECTOR_LANES];
    vf_store(padded, value);
    for (int64_t i = 0; i < n; i++)
        x[i] = padded[i];
}

INLINE float lanes_sum(vf value)
{
    float lanes[VECTOR_LANES];
    vf_store(lanes, value);
    for (int width = VECTOR_LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] += lanes[i + width];
    return lanes[0];
}

INLINE float lanes_max(vf value)
{
    float lanes[VECTOR_LANES];
    vf_store(lanes, value);
    for (int width = VECTOR_LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

INLINE vf polynomial(const int degree, const float *coefficients, vf x)
{
    vf p = vf_set1(coefficients[0]);
    UNROLL
    for (int i = 1; i <= degree; i++)
        p = vf_fma(p, x, vf_set1(coefficients[i]));
    return p;
}

/* 2^x for x <= 127, and zero where that is below 2^-125, which no sum of probabilities can notice; NaN stays NaN. The
 * polynomial (Chebyshev fit on [-1/2, 1/2]) has a relative error below 2e-7. */
INLINE vf exp2_bounded(vf x)
{
    static const float coefficients[] = {1.5461444855e-4f,
                                         1.3400427997e-3f,
                                         9.6180569381e-3f,
                                         5.5503271520e-2f,
                                         2.4022650719e-1f,
                                         6.9314718246e-1f,
                                         1.0f};
    x = vf_max(vf_set1(-200.0f), x); /* -inf - -inf would be NaN */
    vf whole = vf_round(x);
    return vf_times_power_of_2(polynomial(6, coefficients, vf_sub(x, whole)), whole);
}

INLINE vf exp2_vector(vf x) { return exp2_bounded(vf_min(vf_set1(127.4f), x)); }

static void rms_norm(int64_t n, const float *x, const float *weight, float eps, float *out)
{
    vf squares = vf_set1(0.0f);
    FOR_VECTORS(n)
    {
        vf value = load_some(x + i, n - i);
        squares = vf_fma(value, value, squares);
    }
    vf factor = vf_set1(1.0f / sqrtf(lanes_sum(squares) / (float)n + eps));
    FOR_VECTORS(n)
    store_some(out + i, n - i, vf_mul(vf_mul(load_some(x + i, n - i), factor), load_some(weight + i, n - i)));
}

static void rope(int64_t half, float *x, const float *cos, const float *sin)
{
    FOR_VECTORS(half)
    {
        int64_t left = half - i;
        vf c = load_some(cos + i, left), s = load_some(sin + i, left);
        vf first = load_some(x + i, left), second = load_some(x + half + i, left);
        store_some(x + i, left, vf_sub(vf_mul(first, c), vf_mul(second, s)));
        store_some(x + half + i, left, vf_add(vf_mul(second, c), vf_mul(first, s)));
    }
}

static void silu_mul(int64_t n, const float *gate, const float *up, float *out)
{
    FOR_VECTORS(n)
    {
        vf g = load_some(gate + i, n - i);
        vf denominator = vf_add(vf_set1(1.0f), exp2_vector(vf_mul(g, vf_set1(-SWA_LOG2_E))));
        store_some(out + i, n - i, vf_mul(vf_div(g, denominator), load_some(up + i, n - i)));
    }
}

static void add(int64_t n, float *x, const float *y)
{
    FOR_VECTORS(n) store_some(x + i, n - i, vf_add(load_some(x + i, n - i), load_some(y + i, n - i)));
}

static void add_scaled(int64_t n, float *x, float factor, const float *y)
{
    FOR_VECTORS(n)
    store_some(x + i, n - i, vf_fma(vf_set1(factor), load_some(y + i, n - i), load_some(x + i, n - i)));
}

static void scale(int64_t n, float *x, float factor)
{
    FOR_VECTORS(n) store_some(x + i, n - i, vf_mul(load_some(x + i, n - i), vf_set1(factor)));
}

static void to_bf16(int64_t n, const float *x, uint16_t *out)
{
    int64_t i = 0;
    for (; i + VECTOR_LANES <= n; i += VECTOR_LANES)
        vf_store_bf16(out + i, vf_load(x + i));
    for (; i < n; i++)
        out[i] = swa_bf16_from_float(x[i]);
}

/* ---- softmax ---------------------------------------------------------------------------------------------- */

/* The shift of a row's exponents lags behind its maximum by up to 2^LAG, so that rescaling is rare. */
#define LAG 8.0f

/* Moves a row's shift where scores of a tile exceed it by far, and what was summed under the old one with it. Returns
 * what to add to scaled scores. */
INLINE vf follow_scores(const float *scores, float scale_factor, float *shift, float *sums, float *output,
                        int64_t n_out)
{
    vf top = vf_load(scores);
    UNROLL
    for (int v = VECTOR_LANES; v < SWA_TILE; v += VECTOR_LANES)
        top = vf_max(top, vf_load(scores + v));
    if (vf_any_greater(vf_mul(top, vf_set1(scale_factor)), vf_set1(*shift + LAG))) {
        float moved = lanes_max(top) * scale_factor, lanes[VECTOR_LANES];
        if (*shift != -INFINITY) { /* else there are zeros */
            vf_store(lanes, exp2_vector(vf_set1(*shift - moved)));
            scale(SWA_MAX_LANES, sums, lanes[0]);
            scale(n_out, output, lanes[0]);
        }
        *shift = moved;
    }
    return vf_set1(*shift == -INFINITY ? 0.0f : -*shift); /* nothing visible: any finite shift gives exp2(-inf) = 0 */
}

static void softmax_tile(int64_t m, const float *scores, float *probabilities, float scale_factor, float *shifts,
                         float *sums, float *output, int64_t output_stride, int64_t n_out)
{
    const vf factor = vf_set1(scale_factor);
    for (int64_t r = 0; r < m; r++, scores += SWA_TILE, probabilities += SWA_TILE, sums += SWA_MAX_LANES) {
        vf shift = follow_scores(scores, scale_factor, shifts + r, sums, output + r * output_stride, n_out);
        vf sum = vf_load(sums);
        UNROLL
        for (int v = 0; v < SWA_TILE; v += VECTOR_LANES) {
            vf p = exp2_bounded(vf_fma(vf_load(scores + v), factor, shift));
            vf_store(probabilities + v, p);
            sum = vf_add(sum, p);
        }
        vf_store(sums, sum);
    }
}

#ifdef TIER_HAS_BF16_DOT
/* 2^x for x <= 127, to be rounded to bf16: the polynomial (minimax on [0, 1]) has a relative error below 8e-5. */
INLINE vf exp2_coarse(vf x)
{
    static const float coefficients[] = {7.8024522615e-2f, 2.2606715546e-1f, 6.9583354048e-1f, 9.9992521856e-1f};
    return vf_times_power_of_2(polynomial(3, coefficients, vf_fraction(x)), x);
}

/* What is summed is what will be multiplied: a row that sees one key gets its value. */
static void softmax_tile_bf16(int64_t m, const float *scores, uint16_t *probabilities, float scale_factor,
                              float *shifts, float *sums, float *output, int64_t output_stride, int64_t n_out)
{
    static const uint16_t one_one[] = {0x3f80, 0x3f80};
    const vf factor = vf_set1(scale_factor);
    const vb ones = vb_set1_pair(one_one);
    for (int64_t r = 0; r < m; r++, scores += SWA_TILE, probabilities += SWA_TILE, sums += SWA_MAX_LANES) {
        vf shift = follow_scores(scores, scale_factor, shifts + r, sums, output + r * output_stride, n_out);
        vf sum = vf_load(sums);
        UNROLL
        for (int v = 0; v < SWA_TILE; v += 2 * VECTOR_LANES) {
            vf first = exp2_coarse(vf_fma(vf_load(scores + v), factor, shift));
            vf second = exp2_coarse(vf_fma(vf_load(scores + v + VECTOR_LANES), factor, shift));
            vb rounded = vb_round(first, second);
            vb_store(probabilities + v, rounded);
            sum = vb_dot(sum, rounded, ones);
        }
        vf_store(sums, sum);
    }
}
#endif

static void exp_shifted(int64_t n, const float *x, float shift, float *out)
{
    FOR_VECTORS(n)
    {
        vf exponent = vf_mul(vf_sub(load_some(x + i, n - i), vf_set1(shift)), vf_set1(SWA_LOG2_E));
        store_some(out + i, n - i, exp2_vector(exponent));
    }
}

/* ---- backward ---------------------------------------------------------------------------------------------- */

static void dot(int64_t n, const float *x, const float *y, float *out)
{
    vf products = vf_set1(0.0f);
    FOR_VECTORS(n) products = vf_fma(load_some(x + i, n - i), load_some(y + i, n - i), products);
    *out = lanes_sum(products);
}

/* With r = 1 / sqrt(mean(x^2) + eps): d_x = r (weight d_out - x r^2 mean(weight d_out x)). */
static void rms_norm_back(int64_t n, const float *x, const float *weight, float eps, const float *d_out, float *d_x)
{
    vf squares = vf_set1(0.0f), products = vf_set1(0.0f);
    FOR_VECTORS(n)
    {
        vf value = load_some(x + i, n - i);
        squares = vf_fma(value, value, squares);
        products = vf_fma(vf_mul(load_some(weight + i, n - i), load_some(d_out + i, n - i)), value, products);
    }
    float r = 1.0f / sqrtf(lanes_sum(squares) / (float)n + eps);
    vf factor = vf_set1(r), pull = vf_set1(-r * r * r * (lanes_sum(products) / (float)n));
    FOR_VECTORS(n)
    {
        vf direct = vf_mul(vf_mul(load_some(weight + i, n - i), load_some(d_out + i, n - i)), factor);
        vf change = vf_fma(pull, load_some(x + i, n - i), direct);
        store_some(d_x + i, n - i, vf_add(load_some(d_x + i, n - i), change));
    }
}

/* With s = sigmoid(gate): d silu / d gate = s (1 + gate (1 - s)). */
static void silu_mul_back(int64_t n, const float *gate, const float *up, const float *d_out, float *d_gate, float *d_up)
{
    const vf one = vf_set1(1.0f);
    FOR_VECTORS(n)
    {
        vf g = load_some(gate + i, n - i), d = load_some(d_out + i, n - i), u = load_some(up + i, n - i);
        vf s = vf_div(one, vf_add(one, exp2_vector(vf_mul(g, vf_set1(-SWA_LOG2_E)))));
        vf slope = vf_mul(s, vf_fma(g, vf_sub(one, s), one));
        store_some(d_up + i, n - i, vf_mul(d, vf_mul(g, s)));
        store_some(d_gate + i, n - i, vf_mul(vf_mul(d, u), slope));
    }
}

static void softmax_back_queries(int64_t m, const float *scores, const float *d_probabilities, float scale_factor,
                                 float weight, const float *log_sum, const float *delta, bool accumulate,
                                 float *d_scores)
{
    for (int64_t r = 0; r < m; r++)
        for (int64_t i = r * SWA_TILE; i < (r + 1) * SWA_TILE; i += VECTOR_LANES) {
            vf exponent = vf_sub(vf_mul(vf_load(scores + i), vf_set1(scale_factor)), vf_set1(log_sum[r]));
            vf p = vf_mul(exp2_vector(exponent), vf_set1(weight));
            vf change = vf_mul(p, vf_sub(vf_load(d_probabilities + i), vf_set1(delta[r])));
            vf_store(d_scores + i, accumulate ? vf_add(vf_load(d_scores + i), change) : change);
        }
}

static void softmax_back_keys(int64_t m, const float *scores, const float *d_probabilities, float scale_factor,
                              float weight, const float *log_sum, const float *delta, bool accumulate,
                              float *probabilities, float *d_scores)
{
    for (int64_t r = 0; r < m; r++)
        for (int64_t column = 0; column < SWA_TILE; column += VECTOR_LANES) {
            int64_t i = r * SWA_TILE + column;
            vf exponent = vf_sub(vf_mul(vf_load(scores + i), vf_set1(scale_factor)), vf_load(log_sum + column));
            vf p = vf_mul(exp2_vector(exponent), vf_set1(weight));
            vf change = vf_mul(p, vf_sub(vf_load(d_probabilities + i), vf_load(delta + column)));
            vf_store(probabilities + i, accumulate ? vf_add(vf_load(probabilities + i), p) : p);
            vf_store(d_scores + i, accumulate ? vf_add(vf_load(d_scores + i), change) : change);
        }
}

/* ---- measurements ------------------------------------------------------------------------------------------ */

#define FOR_SUMS                                                                                                       \
    UNROLL                                                                                                             \
    for (int r = 0; r < ROW_TILE; r++)                                                                                 \
        UNROLL                                                                                                         \
    for (int v = 0; v < PANEL_VECTORS; v++)

/* As many chains as a register tile has; volatile: the compiler must neither know the factor nor drop the sums. */
static void peak_f32(int64_t n, double *flops)
{
    volatile float one = 1.0f;
    vf factor = vf_set1(one), total = vf_set1(0.0f), sums[ROW_TILE][PANEL_VECTORS];
    FOR_SUMS sums[r][v] = vf_set1(one * (float)(r * PANEL_VECTORS + v)); /* equal chains would become one */
    for (int64_t round = 0; round < n; round++)
        FOR_SUMS sums[r][v] = vf_fma(factor, sums[r][v], factor);
    FOR_SUMS total = vf_add(total, sums[r][v]);
    volatile float kept = lanes_sum(total);
    (void)kept;
    *flops = 2.0 * ROW_TILE * PANEL * (double)n;
}

#if defined(TIER_HAS_BF16_DOT) && !defined(TIER_PEAK_BF16)
#define TIER_PEAK_BF16 peak_bf16
static void peak_bf16(int64_t n, double *flops)
{
    volatile uint32_t ones = 0x3f803f80; /* two of them */
    uint32_t pair = ones;
    vb factor = vb_set1_pair((const uint16_t *)&pair);
    vf total = vf_set1(0.0f), sums[ROW_TILE][PANEL_VECTORS];
    FOR_SUMS sums[r][v] = vf_set1((float)(r * PANEL_VECTORS + v));
    for (int64_t round = 0; round < n; round++)
        FOR_SUMS sums[r][v] = vb_dot(sums[r][v], factor, factor);
    FOR_SUMS total = vf_add(total, sums[r][v]);
    volatile float kept = lanes_sum(total);
    (void)kept;
    *flops = 4.0 * ROW_TILE * PANEL * (double)n;
}
#endif

static void sum(int64_t n, const float *x, float *out)
{
    enum { CHAINS = 8 };
    vf sums[CHAINS];
    int64_t i = 0;
    UNROLL
    for (int v = 0; v < CHAINS; v++)
        sums[v] = vf_set1(0.0f);
    for (; i + CHAINS * VECTOR_LANES <= n; i += CHAINS * VECTOR_LANES)
        UNROLL
    for (int v = 0; v < CHAINS; v++)
        sums[v] = vf_add(sums[v], vf_load(x + i + v * VECTOR_LANES));
    for (; i < n; i += VECTOR_LANES)
        sums[0] = vf_add(sums[0], load_some(x + i, n - i));
    UNROLL
    for (int v = 1; v < CHAINS; v++)
        sums[0] = vf_add(sums[0], sums[v]);
    *out = lanes_sum(sums[0]);
}

#define JOIN_EXPANDED(a, b) a##b
#define JOIN(a, b) JOIN_EXPANDED(a, b)
#define QUOTE_EXPANDED(a) #a
#define QUOTE(a) QUOTE_EXPANDED(a)

const swa_kernels_t JOIN(swa_kernels_, TIER) = {
    .name = QUOTE(TIER),
    .panel = PANEL,
    .k_block = K_BLOCK,
#ifdef TIER_HAS_BF16_DOT
    .panel_bf16 = TIER_PANEL_BF16,
    .softmax_tile_bf16 = softmax_tile_bf16,
    .peak_bf16 = TIER_PEAK_BF16,
#endif
    .panel_f32 = panel_f32,
    .panel_f32_bf16 = panel_f32_bf16,
    .rms_norm = rms_norm,
    .rope = rope,
    .silu_mul = silu_mul,
    .add = add,
    .add_scaled = add_scaled,
    .scale = scale,
    .to_bf16 = to_bf16,
    .softmax_tile = softmax_tile,
    .exp_shifted = exp_shifted,
    .dot = dot,
    .rms_norm_back = rms_norm_back,
    .silu_mul_back = silu_mul_back,
    .softmax_back_queries = softmax_back_queries,
    .softmax_back_keys = softmax_back_keys,
    .peak_f32 = peak_f32,
    .sum = sum,
};
