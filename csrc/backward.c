/* One layer backward. Nothing but the layer's input was kept, so what the gradient needs is computed again. Four
 * parallel loops: transpose the weights; repack queries, keys and values; per chunk of rows from the output down to
 * attention; per chunk of rows from attention down to the input. */
#include "backward.h"

#include "parallel.h"

/* ---- buffers ------------------------------------------------------------------------------------------------ */

static swa_linear_t transposed(const swa_model_t *model, const swa_linear_t *linear, swa_arena_t *arena)
{
    size_t bytes;
    swa_linear_t out = {0};
    if (!swa_matrix_describe(model->kernels, model->dtype, linear->matrix.k, linear->matrix.n, &out.matrix, &bytes))
        bytes = SIZE_MAX;
    out.matrix.data = swa_carve(arena, bytes, 1);
    return out;
}

static swa_kv_t place_heads(const swa_workspace_t *ws, int64_t n_heads, swa_arena_t *arena)
{
    const swa_model_t *model = ws->model;
    swa_kv_t kv = swa_kv_layout(model->kernels, model->bf16_activations, n_heads, model->config.head_dim, ws->n_tokens);
    unsigned char *memory = swa_carve(arena, swa_kv_bytes(&kv), 1);
    if (memory)
        swa_kv_place(&kv, memory);
    return kv;
}

void swa_backward_layout(swa_backward_t *back, swa_workspace_t *ws, int64_t n_choices, swa_arena_t *arena)
{
    const swa_model_t *model = ws->model;
    const swa_config_t *c = &model->config;
    const swa_layer_t *layer = &model->layers[0];
    const int64_t width = c->n_heads * c->head_dim, kv_width = c->n_kv_heads * c->head_dim, hidden = c->hidden_size;
    const size_t element = swa_activation_size(model), rows = (size_t)ws->n_tokens, chunk = (size_t)ws->chunk;
    const size_t query_row = (size_t)swa_activation_stride(width) * element;
    const size_t kv_row = (size_t)swa_activation_stride(kv_width) * element;
    const size_t wide_row = (size_t)swa_activation_stride(c->intermediate_size) * element;
    *back = (swa_backward_t){.ws = ws, .n_choices = n_choices, .stat_stride = swa_round_up(ws->n_tokens, SWA_TILE)};
    back->d_x = swa_carve(arena, rows * (size_t)hidden, sizeof(float));
    back->negative_sines = swa_carve(arena, rows * (size_t)(c->head_dim / 2), sizeof(float));
    back->d_outputs = swa_carve(arena, rows, query_row);
    back->keys = swa_carve(arena, rows, kv_row);
    back->values = swa_carve(arena, rows, kv_row);
    if (c->qk_norm)
        ws->raw_heads = swa_carve(arena, rows * (size_t)(width + kv_width), sizeof(float));
    back->v_k = place_heads(ws, c->n_kv_heads, arena);
    back->q_do = place_heads(ws, c->n_heads, arena);
    back->do_q = place_heads(ws, c->n_heads, arena);
    const size_t statistics = (size_t)(n_choices * c->n_heads);
    back->log_sums = swa_carve(arena, statistics, (size_t)back->stat_stride * sizeof(float));
    back->deltas = swa_carve(arena, statistics, (size_t)back->stat_stride * sizeof(float));
    back->by_row = swa_carve(arena, rows * (size_t)c->n_kv_heads, (size_t)n_choices * sizeof(double));
    back->q = transposed(model, &layer->q, arena);
    back->k = transposed(model, &layer->k, arena);
    back->v = transposed(model, &layer->v, arena);
    back->o = transposed(model, &layer->o, arena);
    back->gate = transposed(model, &layer->gate, arena);
    back->up = transposed(model, &layer->up, arena);
    back->down = transposed(model, &layer->down, arena);

    back->scratch = swa_carve(arena, (size_t)ws->n_threads, sizeof *back->scratch);
    for (int i = 0; i < ws->n_threads; i++) {
        swa_back_scratch_t s;
        s.residual = swa_carve(arena, chunk * (size_t)hidden, sizeof(float));
        s.d_normed = swa_carve(arena, chunk * (size_t)hidden, sizeof(float));
        s.outputs = swa_carve(arena, (size_t)n_choices * chunk * (size_t)width, sizeof(float));
        s.d_outputs = swa_carve(arena, chunk * (size_t)swa_round_up(width, model->kernels->panel), sizeof(float));
        s.d_columns = swa_carve(arena, chunk * (size_t)ws->column_stride, sizeof(float));
        s.d_gate_row = swa_carve(arena, (size_t)ws->column_stride, sizeof(float));
        s.d_up_row = swa_carve(arena, (size_t)ws->column_stride, sizeof(float));
        s.d_rows = swa_carve(arena, chunk * (size_t)swa_activation_stride(hidden), element);
        s.d_gate = swa_carve(arena, chunk, wide_row);
        s.d_up = swa_carve(arena, chunk, wide_row);
        s.d_queries = swa_carve(arena, chunk, query_row);
        s.d_keys = swa_carve(arena, chunk, kv_row);
        s.d_values = swa_carve(arena, chunk, kv_row);
        s.heads = swa_carve(arena, 2 * (size_t)c->head_dim, sizeof(float));
        unsigned char *attention = swa_carve(arena, swa_attention_back_scratch_bytes(&back->v_k), 1);
        if (attention) {
            swa_attention_back_scratch_place(&s.attention, &back->v_k, attention);
            back->scratch[i] = s;
        }
    }
}

