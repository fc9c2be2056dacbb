/* Streaming-softmax attention over packed key tiles: full and windowed rows visit the same tiles, aligned to absolute
 * positions, and every decision is taken per row; so a row's bits depend on its query and its visible keys alone. */
#include "attention.h"

#include <math.h>

#include "arena.h"

/* ---- keys and values ---------------------------------------------------------------------------------------- */

static size_t element_size(const swa_kv_t *kv) { return kv->bf16 ? sizeof(uint16_t) : sizeof(float); }

swa_kv_t swa_kv_layout(const swa_kernels_t *kernels, bool bf16, int64_t n_kv_heads, int64_t head_dim, int64_t n_tokens)
{
    swa_kv_t kv = {.kernels = kernels, .bf16 = bf16, .n_kv_heads = n_kv_heads, .head_dim = head_dim};
    kv.value_columns = swa_round_up(head_dim, kernels->panel);
    kv.slots = (n_tokens + SWA_TILE - 1) / SWA_TILE;
    kv.key_tile_bytes = (size_t)(SWA_TILE * head_dim) * element_size(&kv);
    kv.value_tile_bytes = (size_t)(SWA_TILE * kv.value_columns) * element_size(&kv);
    return kv;
}

static size_t tile_count(const swa_kv_t *kv) { return (size_t)(kv->n_kv_heads * kv->slots); }

size_t swa_kv_bytes(const swa_kv_t *kv)
{
    const size_t tiles = swa_multiply_sizes(tile_count(kv), kv->key_tile_bytes + kv->value_tile_bytes);
    return swa_add_sizes(tiles, (tile_count(kv) + 63) / 64 * 64);
}

void swa_kv_place(swa_kv_t *kv, unsigned char *memory)
{
    kv->keys = memory;
    kv->values = kv->keys + tile_count(kv) * kv->key_tile_bytes;
    kv->not_finite = kv->values + tile_count(kv) * kv->value_tile_bytes;
}

/* Index of a head's tile among all tiles. */
static int64_t tile_index(const swa_kv_t *kv, int64_t kv_head, int64_t tile)
{
    int64_t slot = tile;
    if (kv->ring_tiles && tile >= kv->first_tiles)
        slot = kv->first_tiles + (tile - kv->first_tiles) % kv->ring_tiles;
    return kv_head * kv->slots + slot;
}

const unsigned char *swa_key_tile(const swa_kv_t *kv, int64_t kv_head, int64_t tile)
{
    return kv->keys + (size_t)tile_index(kv, kv_head, tile) * kv->key_tile_bytes;
}

const unsigned char *swa_value_tile(const swa_kv_t *kv, int64_t kv_head, int64_t tile)
{
    return kv->values + (size_t)tile_index(kv, kv_head, tile) * kv->value_tile_bytes;
}

void swa_kv_store_key(swa_kv_t *kv, int64_t position, int64_t kv_head, const float *key)
{
    const int64_t panel = kv->kernels->panel, d = kv->head_dim, at = position % SWA_TILE;
    const int64_t base = at / panel * panel * d, lane = at % panel;
    unsigned char *tile = kv->keys + (size_t)tile_index(kv, kv_head, position / SWA_TILE) * kv->key_tile_bytes;
    if (kv->bf16) { /* [key panel][d / 2][key][2] */
        uint16_t *out = (uint16_t *)tile + base + lane * 2, rounded[SWA_MAX_HEAD_DIM];
        kv->kernels->to_bf16(d, key, rounded);
        for (int64_t i = 0; i < d; i += 2)
            memcpy(out + i * panel, rounded + i, 2 * sizeof *out);
    } else { /* [key panel][d][key] */
        float *out = (float *)tile + base + lane;
        for (int64_t i = 0; i < d; i++)
            out[i * panel] = key[i];
    }
}

