/* With s = q . k / sqrt(d), p the softmax of s under one mask, o = p v and weight w of the mask in the mix:
 *   d_p = d_o . v,  d_s = w p (d_p - d_o . o),  d_q = d_s k,  d_k = d_s^T q,  d_v = w p^T d_o,
 * summed over the masks of the mix before the last three products. Scores and d_p are computed again, once from the
 * side of the queries and once from that of the keys: so every sum has one owner and one order, and no thread waits. */
#include "attention_back.h"

#include <math.h>

enum { TILE_BYTES = SWA_QUERY_BLOCK * SWA_TILE * sizeof(float) };

static size_t output_bytes(const swa_kv_t *kv) { return (size_t)(SWA_QUERY_BLOCK * kv->value_columns) * sizeof(float); }

size_t swa_attention_back_scratch_bytes(const swa_kv_t *kv) { return 5 * TILE_BYTES + 2 * output_bytes(kv); }

void swa_attention_back_scratch_place(swa_attention_back_scratch_t *scratch, const swa_kv_t *kv, unsigned char *memory)
{
    scratch->scores = (float *)memory;
    scratch->d_probabilities = (float *)(memory + TILE_BYTES);
    scratch->probabilities = (float *)(memory + 2 * TILE_BYTES);
    scratch->d_scores = (float *)(memory + 3 * TILE_BYTES);
    scratch->rounded = (uint16_t *)(memory + 4 * TILE_BYTES);
    scratch->first = (float *)(memory + 5 * TILE_BYTES);
    scratch->second = (float *)(memory + 5 * TILE_BYTES + output_bytes(kv));
}

/* The choices that take part, from the widest window to the narrowest: what one hides the next hides too, so one tile
 * of scores serves them all. */
static int order_choices(const swa_mix_t *mix, int order[SWA_MAX_CHOICES])
{
    int n = 0;
    for (int c = 0; c < mix->n; c++) {
        if (mix->weights[c] == 0.0f)
            continue;
        int at = n++;
        for (; at > 0; at--) {
            int64_t window = mix->masks[c].window, other = mix->masks[order[at - 1]].window;
            if (other == 0 || (window != 0 && window <= other))
                break;
            order[at] = order[at - 1];
        }
        order[at] = c;
    }
    return n;
}

static const void *at_row(const swa_attention_back_t *back, const unsigned char *rows, int64_t stride, int64_t row,
                          int64_t head)
{
    return rows + (size_t)(row * stride + head * back->k_v->head_dim) * swa_activation_size(back->model);
}

/* out[m][value_columns] += part of a tile of float32 factors times packed values. */
static void add_values(const swa_attention_back_t *back, int64_t m, const float *factors, const swa_kv_t *kv,
                       int64_t head, int64_t tile, swa_part_t part, float *out, swa_attention_back_scratch_t *s)
{
    if (kv->bf16)
        back->model->kernels->to_bf16(m * SWA_TILE, factors, s->rounded);
    swa_add_values(kv, m, kv->bf16 ? (const void *)s->rounded : factors, swa_value_tile(kv, head, tile), part, out);
}

static const float *statistic(const swa_attention_back_t *back, const float *values, int64_t choice, int64_t head)
{
    return values + (choice * back->model->config.n_heads + head) * back->stat_stride;
}

