/* The decoder forward. A layer runs in two parallel loops over chunks of rows: project (everything that feeds the keys
 * and values) and finish (everything after them). Rows meet only in attention, so chunks decide no result. */
#include "forward.h"

#include "arena.h"
#include "parallel.h"

/* ---- workspace ---------------------------------------------------------------------------------------------- */

enum { CHUNK_TILES = 6 }; /* at most: a chunk reads all weights of a layer */

static int64_t chunk_rows(int64_t n_tokens, int n_threads)
{
    int64_t balanced = n_tokens / (4 * n_threads); /* at least four tasks a thread where there are rows */
    return swa_max(1, swa_min(CHUNK_TILES, balanced / SWA_TILE)) * SWA_TILE;
}

static void layout(swa_workspace_t *ws, swa_arena_t *arena)
{
    const swa_config_t *c = &ws->model->config;
    const int64_t query_columns = c->n_heads * c->head_dim, half = c->head_dim / 2;
    const size_t element = swa_activation_size(ws->model);
    ws->cosines = swa_carve(arena, (size_t)(ws->n_tokens * half), sizeof(float));
    ws->sines = swa_carve(arena, (size_t)(ws->n_tokens * half), sizeof(float));
    ws->queries = swa_carve(arena, (size_t)(ws->n_tokens * swa_activation_stride(query_columns)), element);
    ws->kv = swa_kv_layout(ws->model->kernels, ws->model->bf16_activations, c->n_kv_heads, c->head_dim, ws->n_tokens);
    unsigned char *kv_memory = swa_carve(arena, swa_kv_bytes(&ws->kv), 1);
    if (kv_memory)
        swa_kv_place(&ws->kv, kv_memory);

    const size_t block = (size_t)(ws->chunk * ws->column_stride) * sizeof(float);
    const int64_t widest = swa_max(c->hidden_size, ws->column_stride);
    ws->scratch = swa_carve(arena, (size_t)ws->n_threads, sizeof *ws->scratch);
    for (int i = 0; i < ws->n_threads; i++) {
        swa_scratch_t s;
        s.row = swa_carve(arena, (size_t)widest, sizeof(float));
        s.columns = swa_carve(arena, block, 1);
        s.more_columns = swa_carve(arena, block, 1);
        s.normed = swa_carve(arena, (size_t)(ws->chunk * swa_activation_stride(c->hidden_size)), element);
        s.attended = swa_carve(arena, (size_t)(ws->chunk * swa_activation_stride(query_columns)), element);
        s.intermediate = swa_carve(arena, (size_t)(ws->chunk * swa_activation_stride(c->intermediate_size)), element);
        unsigned char *attention = swa_carve(arena, swa_attention_scratch_bytes(&ws->kv), 1);
        if (attention) {
            swa_attention_scratch_place(&s.attention, &ws->kv, attention);
            ws->scratch[i] = s;
        }
    }
}

swa_workspace_t swa_workspace_describe(const swa_model_t *model, int64_t n_tokens, int n_threads)
{
    swa_workspace_t ws = {.model = model, .n_tokens = n_tokens, .n_threads = n_threads};
    ws.chunk = chunk_rows(n_tokens, n_threads);
    ws.column_stride = swa_column_block(model, model->config.head_dim);
    return ws;
}

size_t swa_pass_bytes(const swa_model_t *model, int64_t n_tokens, int n_threads)
{
    swa_workspace_t ws = swa_workspace_describe(model, n_tokens, n_threads);
    swa_arena_t arena = {0};
    layout(&ws, &arena);
    return arena.used;
}

enum { ROWS_PER_TASK = 64 }; /* of small work */

static void rope_rows(void *context, int64_t task, int thread)
{
    (void)thread;
    const swa_workspace_t *ws = context;
    const int64_t half = ws->model->config.head_dim / 2, first = task * ROWS_PER_TASK;
    for (int64_t t = first; t < swa_min(ws->n_tokens, first + ROWS_PER_TASK); t++)
        swa_rope_angles(ws->model, t, ws->cosines + t * half, ws->sines + t * half);
}

swa_status_t swa_workspace_open(swa_workspace_t *ws, const swa_model_t *model, swa_run_t *run, int64_t n_tokens)
{
    *ws = swa_workspace_describe(model, n_tokens, run->n_threads);
    ws->run = run;
    swa_arena_t arena = {0};
    layout(ws, &arena);
    arena = (swa_arena_t){.base = ws->memory = swa_allocate(arena.used, 1)};
    if (!ws->memory)
        return SWA_ERROR_MEMORY;
    layout(ws, &arena);
    swa_parallel_for(ws->n_threads, (n_tokens + ROWS_PER_TASK - 1) / ROWS_PER_TASK, rope_rows, ws);
    return SWA_OK;
}

