/* Test hooks: one kernel or driver at a time, reached through the same functions as a whole run. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include <time.h>

#include "forward.h"
#include "parallel.h"

/* Just enough of a model for the drivers. */
static swa_model_t bare_model(const swa_kernels_t *kernels, swa_dtype_t dtype)
{
    swa_model_t model = {.dtype = dtype, .kernels = kernels};
    model.bf16_activations = dtype == SWA_BFLOAT16 && kernels->panel_bf16;
    return model;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* ---- attention ----------------------------------------------------------------------------------------------- */

typedef struct {
    swa_model_t model;
    swa_kv_t kv;
    swa_mix_t mix;
    int64_t n_tokens, stride;
    unsigned char *queries, *out; /* activation rows [n_tokens] */
    swa_attention_scratch_t *scratch;
    const float *k, *v;
} attention_t;

/* One tile of positions. */
static void pack_keys(void *context, int64_t task, int thread)
{
    (void)thread;
    attention_t *a = context;
    const int64_t end = swa_min(a->n_tokens, (task + 1) * SWA_TILE);
    for (int64_t t = task * SWA_TILE; t < end; t++)
        for (int64_t g = 0; g < a->kv.n_kv_heads; g++) {
            const int64_t at = (t * a->kv.n_kv_heads + g) * a->kv.head_dim;
            swa_kv_store_key(&a->kv, t, g, a->k + at);
            swa_kv_store_value(&a->kv, t, g, a->v + at);
        }
}

static void attend_rows(void *context, int64_t task, int thread)
{
    const attention_t *a = context;
    int64_t first = task * SWA_QUERY_BLOCK, end = swa_min(a->n_tokens, first + SWA_QUERY_BLOCK);
    size_t offset = (size_t)(first * a->stride) * swa_activation_size(&a->model);
    swa_attend(&a->model, &a->kv, &a->mix, first, end, 0, a->model.config.n_heads, a->queries + offset, a->out + offset,
               a->stride, &a->scratch[thread]);
}

swa_status_t swa_hook_attention(const swa_kernels_t *kernels, swa_dtype_t dtype, int n_threads, const float *q,
                                const float *k, const float *v, int64_t n_tokens, int64_t n_heads, int64_t n_kv_heads,
                                int64_t head_dim, int64_t window, int64_t sinks, int64_t full_from, float *out,
                                double *seconds)
{
    const int64_t width = n_heads * head_dim;
    attention_t a = {.model = bare_model(kernels, dtype),
                     .mix = swa_single_mask((swa_mask_t){window, sinks, full_from}),
                     .n_tokens = n_tokens,
                     .k = k,
                     .v = v};
    a.model.config.n_heads = n_heads;
    a.stride = swa_activation_stride(width);
    a.kv = swa_kv_layout(kernels, a.model.bf16_activations, n_kv_heads, head_dim, n_tokens);
    const size_t row_bytes = (size_t)a.stride * swa_activation_size(&a.model);
    const size_t scratch_bytes = (swa_attention_scratch_bytes(&a.kv) + 63) / 64 * 64;
    unsigned char *kv_memory = swa_allocate(swa_kv_bytes(&a.kv), 1);
    unsigned char *scratch_memory = swa_allocate((size_t)n_threads, scratch_bytes);
    a.queries = swa_allocate((size_t)n_tokens, row_bytes);
    a.out = swa_allocate((size_t)n_tokens, row_bytes);
    a.scratch = swa_allocate((size_t)n_threads, sizeof *a.scratch);
    swa_status_t status = SWA_ERROR_MEMORY;
    if (kv_memory && scratch_memory && a.queries && a.out && a.scratch) {
        status = SWA_OK;
        swa_kv_place(&a.kv, kv_memory);
        for (int i = 0; i < n_threads; i++)
            swa_attention_scratch_place(&a.scratch[i], &a.kv, scratch_memory + (size_t)i * scratch_bytes);
        for (int64_t t = 0; t < n_tokens; t++)
            swa_store_activation(&a.model, width, q + t * width, a.queries + (size_t)t * row_bytes);
        memset(kv_memory, 0, swa_kv_bytes(&a.kv));      /* as in a forward, which touches both once for all layers: */
        memset(a.out, 0, (size_t)n_tokens * row_bytes); /* the time is without page faults */
        double start = now();
        swa_parallel_for(n_threads, (n_tokens + SWA_TILE - 1) / SWA_TILE, pack_keys, &a);
        swa_parallel_for(n_threads, (n_tokens + SWA_QUERY_BLOCK - 1) / SWA_QUERY_BLOCK, attend_rows, &a);
        *seconds = now() - start;
        for (int64_t t = 0; t < n_tokens; t++)
            swa_load_activation(&a.model, width, a.out + (size_t)t * row_bytes, out + t * width);
    }
    swa_release(kv_memory);
    swa_release(scratch_memory);
    swa_release(a.queries);
    swa_release(a.out);
    swa_release(a.scratch);
    return status;
}

/* ---- products ------------------------------------------------------------------------------------------------ */

typedef struct {
    swa_model_t model;
    swa_workspace_t ws; /* rows and columns at a time, as in a forward */
    swa_linear_t linear;
    int64_t m;
    unsigned char *x; /* activation rows [m] */
    float *columns;   /* [n_threads][chunk][column_stride] */
    float *out;
} linear_t;

static void multiply_rows(void *context, int64_t task, int thread)
{
    const linear_t *l = context;
    const swa_matrix_t *matrix = &l->linear.matrix;
    const int64_t stride = swa_activation_stride(matrix->k), block = l->ws.column_stride;
    const swa_chunk_t chunk = swa_chunk_at(&l->ws, 0, l->m, task);
    const unsigned char *x = l->x + (size_t)(chunk.row * stride) * swa_activation_size(&l->model);
    float *own = l->columns + (int64_t)thread * l->ws.chunk * block;
    for (int64_t column = 0; column < matrix->n; column += block) {
        int64_t columns = swa_min(block, matrix->n - column);
        swa_multiply(&l->model, &l->linear, chunk.m, x, stride, column, columns, own, block);
        for (int64_t r = 0; r < chunk.m; r++)
            memcpy(l->out + (chunk.row + r) * matrix->n + column, own + r * block, (size_t)columns * sizeof(float));
    }
}

swa_status_t swa_hook_linear(const swa_kernels_t *kernels, swa_dtype_t dtype, int n_threads, const float *x,
                             const float *w, int64_t m, int64_t n, int64_t k, float *out, double *seconds)
{
    linear_t l = {.model = bare_model(kernels, dtype), .m = m, .out = out};
    l.model.config.head_dim = 1; /* any number of columns at a time */
    l.ws = swa_workspace_describe(&l.model, m, n_threads);
    const size_t row_bytes = (size_t)swa_activation_stride(k) * swa_activation_size(&l.model);
    swa_status_t status = swa_matrix_allocate(kernels, dtype, n, k, &l.linear.matrix);
    l.x = swa_allocate((size_t)m, row_bytes);
    l.columns = swa_allocate((size_t)(n_threads * l.ws.chunk), (size_t)l.ws.column_stride * sizeof(float));
    if (!l.x || !l.columns)
        status = SWA_ERROR_MEMORY;
    if (status == SWA_OK) {
        swa_pack_rows(kernels, l.model.bf16_activations, &l.linear.matrix, 0, n, SWA_SOURCE_F32, w, n_threads);
        for (int64_t r = 0; r < m; r++)
            swa_store_activation(&l.model, k, x + r * k, l.x + (size_t)r * row_bytes);
        memset(out, 0, (size_t)(m * n) * sizeof *out); /* the product's time is without page faults */
        double start = now();
        swa_parallel_for(n_threads, swa_chunk_count(&l.ws, 0, m), multiply_rows, &l);
        *seconds = now() - start;
    }
    swa_release(l.linear.matrix.data);
    swa_release(l.x);
    swa_release(l.columns);
    return status;
}

/* ---- what the machine can do --------------------------------------------------------------------------------- */

enum { READ_TASKS = 64 };
static const double PROBE_SECONDS = 0.1;

typedef struct {
    const swa_kernels_t *kernels;
    swa_peak_t kind;
    int64_t rounds;      /* products */
    const float *buffer; /* or reading: READ_TASKS slices of n floats */
    int64_t n;
} peak_t;

static void peak_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const peak_t *peak = context;
    double flops;
    float sum;
    if (peak->kind == SWA_PEAK_READ)
        peak->kernels->sum(peak->n, peak->buffer + task * peak->n, &sum);
    else if (peak->kind == SWA_PEAK_BF16)
        peak->kernels->peak_bf16(peak->rounds, &flops);
    else
        peak->kernels->peak_f32(peak->rounds, &flops);
}