/* One tile of keys for rows of a block of queries. */
static void queries_tile(const swa_attention_back_t *back, const int *order, int n, int64_t head, int64_t row,
                         int64_t m, int64_t tile, float *d_queries, swa_attention_back_scratch_t *s)
{
    const swa_kernels_t *kernels = back->model->kernels;
    const swa_mix_t *mix = back->mix;
    const swa_kv_t *kv = back->k_v;
    const int64_t kv_head = head / (back->model->config.n_heads / kv->n_kv_heads);
    const float scale = swa_score_scale(kv->head_dim);
    if (swa_tile_visibility(mix->masks[order[0]], row, m, tile) == SWA_HIDDEN)
        return;
    const swa_part_t part = swa_visible_part(kv, mix->masks[order[0]], row, m, tile);
    swa_multiply_keys(kv, m, at_row(back, back->queries, back->query_stride, row, head), back->query_stride,
                      swa_key_tile(kv, kv_head, tile), part, s->scores);
    swa_multiply_keys(kv, m, at_row(back, back->d_outputs, back->query_stride, row, head), back->query_stride,
                      swa_key_tile(back->v_k, kv_head, tile), part, s->d_probabilities);
    for (int i = 0; i < n; i++) {
        const swa_mask_t mask = mix->masks[order[i]];
        swa_visibility_t visible = swa_tile_visibility(mask, row, m, tile);
        if (visible == SWA_HIDDEN)
            break;
        if (visible == SWA_EDGE)
            swa_hide_keys(mask, row, m, tile, s->scores);
        kernels->softmax_back_queries(m, s->scores, s->d_probabilities, scale, mix->weights[order[i]],
                                      statistic(back, back->log_sums, order[i], head) + row,
                                      statistic(back, back->deltas, order[i], head) + row, i > 0, s->d_scores);
    }
    add_values(back, m, s->d_scores, back->v_k, kv_head, tile, part, d_queries, s);
}

void swa_attention_back_queries(const swa_attention_back_t *back, int64_t head, int64_t row, int64_t m,
                                swa_attention_back_scratch_t *s)
{
    const int64_t columns = back->k_v->value_columns;
    int order[SWA_MAX_CHOICES], n = order_choices(back->mix, order);
    memset(s->first, 0, (size_t)(m * columns) * sizeof(float));
    for (int64_t tile = 0; tile <= (row + m - 1) / SWA_TILE; tile++) {
        swa_visibility_t visible = swa_tile_visibility(back->mix->masks[order[0]], row, m, tile);
        const int64_t step = visible == SWA_EDGE ? SWA_EDGE_ROWS : m;
        for (int64_t r = 0; visible != SWA_HIDDEN && r < m; r += step)
            queries_tile(back, order, n, head, row + r, swa_min(step, m - r), tile, s->first + r * columns, s);
    }
    back->model->kernels->scale(m * columns, s->first, 1.0f / sqrtf((float)back->k_v->head_dim));
}

/* Of the queries of a tile for the rows of a block of keys. */
static swa_visibility_t query_visibility(const swa_attention_back_t *back, swa_mask_t mask, int64_t row, int64_t m,
                                         int64_t tile)
{
    const int64_t start = tile * SWA_TILE, end = start + SWA_TILE, last = row + m - 1;
    const bool windowed = mask.window != 0 && start < mask.full_from;
    if (end <= swa_max(row, back->first_query) ||
        (windowed && end <= mask.full_from && row >= mask.sinks && start - mask.window >= last))
        return SWA_HIDDEN;
    bool inside = start >= swa_max(last, back->first_query) && end <= back->n_rows;
    return inside && (!windowed || last < mask.sinks || row > end - 1 - mask.window) ? SWA_INTERIOR : SWA_EDGE;
}

/* Outside of it no query of the tile, of which it is not all hidden, sees a key of the block. */
static swa_part_t visible_queries(const swa_attention_back_t *back, swa_mask_t mask, int64_t row, int64_t m,
                                  int64_t tile)
{
    const int64_t start = tile * SWA_TILE;
    int64_t end = back->n_rows - start;
    if (mask.window != 0 && start + SWA_TILE <= mask.full_from && row >= mask.sinks && mask.window < back->n_rows)
        end = swa_min(end, row + m - 1 + mask.window - start);
    return swa_part(back->q_do, swa_max(row, back->first_query) - start, end);
}