void swa_kv_store_value(swa_kv_t *kv, int64_t position, int64_t kv_head, const float *value)
{
    const int64_t panel = kv->kernels->panel, at = position % SWA_TILE;
    int64_t index = tile_index(kv, kv_head, position / SWA_TILE);
    unsigned char *tile = kv->values + (size_t)index * kv->value_tile_bytes;
    if (at == 0) { /* a tile begun anew: values of rows not yet written must multiply to zero */
        memset(tile, 0, kv->value_tile_bytes);
        kv->not_finite[index] = 0;
    }
    bool is_finite = true;
    for (int64_t first = 0; first < kv->head_dim; first += panel) {
        const int64_t n = swa_min(panel, kv->head_dim - first), base = first * SWA_TILE;
        if (kv->bf16) { /* [value panel][key / 2][value][2] */
            uint16_t *out = (uint16_t *)tile + base + at / 2 * 2 * panel + at % 2, rounded[SWA_MAX_PANEL];
            kv->kernels->to_bf16(n, value + first, rounded);
            for (int64_t i = 0; i < n; i++) {
                out[2 * i] = rounded[i];
                is_finite &= (rounded[i] & 0x7f80u) != 0x7f80u;
            }
        } else { /* [value panel][key][value] */
            float *out = (float *)tile + base + at * panel;
            for (int64_t i = 0; i < n; i++) {
                out[i] = value[first + i];
                is_finite &= isfinite(out[i]) != 0;
            }
        }
    }
    kv->not_finite[index] |= !is_finite;
}

void swa_kv_read(const swa_kv_t *kv, int64_t position, int64_t kv_head, float *key, float *value)
{
    const int64_t panel = kv->kernels->panel, d = kv->head_dim, at = position % SWA_TILE;
    const unsigned char *keys = swa_key_tile(kv, kv_head, position / SWA_TILE);
    const unsigned char *values = swa_value_tile(kv, kv_head, position / SWA_TILE);
    const int64_t key_base = at / panel * panel * d;
    for (int64_t i = 0; i < d; i++) {
        const int64_t value_base = i / panel * panel * SWA_TILE;
        if (kv->bf16) {
            key[i] =
                swa_float_from_bf16(((const uint16_t *)keys)[key_base + i / 2 * 2 * panel + at % panel * 2 + i % 2]);
            value[i] = swa_float_from_bf16(
                ((const uint16_t *)values)[value_base + at / 2 * 2 * panel + i % panel * 2 + at % 2]);
        } else {
            key[i] = ((const float *)keys)[key_base + i * panel + at % panel];
            value[i] = ((const float *)values)[value_base + at * panel + i % panel];
        }
    }
}

void swa_kv_copy(swa_kv_t *to, const swa_kv_t *from, int64_t first, int64_t end)
{
    for (int64_t g = 0; g < to->n_kv_heads; g++)
        for (int64_t tile = first; tile < end; tile++) {
            int64_t target = tile_index(to, g, tile), source = tile_index(from, g, tile);
            memcpy(to->keys + (size_t)target * to->key_tile_bytes, from->keys + (size_t)source * from->key_tile_bytes,
                   to->key_tile_bytes);
            memcpy(to->values + (size_t)target * to->value_tile_bytes,
                   from->values + (size_t)source * from->value_tile_bytes, to->value_tile_bytes);
            to->not_finite[target] = from->not_finite[source];
        }
}

/* ---- scratch ------------------------------------------------------------------------------------------------ */

enum {
    SCORE_BYTES = SWA_QUERY_BLOCK * SWA_TILE * sizeof(float),
    SHIFT_BYTES = SWA_QUERY_BLOCK * sizeof(float),
    SUM_BYTES = SHIFT_BYTES * SWA_MAX_LANES
};

size_t swa_attention_scratch_bytes(const swa_kv_t *kv)
{
    return SCORE_BYTES + SCORE_BYTES / 2 + SHIFT_BYTES + SUM_BYTES +
           2 * (size_t)(SWA_QUERY_BLOCK * kv->value_columns) * sizeof(float) + kv->value_tile_bytes;
}

void swa_attention_scratch_place(swa_attention_scratch_t *scratch, const swa_kv_t *kv, unsigned char *memory)
{
    scratch->scores = (float *)memory;
    scratch->probabilities = (uint16_t *)(memory += SCORE_BYTES);
    scratch->shifts = (float *)(memory += SCORE_BYTES / 2);
    scratch->sums = (float *)(memory += SHIFT_BYTES);
    scratch->output = (float *)(memory += SUM_BYTES);
    scratch->mixed = scratch->output + SWA_QUERY_BLOCK * kv->value_columns;
    scratch->value_tile = (unsigned char *)(scratch->mixed + SWA_QUERY_BLOCK * kv->value_columns);
}

/* ---- masks -------------------------------------------------------------------------------------------------- */