void swa_workspace_close(swa_workspace_t *ws)
{
    swa_release(ws->memory);
    ws->memory = NULL;
}

/* ---- cost --------------------------------------------------------------------------------------------------- */

uint64_t swa_project_cost(const swa_model_t *model, int64_t n_rows, int64_t n_queries)
{
    const swa_config_t *c = &model->config;
    uint64_t query = (uint64_t)(c->n_heads * c->head_dim), kv = (uint64_t)(c->n_kv_heads * c->head_dim);
    return 2 * (uint64_t)c->hidden_size * ((uint64_t)n_queries * query + (uint64_t)n_rows * 2 * kv);
}

uint64_t swa_finish_mixed_cost(const swa_model_t *model, const swa_mix_t *mix, int64_t first, int64_t end)
{
    const swa_config_t *c = &model->config;
    uint64_t rows = (uint64_t)(end - first), width = (uint64_t)(c->n_heads * c->head_dim);
    uint64_t weights = (uint64_t)c->hidden_size * (width + 3 * (uint64_t)c->intermediate_size);
    uint64_t pairs = 0;
    for (int64_t i = 0; i < mix->n; i++)
        if (mix->weights[i] != 0.0f)
            pairs += (uint64_t)swa_visible_pairs(mix->masks[i], first, end);
    return 2 * rows * weights + 4 * width * pairs;
}

uint64_t swa_finish_cost(const swa_model_t *model, swa_mask_t mask, int64_t first, int64_t end)
{
    swa_mix_t mix = swa_single_mask(mask);
    return swa_finish_mixed_cost(model, &mix, first, end);
}

/* ---- one layer ---------------------------------------------------------------------------------------------- */

swa_mask_t swa_layer_mask(const swa_policy_t *policy, int64_t layer)
{
    return (swa_mask_t){policy->window[layer], policy->sinks[layer], policy->full_from[layer]};
}

/* What a parallel loop over chunks of rows shares. */
typedef struct {
    swa_workspace_t *ws;
    const swa_layer_t *layer;
    const swa_mix_t *mix;
    const float *x;
    float *x_out;
    int64_t first, end, query_first;
} pass_t;

/* Chunks of one tile, with which a loop ends, so that no thread waits long for another: what the others may do while
 * one is at its last large chunk, and what is left over from large ones. */
static int64_t small_chunks(const swa_workspace_t *ws, int64_t n_tiles)
{
    int64_t large = ws->chunk / SWA_TILE, small = swa_min(n_tiles, (ws->n_threads - 1) * large);
    return small + (n_tiles - small) % large;
}

static int64_t tile_count(int64_t first, int64_t end) { return (end - 1) / SWA_TILE - first / SWA_TILE + 1; }

int64_t swa_chunk_count(const swa_workspace_t *ws, int64_t first, int64_t end)
{
    int64_t n_tiles = tile_count(first, end), small = small_chunks(ws, n_tiles);
    return small + (n_tiles - small) / (ws->chunk / SWA_TILE);
}

swa_chunk_t swa_chunk_at(const swa_workspace_t *ws, int64_t first, int64_t end, int64_t task)
{
    int64_t index = swa_chunk_count(ws, first, end) - 1 - task;
    int64_t small = small_chunks(ws, tile_count(first, end)), rows = index < small ? SWA_TILE : ws->chunk;
    int64_t tile = index < small ? index : small + (index - small) * (ws->chunk / SWA_TILE);
    int64_t start = first / SWA_TILE * SWA_TILE + tile * SWA_TILE, row = swa_max(start, first);
    return (swa_chunk_t){row, swa_min(start + rows, end) - row};
}

typedef enum { QUERIES, KEYS, VALUES } part_t;

/* Queries, keys or values of a chunk: [m][hidden] x [hidden][heads * head_dim]; then, head by head, norm and RoPE (not
 * for values), and into the workspace. */
