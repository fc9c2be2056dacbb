/* Passes over whole sequences: answer NLL, logits, and the layer sweep.
 *
 * The sweep measures, for every layer that may flip, the run in which that layer alone differs from the base policy.
 * Below the flipped layer both runs agree, so the base's residual is walked upward once and forked at each layer:
 * queries, keys and values there are shared, only attention and what follows differ. Rows that every run computes alike
 * (they see all earlier keys with or without the flip) run once, their keys and values kept. */
#include <math.h>

#include "arena.h"
#include "nll.h"

typedef struct {
    swa_workspace_t ws;
    const swa_policy_t *policy;
    const int64_t *flip_window; /* NULL: no forks */
    const int32_t *ids;
    int64_t n_rows;          /* the last token's row predicts nothing */
    int64_t prompt_len;      /* rows prompt_len - 1 .. n_rows - 1 are scored */
    int64_t n_prefix;        /* rows that all runs share, whole tiles */
    float *base, *fork;      /* residual rows [n_prefix, n_rows) */
    swa_kv_t prefix_kv;      /* keys and values of the prefix ... */
    unsigned char *kv_store; /* ... of every layer */
} sweep_t;

static bool flips(const sweep_t *sweep, int64_t layer)
{
    return sweep->flip_window && sweep->flip_window[layer] != SWA_NO_FLIP;
}

static swa_mask_t flipped_mask(const sweep_t *sweep, int64_t layer)
{
    swa_mask_t mask = swa_layer_mask(sweep->policy, layer);
    mask.window = sweep->flip_window[layer];
    return mask;
}

/* A row t < W + S sees every earlier key, whatever the window: all runs agree on rows below the least W + S. The prefix
 * ends before the scored rows and at a whole tile. */
static int64_t shared_rows(const sweep_t *sweep)
{
    int64_t shared = 0;
    bool any = false;
    for (int64_t l = 0; l < sweep->ws.model->config.n_layers; l++) {
        if (!flips(sweep, l))
            continue;
        swa_mask_t masks[2] = {swa_layer_mask(sweep->policy, l), flipped_mask(sweep, l)};
        for (int i = 0; i < 2; i++) {
            int64_t seen = swa_min(sweep->prompt_len - 1, masks[i].window);
            seen = swa_min(sweep->prompt_len - 1, seen + swa_min(masks[i].sinks, sweep->prompt_len - 1));
            if (masks[i].window > 0 && (!any || seen < shared)) {
                shared = seen;
                any = true;
            }
        }
    }
    return shared / SWA_TILE * SWA_TILE;
}

/* ---- walking ------------------------------------------------------------------------------------------------ */

static void place_prefix(sweep_t *sweep, int64_t layer)
{
    swa_kv_place(&sweep->prefix_kv, sweep->kv_store + (size_t)layer * swa_kv_bytes(&sweep->prefix_kv));
}

/* Rows [0, n_prefix) through all layers; `x` is scratch for their residual. */
static void run_prefix(sweep_t *sweep, float *x)
{
    swa_workspace_t *ws = &sweep->ws;
    const int64_t n_layers = ws->model->config.n_layers, n_prefix = sweep->n_prefix;
    swa_embed_rows(ws, sweep->ids, n_prefix, x);
    for (int64_t l = 0; l < n_layers && !swa_cancelled(ws->run); l++) {
        bool last = l == n_layers - 1;
        swa_project(ws, l, x, 0, n_prefix, last ? n_prefix : 0);
        place_prefix(sweep, l);
        swa_kv_copy(&sweep->prefix_kv, &ws->kv, 0, n_prefix / SWA_TILE);
        if (!last)
            swa_finish(ws, l, swa_layer_mask(sweep->policy, l), x, x, 0, n_prefix);
    }
}

/* First row that layer l must finish: in the last layer only scored rows are needed. */
static int64_t first_needed(const sweep_t *sweep, int64_t layer)
{
    return layer == sweep->ws.model->config.n_layers - 1 ? sweep->prompt_len - 1 : sweep->n_prefix;
}

static float *residual_row(const sweep_t *sweep, float *x, int64_t row)
{
    return x + (row - sweep->n_prefix) * sweep->ws.model->config.hidden_size;
}

static void project_layer(sweep_t *sweep, int64_t layer, const float *x)
{
    if (sweep->n_prefix) {
        place_prefix(sweep, layer);
        swa_kv_copy(&sweep->ws.kv, &sweep->prefix_kv, 0, sweep->n_prefix / SWA_TILE);
    }
    swa_project(&sweep->ws, layer, x, sweep->n_prefix, sweep->n_rows, first_needed(sweep, layer));
}

static void finish_layer(sweep_t *sweep, int64_t layer, swa_mask_t mask, float *x, float *x_out)
{
    int64_t first = first_needed(sweep, layer);
    swa_finish(&sweep->ws, layer, mask, residual_row(sweep, x, first), residual_row(sweep, x_out, first), first,
               sweep->n_rows);
}