void swa_backward_start(swa_backward_t *back, int64_t n_prefix)
{
    const swa_workspace_t *ws = back->ws;
    back->n_prefix = n_prefix;
    for (int64_t i = 0; i < ws->n_tokens * (ws->model->config.head_dim / 2); i++)
        back->negative_sines[i] = -ws->sines[i];
}

/* What the parallel loops of one layer share. */
typedef struct {
    swa_backward_t *back;
    const swa_layer_t *layer;
    const swa_mix_t *mix;
    const float *x;
    int64_t first; /* rows from here on have gradients of the output */
    bool lowest;
    swa_attention_back_t attention;
} layer_back_t;

/* ---- weights and packings ----------------------------------------------------------------------------------- */

enum { LINEARS = 7 };

static void linears(const layer_back_t *pass, const swa_linear_t *from[LINEARS], swa_linear_t *to[LINEARS])
{
    const swa_layer_t *l = pass->layer;
    swa_backward_t *b = pass->back;
    const swa_linear_t *sources[LINEARS] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
    swa_linear_t *targets[LINEARS] = {&b->q, &b->k, &b->v, &b->o, &b->gate, &b->up, &b->down};
    memcpy(from, sources, sizeof sources);
    memcpy(to, targets, sizeof targets);
}

static void transpose_task(void *context, int64_t task, int thread)
{
    const layer_back_t *pass = context;
    const swa_model_t *model = pass->back->ws->model;
    const int64_t panel = model->kernels->panel;
    const swa_linear_t *from[LINEARS];
    swa_linear_t *to[LINEARS];
    (void)thread;
    linears(pass, from, to);
    for (int i = 0; i < LINEARS; i++) {
        const int64_t panels = (to[i]->matrix.n + panel - 1) / panel;
        if (task < panels) {
            const swa_matrix_t *matrix = &to[i]->matrix;
            swa_transpose_panel(model->kernels, model->bf16_activations, &from[i]->matrix, task, 0, matrix->k_padded,
                                matrix->data + (size_t)(task * panel * matrix->k_padded) * matrix->element_size);
            return;
        }
        task -= panels;
    }
}

