/* The decoder forward, one layer at a time over all rows of a sequence. */
#ifndef SWA_FORWARD_H
#define SWA_FORWARD_H

#include "attention.h"
#include "model.h"

/* Scratch of one thread: a chunk of rows on its way through a layer. */
typedef struct {
    float *row;                                      /* [max of the row widths] */
    float *columns, *more_columns;                   /* [chunk][column block] float32 */
    unsigned char *normed, *attended, *intermediate; /* [chunk] activation rows */
    swa_attention_scratch_t attention;
} swa_scratch_t;

/* Buffers of a pass over rows [0, n_tokens), one allocation. */
typedef struct {
    const swa_model_t *model;
    swa_run_t *run;
    int n_threads;
    int64_t n_tokens, chunk; /* rows per task, whole tiles */
    int64_t column_stride;
    void *memory;
    float *cosines, *sines; /* [n_tokens][head_dim / 2] */
    unsigned char *queries; /* activation rows [n_tokens] */
    swa_kv_t kv;            /* keys and values of the layer at work */
    swa_scratch_t *scratch; /* [n_threads] */
} swa_workspace_t;

size_t swa_pass_bytes(const swa_model_t *model, int64_t n_tokens, int n_threads);
swa_status_t swa_workspace_open(swa_workspace_t *ws, const swa_model_t *model, swa_run_t *run, int64_t n_tokens);
void swa_workspace_close(swa_workspace_t *ws);

/* The two halves of a layer, for rows [first, end); residual rows `x` stand at row `first`. Both return early when the
 * run is cancelled.
 * Project: queries (rows >= query_first), keys and values of the rows, into the workspace. */
void swa_project(swa_workspace_t *ws, int64_t layer, const float *x, int64_t first, int64_t end, int64_t query_first);
/* Finish: attention under the mask, output projection, MLP: x_out = x + ... (x_out may be x). */
void swa_finish(swa_workspace_t *ws, int64_t layer, swa_mask_t mask, const float *x, float *x_out, int64_t first,
                int64_t end);

void swa_embed_rows(swa_workspace_t *ws, const int32_t *ids, int64_t n_rows, float *x);
swa_mask_t swa_layer_mask(const swa_policy_t *policy, int64_t layer);

/* FLOPs of the two halves, for progress. */
uint64_t swa_project_cost(const swa_model_t *model, int64_t n_rows, int64_t n_queries);
uint64_t swa_finish_cost(const swa_model_t *model, swa_mask_t mask, int64_t first, int64_t end);

static inline bool swa_cancelled(const swa_run_t *run)
{
    return atomic_load_explicit(&run->cancelled, memory_order_relaxed) != 0;
}

static inline void swa_advance(swa_run_t *run, uint64_t cost)
{
    atomic_fetch_add_explicit(&run->done, cost, memory_order_relaxed);
}

#endif
