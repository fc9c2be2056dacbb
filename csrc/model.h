/* A model's packed weights, and products with them. */
#ifndef SWA_MODEL_H
#define SWA_MODEL_H

#include "kernels.h"
#include "numeric.h"
#include "swa.h"

/* Packed [n outputs][k inputs] matrix: panels of kernels->panel outputs, each [k][panel]; where the tier multiplies
 * bf16 pairs, [k / 2][panel][2]. Missing outputs of the last panel and an odd last input are zeros. */
typedef struct {
    int64_t n, k, k_padded;
    int64_t n_loaded;    /* rows received so far */
    size_t element_size; /* 4: float32, 2: bf16 */
    unsigned char *data; /* NULL: a tied head, which is read from the embedding */
} swa_matrix_t;

typedef struct {
    int64_t n; /* 0: the family has no such vector */
    bool loaded;
    float *data;
} swa_vector_t;

typedef struct {
    swa_matrix_t matrix;
    swa_vector_t bias;
} swa_linear_t;

typedef struct {
    swa_vector_t input_norm, post_attention_norm, q_norm, k_norm;
    swa_linear_t q, k, v, o, gate, up, down;
} swa_layer_t;

struct swa_model {
    swa_config_t config; /* its inv_freq points to `inv_freq` */
    float *inv_freq;
    swa_dtype_t dtype;
    const swa_kernels_t *kernels;
    bool planned;          /* no weight has memory */
    bool bf16_activations; /* GEMM and attention inputs are bf16 (else float32): bf16 model on a tier with bf16 dot */
    swa_linear_t embedding, head;
    swa_vector_t norm;
    swa_layer_t *layers;
    size_t bytes;
};

static inline size_t swa_activation_size(const swa_model_t *model)
{
    return model->bf16_activations ? sizeof(uint16_t) : sizeof(float);
}

/* Elements between rows of an activation buffer of n columns; columns beyond n must be zero. An odd number of 32s: rows
 * a power of two apart would share a few sets of the caches. */
static inline int64_t swa_activation_stride(int64_t n) { return swa_round_up(n, 32) | 32; }

/* Rounds (bf16) or copies one row of n float32 values into an activation buffer. */
void swa_store_activation(const swa_model_t *model, int64_t n, const float *x, void *activation);
void swa_load_activation(const swa_model_t *model, int64_t n, const void *activation, float *x);

/* c[m][panel] (+)= a[m][first ..] b for `depth` rows of one packed panel; a_stride in elements. */
void swa_panel_product(const swa_model_t *model, int64_t m, int64_t depth, const void *a, int64_t first,
                       int64_t a_stride, const void *b, float *c, int64_t c_stride, bool accumulate);

/* c[m][columns] = a[m][k] W^T + bias for the outputs [column, column + columns); column is a multiple of the panel.
 * c_stride must cover `columns` rounded up to whole panels, whose surplus is scratch. */
void swa_multiply(const swa_model_t *model, const swa_linear_t *linear, int64_t m, const void *a, int64_t a_stride,
                  int64_t column, int64_t columns, float *c, int64_t c_stride);

/* Largest multiple of the panel and of `unit` columns that keeps a block of float32 outputs in cache. */
int64_t swa_column_block(const swa_model_t *model, int64_t unit);

/* x[hidden_size] = embedding of a token */
void swa_embed(const swa_model_t *model, int32_t token, float *x);

const swa_linear_t *swa_head(const swa_model_t *model);

/* out[d] = RMSNorm(x) as an activation row; `row` is float32 scratch of n values. */
void swa_norm_activation(const swa_model_t *model, const swa_vector_t *weight, const float *x, float *row, void *out);

/* cos and sin [head_dim / 2] of the rotation at `position`. */
void swa_rope_angles(const swa_model_t *model, int64_t position, float *cosines, float *sines);

/* RMSNorm (qwen3) and RoPE of one head in place; norm->n == 0: no norm. */
void swa_finish_head(const swa_model_t *model, const swa_vector_t *norm, const float *cosines, const float *sines,
                     float *head);

/* Packs rows [row_start, row_start + n_rows) of a row-major source into a matrix. */
void swa_pack_rows(const swa_kernels_t *kernels, bool pairs, swa_matrix_t *matrix, int64_t row_start, int64_t n_rows,
                   swa_source_t source, const void *data, int n_threads);
/* A matrix without memory; false: its size overflows. */
bool swa_matrix_describe(const swa_kernels_t *kernels, swa_dtype_t dtype, int64_t n, int64_t k, swa_matrix_t *matrix,
                         size_t *bytes);
swa_status_t swa_matrix_allocate(const swa_kernels_t *kernels, swa_dtype_t dtype, int64_t n, int64_t k,
                                 swa_matrix_t *matrix);

/* The transpose, for the backward pass: dX = dY W multiplies by the matrix whose outputs are W's inputs. Packs panel
 * `index` of it, its inputs [first, end) alone: `out` gets [end - first][panel] elements in the order of a panel,
 * `first` a multiple of the panel and `end` even (it may be the padded end). */
void swa_transpose_panel(const swa_kernels_t *kernels, bool pairs, const swa_matrix_t *from, int64_t index,
                         int64_t first, int64_t end, void *out);

void *swa_allocate(size_t count, size_t size); /* zeroed, 64-byte aligned; NULL on overflow or lack of memory */
void swa_release(void *memory);

#endif
