/* The loss of an answer and its gradient with respect to every layer's gates: one forward that keeps the input of each
 * layer, and one backward, for inputs only, that computes the rest again layer by layer. */
#include "backward.h"
#include "nll.h"

typedef struct {
    swa_workspace_t ws;
    swa_backward_t back;
    const swa_gates_t *gates;
    const int32_t *ids;
    int64_t n_rows,
        prompt_len;        /* the last token's row predicts nothing; rows prompt_len - 1 .. n_rows - 1 are scored */
    int64_t lowest;        /* the lowest layer with a choice */
    float *x;              /* [n_rows][hidden_size]: the residual at the layer at work */
    unsigned char *inputs; /* [n_layers][n_rows][hidden_size] activations, from `lowest` on */
} gates_t;

static swa_mix_t layer_mix(const gates_t *run, int64_t layer)
{
    const swa_gates_t *gates = run->gates;
    swa_mix_t mix = {.n = gates->n_choices};
    for (int64_t c = 0; c < mix.n; c++) {
        int64_t at = layer * gates->n_choices + c;
        mix.masks[c] = (swa_mask_t){gates->window[at], gates->sinks[layer], gates->full_from[layer]};
        mix.weights[c] = (float)gates->weights[at];
    }
    for (int64_t c = 0; c < mix.n; c++)
        if (mix.weights[c] == 1.0f) { /* by rounding, perhaps: nothing is left for the others */
            memset(mix.weights, 0, sizeof mix.weights);
            mix.weights[c] = 1.0f;
        }
    return mix;
}

/* Whether the layer's choices differ in any row. */
static bool has_choice(const gates_t *run, int64_t layer)
{
    swa_mix_t mix = layer_mix(run, layer);
    for (int64_t c = 1; c < mix.n; c++)
        if (mix.masks[c].window != mix.masks[0].window)
            return true;
    return false;
}

/* Rows that see all earlier keys under every choice of every layer that has one, whole tiles. Their outputs are the
 * same at all gates, and so are those of the rows before them: no gradient comes from there. */
static int64_t prefix_rows(const gates_t *run)
{
    int64_t rows = run->prompt_len - 1;
    for (int64_t l = 0; l < run->ws.model->config.n_layers; l++) {
        swa_mix_t mix = layer_mix(run, l);
        for (int64_t c = 0; has_choice(run, l) && c < mix.n; c++)
            if (mix.masks[c].window > 0 && mix.masks[c].window < rows)
                rows = swa_min(rows, mix.masks[c].window + swa_min(mix.masks[c].sinks, rows));
    }
    return rows / SWA_TILE * SWA_TILE;
}

/* In the last layer only the scored rows are needed. */
static int64_t first_needed(const gates_t *run, int64_t layer)
{
    return layer == run->ws.model->config.n_layers - 1 ? run->prompt_len - 1 : 0;
}

static unsigned char *layer_input(const gates_t *run, int64_t layer)
{
    const swa_model_t *model = run->ws.model;
    return run->inputs +
           (size_t)((layer - run->lowest) * run->n_rows * model->config.hidden_size) * swa_activation_size(model);
}

static void forward(gates_t *run)
{
    swa_workspace_t *ws = &run->ws;
    const int64_t hidden = ws->model->config.hidden_size;
    swa_embed_rows(ws, run->ids, run->n_rows, run->x);
    for (int64_t l = 0; l < ws->model->config.n_layers && !swa_cancelled(ws->run); l++) {
        const int64_t first = first_needed(run, l);
        const swa_mix_t mix = layer_mix(run, l);
        if (l >= run->lowest)
            swa_store_activation(ws->model, run->n_rows * hidden, run->x, layer_input(run, l));
        swa_project(ws, l, run->x, 0, run->n_rows, first);
        swa_finish_mixed(ws, l, &mix, run->x + first * hidden, run->x + first * hidden, first, run->n_rows);
    }
}

static void backward(gates_t *run, double *gradient)
{
    swa_workspace_t *ws = &run->ws;
    const swa_config_t *c = &ws->model->config;
    for (int64_t l = c->n_layers - 1; l >= run->lowest && !swa_cancelled(ws->run); l--) {
        const int64_t n_gates = run->gates->n_choices * c->n_kv_heads;
        const swa_mix_t mix = layer_mix(run, l);
        swa_load_activation(ws->model, run->n_rows * c->hidden_size, layer_input(run, l), run->x);
        swa_layer_back(&run->back, l, &mix, run->x, swa_max(first_needed(run, l), run->back.n_prefix), l == run->lowest,
                       gradient + l * n_gates);
    }
}

