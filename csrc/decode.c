/* KV cache of one sequence: prefill, then one token a step. A step computes what the prefill's row would, bit for bit:
 * the same kernels in the same order. */
#include "arena.h"
#include "nll.h"
#include "parallel.h"

struct swa_session {
    const swa_model_t *model;
    int n_threads; /* scratch exists for so many */
    int64_t n_tokens, capacity;
    int64_t *decode_window, *decode_sinks; /* [n_layers] */
    swa_kv_t *kv;                          /* [n_layers] */
    unsigned char *kv_memory;
    size_t kv_bytes;
    float *logits, *next_logits; /* of the last token, and of the one that a step is at */
    /* one row on its way through a layer */
    float *x, *row, *q, *k, *v, *gate, *up, *out, *cosines, *sines;
    unsigned char *normed, *queries, *attended, *intermediate;
    unsigned char *attention_memory;
    swa_attention_scratch_t *attention; /* [n_threads] */
};

/* Tiles that a windowed layer must keep to see W keys wherever the last of them lies in its tile, and its sinks. */
static swa_kv_t cache_layout(const swa_model_t *model, int64_t window, int64_t sinks, int64_t capacity)
{
    const swa_config_t *c = &model->config;
    swa_kv_t kv = swa_kv_layout(model->kernels, model->bf16_activations, c->n_kv_heads, c->head_dim, capacity);
    if (window == 0 || window >= capacity)
        return kv;
    int64_t first = (swa_min(sinks, capacity) + SWA_TILE - 1) / SWA_TILE;
    int64_t ring = (window + SWA_TILE - 2) / SWA_TILE + 1;
    if (first + ring < kv.slots) {
        kv.first_tiles = first;
        kv.ring_tiles = ring;
        kv.slots = first + ring;
    }
    return kv;
}

static bool allocate_row_buffers(swa_session_t *s)
{
    const swa_config_t *c = &s->model->config;
    const int64_t heads = c->n_heads * c->head_dim, kv_heads = c->n_kv_heads * c->head_dim;
    const size_t element = swa_activation_size(s->model);
    struct {
        void **buffer;
        int64_t count;
        size_t size;
    } buffers[] = {
        {(void **)&s->x, c->hidden_size, sizeof(float)},
        {(void **)&s->row, c->hidden_size, sizeof(float)},
        {(void **)&s->q, swa_round_up(heads, SWA_MAX_PANEL), sizeof(float)},
        {(void **)&s->k, swa_round_up(kv_heads, SWA_MAX_PANEL), sizeof(float)},
        {(void **)&s->v, swa_round_up(kv_heads, SWA_MAX_PANEL), sizeof(float)},
        {(void **)&s->gate, swa_round_up(c->intermediate_size, SWA_MAX_PANEL), sizeof(float)},
        {(void **)&s->up, swa_round_up(c->intermediate_size, SWA_MAX_PANEL), sizeof(float)},
        {(void **)&s->out, swa_round_up(c->hidden_size, SWA_MAX_PANEL), sizeof(float)},
        {(void **)&s->cosines, c->head_dim / 2, sizeof(float)},
        {(void **)&s->sines, c->head_dim / 2, sizeof(float)},
        {(void **)&s->logits, c->vocab_size, sizeof(float)},
        {(void **)&s->next_logits, c->vocab_size, sizeof(float)},
        {(void **)&s->normed, swa_activation_stride(c->hidden_size), element},
        {(void **)&s->queries, swa_activation_stride(heads), element},
        {(void **)&s->attended, swa_activation_stride(heads), element},
        {(void **)&s->intermediate, swa_activation_stride(c->intermediate_size), element},
        {(void **)&s->attention, s->n_threads, sizeof *s->attention},
    };
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        if (!(*buffers[i].buffer = swa_allocate((size_t)buffers[i].count, buffers[i].size)))
            return false;
    size_t scratch = (swa_attention_scratch_bytes(&s->kv[0]) + 63) / 64 * 64;
    s->attention_memory = swa_allocate((size_t)s->n_threads, scratch);
    for (int i = 0; s->attention_memory && i < s->n_threads; i++)
        swa_attention_scratch_place(&s->attention[i], &s->kv[0], s->attention_memory + (size_t)i * scratch);
    return s->attention_memory != NULL;
}

static bool allocate_caches(swa_session_t *s, const int64_t *decode_window, const int64_t *decode_sinks)
{
    const int64_t n_layers = s->model->config.n_layers;
    s->kv = swa_allocate((size_t)n_layers, sizeof *s->kv);
    s->decode_window = swa_allocate((size_t)n_layers, sizeof(int64_t));
    s->decode_sinks = swa_allocate((size_t)n_layers, sizeof(int64_t));
    if (!s->kv || !s->decode_window || !s->decode_sinks)
        return false;
    memcpy(s->decode_window, decode_window, (size_t)n_layers * sizeof(int64_t));
    memcpy(s->decode_sinks, decode_sinks, (size_t)n_layers * sizeof(int64_t));
    swa_arena_t arena = {0};
    for (int64_t l = 0; l < n_layers; l++) {
        s->kv[l] = cache_layout(s->model, decode_window[l], decode_sinks[l], s->capacity);
        swa_carve(&arena, swa_kv_bytes(&s->kv[l]), 1);
    }
    s->kv_bytes = arena.used;
    arena = (swa_arena_t){.base = s->kv_memory = swa_allocate(s->kv_bytes, 1)};
    for (int64_t l = 0; arena.base && l < n_layers; l++)
        swa_kv_place(&s->kv[l], swa_carve(&arena, swa_kv_bytes(&s->kv[l]), 1));
    return arena.base != NULL;
}

