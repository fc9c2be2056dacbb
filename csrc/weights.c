/* Packing weights at load, and the small steps that read them. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "model.h"
#include "parallel.h"

enum { ALIGNMENT = 64, LARGE = 1 << 20 };

/* Memory of the heap starts at `block`, which is kept before the aligned piece. Zeros that the system maps anew are its
 * own: whoever computes on a page first touches it first, on its own NUMA node. They are for the largest pieces alone:
 * once a mapped one was freed, glibc takes pieces up to that size (32 MiB at most) from its heap, and clears them. */
void *swa_allocate(size_t count, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes > SIZE_MAX - 3 * ALIGNMENT)
        return NULL;
    bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT + ALIGNMENT;
    unsigned char *block = bytes < LARGE ? aligned_alloc(ALIGNMENT, bytes) : calloc(1, bytes);
    if (!block)
        return NULL;
    if (bytes < LARGE)
        memset(block, 0, bytes);
    unsigned char *memory = block + ALIGNMENT - (uintptr_t)block % ALIGNMENT;
    memcpy(memory - sizeof block, &block, sizeof block);
    return memory;
}

void swa_release(void *memory)
{
    if (!memory)
        return;
    void *block;
    memcpy(&block, (unsigned char *)memory - sizeof block, sizeof block);
    free(block);
}

/* ---- construction ------------------------------------------------------------------------------------------ */

bool swa_matrix_describe(const swa_kernels_t *kernels, swa_dtype_t dtype, int64_t n, int64_t k, swa_matrix_t *matrix,
                         size_t *bytes)
{
    *matrix = (swa_matrix_t){.n = n, .k = k, .k_padded = swa_round_up(k, 2)};
    matrix->element_size = dtype == SWA_BFLOAT16 ? 2 : 4;
    size_t count;
    return !__builtin_mul_overflow((size_t)swa_round_up(n, kernels->panel), (size_t)matrix->k_padded, &count) &&
           !__builtin_mul_overflow(count, matrix->element_size, bytes);
}

swa_status_t swa_matrix_allocate(const swa_kernels_t *kernels, swa_dtype_t dtype, int64_t n, int64_t k,
                                 swa_matrix_t *matrix)
{
    size_t bytes;
    if (!swa_matrix_describe(kernels, dtype, n, k, matrix, &bytes))
        return SWA_ERROR_MEMORY;
    matrix->data = swa_allocate(bytes, 1);
    return matrix->data ? SWA_OK : SWA_ERROR_MEMORY;
}

static bool make_vector(swa_model_t *model, swa_vector_t *vector, int64_t n)
{
    vector->n = n;
    if (__builtin_add_overflow(model->bytes, (size_t)n * sizeof(float), &model->bytes))
        return false;
    return model->planned || (vector->data = swa_allocate((size_t)n, sizeof(float))) != NULL;
}

static bool make_linear(swa_model_t *model, swa_linear_t *linear, int64_t n, int64_t k, bool bias)
{
    size_t bytes;
    if (!swa_matrix_describe(model->kernels, model->dtype, n, k, &linear->matrix, &bytes) ||
        __builtin_add_overflow(model->bytes, bytes, &model->bytes))
        return false;
    return (model->planned || (linear->matrix.data = swa_allocate(bytes, 1))) &&
           (!bias || make_vector(model, &linear->bias, n));
}

static bool make_layer(swa_model_t *model, swa_layer_t *layer)
{
    const swa_config_t *c = &model->config;
    int64_t d = c->hidden_size, q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    return make_vector(model, &layer->input_norm, d) && make_vector(model, &layer->post_attention_norm, d) &&
           (!c->qk_norm ||
            (make_vector(model, &layer->q_norm, c->head_dim) && make_vector(model, &layer->k_norm, c->head_dim))) &&
           make_linear(model, &layer->q, q, d, c->q_bias) && make_linear(model, &layer->k, kv, d, c->k_bias) &&
           make_linear(model, &layer->v, kv, d, c->v_bias) && make_linear(model, &layer->o, d, q, c->o_bias) &&
           make_linear(model, &layer->gate, c->intermediate_size, d, c->gate_bias) &&
           make_linear(model, &layer->up, c->intermediate_size, d, c->up_bias) &&
           make_linear(model, &layer->down, d, c->intermediate_size, c->down_bias);
}