static bool row_is_full(swa_mask_t mask, int64_t row) { return mask.window == 0 || row >= mask.full_from; }

int64_t swa_window_start(swa_mask_t mask, int64_t row)
{
    return row_is_full(mask, row) ? 0 : swa_max(0, row - mask.window + 1);
}

static int64_t row_pairs(swa_mask_t mask, int64_t row)
{
    int64_t start = swa_window_start(mask, row);
    return row + 1 - start + swa_min(start, mask.sinks);
}

int64_t swa_visible_pairs(swa_mask_t mask, int64_t first, int64_t end)
{
    int64_t pairs = 0;
    for (int64_t row = first; row < end; row++)
        pairs += row_pairs(mask, row);
    return pairs;
}

bool swa_sees_all(swa_mask_t mask, int64_t row, int64_t m)
{
    int64_t start = swa_max(swa_window_start(mask, row), swa_window_start(mask, row + m - 1));
    return start <= mask.sinks;
}

swa_visibility_t swa_tile_visibility(swa_mask_t mask, int64_t row, int64_t m, int64_t tile)
{
    const int64_t tile_start = tile * SWA_TILE, tile_end = tile_start + SWA_TILE;
    if (tile_start > row + m - 1 || (tile_start >= mask.sinks && tile_end <= swa_window_start(mask, row)))
        return SWA_HIDDEN;
    bool interior =
        tile_end <= row + 1 && (tile_start >= swa_window_start(mask, row + m - 1) || tile_end <= mask.sinks);
    return interior ? SWA_INTERIOR : SWA_EDGE;
}

/* Ranges of the tile's keys that a row does not see: [sinks_end, window_first) and [causal_end, SWA_TILE). */
typedef struct {
    int64_t sinks_end, window_first, causal_end;
} hidden_t;

static hidden_t hidden_keys(swa_mask_t mask, int64_t row, int64_t tile_start)
{
    int64_t start = swa_window_start(mask, row);
    hidden_t hidden = {
        .sinks_end = swa_max(0, swa_min(SWA_TILE, swa_min(mask.sinks, start) - tile_start)),
        .window_first = swa_max(0, swa_min(SWA_TILE, start - tile_start)),
        .causal_end = swa_max(0, swa_min(SWA_TILE, row + 1 - tile_start)),
    };
    return hidden;
}

void swa_hide_keys(swa_mask_t mask, int64_t row, int64_t m, int64_t tile, float *scores)
{
    for (int64_t r = 0; r < m; r++, scores += SWA_TILE) {
        hidden_t hidden = hidden_keys(mask, row + r, tile * SWA_TILE);
        for (int64_t j = hidden.sinks_end; j < hidden.window_first; j++)
            scores[j] = -INFINITY;
        for (int64_t j = hidden.causal_end; j < SWA_TILE; j++)
            scores[j] = -INFINITY;
    }
}

/* ---- one block of query rows -------------------------------------------------------------------------------- */

enum { KEY_STEP = 32 }; /* AMX multiplies so many at a time, and by other instructions what is left */

/* What rows of a block have summed so far. */
typedef struct {
    float *shifts, *sums, *output;
} sums_t;

/* c[m][panel] (+)= a[m][k] b[k][panel] */
static void multiply_panel(const swa_kv_t *kv, int64_t m, int64_t k, const void *a, int64_t a_stride, const void *b,
                           float *c, int64_t c_stride, bool accumulate)
{
    if (kv->bf16)
        kv->kernels->panel_bf16(m, k, a, a_stride, b, c, c_stride, accumulate);
    else
        kv->kernels->panel_f32(m, k, a, a_stride, b, c, c_stride, accumulate);
}

void swa_multiply_keys(const swa_kv_t *kv, int64_t m, const void *a, int64_t a_stride, const unsigned char *tile,
                       swa_part_t part, float *scores)
{
    const size_t key_bytes = (size_t)kv->head_dim * element_size(kv);
    for (int64_t key = part.first; key < part.end; key += kv->kernels->panel)
        multiply_panel(kv, m, kv->head_dim, a, a_stride, tile + (size_t)key * key_bytes, scores + key, SWA_TILE, false);
}

