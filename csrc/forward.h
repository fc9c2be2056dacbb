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
    float *raw_heads; /* NULL, or [n_tokens][n_heads + n_kv_heads][head_dim]: queries and keys before their norm */
    swa_kv_t kv;      /* keys and values of the layer at work */
    swa_scratch_t *scratch; /* [n_threads] */
} swa_workspace_t;

/* Sizes alone, no memory. */
swa_workspace_t swa_workspace_describe(const swa_model_t *model, int64_t n_tokens, int n_threads);
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

/* The same with attention under several masks. */
void swa_finish_mixed(swa_workspace_t *ws, int64_t layer, const swa_mix_t *mix, const float *x, float *x_out,
                      int64_t first, int64_t end);

/* Rows [first, end) in tasks: chunks are whole tiles of absolute positions, so a key tile belongs to one of them. Task
 * 0 has the last rows, which see most keys under full attention; small chunks of the first rows come last. */
typedef struct {
    int64_t row, m; /* first row of a chunk, number of rows */
} swa_chunk_t;
int64_t swa_chunk_count(const swa_workspace_t *ws, int64_t first, int64_t end);
swa_chunk_t swa_chunk_at(const swa_workspace_t *ws, int64_t first, int64_t end, int64_t task);

/* s->normed[m] = RMSNorm(x) as activation rows */
void swa_norm_rows(const swa_workspace_t *ws, const swa_vector_t *weight, const float *x, int64_t m, swa_scratch_t *s);
/* x_out[m][n] = x + a[m][k] W: an output projection onto the residual stream. */
void swa_add_product(const swa_workspace_t *ws, const swa_linear_t *linear, const void *a, int64_t a_stride, int64_t m,
                     const float *x, float *x_out, swa_scratch_t *s);

void swa_embed_rows(swa_workspace_t *ws, const int32_t *ids, int64_t n_rows, float *x);
swa_mask_t swa_layer_mask(const swa_policy_t *policy, int64_t layer);

/* FLOPs of the two halves, for progress. */
uint64_t swa_project_cost(const swa_model_t *model, int64_t n_rows, int64_t n_queries);
uint64_t swa_finish_cost(const swa_model_t *model, swa_mask_t mask, int64_t first, int64_t end);
uint64_t swa_finish_mixed_cost(const swa_model_t *model, const swa_mix_t *mix, int64_t first, int64_t end);

static inline float *swa_raw_head(const swa_workspace_t *ws, int64_t row, int64_t head)
{
    const swa_config_t *c = &ws->model->config;
    return ws->raw_heads + (row * (c->n_heads + c->n_kv_heads) + head) * c->head_dim;
}

#endif