static swa_status_t score(sweep_t *sweep, float *x, double *nll, uint8_t *greedy)
{
    if (swa_cancelled(sweep->ws.run))
        return SWA_ERROR_CANCELLED;
    int64_t first = sweep->prompt_len - 1;
    return swa_score_rows(sweep->ws.model, sweep->ws.run, residual_row(sweep, x, first), sweep->n_rows - first,
                          sweep->ids + sweep->prompt_len, nll, greedy);
}

/* The fork of `layer`, whose finished residual stands in sweep->fork, through the layers above. */
static swa_status_t run_fork(sweep_t *sweep, int64_t layer, double *nll, uint8_t *greedy)
{
    for (int64_t l = layer + 1; l < sweep->ws.model->config.n_layers && !swa_cancelled(sweep->ws.run); l++) {
        project_layer(sweep, l, sweep->fork);
        finish_layer(sweep, l, swa_layer_mask(sweep->policy, l), sweep->fork, sweep->fork);
    }
    return score(sweep, sweep->fork, nll, greedy);
}

static swa_status_t walk(sweep_t *sweep, double *base_nll, uint8_t *base_greedy, double *run_nll, uint8_t *run_greedy)
{
    const int64_t n_answer = sweep->n_rows + 1 - sweep->prompt_len;
    swa_embed_rows(&sweep->ws, sweep->ids + sweep->n_prefix, sweep->n_rows - sweep->n_prefix, sweep->base);
    for (int64_t l = 0; l < sweep->ws.model->config.n_layers && !swa_cancelled(sweep->ws.run); l++) {
        project_layer(sweep, l, sweep->base);
        if (flips(sweep, l))
            finish_layer(sweep, l, flipped_mask(sweep, l), sweep->base, sweep->fork);
        /* The base goes on first: the fork's way up overwrites the keys and values. */
        finish_layer(sweep, l, swa_layer_mask(sweep->policy, l), sweep->base, sweep->base);
        if (flips(sweep, l)) {
            swa_status_t status = run_fork(sweep, l, run_nll + l * n_answer, run_greedy + l * n_answer);
            if (status != SWA_OK)
                return status;
        }
    }
    return score(sweep, sweep->base, base_nll, base_greedy);
}

/* ---- cost --------------------------------------------------------------------------------------------------- */

static uint64_t project_layer_cost(const sweep_t *sweep, int64_t layer)
{
    return swa_project_cost(sweep->ws.model, sweep->n_rows - sweep->n_prefix,
                            sweep->n_rows - first_needed(sweep, layer));
}

static uint64_t finish_layer_cost(const sweep_t *sweep, int64_t layer, swa_mask_t mask)
{
    return swa_finish_cost(sweep->ws.model, mask, first_needed(sweep, layer), sweep->n_rows);
}

/* The same sum that the walk's tasks will report. */
static uint64_t walk_cost(const sweep_t *sweep)
{
    const swa_model_t *model = sweep->ws.model;
    const int64_t n_layers = model->config.n_layers;
    const uint64_t head = swa_head_cost(model, sweep->n_rows + 1 - sweep->prompt_len);
    uint64_t total = head, above = 0; /* above: layers l + 1 .. in the base policy */
    for (int64_t l = n_layers - 1; l >= 0; l--) {
        if (flips(sweep, l))
            total += finish_layer_cost(sweep, l, flipped_mask(sweep, l)) + above + head;
        uint64_t own = project_layer_cost(sweep, l) + finish_layer_cost(sweep, l, swa_layer_mask(sweep->policy, l));
        total += own;
        above += own;
        if (sweep->n_prefix) {
            bool last = l == n_layers - 1;
            total += swa_project_cost(model, sweep->n_prefix, last ? 0 : sweep->n_prefix);
            if (!last)
                total += swa_finish_cost(model, swa_layer_mask(sweep->policy, l), 0, sweep->n_prefix);
        }
    }
    return total;
}

/* ---- entry points ------------------------------------------------------------------------------------------- */

static size_t rows_bytes(const swa_model_t *model, int64_t n_rows)
{
    return swa_multiply_sizes((size_t)(n_rows * model->config.hidden_size), sizeof(float));
}

static swa_kv_t prefix_layout(const swa_model_t *model, int64_t n_prefix)
{
    const swa_config_t *c = &model->config;
    return swa_kv_layout(model->kernels, model->bf16_activations, c->n_kv_heads, c->head_dim, n_prefix);
}