void swa_add_values(const swa_kv_t *kv, int64_t m, const void *factors, const unsigned char *tile, swa_part_t part,
                    float *out)
{
    const int64_t panel = kv->kernels->panel, k = part.end - part.first;
    const size_t element = element_size(kv), panel_bytes = (size_t)(SWA_TILE * panel) * element;
    factors = (const unsigned char *)factors + (size_t)part.first * element;
    tile += (size_t)(part.first * panel) * element;
    for (int64_t column = 0; column < kv->value_columns; column += panel, tile += panel_bytes)
        multiply_panel(kv, m, k, factors, SWA_TILE, tile, out + column, kv->value_columns, true);
}

/* Sets the values of hidden keys to zero, so that NaN * 0 cannot reach a row that does not see them. */
static const void *visible_values(const swa_kv_t *kv, const unsigned char *tile, hidden_t hidden, unsigned char *copy)
{
    const int64_t panel = kv->kernels->panel;
    memcpy(copy, tile, kv->value_tile_bytes);
    for (int64_t j = 0; j < SWA_TILE; j++) {
        bool seen = (j < hidden.sinks_end || j >= hidden.window_first) && j < hidden.causal_end;
        for (int64_t i = 0; !seen && i < kv->value_columns; i++) {
            int64_t base = i / panel * panel * SWA_TILE;
            if (kv->bf16)
                ((uint16_t *)copy)[base + j / 2 * 2 * panel + i % panel * 2 + j % 2] = 0;
            else
                ((float *)copy)[base + j * panel + i % panel] = 0.0f;
        }
    }
    return copy;
}

float swa_score_scale(int64_t head_dim) { return SWA_LOG2_E / sqrtf((float)head_dim); }