static void project_part(const pass_t *pass, swa_chunk_t chunk, part_t part, swa_scratch_t *s)
{
    swa_workspace_t *ws = pass->ws;
    const swa_model_t *model = ws->model;
    const swa_layer_t *layer = pass->layer;
    const swa_config_t *c = &model->config;
    const swa_linear_t *linear = part == QUERIES ? &layer->q : part == KEYS ? &layer->k : &layer->v;
    const swa_vector_t *norm = part == QUERIES ? &layer->q_norm : &layer->k_norm;
    const int64_t d = c->head_dim, half = d / 2, width = linear->matrix.n;
    const int64_t hidden_stride = swa_activation_stride(c->hidden_size), query_stride = swa_activation_stride(width);
    const size_t element = swa_activation_size(model);
    const int64_t skip = part == QUERIES ? swa_max(0, pass->query_first - chunk.row) : 0;
    for (int64_t column = 0; column < width && skip < chunk.m; column += ws->column_stride) {
        int64_t columns = swa_min(ws->column_stride, width - column);
        if (swa_cancelled(ws->run))
            return;
        swa_multiply(model, linear, chunk.m - skip, s->normed + (size_t)(skip * hidden_stride) * element, hidden_stride,
                     column, columns, s->columns, ws->column_stride);
        for (int64_t r = skip; r < chunk.m; r++) {
            int64_t row = chunk.row + r;
            float *heads = s->columns + (r - skip) * ws->column_stride;
            for (int64_t i = 0; i < columns; i += d) {
                if (part != VALUES && ws->raw_heads)
                    memcpy(swa_raw_head(ws, row, (column + i) / d + (part == KEYS ? c->n_heads : 0)), heads + i,
                           (size_t)d * sizeof(float));
                if (part != VALUES)
                    swa_finish_head(model, norm, ws->cosines + row * half, ws->sines + row * half, heads + i);
                if (part == KEYS)
                    swa_kv_store_key(&ws->kv, row, (column + i) / d, heads + i);
                else if (part == VALUES)
                    swa_kv_store_value(&ws->kv, row, (column + i) / d, heads + i);
            }
            if (part == QUERIES)
                swa_store_activation(model, columns, heads,
                                     ws->queries + (size_t)(row * query_stride + column) * element);
        }
    }
}

void swa_norm_rows(const swa_workspace_t *ws, const swa_vector_t *weight, const float *x, int64_t m, swa_scratch_t *s)
{
    const swa_model_t *model = ws->model;
    const int64_t hidden = model->config.hidden_size;
    const size_t row_bytes = (size_t)swa_activation_stride(hidden) * swa_activation_size(model);
    for (int64_t r = 0; r < m; r++)
        swa_norm_activation(model, weight, x + r * hidden, s->row, s->normed + (size_t)r * row_bytes);
}

static void project_chunk(void *context, int64_t task, int thread)
{
    const pass_t *pass = context;
    swa_workspace_t *ws = pass->ws;
    if (swa_cancelled(ws->run))
        return;
    swa_chunk_t chunk = swa_chunk_at(ws, pass->first, pass->end, task);
    swa_scratch_t *s = &ws->scratch[thread];
    const float *x = pass->x + (chunk.row - pass->first) * ws->model->config.hidden_size;
    swa_norm_rows(ws, &pass->layer->input_norm, x, chunk.m, s);
    project_part(pass, chunk, QUERIES, s);
    project_part(pass, chunk, KEYS, s);
    project_part(pass, chunk, VALUES, s);
    int64_t n_queries = swa_max(0, chunk.m - swa_max(0, pass->query_first - chunk.row));
    swa_advance(ws->run, swa_project_cost(ws->model, chunk.m, n_queries));
}

void swa_project(swa_workspace_t *ws, int64_t layer, const float *x, int64_t first, int64_t end, int64_t query_first)
{
    pass_t pass = {
        .ws = ws, .layer = &ws->model->layers[layer], .x = x, .first = first, .end = end, .query_first = query_first};
    swa_parallel_for(ws->n_threads, swa_chunk_count(ws, first, end), project_chunk, &pass);
}

void swa_add_product(const swa_workspace_t *ws, const swa_linear_t *linear, const void *a, int64_t a_stride, int64_t m,
                     const float *x, float *x_out, swa_scratch_t *s)
{
    const int64_t hidden = linear->matrix.n;
    for (int64_t column = 0; column < hidden; column += ws->column_stride) {
        int64_t columns = swa_min(ws->column_stride, hidden - column);
        if (swa_cancelled(ws->run))
            return;
        swa_multiply(ws->model, linear, m, a, a_stride, column, columns, s->columns, ws->column_stride);
        for (int64_t r = 0; r < m; r++) {
            float *out = x_out + r * hidden + column;
            if (x != x_out)
                memcpy(out, x + r * hidden + column, (size_t)columns * sizeof(float));
            ws->model->kernels->add(columns, out, s->columns + r * ws->column_stride);
        }
    }
}

