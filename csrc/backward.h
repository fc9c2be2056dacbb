/* The backward pass of one layer: from the gradient of its output to that of its input, and the gradients of its gates.
 */
#ifndef SWA_BACKWARD_H
#define SWA_BACKWARD_H

#include "arena.h"
#include "attention_back.h"
#include "forward.h"

/* Scratch of one thread, beside that of the forward. */
typedef struct {
    float *residual, *d_normed;               /* [chunk][hidden_size] */
    float *outputs;                           /* [n_choices][chunk][n_heads * head_dim] */
    float *d_outputs;                         /* [chunk][n_heads * head_dim, whole panels] */
    float *d_columns, *d_gate_row, *d_up_row; /* [chunk][column block], [column block] twice */
    unsigned char *d_rows, *d_gate, *d_up;    /* activation rows [chunk] */
    unsigned char *d_queries, *d_keys, *d_values;
    float *heads; /* two of [head_dim] */
    swa_attention_back_scratch_t attention;
} swa_back_scratch_t;

typedef struct {
    swa_workspace_t *ws;
    int64_t n_choices, n_prefix; /* rows [0, n_prefix) are the same under every choice: they need no gradient */
    float *d_x;                  /* [n_tokens][hidden_size]: gradient of the residual, in place from layer to layer */
    float *negative_sines;       /* [n_tokens][head_dim / 2] */
    unsigned char *d_outputs, *keys, *values; /* activation rows [n_tokens] */
    swa_kv_t v_k, q_do, do_q;                 /* attention_back.h */
    float *log_sums, *deltas;                 /* [n_choices][n_heads][stat_stride] */
    int64_t stat_stride;
    double *by_row; /* [n_tokens][n_choices][n_kv_heads]: a row's share of the gate gradients */
    swa_linear_t q, k, v, o, gate, up, down; /* the layer's weights, transposed */
    swa_back_scratch_t *scratch;             /* [n_threads] */
} swa_backward_t;

/* Describes the buffers (model, n_tokens, n_threads of `ws`) and carves them. */
void swa_backward_layout(swa_backward_t *back, swa_workspace_t *ws, int64_t n_choices, swa_arena_t *arena);
void swa_backward_start(swa_backward_t *back, int64_t n_prefix);

/* x [n_tokens][hidden_size]: the layer's input. d_x has the gradient of its output in rows [first, n_tokens), first >=
 * n_prefix, and zeros elsewhere; and then that of its input, unless `lowest`. gradient [n_choices][n_kv_heads]. */
void swa_layer_back(swa_backward_t *back, int64_t layer, const swa_mix_t *mix, const float *x, int64_t first,
                    bool lowest, double *gradient);
uint64_t swa_layer_back_cost(const swa_model_t *model, const swa_mix_t *mix, int64_t n_prefix, int64_t first,
                             int64_t n_tokens, bool lowest);

#endif