static void hide_queries(const swa_attention_back_t *back, swa_mask_t mask, int64_t row, int64_t m, int64_t tile,
                         float *scores)
{
    const int64_t start = tile * SWA_TILE, end = swa_min(SWA_TILE, back->n_rows - start);
    for (int64_t key = row; key < row + m; key++, scores += SWA_TILE) {
        int64_t first = swa_min(SWA_TILE, swa_max(key, back->first_query) - start);
        int64_t beyond = end; /* from here to the full rows the window has left the key behind */
        if (mask.window != 0 && key >= mask.sinks && mask.window < back->n_rows - key)
            beyond = swa_max(0, key + mask.window - start);
        for (int64_t i = 0; i < first; i++)
            scores[i] = -INFINITY;
        for (int64_t i = beyond; i < swa_min(end, mask.full_from - start); i++)
            scores[i] = -INFINITY;
        for (int64_t i = end; i < SWA_TILE; i++)
            scores[i] = -INFINITY;
    }
}

/* One tile of queries of a head for rows of a block of keys. */
static void keys_tile(const swa_attention_back_t *back, const int *order, int n, int64_t head, int64_t row, int64_t m,
                      int64_t tile, float *d_keys, float *d_values, swa_attention_back_scratch_t *s)
{
    const swa_kernels_t *kernels = back->model->kernels;
    const swa_mix_t *mix = back->mix;
    const swa_kv_t *q_do = back->q_do, *do_q = back->do_q;
    const int64_t kv_head = head / (back->model->config.n_heads / back->k_v->n_kv_heads);
    const float scale = swa_score_scale(q_do->head_dim);
    if (query_visibility(back, mix->masks[order[0]], row, m, tile) == SWA_HIDDEN)
        return;
    const swa_part_t part = visible_queries(back, mix->masks[order[0]], row, m, tile);
    swa_multiply_keys(q_do, m, at_row(back, back->keys, back->kv_stride, row, kv_head), back->kv_stride,
                      swa_key_tile(q_do, head, tile), part, s->scores);
    swa_multiply_keys(do_q, m, at_row(back, back->values, back->kv_stride, row, kv_head), back->kv_stride,
                      swa_key_tile(do_q, head, tile), part, s->d_probabilities);
    for (int i = 0; i < n; i++) {
        const swa_mask_t mask = mix->masks[order[i]];
        swa_visibility_t visible = query_visibility(back, mask, row, m, tile);
        if (visible == SWA_HIDDEN)
            break;
        if (visible == SWA_EDGE)
            hide_queries(back, mask, row, m, tile, s->scores);
        kernels->softmax_back_keys(m, s->scores, s->d_probabilities, scale, mix->weights[order[i]],
                                   statistic(back, back->log_sums, order[i], head) + tile * SWA_TILE,
                                   statistic(back, back->deltas, order[i], head) + tile * SWA_TILE, i > 0,
                                   s->probabilities, s->d_scores);
    }
    add_values(back, m, s->d_scores, do_q, head, tile, part, d_keys, s);
    add_values(back, m, s->probabilities, q_do, head, tile, part, d_values, s);
}

void swa_attention_back_keys(const swa_attention_back_t *back, int64_t kv_head, int64_t row, int64_t m,
                             swa_attention_back_scratch_t *s)
{
    const int64_t group = back->model->config.n_heads / back->k_v->n_kv_heads, columns = back->q_do->value_columns;
    int order[SWA_MAX_CHOICES], n = order_choices(back->mix, order);
    memset(s->first, 0, (size_t)(m * columns) * sizeof(float));
    memset(s->second, 0, (size_t)(m * columns) * sizeof(float));
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group && !swa_cancelled(back->run); head++)
        for (int64_t tile = swa_max(row, back->first_query) / SWA_TILE; tile * SWA_TILE < back->n_rows; tile++) {
            swa_visibility_t visible = query_visibility(back, back->mix->masks[order[0]], row, m, tile);
            const int64_t step = visible == SWA_EDGE ? SWA_EDGE_ROWS : m;
            for (int64_t r = 0; visible != SWA_HIDDEN && r < m; r += step)
                keys_tile(back, order, n, head, row + r, swa_min(step, m - r), tile, s->first + r * columns,
                          s->second + r * columns, s);
        }
    back->model->kernels->scale(m * columns, s->first, 1.0f / sqrtf((float)back->q_do->head_dim));
}