void swa_session_free(swa_session_t *s)
{
    if (!s)
        return;
    void *owned[] = {s->decode_window,
                     s->decode_sinks,
                     s->kv,
                     s->kv_memory,
                     s->logits,
                     s->next_logits,
                     s->x,
                     s->row,
                     s->q,
                     s->k,
                     s->v,
                     s->gate,
                     s->up,
                     s->out,
                     s->cosines,
                     s->sines,
                     s->normed,
                     s->queries,
                     s->attended,
                     s->intermediate,
                     s->attention,
                     s->attention_memory};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        swa_release(owned[i]);
    swa_release(s);
}

/* ---- prefill ------------------------------------------------------------------------------------------------ */

static swa_status_t prefill(swa_session_t *s, swa_run_t *run, const int32_t *ids, int64_t n_tokens,
                            const swa_policy_t *policy)
{
    const swa_model_t *model = s->model;
    const int64_t n_layers = model->config.n_layers, hidden = model->config.hidden_size;
    swa_workspace_t ws;
    swa_status_t status = swa_workspace_open(&ws, model, run, n_tokens);
    if (status != SWA_OK)
        return status;
    float *rows = swa_allocate((size_t)(n_tokens * hidden), sizeof(float));
    if (!rows) {
        swa_workspace_close(&ws);
        return SWA_ERROR_MEMORY;
    }
    uint64_t total = swa_head_cost(model, 1);
    for (int64_t l = 0; l < n_layers; l++) {
        int64_t first = l == n_layers - 1 ? n_tokens - 1 : 0;
        total += swa_project_cost(model, n_tokens, n_tokens - first) +
                 swa_finish_cost(model, swa_layer_mask(policy, l), first, n_tokens);
    }
    atomic_store(&run->total, total);
    swa_embed_rows(&ws, ids, n_tokens, rows);
    const swa_kv_t whole = ws.kv;
    for (int64_t l = 0; l < n_layers && !swa_cancelled(run); l++) {
        swa_kv_t *cache = &s->kv[l];
        int64_t first = l == n_layers - 1 ? n_tokens - 1 : 0;
        ws.kv = cache->ring_tiles ? whole : *cache; /* a cache that keeps all is filled in place */
        swa_project(&ws, l, rows, 0, n_tokens, first);
        swa_finish(&ws, l, swa_layer_mask(policy, l), rows + first * hidden, rows + first * hidden, first, n_tokens);
        if (cache->ring_tiles) {
            int64_t tiles = (n_tokens + SWA_TILE - 1) / SWA_TILE;
            int64_t recent = swa_max(cache->first_tiles, tiles - cache->ring_tiles);
            swa_kv_copy(cache, &whole, 0, swa_min(cache->first_tiles, tiles));
            swa_kv_copy(cache, &whole, recent, tiles);
        }
    }
    status = swa_cancelled(run) ? SWA_ERROR_CANCELLED
                                : swa_logit_rows(model, run, rows + (n_tokens - 1) * hidden, 1, s->logits);
    s->n_tokens = n_tokens;
    swa_release(rows);
    swa_workspace_close(&ws);
    return status;
}

swa_status_t swa_session_start(const swa_model_t *model, swa_run_t *run, const int32_t *ids, int64_t n_tokens,
                               const swa_policy_t *policy, const int64_t *decode_window, const int64_t *decode_sinks,
                               int64_t capacity, swa_session_t **out)
{
    *out = NULL;
    swa_session_t *s = swa_allocate(1, sizeof *s);
    if (!s)
        return SWA_ERROR_MEMORY;
    s->model = model;
    s->n_threads = run->n_threads;
    s->capacity = capacity;
    swa_status_t status = SWA_ERROR_MEMORY;
    if (allocate_caches(s, decode_window, decode_sinks) && allocate_row_buffers(s))
        status = prefill(s, run, ids, n_tokens, policy);
    if (status == SWA_OK)
        *out = s;
    else
        swa_session_free(s);
    return status;
}

/* ---- one step ----------------------------------------------------------------------------------------------- */

enum { STEP_COLUMNS = 256 }; /* outputs per task: whole panels on every tier */

/* Up to three products of one activation row, cut into tasks by output columns. */
typedef struct {
    const swa_session_t *session;
    const void *a;
    int n;
    const swa_linear_t *linear[3];
    float *out[3];
} products_t;