static void transpose_weights(layer_back_t *pass)
{
    const swa_workspace_t *ws = pass->back->ws;
    const swa_linear_t *from[LINEARS];
    swa_linear_t *to[LINEARS];
    linears(pass, from, to);
    int64_t tasks = 0, panel = ws->model->kernels->panel;
    for (int i = 0; i < LINEARS; i++)
        tasks += (to[i]->matrix.n + panel - 1) / panel;
    swa_parallel_for(ws->n_threads, tasks, transpose_task, pass);
}

static unsigned char *activation_row(const swa_model_t *model, unsigned char *rows, int64_t width, int64_t row,
                                     int64_t column)
{
    return rows + (size_t)(row * swa_activation_stride(width) + column) * swa_activation_size(model);
}

/* Keys and values the other way round and as rows; queries as keys and as values. */
static void repack_tile(void *context, int64_t tile, int thread)
{
    const layer_back_t *pass = context;
    swa_backward_t *back = pass->back;
    const swa_workspace_t *ws = back->ws;
    const swa_model_t *model = ws->model;
    const swa_config_t *c = &model->config;
    const int64_t d = c->head_dim;
    float *key = back->scratch[thread].heads, *value = key + d;
    const int64_t end = swa_min(ws->n_tokens, (tile + 1) * SWA_TILE);
    for (int64_t row = tile * SWA_TILE; row < end; row++) {
        for (int64_t g = 0; g < c->n_kv_heads; g++) {
            swa_kv_read(&ws->kv, row, g, key, value);
            swa_kv_store_key(&back->v_k, row, g, value);
            swa_kv_store_value(&back->v_k, row, g, key);
            swa_store_activation(model, d, key, activation_row(model, back->keys, c->n_kv_heads * d, row, g * d));
            swa_store_activation(model, d, value, activation_row(model, back->values, c->n_kv_heads * d, row, g * d));
        }
        for (int64_t h = 0; row >= pass->first && h < c->n_heads; h++) {
            swa_load_activation(model, d, activation_row(model, ws->queries, c->n_heads * d, row, h * d), key);
            swa_kv_store_key(&back->q_do, row, h, key);
            swa_kv_store_value(&back->do_q, row, h, key);
        }
    }
}

/* ---- from the layer's output to attention's ------------------------------------------------------------------ */

/* Attention of the chunk under every choice, float32, and mixed as activations. */
static void attend_choices(const layer_back_t *pass, swa_chunk_t chunk, swa_scratch_t *s, swa_back_scratch_t *t)
{
    swa_backward_t *back = pass->back;
    const swa_workspace_t *ws = back->ws;
    const swa_model_t *model = ws->model;
    const swa_config_t *c = &model->config;
    const swa_mix_t *mix = pass->mix;
    const int64_t d = c->head_dim, width = c->n_heads * d, group = c->n_heads / c->n_kv_heads;
    const int64_t columns = ws->kv.value_columns, end = chunk.row + chunk.m;
    for (int64_t row = chunk.row, m; row < end; row += m) {
        m = swa_block_rows(mix->masks[0], row, end);
        for (int64_t head = 0; head < c->n_heads && !swa_cancelled(ws->run); head++) {
            const void *queries = activation_row(model, ws->queries, width, row, head * d);
            bool computed_all = false; /* scratch->output is that of full attention on this block */
            for (int64_t choice = 0; choice < mix->n; choice++) {
                float *log_sum = back->log_sums + (choice * c->n_heads + head) * back->stat_stride + row;
                bool all = swa_sees_all(mix->masks[choice], row, m);
                if (all && computed_all)
                    memcpy(log_sum, log_sum - c->n_heads * back->stat_stride, (size_t)m * sizeof(float));
                else
                    swa_attend_block(&ws->kv, mix->masks[choice], head / group, row, m, queries,
                                     swa_activation_stride(width), &s->attention, log_sum);
                computed_all = all;
                for (int64_t r = 0; r < m; r++)
                    memcpy(t->outputs + (choice * ws->chunk + row - chunk.row + r) * width + head * d,
                           s->attention.output + r * columns, (size_t)d * sizeof(float));
            }
        }
    }
    for (int64_t r = 0; r < chunk.m; r++) {
        float *mixed = t->d_outputs; /* free until the gradient arrives */
        bool first = true;
        for (int64_t choice = 0; choice < mix->n; choice++) {
            const float *output = t->outputs + (choice * ws->chunk + r) * width;
            if (mix->weights[choice] == 0.0f)
                continue;
            if (mix->weights[choice] == 1.0f) {
                memcpy(mixed, output, (size_t)width * sizeof(float));
                continue;
            }
            if (first)
                memset(mixed, 0, (size_t)width * sizeof(float));
            model->kernels->add_scaled(width, mixed, mix->weights[choice], output);
            first = false;
        }
        swa_store_activation(model, width, mixed, activation_row(model, s->attended, width, r, 0));
    }
}