/* Every product of two sizes stays far below 2^63. */
static const char *config_problem(const swa_config_t *c)
{
    const int64_t limit = (int64_t)1 << 31;
    const int64_t sizes[] = {c->vocab_size, c->hidden_size, c->intermediate_size, c->n_layers,
                             c->n_heads,    c->n_kv_heads,  c->head_dim};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i] < 1 || sizes[i] >= limit)
            return "every size of the config must be at least 1 and below 2^31";
    if (c->n_heads * c->head_dim >= limit || c->n_layers > 65536)
        return "n_heads * head_dim must be below 2^31 and n_layers at most 65536";
    if (c->n_heads % c->n_kv_heads)
        return "n_heads must be a multiple of n_kv_heads";
    if (c->head_dim % 2 || c->head_dim > SWA_MAX_HEAD_DIM)
        return "head_dim must be even and at most 1024";
    return NULL;
}

swa_status_t swa_model_create(const swa_config_t *config, swa_dtype_t dtype, const swa_kernels_t *kernels, bool planned,
                              swa_model_t **out, char *message)
{
    *out = NULL;
    const char *problem = config_problem(config);
    if (problem) {
        snprintf(message, SWA_MESSAGE_BYTES, "%s", problem);
        return SWA_ERROR_VALUE;
    }
    swa_model_t *model = swa_allocate(1, sizeof *model);
    if (!model)
        return SWA_ERROR_MEMORY;
    model->config = *config;
    model->dtype = dtype;
    model->kernels = kernels;
    model->planned = planned;
    model->bf16_activations = dtype == SWA_BFLOAT16 && kernels->panel_bf16;
    model->inv_freq = swa_allocate((size_t)config->head_dim / 2, sizeof(float));
    model->layers = swa_allocate((size_t)config->n_layers, sizeof *model->layers);
    bool ok = model->inv_freq && model->layers && make_vector(model, &model->norm, config->hidden_size) &&
              make_linear(model, &model->embedding, config->vocab_size, config->hidden_size, false) &&
              (config->tied || make_linear(model, &model->head, config->vocab_size, config->hidden_size, false));
    for (int64_t l = 0; ok && l < config->n_layers; l++)
        ok = make_layer(model, &model->layers[l]);
    if (!ok) {
        swa_model_free(model);
        return SWA_ERROR_MEMORY;
    }
    memcpy(model->inv_freq, config->inv_freq, (size_t)config->head_dim / 2 * sizeof(float));
    model->config.inv_freq = model->inv_freq;
    *out = model;
    return SWA_OK;
}

/* ---- loading ----------------------------------------------------------------------------------------------- */

/* Where a named tensor goes: a matrix or a vector. */
typedef struct {
    const char *name;
    swa_matrix_t *matrix;
    swa_vector_t *vector;
} slot_t;

enum { MODEL_SLOTS = 3, LAYER_SLOTS = 18 };

static void model_slots(swa_model_t *model, slot_t slots[MODEL_SLOTS])
{
    slots[0] = (slot_t){"embed_tokens", &model->embedding.matrix, NULL};
    slots[1] = (slot_t){"lm_head", &model->head.matrix, NULL};
    slots[2] = (slot_t){"norm", NULL, &model->norm};
}

static void layer_slots(swa_layer_t *layer, slot_t slots[LAYER_SLOTS])
{
    const slot_t all[LAYER_SLOTS] = {
        {"input_layernorm", NULL, &layer->input_norm},
        {"post_attention_layernorm", NULL, &layer->post_attention_norm},
        {"q_norm", NULL, &layer->q_norm},
        {"k_norm", NULL, &layer->k_norm},
        {"q_proj", &layer->q.matrix, NULL},
        {"k_proj", &layer->k.matrix, NULL},
        {"v_proj", &layer->v.matrix, NULL},
        {"o_proj", &layer->o.matrix, NULL},
        {"gate_proj", &layer->gate.matrix, NULL},
        {"up_proj", &layer->up.matrix, NULL},
        {"down_proj", &layer->down.matrix, NULL},
        {"q_proj.bias", NULL, &layer->q.bias},
        {"k_proj.bias", NULL, &layer->k.bias},
        {"v_proj.bias", NULL, &layer->v.bias},
        {"o_proj.bias", NULL, &layer->o.bias},
        {"gate_proj.bias", NULL, &layer->gate.bias},
        {"up_proj.bias", NULL, &layer->up.bias},
        {"down_proj.bias", NULL, &layer->down.bias},
    };
    memcpy(slots, all, sizeof all);
}