static double time_tasks(peak_t *peak, int n_threads, int64_t n_tasks)
{
    double start = now();
    swa_parallel_for(n_threads, n_tasks, peak_task, peak);
    return now() - start;
}

swa_status_t swa_hook_peak(const swa_kernels_t *kernels, swa_peak_t kind, int n_threads, int64_t n_bytes,
                           double *per_second)
{
    peak_t peak = {.kernels = kernels, .kind = kind, .rounds = 1000};
    *per_second = 0.0;
    if (kind == SWA_PEAK_READ) {
        peak.n = swa_max(1, n_bytes / (READ_TASKS * (int64_t)sizeof(float)));
        float *buffer = swa_allocate((size_t)(READ_TASKS * peak.n), sizeof(float));
        if (!buffer)
            return SWA_ERROR_MEMORY;
        memset(buffer, 0, (size_t)(READ_TASKS * peak.n) * sizeof(float)); /* untouched pages are all the same one */
        peak.buffer = buffer;
        for (int i = 0; i < 3; i++) {
            double rate = (double)(READ_TASKS * peak.n) * sizeof(float) / time_tasks(&peak, n_threads, READ_TASKS);
            *per_second = rate > *per_second ? rate : *per_second;
        }
        swa_release(buffer);
        return SWA_OK;
    }
    if (kind == SWA_PEAK_BF16 && !kernels->peak_bf16)
        return SWA_OK; /* this tier has no such products */
    double flops;
    while (time_tasks(&peak, n_threads, n_threads) < PROBE_SECONDS) /* warm up, and long enough to time */
        peak.rounds *= 2;
    (kind == SWA_PEAK_BF16 ? kernels->peak_bf16 : kernels->peak_f32)(1, &flops);
    double seconds = time_tasks(&peak, n_threads, n_threads);
    *per_second = (double)n_threads * (double)peak.rounds * flops / seconds;
    return SWA_OK;
}