static swa_status_t run_sweep(const swa_model_t *model, swa_run_t *run, const int32_t *ids, int64_t n_tokens,
                              int64_t prompt_len, const swa_policy_t *policy, const int64_t *flip_window,
                              double *base_nll, uint8_t *base_greedy, double *run_nll, uint8_t *run_greedy)
{
    sweep_t sweep = {
        .policy = policy, .flip_window = flip_window, .ids = ids, .n_rows = n_tokens - 1, .prompt_len = prompt_len};
    swa_status_t status = swa_workspace_open(&sweep.ws, model, run, sweep.n_rows);
    if (status != SWA_OK)
        return status;
    sweep.n_prefix = shared_rows(&sweep);
    sweep.prefix_kv = prefix_layout(model, sweep.n_prefix);
    int64_t live = sweep.n_rows - sweep.n_prefix;
    int64_t fork_rows = flip_window ? swa_max(live, sweep.n_prefix) : 0;
    sweep.base = swa_allocate(rows_bytes(model, live), 1);
    sweep.fork = swa_allocate(rows_bytes(model, fork_rows), 1);
    sweep.kv_store = swa_allocate((size_t)model->config.n_layers, swa_kv_bytes(&sweep.prefix_kv));
    if (sweep.base && sweep.fork && sweep.kv_store) {
        atomic_store(&run->total, walk_cost(&sweep));
        if (sweep.n_prefix)
            run_prefix(&sweep, sweep.fork);
        status = walk(&sweep, base_nll, base_greedy, run_nll, run_greedy);
    } else {
        status = SWA_ERROR_MEMORY;
    }
    swa_release(sweep.kv_store);
    swa_release(sweep.fork);
    swa_release(sweep.base);
    swa_workspace_close(&sweep.ws);
    return status;
}

swa_status_t swa_nll(const swa_model_t *model, swa_run_t *run, const int32_t *ids, int64_t n_tokens, int64_t prompt_len,
                     const swa_policy_t *policy, double *nll, uint8_t *greedy)
{
    return run_sweep(model, run, ids, n_tokens, prompt_len, policy, NULL, nll, greedy, NULL, NULL);
}

swa_status_t swa_sweep(const swa_model_t *model, swa_run_t *run, const int32_t *ids, int64_t n_tokens,
                       int64_t prompt_len, const swa_policy_t *policy, const int64_t *flip_window, double *base_nll,
                       uint8_t *base_greedy, double *run_nll, uint8_t *run_greedy)
{
    const int64_t n_answer = n_tokens - prompt_len;
    for (int64_t i = 0; i < model->config.n_layers * n_answer; i++) {
        run_nll[i] = NAN;
        run_greedy[i] = 0;
    }
    return run_sweep(model, run, ids, n_tokens, prompt_len, policy, flip_window, base_nll, base_greedy, run_nll,
                     run_greedy);
}

swa_status_t swa_logits(const swa_model_t *model, swa_run_t *run, const int32_t *ids, int64_t n_tokens,
                        const swa_policy_t *policy, int64_t first_row, float *logits)
{
    const int64_t n_layers = model->config.n_layers, hidden = model->config.hidden_size;
    swa_workspace_t ws;
    swa_status_t status = swa_workspace_open(&ws, model, run, n_tokens);
    if (status != SWA_OK)
        return status;
    float *x = swa_allocate(rows_bytes(model, n_tokens), 1);
    if (x) {
        uint64_t total = swa_head_cost(model, n_tokens - first_row);
        for (int64_t l = 0; l < n_layers; l++) {
            int64_t first = l == n_layers - 1 ? first_row : 0;
            total += swa_project_cost(model, n_tokens, n_tokens - first) +
                     swa_finish_cost(model, swa_layer_mask(policy, l), first, n_tokens);
        }
        atomic_store(&run->total, total);
        swa_embed_rows(&ws, ids, n_tokens, x);
        for (int64_t l = 0; l < n_layers && !swa_cancelled(run); l++) {
            int64_t first = l == n_layers - 1 ? first_row : 0;
            swa_project(&ws, l, x, 0, n_tokens, first);
            swa_finish(&ws, l, swa_layer_mask(policy, l), x + first * hidden, x + first * hidden, first, n_tokens);
        }
        status = swa_cancelled(run) ? SWA_ERROR_CANCELLED
                                    : swa_logit_rows(model, run, x + first_row * hidden, n_tokens - first_row, logits);
    } else {
        status = SWA_ERROR_MEMORY;
    }
    swa_release(x);
    swa_workspace_close(&ws);
    return status;
}

size_t swa_workspace_bytes(const swa_model_t *model, swa_work_t work, int64_t n_tokens, int64_t n_prefix, int n_threads)
{
    const size_t n_layers = (size_t)model->config.n_layers;
    size_t bytes = swa_add_sizes(swa_pass_bytes(model, n_tokens, n_threads), rows_bytes(model, n_tokens));
    swa_kv_t kv = prefix_layout(model, work == SWA_WORK_SWEEP ? n_prefix : n_tokens);
    if (work == SWA_WORK_SWEEP)
        bytes = swa_add_sizes(bytes, rows_bytes(model, n_tokens));
    if (work == SWA_WORK_SWEEP || work == SWA_WORK_DECODE)
        bytes = swa_add_sizes(bytes, swa_multiply_sizes(n_layers, swa_kv_bytes(&kv)));
    return swa_add_sizes(bytes, swa_head_bytes(model, n_tokens, n_threads));
}