/* d_gate and d_up of the chunk from d_rows, and from s->normed computed again. */
static void gated_product_back(const layer_back_t *pass, int64_t m, swa_scratch_t *s, swa_back_scratch_t *t)
{
    const swa_workspace_t *ws = pass->back->ws;
    const swa_model_t *model = ws->model;
    const int64_t width = model->config.intermediate_size, stride = ws->column_stride;
    const int64_t hidden_stride = swa_activation_stride(model->config.hidden_size);
    for (int64_t column = 0; column < width && !swa_cancelled(ws->run); column += stride) {
        const int64_t columns = swa_min(stride, width - column);
        swa_multiply(model, &pass->layer->gate, m, s->normed, hidden_stride, column, columns, s->columns, stride);
        swa_multiply(model, &pass->layer->up, m, s->normed, hidden_stride, column, columns, s->more_columns, stride);
        swa_multiply(model, &pass->back->down, m, t->d_rows, hidden_stride, column, columns, t->d_columns, stride);
        for (int64_t r = 0; r < m; r++) {
            model->kernels->silu_mul_back(columns, s->columns + r * stride, s->more_columns + r * stride,
                                          t->d_columns + r * stride, t->d_gate_row, t->d_up_row);
            swa_store_activation(model, columns, t->d_gate_row, activation_row(model, t->d_gate, width, r, column));
            swa_store_activation(model, columns, t->d_up_row, activation_row(model, t->d_up, width, r, column));
        }
    }
}

static void store_rows(const swa_model_t *model, const float *x, int64_t m, unsigned char *out)
{
    const int64_t hidden = model->config.hidden_size;
    for (int64_t r = 0; r < m; r++)
        swa_store_activation(model, hidden, x + r * hidden, activation_row(model, out, hidden, r, 0));
}

/* The row's share of the gate gradients, and what attention's backward needs of d_outputs. */
static void finish_outputs(const layer_back_t *pass, int64_t row, int64_t r, swa_back_scratch_t *t)
{
    swa_backward_t *back = pass->back;
    const swa_model_t *model = back->ws->model;
    const swa_config_t *c = &model->config;
    const int64_t d = c->head_dim, width = c->n_heads * d, group = c->n_heads / c->n_kv_heads;
    const float *d_output = t->d_outputs + r * swa_round_up(width, model->kernels->panel);
    double *share = back->by_row + row * back->n_choices * c->n_kv_heads;
    memset(share, 0, (size_t)(back->n_choices * c->n_kv_heads) * sizeof(double));
    for (int64_t head = 0; head < c->n_heads; head++) {
        float products[SWA_MAX_CHOICES];
        for (int64_t choice = 0; choice < back->n_choices; choice++) {
            const float *output = t->outputs + (choice * back->ws->chunk + r) * width + head * d;
            model->kernels->dot(d, d_output + head * d, output, &products[choice]);
            back->deltas[(choice * c->n_heads + head) * back->stat_stride + row] = products[choice];
            share[choice * c->n_kv_heads + head / group] += (double)products[choice] - (double)products[0];
        }
        if (!pass->lowest) {
            swa_kv_store_key(&back->do_q, row, head, d_output + head * d);
            swa_kv_store_value(&back->q_do, row, head, d_output + head * d);
        }
    }
    swa_store_activation(model, width, d_output, activation_row(model, back->d_outputs, width, row, 0));
}

