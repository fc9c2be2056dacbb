/* How much of the attention of a sequence's last rows stays within a window and the sinks, head by head. */
#include <math.h>

#include "forward.h"
#include "parallel.h"

typedef struct {
    swa_workspace_t *ws;
    swa_mask_t own, near; /* what the layer sees, and the part of it that is asked about */
    int64_t first;        /* the last rows begin here */
    double *mass;         /* [n_heads] of the layer at work */
} mass_t;

/* A softmax's sum over the near keys, divided by that over all: two log-sums tell it. */
static void head_mass(void *context, int64_t head, int thread)
{
    const mass_t *pass = context;
    const swa_workspace_t *ws = pass->ws;
    const swa_config_t *c = &ws->model->config;
    swa_attention_scratch_t *scratch = &ws->scratch[thread].attention;
    const int64_t stride = swa_activation_stride(c->n_heads * c->head_dim);
    const int64_t kv_head = head / (c->n_heads / c->n_kv_heads);
    float near[SWA_QUERY_BLOCK], own[SWA_QUERY_BLOCK];
    double total = 0.0;
    for (int64_t row = pass->first, m; row < ws->n_tokens && !swa_cancelled(ws->run); row += m) {
        m = swa_min(SWA_QUERY_BLOCK, ws->n_tokens - row);
        const size_t offset = (size_t)(row * stride + head * c->head_dim) * swa_activation_size(ws->model);
        swa_attend_block(&ws->kv, pass->near, kv_head, row, m, ws->queries + offset, stride, scratch, near);
        swa_attend_block(&ws->kv, pass->own, kv_head, row, m, ws->queries + offset, stride, scratch, own);
        for (int64_t r = 0; r < m; r++)
            total += exp2((double)near[r] - (double)own[r]);
    }
    pass->mass[head] = total / (double)(ws->n_tokens - pass->first);
}

static void walk(swa_workspace_t *ws, const int32_t *ids, const int64_t *window, int64_t near_window,
                 int64_t near_sinks, int64_t n_last, float *x, double *mass)
{
    const swa_config_t *c = &ws->model->config;
    const int64_t n_tokens = ws->n_tokens;
    swa_embed_rows(ws, ids, n_tokens, x);
    for (int64_t l = 0; l < c->n_layers && !swa_cancelled(ws->run); l++, mass += c->n_heads) {
        const bool last = l == c->n_layers - 1;
        const swa_mask_t own = {window[l], 0, n_tokens};
        const int64_t seen = own.window ? swa_min(own.window, near_window) : near_window;
        mass_t pass = {.ws = ws,
                       .own = own,
                       .near = {seen, own.window ? 0 : near_sinks, n_tokens},
                       .first = n_tokens - n_last,
                       .mass = mass};
        swa_project(ws, l, x, 0, n_tokens, last ? pass.first : 0);
        swa_parallel_for(ws->n_threads, c->n_heads, head_mass, &pass);
        if (!last)
            swa_finish(ws, l, own, x, x, 0, n_tokens);
    }
}

swa_status_t swa_attention_mass(const swa_model_t *model, swa_run_t *run, const int32_t *ids, int64_t n_tokens,
                                const int64_t *window, int64_t near_window, int64_t near_sinks, int64_t n_last,
                                double *mass)
{
    const int64_t n_layers = model->config.n_layers;
    swa_workspace_t ws;
    swa_status_t status = swa_workspace_open(&ws, model, run, n_tokens);
    if (status != SWA_OK)
        return status;
    float *x = swa_allocate((size_t)(n_tokens * model->config.hidden_size), sizeof(float));
    status = SWA_ERROR_MEMORY;
    if (x) {
        uint64_t total = swa_project_cost(model, n_tokens, n_last);
        for (int64_t l = 0; l < n_layers - 1; l++)
            total += swa_project_cost(model, n_tokens, n_tokens) +
                     swa_finish_cost(model, (swa_mask_t){window[l], 0, n_tokens}, 0, n_tokens);
        atomic_store(&run->total, total);
        walk(&ws, ids, window, near_window, near_sinks, n_last, x, mass);
        status = swa_cancelled(run) ? SWA_ERROR_CANCELLED : SWA_OK;
    }
    swa_release(x);
    swa_workspace_close(&ws);
    return status;
}
