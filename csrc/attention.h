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

/* Scratch of one thread. */
typedef struct {
    float *scores, *output, *shifts, *sums;
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
 * [head_first, head_end); queries and out are activation rows, the pointers standing at row `first`. */
void swa_attend(const swa_model_t *model, const swa_kv_t *kv, swa_mask_t mask, int64_t first, int64_t end,
                int64_t head_first, int64_t head_end, const void *queries, void *out, int64_t stride,
                swa_attention_scratch_t *scratch);

/* Pairs (row, key) that rows [first, end) see. */
int64_t swa_visible_pairs(swa_mask_t mask, int64_t first, int64_t end);

#endif