static int64_t column_tasks(const swa_linear_t *linear) { return (linear->matrix.n + STEP_COLUMNS - 1) / STEP_COLUMNS; }

static void product_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const products_t *products = context;
    int i = 0;
    while (task >= column_tasks(products->linear[i]))
        task -= column_tasks(products->linear[i++]);
    const swa_linear_t *linear = products->linear[i];
    int64_t column = task * STEP_COLUMNS, columns = swa_min(STEP_COLUMNS, linear->matrix.n - column);
    swa_multiply(products->session->model, linear, 1, products->a, swa_activation_stride(linear->matrix.k), column,
                 columns, products->out[i] + column, STEP_COLUMNS);
}

static void multiply_row(const products_t *products, int n_threads)
{
    int64_t tasks = 0;
    for (int i = 0; i < products->n; i++)
        tasks += column_tasks(products->linear[i]);
    swa_parallel_for(n_threads, tasks, product_task, (void *)products);
}

typedef struct {
    swa_session_t *session;
    int64_t layer;
} step_t;

/* All query heads of one KV head. */
static void attend_task(void *context, int64_t kv_head, int thread)
{
    const step_t *step = context;
    swa_session_t *s = step->session;
    const swa_config_t *c = &s->model->config;
    const int64_t group = c->n_heads / c->n_kv_heads, row = s->n_tokens;
    swa_mask_t mask = {s->decode_window[step->layer], s->decode_sinks[step->layer], row + 1};
    swa_mix_t mix = swa_single_mask(mask);
    swa_attend(s->model, &s->kv[step->layer], &mix, row, row + 1, kv_head * group, (kv_head + 1) * group, s->queries,
               s->attended, swa_activation_stride(c->n_heads * c->head_dim), &s->attention[thread]);
}

static void step_layer(swa_session_t *s, int64_t l, int n_threads)
{
    const swa_model_t *model = s->model;
    const swa_layer_t *layer = &model->layers[l];
    const swa_config_t *c = &model->config;
    const int64_t d = c->head_dim;

    swa_norm_activation(model, &layer->input_norm, s->x, s->row, s->normed);
    multiply_row(&(products_t){s, s->normed, 3, {&layer->q, &layer->k, &layer->v}, {s->q, s->k, s->v}}, n_threads);
    for (int64_t h = 0; h < c->n_heads; h++)
        swa_finish_head(model, &layer->q_norm, s->cosines, s->sines, s->q + h * d);
    swa_store_activation(model, c->n_heads * d, s->q, s->queries);
    for (int64_t g = 0; g < c->n_kv_heads; g++) {
        swa_finish_head(model, &layer->k_norm, s->cosines, s->sines, s->k + g * d);
        swa_kv_store_key(&s->kv[l], s->n_tokens, g, s->k + g * d);
        swa_kv_store_value(&s->kv[l], s->n_tokens, g, s->v + g * d);
    }
    swa_parallel_for(n_threads, c->n_kv_heads, attend_task, &(step_t){s, l});
    multiply_row(&(products_t){s, s->attended, 1, {&layer->o}, {s->out}}, n_threads);
    model->kernels->add(c->hidden_size, s->x, s->out);

    swa_norm_activation(model, &layer->post_attention_norm, s->x, s->row, s->normed);
    multiply_row(&(products_t){s, s->normed, 2, {&layer->gate, &layer->up}, {s->gate, s->up}}, n_threads);
    model->kernels->silu_mul(c->intermediate_size, s->gate, s->up, s->gate);
    swa_store_activation(model, c->intermediate_size, s->gate, s->intermediate);
    multiply_row(&(products_t){s, s->intermediate, 1, {&layer->down}, {s->out}}, n_threads);
    model->kernels->add(c->hidden_size, s->x, s->out);
}

swa_status_t swa_session_step(swa_session_t *s, swa_run_t *run, int32_t token)
{
    const int64_t n_layers = s->model->config.n_layers;
    const int n_threads = (int)swa_min(run->n_threads, s->n_threads);
    if (s->n_tokens >= s->capacity)
        return SWA_ERROR_VALUE;
    swa_rope_angles(s->model, s->n_tokens, s->cosines, s->sines);
    swa_embed(s->model, token, s->x);
    for (int64_t l = 0; l < n_layers; l++) {
        if (swa_cancelled(run)) /* the position is written anew by the next step */
            return SWA_ERROR_CANCELLED;
        step_layer(s, l, n_threads);
    }
    swa_status_t status = swa_logit_rows(s->model, run, s->x, 1, s->next_logits);
    if (status == SWA_OK) { /* else the session is as it was */
        float *last = s->logits;
        s->logits = s->next_logits;
        s->next_logits = last;
        s->n_tokens++;
    }
    return status;
}

const float *swa_session_logits(const swa_session_t *s) { return s->logits; }

int64_t swa_session_tokens(const swa_session_t *s) { return s->n_tokens; }

int64_t swa_session_capacity(const swa_session_t *s) { return s->capacity; }

size_t swa_session_kv_bytes(const swa_session_t *s) { return s->kv_bytes; }