/* The tensors of a layer, or with layer -1 of the model; returns their number. */
static int slots_of(swa_model_t *model, int64_t layer, slot_t slots[LAYER_SLOTS])
{
    if (layer < 0) {
        model_slots(model, slots);
        return MODEL_SLOTS;
    }
    layer_slots(&model->layers[layer], slots);
    return LAYER_SLOTS;
}

static bool slot_exists(const slot_t *slot) { return slot->matrix ? slot->matrix->data != NULL : slot->vector->n > 0; }

static bool slot_complete(const slot_t *slot)
{
    return !slot_exists(slot) || (slot->matrix ? slot->matrix->n_loaded == slot->matrix->n : slot->vector->loaded);
}

static inline float read_source(swa_source_t source, const unsigned char *data, int64_t index)
{
    uint16_t half;
    float value;
    switch (source) {
    case SWA_SOURCE_F32: memcpy(&value, data + index * 4, sizeof value); return value;
    case SWA_SOURCE_F16: memcpy(&half, data + index * 2, sizeof half); return swa_float_from_f16(half);
    default: memcpy(&half, data + index * 2, sizeof half); return swa_float_from_bf16(half);
    }
}

/* bf16 bits of a source element; bf16 sources keep every bit, signalling NaNs included. */
static inline uint16_t read_source_bf16(swa_source_t source, const unsigned char *data, int64_t index)
{
    if (source != SWA_SOURCE_BF16)
        return swa_bf16_from_float(read_source(source, data, index));
    uint16_t value;
    memcpy(&value, data + index * 2, sizeof value);
    return value;
}

/* Offset in elements of W[row][p]. */
static inline int64_t packed_index(int64_t panel, bool pairs, int64_t k_padded, int64_t row, int64_t p)
{
    int64_t lane = row % panel, base = row / panel * panel * k_padded;
    return pairs ? base + p / 2 * 2 * panel + lane * 2 + p % 2 : base + p * panel + lane;
}

enum { PACK_BLOCK = 128 }; /* inputs: some cache lines of each row */

/* n inputs of one output; `out` stands at the first. Inlined with a constant source. */
static inline __attribute__((always_inline)) void pack_line(swa_source_t source, const unsigned char *data,
                                                            int64_t first, uint32_t n, bool pairs, uint32_t panel,
                                                            size_t element_size, unsigned char *out)
{
    if (element_size == 4)
        for (uint32_t p = 0; p < n; p++)
            ((float *)out)[p * panel] = read_source(source, data, first + p);
    else if (pairs && source == SWA_SOURCE_BF16 && n % 2 == 0)
        for (uint32_t p = 0; p < n; p += 2)
            memcpy(out + (size_t)p * panel * 2, data + (first + p) * 2, 4);
    else if (pairs)
        for (uint32_t p = 0; p < n; p++)
            ((uint16_t *)out)[p / 2 * 2 * panel + p % 2] = read_source_bf16(source, data, first + p);
    else
        for (uint32_t p = 0; p < n; p++)
            ((uint16_t *)out)[p * panel] = read_source_bf16(source, data, first + p);
}

typedef struct {
    int64_t panel;
    bool pairs;
    swa_matrix_t *matrix;
    int64_t row_start, n_rows;
    swa_source_t source;
    const void *data;
} pack_t;

