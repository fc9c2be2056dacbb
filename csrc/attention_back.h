/* Attention's backward pass over packed tiles: gradients of queries from tiles of keys, and of keys and values from
 * tiles of queries. */
#ifndef SWA_ATTENTION_BACK_H
#define SWA_ATTENTION_BACK_H

#include "attention.h"

/* What the backward of one layer reads. Packings share a type with the cache of keys and values: `keys` holds what a
 * product sums over head_dim, `values` what it sums over positions. d_o: gradient of the mixed attention output. */
typedef struct {
    const swa_model_t *model;
    const swa_run_t *run;
    const swa_mix_t *mix;
    int64_t n_rows, first_query; /* rows [first_query, n_rows) have gradients */
    int64_t query_stride, kv_stride;
    const unsigned char *queries, *d_outputs; /* activation rows [n_rows][n_heads * head_dim] */
    const unsigned char *keys, *values;       /* activation rows [n_rows][n_kv_heads * head_dim] */
    const swa_kv_t *k_v, *v_k;                /* keys | values; values | keys */
    const swa_kv_t *q_do, *do_q;              /* by query head: queries | d_o; d_o | queries */
    const float *log_sums, *deltas; /* [n_choices][n_heads][stat_stride]; delta = d_o . output of the choice */
    int64_t stat_stride;
} swa_attention_back_t;

/* Scratch of one thread. */
typedef struct {
    float *scores, *d_probabilities, *probabilities, *d_scores; /* [SWA_QUERY_BLOCK][SWA_TILE] */
    uint16_t *rounded;                                          /* the same */
    float *first, *second;                                      /* [SWA_QUERY_BLOCK][value_columns] */
} swa_attention_back_scratch_t;

size_t swa_attention_back_scratch_bytes(const swa_kv_t *kv);
void swa_attention_back_scratch_place(swa_attention_back_scratch_t *scratch, const swa_kv_t *kv, unsigned char *memory);

/* scratch->first [m][value_columns]: gradient of the scaled query rows [row, row + m) of one head (a block as
 * swa_block_rows makes them). */
void swa_attention_back_queries(const swa_attention_back_t *back, int64_t head, int64_t row, int64_t m,
                                swa_attention_back_scratch_t *scratch);
/* scratch->first and second [m][value_columns]: gradients of keys and values [row, row + m) of one KV head,
 * m <= SWA_QUERY_BLOCK. */
void swa_attention_back_keys(const swa_attention_back_t *back, int64_t kv_head, int64_t row, int64_t m,
                             swa_attention_back_scratch_t *scratch);

#endif