/* ---- rows ---------------------------------------------------------------------------------------------------- */

void swa_hook_rms_norm(const swa_kernels_t *kernels, const float *x, const float *weight, int64_t m, int64_t n,
                       float eps, float *out)
{
    for (int64_t r = 0; r < m; r++)
        kernels->rms_norm(n, x + r * n, weight, eps, out + r * n);
}

void swa_hook_silu_mul(const swa_kernels_t *kernels, const float *gate, const float *up, int64_t n, float *out)
{
    kernels->silu_mul(n, gate, up, out);
}

swa_status_t swa_hook_bf16_round_trip(const swa_kernels_t *kernels, const uint16_t *in, int64_t n, uint16_t *out)
{
    swa_model_t model = bare_model(kernels, SWA_BFLOAT16);
    swa_matrix_t *matrix = &model.embedding.matrix; /* one input: token i is element i */
    if (swa_matrix_allocate(kernels, SWA_BFLOAT16, n, 1, matrix) != SWA_OK)
        return SWA_ERROR_MEMORY;
    swa_pack_rows(kernels, model.bf16_activations, matrix, 0, n, SWA_SOURCE_BF16, in, 1);
    for (int64_t i = 0; i < n; i++) {
        float x;
        swa_embed(&model, (int32_t)i, &x);
        out[i] = (uint16_t)(swa_bits_from_float(x) >> 16);
    }
    swa_release(matrix->data);
    return SWA_OK;
}