/* The rows that share a panel, PACK_BLOCK inputs at a time: put together in cache, then copied to where they stay. */
static void pack_panel(void *context, int64_t task, int thread)
{
    (void)thread;
    const pack_t *pack = context;
    const swa_matrix_t *matrix = pack->matrix;
    const int64_t panel = pack->panel, k = matrix->k, start = (pack->row_start / panel + task) * panel;
    const int64_t first = swa_max(start, pack->row_start);
    const int64_t end = swa_min(start + panel, pack->row_start + pack->n_rows);
    _Alignas(64) unsigned char block[PACK_BLOCK * SWA_MAX_PANEL * sizeof(float)];
    for (int64_t p = 0; p < k; p += PACK_BLOCK) {
        const uint32_t n = (uint32_t)swa_min(PACK_BLOCK, k - p);
        const size_t bytes = (size_t)(swa_min(PACK_BLOCK, matrix->k_padded - p) * panel) * matrix->element_size;
        unsigned char *target = matrix->data + (size_t)(start * matrix->k_padded + p * panel) * matrix->element_size;
        if (end - first < panel || n < PACK_BLOCK)
            memcpy(block, target, bytes);
        for (int64_t row = first; row < end; row++) {
            int64_t from = (row - pack->row_start) * k + p, to = packed_index(panel, pack->pairs, 0, row % panel, 0);
            unsigned char *out = block + (size_t)to * matrix->element_size;
            switch (pack->source) {
            case SWA_SOURCE_F32:
                pack_line(SWA_SOURCE_F32, pack->data, from, n, pack->pairs, (uint32_t)panel, matrix->element_size, out);
                break;
            case SWA_SOURCE_F16:
                pack_line(SWA_SOURCE_F16, pack->data, from, n, pack->pairs, (uint32_t)panel, matrix->element_size, out);
                break;
            default:
                pack_line(SWA_SOURCE_BF16, pack->data, from, n, pack->pairs, (uint32_t)panel, matrix->element_size,
                          out);
            }
        }
        memcpy(target, block, bytes);
    }
}

void swa_pack_rows(const swa_kernels_t *kernels, bool pairs, swa_matrix_t *matrix, int64_t row_start, int64_t n_rows,
                   swa_source_t source, const void *data, int n_threads)
{
    const int64_t panel = kernels->panel;
    pack_t pack = {panel, pairs, matrix, row_start, n_rows, source, data};
    swa_parallel_for(n_threads, (row_start + n_rows - 1) / panel - row_start / panel + 1, pack_panel, &pack);
}

static swa_status_t complain(char *message, const char *tensor, int64_t layer, const char *what)
{
    if (layer == -1)
        snprintf(message, SWA_MESSAGE_BYTES, "%.60s: %s", tensor, what);
    else
        snprintf(message, SWA_MESSAGE_BYTES, "layer %lld %.60s: %s", (long long)layer, tensor, what);
    return SWA_ERROR_VALUE;
}

swa_status_t swa_model_load_rows(swa_model_t *model, const char *tensor, int64_t layer, int64_t row_start,
                                 swa_source_t source, const void *data, size_t n_bytes, int n_threads, char *message)
{
    slot_t slots[LAYER_SLOTS], *slot = NULL;
    if (model->planned)
        return complain(message, tensor, layer, "the engine is only planned: it has no memory for weights");
    if (layer < -1 || layer >= model->config.n_layers)
        return complain(message, tensor, layer, "no such layer");
    int n_slots = slots_of(model, layer, slots);
    for (int i = 0; i < n_slots && !slot; i++)
        if (!strcmp(slots[i].name, tensor))
            slot = &slots[i];
    if (!slot || !slot_exists(slot))
        return complain(message, tensor, layer, "this model has no such tensor");

    size_t size = source == SWA_SOURCE_F32 ? 4 : 2;
    if (slot->vector) {
        if (row_start != 0 || n_bytes != (size_t)slot->vector->n * size)
            return complain(message, tensor, layer, "a vector must arrive whole and in its exact length");
        for (int64_t i = 0; i < slot->vector->n; i++)
            slot->vector->data[i] = read_source(source, data, i);
        slot->vector->loaded = true;
        return SWA_OK;
    }
    swa_matrix_t *matrix = slot->matrix;
    size_t row_bytes = (size_t)matrix->k * size;
    if (n_bytes == 0 || n_bytes % row_bytes)
        return complain(message, tensor, layer, "a chunk must hold whole rows");
    int64_t n_rows = (int64_t)(n_bytes / row_bytes);
    if (row_start != matrix->n_loaded || n_rows > matrix->n - row_start)
        return complain(message, tensor, layer, "rows must arrive in order, each once");
    swa_pack_rows(model->kernels, model->bf16_activations, matrix, row_start, n_rows, source, data, n_threads);
    matrix->n_loaded += n_rows;
    return SWA_OK;
}