/* intermediate[m][n] = silu(normed gate) * (normed up) */
static void gated_product(const swa_workspace_t *ws, const swa_layer_t *layer, int64_t m, swa_scratch_t *s)
{
    const swa_model_t *model = ws->model;
    const int64_t width = model->config.intermediate_size, stride = swa_activation_stride(width);
    const int64_t hidden_stride = swa_activation_stride(model->config.hidden_size);
    for (int64_t column = 0; column < width; column += ws->column_stride) {
        int64_t columns = swa_min(ws->column_stride, width - column);
        if (swa_cancelled(ws->run))
            return;
        swa_multiply(model, &layer->gate, m, s->normed, hidden_stride, column, columns, s->columns, ws->column_stride);
        swa_multiply(model, &layer->up, m, s->normed, hidden_stride, column, columns, s->more_columns,
                     ws->column_stride);
        for (int64_t r = 0; r < m; r++) {
            float *gate = s->columns + r * ws->column_stride;
            model->kernels->silu_mul(columns, gate, s->more_columns + r * ws->column_stride, gate);
            swa_store_activation(model, columns, gate,
                                 s->intermediate + (size_t)(r * stride + column) * swa_activation_size(model));
        }
    }
}

static void finish_chunk(void *context, int64_t task, int thread)
{
    const pass_t *pass = context;
    swa_workspace_t *ws = pass->ws;
    const swa_model_t *model = ws->model;
    const swa_layer_t *layer = pass->layer;
    const swa_config_t *c = &model->config;
    swa_scratch_t *s = &ws->scratch[thread];
    swa_chunk_t chunk = swa_chunk_at(ws, pass->first, pass->end, task);
    const int64_t query_stride = swa_activation_stride(c->n_heads * c->head_dim);
    const int64_t offset = (chunk.row - pass->first) * c->hidden_size;
    const size_t element = swa_activation_size(model);
    const float *x = pass->x + offset;
    float *x_out = pass->x_out + offset;
    for (int64_t row = 0; row < chunk.m; row += SWA_QUERY_BLOCK) {
        const int64_t first = chunk.row + row, end = chunk.row + swa_min(chunk.m, row + SWA_QUERY_BLOCK);
        const unsigned char *queries = ws->queries + (size_t)(first * query_stride) * element;
        unsigned char *attended = s->attended + (size_t)(row * query_stride) * element;
        for (int64_t head = 0; head < c->n_heads; head++) { /* one at a time: Ctrl-C is heard on long contexts */
            if (swa_cancelled(ws->run))
                return;
            swa_attend(model, &ws->kv, pass->mix, first, end, head, head + 1, queries, attended, query_stride,
                       &s->attention);
        }
    }
    swa_add_product(ws, &layer->o, s->attended, query_stride, chunk.m, x, x_out, s);
    swa_norm_rows(ws, &layer->post_attention_norm, x_out, chunk.m, s);
    gated_product(ws, layer, chunk.m, s);
    swa_add_product(ws, &layer->down, s->intermediate, swa_activation_stride(c->intermediate_size), chunk.m, x_out,
                    x_out, s);
    swa_advance(ws->run, swa_finish_mixed_cost(model, pass->mix, chunk.row, chunk.row + chunk.m));
}

void swa_finish_mixed(swa_workspace_t *ws, int64_t layer, const swa_mix_t *mix, const float *x, float *x_out,
                      int64_t first, int64_t end)
{
    pass_t pass = {
        .ws = ws, .layer = &ws->model->layers[layer], .mix = mix, .x = x, .x_out = x_out, .first = first, .end = end};
    swa_parallel_for(ws->n_threads, swa_chunk_count(ws, first, end), finish_chunk, &pass);
}

void swa_finish(swa_workspace_t *ws, int64_t layer, swa_mask_t mask, const float *x, float *x_out, int64_t first,
                int64_t end)
{
    swa_mix_t mix = swa_single_mask(mask);
    swa_finish_mixed(ws, layer, &mix, x, x_out, first, end);
}

typedef struct {
    const swa_workspace_t *ws;
    const int32_t *ids;
    int64_t n_rows;
    float *x;
} embed_t;

static void embed_rows(void *context, int64_t task, int thread)
{
    (void)thread;
    const embed_t *e = context;
    const int64_t hidden = e->ws->model->config.hidden_size, first = task * ROWS_PER_TASK;
    for (int64_t t = first; t < swa_min(e->n_rows, first + ROWS_PER_TASK) && !swa_cancelled(e->ws->run); t++)
        swa_embed(e->ws->model, e->ids[t], e->x + t * hidden);
}

void swa_embed_rows(swa_workspace_t *ws, const int32_t *ids, int64_t n_rows, float *x)
{
    embed_t embed = {ws, ids, n_rows, x};
    swa_parallel_for(ws->n_threads, (n_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, embed_rows, &embed);
}