static uint64_t upper_cost(const swa_model_t *model, const swa_mix_t *mix, int64_t first, int64_t end)
{
    const swa_config_t *c = &model->config;
    const uint64_t rows = (uint64_t)(end - first), width = (uint64_t)(c->n_heads * c->head_dim);
    uint64_t pairs = 0;
    for (int64_t i = 0; i < mix->n; i++)
        pairs += (uint64_t)swa_visible_pairs(mix->masks[i], first, end);
    return 2 * rows * (uint64_t)c->hidden_size * (2 * width + 5 * (uint64_t)c->intermediate_size) + 4 * width * pairs;
}

static void upper_chunk(void *context, int64_t task, int thread)
{
    const layer_back_t *pass = context;
    swa_backward_t *back = pass->back;
    const swa_workspace_t *ws = back->ws;
    const swa_model_t *model = ws->model;
    const swa_config_t *c = &model->config;
    swa_scratch_t *s = &ws->scratch[thread];
    swa_back_scratch_t *t = &back->scratch[thread];
    const int64_t hidden = c->hidden_size, width = c->n_heads * c->head_dim, first = pass->first, end = ws->n_tokens;
    const int64_t wide_stride = swa_activation_stride(c->intermediate_size);
    swa_chunk_t chunk = swa_chunk_at(ws, first, end, task);
    float *d_x = back->d_x + chunk.row * hidden;
    attend_choices(pass, chunk, s, t);
    if (swa_cancelled(ws->run))
        return;
    swa_add_product(ws, &pass->layer->o, s->attended, swa_activation_stride(width), chunk.m,
                    pass->x + chunk.row * hidden, t->residual, s);
    swa_norm_rows(ws, &pass->layer->post_attention_norm, t->residual, chunk.m, s);
    store_rows(model, d_x, chunk.m, t->d_rows);
    gated_product_back(pass, chunk.m, s, t);
    memset(t->d_normed, 0, (size_t)(chunk.m * hidden) * sizeof(float));
    swa_add_product(ws, &back->gate, t->d_gate, wide_stride, chunk.m, t->d_normed, t->d_normed, s);
    swa_add_product(ws, &back->up, t->d_up, wide_stride, chunk.m, t->d_normed, t->d_normed, s);
    for (int64_t r = 0; r < chunk.m; r++)
        model->kernels->rms_norm_back(hidden, t->residual + r * hidden, pass->layer->post_attention_norm.data,
                                      c->rms_norm_eps, t->d_normed + r * hidden, d_x + r * hidden);
    store_rows(model, d_x, chunk.m, t->d_rows);
    swa_multiply(model, &back->o, chunk.m, t->d_rows, swa_activation_stride(hidden), 0, width, t->d_outputs,
                 swa_round_up(width, model->kernels->panel));
    for (int64_t r = 0; r < chunk.m; r++)
        finish_outputs(pass, chunk.row + r, r, t);
    swa_advance(ws->run, upper_cost(model, pass->mix, chunk.row, chunk.row + chunk.m));
}

/* ---- from attention to the layer's input ---------------------------------------------------------------------- */

/* Through RoPE and QK-norm of one head, in place. raw: the head before its norm; copy: scratch of [head_dim]. */
static void head_back(const swa_backward_t *back, const swa_vector_t *norm, int64_t row, int64_t raw_head,
                      float *d_head, float *copy)
{
    const swa_model_t *model = back->ws->model;
    const int64_t d = model->config.head_dim, half = d / 2;
    model->kernels->rope(half, d_head, back->ws->cosines + row * half, back->negative_sines + row * half);
    if (!norm->n)
        return;
    memcpy(copy, d_head, (size_t)d * sizeof(float));
    memset(d_head, 0, (size_t)d * sizeof(float));
    model->kernels->rms_norm_back(d, swa_raw_head(back->ws, row, raw_head), norm->data, model->config.rms_norm_eps,
                                  copy, d_head);
}