swa_status_t swa_model_finish(swa_model_t *model, char *message)
{
    slot_t slots[LAYER_SLOTS];
    if (model->planned)
        return complain(message, "weights", -1, "the engine is only planned: it has no memory for them");
    for (int64_t l = -1; l < model->config.n_layers; l++) {
        int n_slots = slots_of(model, l, slots);
        for (int i = 0; i < n_slots; i++)
            if (!slot_complete(&slots[i]))
                return complain(message, slots[i].name, l, "the tensor is missing or incomplete");
    }
    return SWA_OK;
}

void swa_model_free(swa_model_t *model)
{
    if (!model)
        return;
    slot_t slots[LAYER_SLOTS];
    for (int64_t l = -1; model->layers && l < model->config.n_layers; l++) {
        int n_slots = slots_of(model, l, slots);
        for (int i = 0; i < n_slots; i++)
            swa_release(slots[i].matrix ? (void *)slots[i].matrix->data : (void *)slots[i].vector->data);
    }
    swa_release(model->layers);
    swa_release(model->inv_freq);
    swa_release(model);
}

size_t swa_model_bytes(const swa_model_t *model) { return model->bytes; }

const swa_config_t *swa_model_config(const swa_model_t *model) { return &model->config; }

/* ---- transposing -------------------------------------------------------------------------------------------- */

/* Both packings keep an element's whereabouts in closed form; blocks of one panel of W stay in cache. Inlined with
 * constant `size`. */
static inline __attribute__((always_inline)) void transpose_single(const int64_t size, int64_t panel,
                                                                   const swa_matrix_t *from, int64_t index,
                                                                   int64_t first, int64_t end, int64_t n_lanes,
                                                                   unsigned char *out)
{
    for (int64_t lane = 0; lane < n_lanes; lane++)
        for (int64_t n = first; n < end; n++) {
            int64_t source = packed_index(panel, false, from->k_padded, n, index * panel + lane);
            memcpy(out + ((n - first) * panel + lane) * size, from->data + source * size, (size_t)size);
        }
}

/* Two outputs by two inputs are four neighbours in both packings. */
static void transpose_pairs(int64_t panel, const swa_matrix_t *from, int64_t index, int64_t first, int64_t end,
                            int64_t n_lanes, uint16_t *out)
{
    for (int64_t block = first; block < end; block += panel)
        for (int64_t lane = 0; lane < n_lanes; lane += 2) {
            const uint16_t *source =
                (const uint16_t *)from->data + packed_index(panel, true, from->k_padded, block, index * panel + lane);
            uint16_t *target = out + packed_index(panel, true, end - first, lane, block - first);
            for (int64_t n = block; n < swa_min(block + panel, end); n += 2, source += 4, target += 2 * panel) {
                const uint16_t four[] = {source[0], source[2], source[1], source[3]};
                memcpy(target, four, sizeof four);
            }
        }
}

void swa_transpose_panel(const swa_kernels_t *kernels, bool pairs, const swa_matrix_t *from, int64_t index,
                         int64_t first, int64_t end, void *out)
{
    const int64_t panel = kernels->panel, n_end = swa_min(end, swa_round_up(from->n, panel));
    const int64_t n_lanes = swa_min(panel, from->k_padded - index * panel);
    memset(out, 0, (size_t)((end - first) * panel * from->element_size));
    if (pairs)
        transpose_pairs(panel, from, index, first, n_end, n_lanes, out);
    else if (from->element_size == 2)
        transpose_single(2, panel, from, index, first, n_end, n_lanes, out);
    else
        transpose_single(4, panel, from, index, first, n_end, n_lanes, out);
}

/* ---- reading ----------------------------------------------------------------------------------------------- */

void swa_store_activation(const swa_model_t *model, int64_t n, const float *x, void *activation)
{
    if (model->bf16_activations)
        model->kernels->to_bf16(n, x, activation);
    else
        memcpy(activation, x, (size_t)n * sizeof(float));
}