static uint64_t total_cost(const gates_t *run)
{
    const swa_model_t *model = run->ws.model;
    const int64_t n_layers = model->config.n_layers, n_rows = run->n_rows, n_prefix = run->back.n_prefix;
    uint64_t total = 2 * swa_head_cost(model, n_rows + 1 - run->prompt_len);
    for (int64_t l = 0; l < n_layers; l++) {
        const int64_t first = first_needed(run, l);
        const swa_mix_t mix = layer_mix(run, l);
        total += swa_project_cost(model, n_rows, n_rows - first) + swa_finish_mixed_cost(model, &mix, first, n_rows);
        if (l >= run->lowest)
            total += swa_layer_back_cost(model, &mix, n_prefix, swa_max(first, n_prefix), n_rows, l == run->lowest);
    }
    return total;
}

static void layout(gates_t *run, int64_t n_choices, swa_arena_t *arena)
{
    const swa_config_t *c = &run->ws.model->config;
    const size_t rows = (size_t)(run->n_rows * c->hidden_size);
    run->x = swa_carve(arena, rows, sizeof(float));
    run->inputs = swa_carve(arena, rows, (size_t)(c->n_layers - run->lowest) * swa_activation_size(run->ws.model));
    swa_backward_layout(&run->back, &run->ws, n_choices, arena);
}

static swa_status_t run_gates(gates_t *run, const float *reference, double *loss, uint8_t *greedy, double *gradient)
{
    swa_workspace_t *ws = &run->ws;
    const int64_t hidden = ws->model->config.hidden_size, first = run->prompt_len - 1, n_answer = run->n_rows - first;
    swa_backward_start(&run->back, prefix_rows(run));
    atomic_store(&ws->run->total, total_cost(run));
    forward(run);
    if (swa_cancelled(ws->run))
        return SWA_ERROR_CANCELLED;
    swa_status_t status =
        swa_score_rows_back(ws->model, ws->run, run->x + first * hidden, n_answer, run->ids + run->prompt_len,
                            reference, 1.0f / (float)n_answer, loss, greedy, run->back.d_x + first * hidden);
    if (status == SWA_OK)
        backward(run, gradient);
    return swa_cancelled(ws->run) ? SWA_ERROR_CANCELLED : status;
}

swa_status_t swa_gates(const swa_model_t *model, swa_run_t *run_control, const int32_t *ids, int64_t n_tokens,
                       int64_t prompt_len, const swa_gates_t *gates, const float *reference, double *loss,
                       uint8_t *greedy, double *gradient)
{
    const int64_t n_layers = model->config.n_layers;
    gates_t run = {.gates = gates, .ids = ids, .n_rows = n_tokens - 1, .prompt_len = prompt_len};
    memset(gradient, 0, (size_t)(n_layers * gates->n_choices * model->config.n_kv_heads) * sizeof(double));
    swa_status_t status = swa_workspace_open(&run.ws, model, run_control, run.n_rows);
    if (status != SWA_OK)
        return status;
    while (run.lowest < n_layers && !has_choice(&run, run.lowest))
        run.lowest++;
    swa_arena_t arena = {0};
    layout(&run, gates->n_choices, &arena);
    unsigned char *memory = swa_allocate(arena.used, 1);
    status = SWA_ERROR_MEMORY;
    if (memory) {
        arena = (swa_arena_t){.base = memory};
        layout(&run, gates->n_choices, &arena);
        status = run_gates(&run, reference, loss, greedy, gradient);
    }
    swa_release(memory);
    swa_workspace_close(&run.ws);
    return status;
}

size_t swa_gates_bytes(const swa_model_t *model, int64_t n_tokens, int64_t n_choices, int n_threads)
{
    gates_t run = {.n_rows = n_tokens};
    swa_arena_t arena = {0};
    run.ws = swa_workspace_describe(model, n_tokens, n_threads);
    layout(&run, n_choices, &arena);
    size_t bytes = swa_add_sizes(arena.used, swa_pass_bytes(model, n_tokens, n_threads));
    return swa_add_sizes(bytes, swa_head_back_bytes(model, n_tokens, n_threads));
}