static float row_sum(const float *lanes)
{
    float sums[4] = {0.0f}; /* four chains instead of one */
    for (int i = 0; i < SWA_MAX_LANES; i++)
        sums[i % 4] += lanes[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

swa_part_t swa_part(const swa_kv_t *kv, int64_t first, int64_t end)
{
    const int64_t step = swa_max(KEY_STEP, kv->kernels->panel);
    return (swa_part_t){.first = swa_max(0, first) / step * step, .end = swa_round_up(swa_min(end, SWA_TILE), step)};
}

swa_part_t swa_visible_part(const swa_kv_t *kv, swa_mask_t mask, int64_t row, int64_t m, int64_t tile)
{
    hidden_t upper = hidden_keys(mask, row, tile * SWA_TILE), lower = hidden_keys(mask, row + m - 1, tile * SWA_TILE);
    bool in_window = upper.window_first < lower.causal_end;
    return swa_part(kv, lower.sinks_end > 0 ? 0 : upper.window_first, in_window ? lower.causal_end : lower.sinks_end);
}

/* Adds a tile to what rows of a block, at most SWA_QUERY_BLOCK, have summed. */
static void attend_tile(const swa_kv_t *kv, swa_mask_t mask, int64_t kv_head, int64_t tile, int64_t row, int64_t m,
                        const void *queries, int64_t stride, const sums_t *sums, swa_attention_scratch_t *s)
{
    const swa_kernels_t *kernels = kv->kernels;
    const int64_t d = kv->head_dim, columns = kv->value_columns, index = tile_index(kv, kv_head, tile);
    const float scale = swa_score_scale(d);
    const unsigned char *values = swa_value_tile(kv, kv_head, tile);
    const swa_visibility_t visible = swa_tile_visibility(mask, row, m, tile);
    if (visible == SWA_HIDDEN)
        return;
    const swa_part_t part = swa_visible_part(kv, mask, row, m, tile);
    swa_multiply_keys(kv, m, queries, stride, swa_key_tile(kv, kv_head, tile), part, s->scores);
    if (visible == SWA_EDGE)
        swa_hide_keys(mask, row, m, tile, s->scores);
    const unsigned char *p = kv->bf16 ? (unsigned char *)s->probabilities : (unsigned char *)s->scores;
    if (kv->bf16)
        kernels->softmax_tile_bf16(m, s->scores, s->probabilities, scale, sums->shifts, sums->sums, sums->output,
                                   columns, d);
    else
        kernels->softmax_tile(m, s->scores, s->scores, scale, sums->shifts, sums->sums, sums->output, columns, d);
    if (visible == SWA_INTERIOR || !kv->not_finite[index]) {
        swa_add_values(kv, m, p, values, part, sums->output);
        return;
    }
    for (int64_t r = 0; r < m; r++) {
        const void *seen = visible_values(kv, values, hidden_keys(mask, row + r, tile * SWA_TILE), s->value_tile);
        swa_add_values(kv, 1, p + (size_t)(r * SWA_TILE) * element_size(kv), seen, part, sums->output + r * columns);
    }
}

void swa_attend_block(const swa_kv_t *kv, swa_mask_t mask, int64_t kv_head, int64_t row, int64_t m, const void *queries,
                      int64_t stride, swa_attention_scratch_t *s, float *log_sum)
{
    const int64_t d = kv->head_dim, columns = kv->value_columns;
    const size_t query_bytes = (size_t)stride * element_size(kv);
    for (int64_t r = 0; r < m; r++)
        s->shifts[r] = -INFINITY;
    memset(s->sums, 0, (size_t)(m * SWA_MAX_LANES) * sizeof(float));
    memset(s->output, 0, (size_t)(m * columns) * sizeof(float));

    int64_t last_tile = (row + m - 1) / SWA_TILE;
    for (int64_t tile = 0; tile <= last_tile; tile++) {
        swa_visibility_t visible = swa_tile_visibility(mask, row, m, tile);
        if (visible == SWA_HIDDEN) { /* between the sinks and the window */
            tile = swa_window_start(mask, row) / SWA_TILE - 1;
            continue;
        }
        const int64_t step = visible == SWA_EDGE ? SWA_EDGE_ROWS : m;
        for (int64_t r = 0; r < m; r += step) {
            const int64_t n = swa_min(step, m - r);
            const sums_t sums = {s->shifts + r, s->sums + r * SWA_MAX_LANES, s->output + r * columns};
            attend_tile(kv, mask, kv_head, tile, row + r, n, (const unsigned char *)queries + (size_t)r * query_bytes,
                        stride, &sums, s);
        }
    }
    for (int64_t r = 0; r < m; r++) {
        float sum = row_sum(s->sums + r * SWA_MAX_LANES);
        kv->kernels->scale(d, s->output + r * columns, 1.0f / sum);
        if (log_sum)
            log_sum[r] = s->shifts[r] + log2f(sum);
    }
}

int64_t swa_block_rows(swa_mask_t mask, int64_t row, int64_t end)
{
    int64_t m = swa_min(SWA_QUERY_BLOCK, end - row);
    return row < mask.full_from ? swa_min(m, mask.full_from - row) : m; /* all windowed or all full */
}

/* The block's outputs under the mix: scratch->output or scratch->mixed. */
static const float *attend_mixed(const swa_kv_t *kv, const swa_mix_t *mix, int64_t kv_head, int64_t row, int64_t m,
                                 const void *queries, int64_t stride, swa_attention_scratch_t *scratch)
{
    const int64_t count = m * kv->value_columns;
    bool first = true;
    for (int64_t c = 0; c < mix->n; c++) {
        if (mix->weights[c] == 0.0f)
            continue;
        swa_attend_block(kv, mix->masks[c], kv_head, row, m, queries, stride, scratch, NULL);
        if (mix->weights[c] == 1.0f)
            return scratch->output;
        if (first)
            memset(scratch->mixed, 0, (size_t)count * sizeof(float));
        kv->kernels->add_scaled(count, scratch->mixed, mix->weights[c], scratch->output);
        first = false;
    }
    return scratch->mixed;
}

void swa_attend(const swa_model_t *model, const swa_kv_t *kv, const swa_mix_t *mix, int64_t first, int64_t end,
                int64_t head_first, int64_t head_end, const void *queries, void *out, int64_t stride,
                swa_attention_scratch_t *scratch)
{
    const int64_t d = kv->head_dim, group = model->config.n_heads / kv->n_kv_heads;
    const size_t element = swa_activation_size(model);
    for (int64_t row = first, m; row < end; row += m) {
        m = swa_block_rows(mix->masks[0], row, end);
        for (int64_t head = head_first; head < head_end; head++) {
            size_t offset = (size_t)((row - first) * stride + head * d) * element;
            const float *mixed =
                attend_mixed(kv, mix, head / group, row, m, (const unsigned char *)queries + offset, stride, scratch);
            for (int64_t r = 0; r < m; r++)
                swa_store_activation(model, d, mixed + r * kv->value_columns,
                                     (unsigned char *)out + offset + (size_t)(r * stride) * element);
        }
    }
}
