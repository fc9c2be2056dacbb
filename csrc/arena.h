/* One allocation handed out in 64-byte aligned pieces. */
#ifndef SWA_ARENA_H
#define SWA_ARENA_H

#include <stddef.h>

/* With base NULL it only counts: lay out once to learn the size, allocate, and lay out again. */
typedef struct {
    unsigned char *base;
    size_t used;
} swa_arena_t;

static inline void *swa_carve(swa_arena_t *arena, size_t bytes)
{
    void *piece = arena->base ? arena->base + arena->used : NULL;
    arena->used += (bytes + 63) / 64 * 64;
    return piece;
}

#endif
