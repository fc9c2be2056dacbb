/* Sizes that do not wrap, and one allocation handed out in 64-byte aligned pieces. */
#ifndef SWA_ARENA_H
#define SWA_ARENA_H

#include <stddef.h>
#include <stdint.h>

/* SIZE_MAX stands for all that no size_t holds: swa_allocate has no memory for it. */
static inline size_t swa_add_sizes(size_t a, size_t b)
{
    size_t sum;
    return __builtin_add_overflow(a, b, &sum) ? SIZE_MAX : sum;
}

static inline size_t swa_multiply_sizes(size_t a, size_t b)
{
    size_t product;
    return __builtin_mul_overflow(a, b, &product) ? SIZE_MAX : product;
}

/* With base NULL it only counts: lay out once to learn the size, allocate, and lay out again. */
typedef struct {
    unsigned char *base;
    size_t used;
} swa_arena_t;

/* count pieces of `size` bytes; a product of more than two of a model's sizes must be split between the two. */
static inline void *swa_carve(swa_arena_t *arena, size_t count, size_t size)
{
    void *piece = arena->base ? arena->base + arena->used : NULL;
    size_t end = swa_add_sizes(arena->used, swa_multiply_sizes(count, size));
    arena->used = end > SIZE_MAX - 63 ? SIZE_MAX : (end + 63) / 64 * 64;
    return piece;
}

#endif