void swa_load_activation(const swa_model_t *model, int64_t n, const void *activation, float *x)
{
    if (!model->bf16_activations) {
        memcpy(x, activation, (size_t)n * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < n; i++)
        x[i] = swa_float_from_bf16(((const uint16_t *)activation)[i]);
}

void swa_panel_product(const swa_model_t *model, int64_t m, int64_t depth, const void *a, int64_t first,
                       int64_t a_stride, const void *b, float *c, int64_t c_stride, bool accumulate)
{
    const swa_kernels_t *kernels = model->kernels;
    if (model->bf16_activations)
        kernels->panel_bf16(m, depth, (const uint16_t *)a + first, a_stride, b, c, c_stride, accumulate);
    else if (model->dtype == SWA_BFLOAT16)
        kernels->panel_f32_bf16(m, depth, (const float *)a + first, a_stride, b, c, c_stride, accumulate);
    else
        kernels->panel_f32(m, depth, (const float *)a + first, a_stride, b, c, c_stride, accumulate);
}

void swa_multiply(const swa_model_t *model, const swa_linear_t *linear, int64_t m, const void *a, int64_t a_stride,
                  int64_t column, int64_t columns, float *c, int64_t c_stride)
{
    const swa_kernels_t *kernels = model->kernels;
    const swa_matrix_t *matrix = &linear->matrix;
    int64_t panel = kernels->panel, k = model->bf16_activations ? matrix->k_padded : matrix->k;
    /* Blocks of k depend on k alone, so an output's summation order never changes; whole tiles of AMX. */
    int64_t n_blocks = (k + kernels->k_block - 1) / kernels->k_block;
    int64_t block = swa_round_up((k + n_blocks - 1) / n_blocks, 32);
    for (int64_t p = 0; p < k; p += block) { /* the outer loop: a block of A is read from L2 for every panel */
        const int64_t depth = swa_min(block, k - p);
        for (int64_t n = 0; n < columns; n += panel) {
            int64_t at = (column + n) * matrix->k_padded + p * panel;
            swa_panel_product(model, m, depth, a, p, a_stride, matrix->data + (size_t)at * matrix->element_size, c + n,
                              c_stride, p > 0);
        }
    }
    if (linear->bias.n)
        for (int64_t row = 0; row < m; row++)
            kernels->add(swa_min(columns, matrix->n - column), c + row * c_stride, linear->bias.data + column);
}

enum { COLUMN_BLOCK = 256 }; /* about as many columns at a time: what follows a product finds them in L2 */

int64_t swa_column_block(const swa_model_t *model, int64_t unit)
{
    int64_t block = unit;
    while (block % model->kernels->panel)
        block += unit;
    return block * (swa_max(1, COLUMN_BLOCK / block) | 1); /* odd: rows spread over the sets of the caches */
}

const swa_linear_t *swa_head(const swa_model_t *model) { return model->config.tied ? &model->embedding : &model->head; }

void swa_embed(const swa_model_t *model, int32_t token, float *x)
{
    const swa_matrix_t *matrix = &model->embedding.matrix;
    for (int64_t p = 0; p < matrix->k; p++) {
        int64_t at = packed_index(model->kernels->panel, model->bf16_activations, matrix->k_padded, token, p);
        x[p] = matrix->element_size == 4 ? ((const float *)matrix->data)[at]
                                         : swa_float_from_bf16(((const uint16_t *)matrix->data)[at]);
    }
}

void swa_norm_activation(const swa_model_t *model, const swa_vector_t *weight, const float *x, float *row, void *out)
{
    model->kernels->rms_norm(weight->n, x, weight->data, model->config.rms_norm_eps, row);
    swa_store_activation(model, weight->n, row, out);
}

void swa_rope_angles(const swa_model_t *model, int64_t position, float *cosines, float *sines)
{
    const swa_config_t *c = &model->config;
    for (int64_t i = 0; i < c->head_dim / 2; i++) {
        float angle = (float)position * c->inv_freq[i]; /* float32, as the models were trained with */
        cosines[i] = (float)cos((double)angle) * c->rope_scale;
        sines[i] = (float)sin((double)angle) * c->rope_scale;
    }
}

void swa_finish_head(const swa_model_t *model, const swa_vector_t *norm, const float *cosines, const float *sines,
                     float *head)
{
    const swa_config_t *c = &model->config;
    if (norm->n)
        model->kernels->rms_norm(c->head_dim, head, norm->data, c->rms_norm_eps, head);
    model->kernels->rope(c->head_dim / 2, head, cosines, sines);
}
