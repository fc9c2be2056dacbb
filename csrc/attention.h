/* Packed keys and values of one layer, and streaming-softmax attention over them. */
#ifndef SWA_ATTENTION_H
#define SWA_ATTENTION_H

#include "model.h"

enum { SWA_QUERY_BLOCK = 48 }; /* query rows that share a pass over the key tiles */

/* Keys and values in tiles of SWA_TILE absolute positions, packed as panels for the kernels. A ring keeps the first
 * `first_tiles` tiles and the last `ring_tiles` ones; ring_tiles 0 keeps all. */
typedef struct {
    const swa_kernels_t *kernels;
    bool bf16;
    int64_t n_kv_heads, head_dim, value_columns;
    int64_t slots, first_tiles, ring_tiles;
    size_t key_tile_bytes, value_tile_bytes;
    unsigned char *keys, *values; /* [n_kv_heads][slots][tile] */
    uint8_t *not_finite;          /* [n_kv_heads][slots]: some value of the tile is NaN or infinite */
} swa_kv_t;

typedef struct {
    int64_t window, sinks, full_from;
} swa_mask_t;

/* Attention under several masks at once: a row gets the weighted sum of what each of them gives it. They differ in
 * their windows alone. */
typedef struct {
    int64_t n;
    swa_mask_t masks[SWA_MAX_CHOICES];
    float weights[SWA_MAX_CHOICES];
} swa_mix_t;

static inline swa_mix_t swa_single_mask(swa_mask_t mask)
{
    return (swa_mix_t){.n = 1, .masks = {mask}, .weights = {1.0f}};
}

/* Scratch of one thread. */
typedef struct {
    float *scores, *output, *shifts, *sums;
    float *mixed; /* [SWA_QUERY_BLOCK][value_columns] */
    uint16_t *probabilities;
    unsigned char *value_tile;
} swa_attention_scratch_t;

/* Describes a cache without memory; swa_kv_bytes says what swa_kv_place needs (64-byte aligned). */
swa_kv_t swa_kv_layout(const swa_kernels_t *kernels, bool bf16, int64_t n_kv_heads, int64_t head_dim, int64_t n_tokens);
size_t swa_kv_bytes(const swa_kv_t *kv);
void swa_kv_place(swa_kv_t *kv, unsigned char *memory);

/* Write one head's key or value [head_dim] of a position. The values of a tile must come in ascending order. */
void swa_kv_store_key(swa_kv_t *kv, int64_t position, int64_t kv_head, const float *key);
void swa_kv_store_value(swa_kv_t *kv, int64_t position, int64_t kv_head, const float *value);
/* Copies tiles [first, end) of absolute positions between caches of one shape. */
void swa_kv_copy(swa_kv_t *to, const swa_kv_t *from, int64_t first, int64_t end);

size_t swa_attention_scratch_bytes(const swa_kv_t *kv);
void swa_attention_scratch_place(swa_attention_scratch_t *scratch, const swa_kv_t *kv, unsigned char *memory);

/* out[row][head][head_dim] = softmax(q K^T / sqrt(head_dim)) V for rows [first, end) and query heads
 * [head_first, head_end), mixed; queries and out are activation rows, the pointers standing at row `first`. */
void swa_attend(const swa_model_t *model, const swa_kv_t *kv, const swa_mix_t *mix, int64_t first, int64_t end,
                int64_t head_first, int64_t head_end, const void *queries, void *out, int64_t stride,
                swa_attention_scratch_t *scratch);

/* The parts of swa_attend, for the backward pass. Rows of a block, at most SWA_QUERY_BLOCK, that begins at `row`: */
int64_t swa_block_rows(swa_mask_t mask, int64_t row, int64_t end);
/* One block and one head under one mask: scratch->output [m][value_columns], float32; and, where log_sum is not NULL,
 * log_sum[m] = log2 of the sum of 2^(scale * score), scale as below. */
void swa_attend_block(const swa_kv_t *kv, swa_mask_t mask, int64_t kv_head, int64_t row, int64_t m, const void *queries,
                      int64_t stride, swa_attention_scratch_t *scratch, float *log_sum);
float swa_score_scale(int64_t head_dim); /* log2(e) / sqrt(head_dim): the kernels exponentiate base 2 */
/* First position of the row's window; every earlier key is visible only as a sink. */
int64_t swa_window_start(swa_mask_t mask, int64_t row);
/* Sees what full attention would: every row of the block sees all earlier keys. */
bool swa_sees_all(swa_mask_t mask, int64_t row, int64_t m);
typedef enum { SWA_HIDDEN, SWA_EDGE, SWA_INTERIOR } swa_visibility_t;
/* Of the keys of a tile for the rows of a block: none is visible, some, all. */
swa_visibility_t swa_tile_visibility(swa_mask_t mask, int64_t row, int64_t m, int64_t tile);
/* A part of a tile, from and to a multiple of every panel and of every step of a product. */
typedef struct {
    int64_t first, end;
} swa_part_t;
swa_part_t swa_part(const swa_kv_t *kv, int64_t first, int64_t end); /* outwards from [first, end) */
/* Outside of it no row of the block sees a key of the tile, of which it is not all hidden. */
swa_part_t swa_visible_part(const swa_kv_t *kv, swa_mask_t mask, int64_t row, int64_t m, int64_t tile);
enum { SWA_EDGE_ROWS = 24 }; /* rows of a block that share the visible part of an edge tile: more of them see more */
/* Sets the scores [m][SWA_TILE] of hidden keys to -inf. */
void swa_hide_keys(swa_mask_t mask, int64_t row, int64_t m, int64_t tile, float *scores);
/* scores[m][SWA_TILE] = a[m][head_dim] k^T for a part of a tile's packed keys. */
void swa_multiply_keys(const swa_kv_t *kv, int64_t m, const void *a, int64_t a_stride, const unsigned char *tile,
                       swa_part_t part, float *scores);
/* out[m][value_columns] += factors[m][SWA_TILE] v for a part of a tile's packed values. */
void swa_add_values(const swa_kv_t *kv, int64_t m, const void *factors, const unsigned char *tile, swa_part_t part,
                    float *out);
const unsigned char *swa_key_tile(const swa_kv_t *kv, int64_t kv_head, int64_t tile);
const unsigned char *swa_value_tile(const swa_kv_t *kv, int64_t kv_head, int64_t tile);
/* One head's key and value [head_dim] of a position, as they were rounded. */
void swa_kv_read(const swa_kv_t *kv, int64_t position, int64_t kv_head, float *key, float *value);

/* Pairs (row, key) that rows [first, end) see. */
int64_t swa_visible_pairs(swa_mask_t mask, int64_t first, int64_t end);

#endif