static void queries_back(const layer_back_t *pass, swa_chunk_t chunk, swa_back_scratch_t *t)
{
    const swa_backward_t *back = pass->back;
    const swa_model_t *model = back->ws->model;
    const swa_config_t *c = &model->config;
    const int64_t d = c->head_dim, width = c->n_heads * d, end = chunk.row + chunk.m;
    for (int64_t row = chunk.row, m; row < end; row += m) {
        m = swa_block_rows(pass->mix->masks[0], row, end);
        for (int64_t head = 0; head < c->n_heads && !swa_cancelled(back->ws->run); head++) {
            swa_attention_back_queries(&pass->attention, head, row, m, &t->attention);
            for (int64_t r = 0; r < m; r++) {
                float *d_query = t->attention.first + r * back->v_k.value_columns;
                head_back(back, &pass->layer->q_norm, row + r, head, d_query, t->heads);
                swa_store_activation(model, d, d_query,
                                     activation_row(model, t->d_queries, width, row + r - chunk.row, head * d));
            }
        }
    }
}

static void keys_back(const layer_back_t *pass, swa_chunk_t chunk, swa_back_scratch_t *t)
{
    const swa_backward_t *back = pass->back;
    const swa_model_t *model = back->ws->model;
    const swa_config_t *c = &model->config;
    const int64_t d = c->head_dim, width = c->n_kv_heads * d, columns = back->v_k.value_columns;
    for (int64_t row = 0, m; row < chunk.m; row += m) {
        m = swa_min(SWA_QUERY_BLOCK, chunk.m - row);
        for (int64_t g = 0; g < c->n_kv_heads && !swa_cancelled(back->ws->run); g++) {
            swa_attention_back_keys(&pass->attention, g, chunk.row + row, m, &t->attention);
            for (int64_t r = 0; r < m; r++) {
                float *d_key = t->attention.first + r * columns;
                head_back(back, &pass->layer->k_norm, chunk.row + row + r, c->n_heads + g, d_key, t->heads);
                swa_store_activation(model, d, d_key, activation_row(model, t->d_keys, width, row + r, g * d));
                swa_store_activation(model, d, t->attention.second + r * columns,
                                     activation_row(model, t->d_values, width, row + r, g * d));
            }
        }
    }
}

/* Pairs are counted by their queries, whichever chunk holds the keys: the sum over all chunks is the same. */
static uint64_t lower_cost(const swa_model_t *model, const swa_mix_t *mix, int64_t row, int64_t query, int64_t end)
{
    const swa_config_t *c = &model->config;
    const uint64_t width = (uint64_t)(c->n_heads * c->head_dim), kv_width = (uint64_t)(c->n_kv_heads * c->head_dim);
    int64_t pairs = 0;
    for (int64_t i = 0; i < mix->n && query < end; i++)
        if (mix->weights[i] != 0.0f)
            pairs = swa_max(pairs, swa_visible_pairs(mix->masks[i], query, end));
    return 2 * (uint64_t)c->hidden_size *
               ((uint64_t)swa_max(0, end - query) * width + (uint64_t)(end - row) * 2 * kv_width) +
           14 * width * (uint64_t)pairs;
}

static void lower_chunk(void *context, int64_t task, int thread)
{
    const layer_back_t *pass = context;
    swa_backward_t *back = pass->back;
    const swa_workspace_t *ws = back->ws;
    const swa_model_t *model = ws->model;
    const swa_config_t *c = &model->config;
    swa_back_scratch_t *t = &back->scratch[thread];
    const int64_t hidden = c->hidden_size, width = c->n_heads * c->head_dim, kv_width = c->n_kv_heads * c->head_dim;
    swa_chunk_t chunk = swa_chunk_at(ws, back->n_prefix, ws->n_tokens, task);
    /* In the last layer only the scored rows have queries. */
    const int64_t skip = swa_min(chunk.m, swa_max(0, pass->first - chunk.row));
    swa_chunk_t asking = {chunk.row + skip, chunk.m - skip};
    swa_scratch_t *s = &ws->scratch[thread];
    queries_back(pass, asking, t);
    keys_back(pass, chunk, t);
    if (swa_cancelled(ws->run))
        return;
    memset(t->d_normed, 0, (size_t)(chunk.m * hidden) * sizeof(float));
    float *asked = t->d_normed + skip * hidden;
    swa_add_product(ws, &back->q, t->d_queries, swa_activation_stride(width), asking.m, asked, asked, s);
    swa_add_product(ws, &back->k, t->d_keys, swa_activation_stride(kv_width), chunk.m, t->d_normed, t->d_normed, s);
    swa_add_product(ws, &back->v, t->d_values, swa_activation_stride(kv_width), chunk.m, t->d_normed, t->d_normed, s);
    for (int64_t r = 0; r < chunk.m; r++)
        model->kernels->rms_norm_back(hidden, pass->x + (chunk.row + r) * hidden, pass->layer->input_norm.data,
                                      c->rms_norm_eps, t->d_normed + r * hidden, back->d_x + (chunk.row + r) * hidden);
    swa_advance(ws->run, lower_cost(model, pass->mix, chunk.row, asking.row, chunk.row + chunk.m));
}

/* ---- the layer ------------------------------------------------------------------------------------------------ */

uint64_t swa_layer_back_cost(const swa_model_t *model, const swa_mix_t *mix, int64_t n_prefix, int64_t first,
                             int64_t n_tokens, bool lowest)
{
    return swa_project_cost(model, n_tokens, n_tokens - first) + upper_cost(model, mix, first, n_tokens) +
           (lowest ? 0 : lower_cost(model, mix, n_prefix, first, n_tokens));
}

void swa_layer_back(swa_backward_t *back, int64_t layer, const swa_mix_t *mix, const float *x, int64_t first,
                    bool lowest, double *gradient)
{
    swa_workspace_t *ws = back->ws;
    const swa_config_t *c = &ws->model->config;
    const int64_t n_tokens = ws->n_tokens, n_gates = back->n_choices * c->n_kv_heads;
    layer_back_t pass = {
        .back = back, .layer = &ws->model->layers[layer], .mix = mix, .x = x, .first = first, .lowest = lowest};
    pass.attention = (swa_attention_back_t){
        .model = ws->model,
        .run = ws->run,
        .mix = mix,
        .n_rows = n_tokens,
        .first_query = first,
        .query_stride = swa_activation_stride(c->n_heads * c->head_dim),
        .kv_stride = swa_activation_stride(c->n_kv_heads * c->head_dim),
        .queries = ws->queries,
        .d_outputs = back->d_outputs,
        .keys = back->keys,
        .values = back->values,
        .k_v = &ws->kv,
        .v_k = &back->v_k,
        .q_do = &back->q_do,
        .do_q = &back->do_q,
        .log_sums = back->log_sums,
        .deltas = back->deltas,
        .stat_stride = back->stat_stride,
    };
    transpose_weights(&pass);
    swa_project(ws, layer, x, 0, n_tokens, first);
    swa_parallel_for(ws->n_threads, lowest ? 0 : (n_tokens + SWA_TILE - 1) / SWA_TILE, repack_tile, &pass);
    swa_parallel_for(ws->n_threads, swa_chunk_count(ws, first, n_tokens), upper_chunk, &pass);
    if (!lowest)
        swa_parallel_for(ws->n_threads, swa_chunk_count(ws, back->n_prefix, n_tokens), lower_chunk, &pass);
    for (int64_t i = 0; i < n_gates; i++)
        gradient[i] = 0.0;
    for (int64_t row = first; row < n_tokens && !swa_cancelled(ws->run); row++)
        for (int64_t i = 0; i < n_gates; i++)
            gradient[i] += back->by_row[row * n_gates + i];
}
