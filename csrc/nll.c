/* Final norm, lm_head and log-sum-exp on scored rows. Vocabulary blocks are fixed and combined in order, so a result
 * does not depend on the threads. */
#include "nll.h"

#include <math.h>

#include "arena.h"
#include "parallel.h"

enum { VOCABULARY_BLOCK = 1024, ROW_BLOCK = 64 }; /* a whole number of panels on every tier */
enum { HEAD_ROWS = 1024 };                        /* at once: what they take does not grow with the prompt */

/* One row's view of one vocabulary block. */
typedef struct {
    float maximum;
    int32_t argmax;
    double sum; /* of exp(logit - maximum) */
} block_t;

typedef struct {
    const swa_model_t *model;
    swa_run_t *run;
    int64_t n_rows, n_blocks, stride;
    unsigned char *normed;  /* activation rows */
    float *scratch;         /* [n_threads][ROW_BLOCK + 1][VOCABULARY_BLOCK] */
    const int32_t *targets; /* scoring: */
    block_t *blocks;        /* [n_rows][n_blocks] */
    float *target_logits;   /* [n_rows] */
    float *logits;          /* or plain logits: [n_rows][vocab_size] */
} head_t;

uint64_t swa_head_cost(const swa_model_t *model, int64_t n_rows)
{
    return 2 * (uint64_t)n_rows * (uint64_t)model->config.vocab_size * (uint64_t)model->config.hidden_size;
}

static int64_t block_count(int64_t vocab_size) { return (vocab_size + VOCABULARY_BLOCK - 1) / VOCABULARY_BLOCK; }

static const size_t SCRATCH_FLOATS = (size_t)(ROW_BLOCK + 1) * VOCABULARY_BLOCK;

size_t swa_head_bytes(const swa_model_t *model, int64_t n_rows, int n_threads)
{
    const swa_config_t *c = &model->config;
    size_t row = (size_t)swa_activation_stride(c->hidden_size) * swa_activation_size(model) + sizeof(float) +
                 (size_t)block_count(c->vocab_size) * sizeof(block_t);
    return (size_t)swa_min(n_rows, HEAD_ROWS) * row + (size_t)n_threads * SCRATCH_FLOATS * sizeof(float);
}

/* `exponentials` is scratch of n floats. Four sums in a fixed order: exact enough (double) and not one long chain. */
static block_t summarise(const swa_kernels_t *kernels, const float *logits, int64_t n, float *exponentials)
{
    block_t block = {.maximum = -INFINITY, .argmax = 0};
    for (int64_t i = 0; i < n; i++)
        if (logits[i] > block.maximum) {
            block.maximum = logits[i];
            block.argmax = (int32_t)i;
        }
    /* Where every logit is -inf any finite shift gives zeros. */
    kernels->exp_shifted(n, logits, block.maximum == -INFINITY ? 0.0f : block.maximum, exponentials);
    double sums[4] = {0};
    for (int64_t i = 0; i < n; i++)
        sums[i % 4] += (double)exponentials[i];
    block.sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return block;
}

/* A row's view of the whole vocabulary. */
static block_t combine(const block_t *blocks, int64_t n_blocks)
{
    int64_t best = 0;
    for (int64_t b = 1; b < n_blocks; b++)
        if (blocks[b].maximum > blocks[best].maximum)
            best = b;
    block_t row = {blocks[best].maximum, (int32_t)(best * VOCABULARY_BLOCK) + blocks[best].argmax, 0.0};
    for (int64_t b = 0; b < n_blocks; b++)
        row.sum += blocks[b].sum * exp((double)blocks[b].maximum - (double)row.maximum);
    return row;
}

/* Negative log-probability of the target, whether it is the argmax. */
static double target_nll(block_t row, float target_logit, int32_t target, uint8_t *greedy)
{
    double nll = log(row.sum) + ((double)row.maximum - (double)target_logit);
    *greedy = !isnan(nll) && row.argmax == target;
    return nll;
}

static void head_block(void *context, int64_t task, int thread)
{
    const head_t *head = context;
    const swa_model_t *model = head->model;
    const int64_t vocab_size = model->config.vocab_size, column = task * VOCABULARY_BLOCK;
    const int64_t columns = swa_min(VOCABULARY_BLOCK, vocab_size - column);
    float *logits = head->scratch + (size_t)thread * SCRATCH_FLOATS;
    float *exponentials = logits + ROW_BLOCK * VOCABULARY_BLOCK;
    for (int64_t row = 0; row < head->n_rows && !swa_cancelled(head->run); row += ROW_BLOCK) {
        int64_t m = swa_min(ROW_BLOCK, head->n_rows - row);
        swa_multiply(model, swa_head(model), m,
                     head->normed + (size_t)(row * head->stride) * swa_activation_size(model), head->stride, column,
                     columns, logits, VOCABULARY_BLOCK);
        for (int64_t r = 0; r < m; r++) {
            const float *line = logits + r * VOCABULARY_BLOCK;
            if (head->logits) {
                memcpy(head->logits + (row + r) * vocab_size + column, line, (size_t)columns * sizeof(float));
                continue;
            }
            head->blocks[(row + r) * head->n_blocks + task] = summarise(model->kernels, line, columns, exponentials);
            int64_t target = head->targets[row + r] - column;
            if (target >= 0 && target < columns)
                head->target_logits[row + r] = line[target];
        }
    }
    swa_advance(head->run, 2 * (uint64_t)(head->n_rows * columns) * (uint64_t)model->config.hidden_size);
}

/* Norms up to HEAD_ROWS rows and runs every vocabulary block. */
static swa_status_t run_head(head_t *head, const float *x)
{
    const swa_model_t *model = head->model;
    const int64_t hidden = model->config.hidden_size;
    head->stride = swa_activation_stride(hidden);
    head->normed = swa_allocate((size_t)(head->n_rows * head->stride), swa_activation_size(model));
    head->scratch = swa_allocate((size_t)head->run->n_threads * SCRATCH_FLOATS, sizeof(float));
    float *row = swa_allocate((size_t)hidden, sizeof(float));
    swa_status_t status = head->normed && head->scratch && row ? SWA_OK : SWA_ERROR_MEMORY;
    if (status == SWA_OK) {
        for (int64_t r = 0; r < head->n_rows; r++)
            swa_norm_activation(model, &model->norm, x + r * hidden, row,
                                head->normed + (size_t)(r * head->stride) * swa_activation_size(model));
        swa_parallel_for(head->run->n_threads, block_count(model->config.vocab_size), head_block, head);
        status = swa_cancelled(head->run) ? SWA_ERROR_CANCELLED : SWA_OK;
    }
    swa_release(row);
    swa_release(head->scratch);
    swa_release(head->normed);
    return status;
}

swa_status_t swa_logit_rows(const swa_model_t *model, swa_run_t *run, const float *x, int64_t n_rows, float *logits)
{
    const int64_t hidden = model->config.hidden_size, vocab_size = model->config.vocab_size;
    swa_status_t status = SWA_OK;
    for (int64_t first = 0; status == SWA_OK && first < n_rows; first += HEAD_ROWS) {
        int64_t m = swa_min(HEAD_ROWS, n_rows - first);
        head_t head = {.model = model, .run = run, .n_rows = m, .logits = logits + first * vocab_size};
        status = run_head(&head, x + first * hidden);
    }
    return status;
}

swa_status_t swa_score_rows(const swa_model_t *model, swa_run_t *run, const float *x, int64_t n_rows,
                            const int32_t *targets, double *nll, uint8_t *greedy)
{
    const int64_t n_blocks = block_count(model->config.vocab_size), most = swa_min(HEAD_ROWS, n_rows);
    head_t head = {.model = model, .run = run, .n_blocks = n_blocks};
    head.blocks = swa_allocate((size_t)(most * n_blocks), sizeof *head.blocks);
    head.target_logits = swa_allocate((size_t)most, sizeof *head.target_logits);
    swa_status_t status = head.blocks && head.target_logits ? SWA_OK : SWA_ERROR_MEMORY;
    for (int64_t first = 0; status == SWA_OK && first < n_rows; first += HEAD_ROWS) {
        head.n_rows = swa_min(HEAD_ROWS, n_rows - first);
        head.targets = targets + first;
        status = run_head(&head, x + first * model->config.hidden_size);
        for (int64_t r = 0; status == SWA_OK && r < head.n_rows; r++)
            nll[first + r] = target_nll(combine(head.blocks + r * n_blocks, n_blocks), head.target_logits[r],
                                        head.targets[r], &greedy[first + r]);
    }
    swa_release(head.target_logits);
    swa_release(head.blocks);
    return status;
}

/* ---- one row of logits, whole ---------------------------------------------------------------------------------- */

/* Scratch: blocks of the vocabulary, and VOCABULARY_BLOCK floats of `exponentials`. */
static block_t summarise_row(const swa_kernels_t *kernels, const float *logits, int64_t vocab_size, block_t *blocks,
                             float *exponentials)
{
    const int64_t n_blocks = block_count(vocab_size);
    for (int64_t b = 0; b < n_blocks; b++) {
        int64_t column = b * VOCABULARY_BLOCK;
        blocks[b] = summarise(kernels, logits + column, swa_min(VOCABULARY_BLOCK, vocab_size - column), exponentials);
    }
    return combine(blocks, n_blocks);
}

swa_status_t swa_hook_log_prob(const swa_kernels_t *kernels, const float *logits, int64_t m, int64_t vocab_size,
                               const int64_t *targets, double *nll, uint8_t *greedy)
{
    int64_t n_blocks = block_count(vocab_size);
    block_t *blocks = swa_allocate((size_t)n_blocks, sizeof *blocks);
    if (!blocks)
        return SWA_ERROR_MEMORY;
    float exponentials[VOCABULARY_BLOCK];
    for (int64_t r = 0; r < m; r++, logits += vocab_size) {
        const block_t row = summarise_row(kernels, logits, vocab_size, blocks, exponentials);
        nll[r] = target_nll(row, logits[targets[r]], (int32_t)targets[r], &greedy[r]);
    }
    swa_release(blocks);
    return SWA_OK;
}

/* ---- backward ------------------------------------------------------------------------------------------------- */

/* Up to ROW_BLOCK rows on their way back from loss to residual. */
typedef struct {
    const swa_model_t *model;
    swa_run_t *run;
    int64_t m, n_blocks, d_stride; /* stride of d_logits */
    const float *x, *reference;
    const int32_t *targets;
    float weight;
    float *logits;           /* [m][vocab_size] */
    unsigned char *d_logits; /* activation rows [m][vocab_size] */
    float *d_normed;         /* [m][normed_stride], whole panels */
    int64_t normed_stride;
    block_t *blocks;           /* [n_threads][n_blocks] */
    unsigned char *transposed; /* [n_threads] slices of a panel */
    size_t slice_bytes;
    double *loss;
    uint8_t *greedy;
    float *d_x;
} head_back_t;

/* Probabilities of n logits of a row. A shift of the row does not move them: they are taken from its maximum, not from
 * a rounded total. */
static void softmax(const swa_kernels_t *kernels, block_t row, int64_t n, const float *logits, float *out)
{
    const float scale = (float)(1.0 / row.sum);
    kernels->exp_shifted(n, logits, row.maximum, out);
    for (int64_t i = 0; i < n; i++)
        out[i] *= scale;
}

/* d_logits = weight (softmax(logits) - target distribution), and the loss. */
static void loss_row(void *context, int64_t r, int thread)
{
    head_back_t *head = context;
    const swa_kernels_t *kernels = head->model->kernels;
    const int64_t vocab_size = head->model->config.vocab_size;
    float *logits = head->logits + r * vocab_size, p[VOCABULARY_BLOCK], q[VOCABULARY_BLOCK];
    const float *reference = head->reference ? head->reference + r * vocab_size : NULL;
    block_t *blocks = head->blocks + thread * head->n_blocks;
    if (swa_cancelled(head->run))
        return;
    const block_t own = summarise_row(kernels, logits, vocab_size, blocks, p);
    const block_t given = reference ? summarise_row(kernels, reference, vocab_size, blocks, q) : own;
    const double own_log = log(own.sum), given_log = log(given.sum);
    const int32_t target = head->targets[r];
    head->loss[r] = target_nll(own, logits[target], target, &head->greedy[r]);
    double divergence = 0.0;
    for (int64_t column = 0; column < vocab_size; column += VOCABULARY_BLOCK) {
        const int64_t n = swa_min(VOCABULARY_BLOCK, vocab_size - column);
        float *line = logits + column;
        softmax(kernels, own, n, line, p);
        if (reference) {
            softmax(kernels, given, n, reference + column, q);
            for (int64_t i = 0; i < n; i++) {
                double log_p = (double)line[i] - (double)own.maximum - own_log;
                double log_q = (double)reference[column + i] - (double)given.maximum - given_log;
                divergence += (double)q[i] * (log_q - log_p); /* q adds up to 1 but for rounding: no total outside */
                line[i] = head->weight * (p[i] - q[i]);
            }
        } else {
            for (int64_t i = 0; i < n; i++)
                line[i] = head->weight * (p[i] - (float)(column + i == target));
        }
    }
    if (reference)
        head->loss[r] = divergence;
    swa_store_activation(head->model, vocab_size, logits,
                         head->d_logits + (size_t)(r * head->d_stride) * swa_activation_size(head->model));
}

enum { TRANSPOSED_ROWS = 384 }; /* of W at a time: they stay in L1 */

/* One panel of d_normed[m][hidden_size] = d_logits W: W is transposed slice by slice, since it is read but once. */
static void head_back_panel(void *context, int64_t panel, int thread)
{
    head_back_t *head = context;
    const swa_model_t *model = head->model;
    const swa_kernels_t *kernels = model->kernels;
    const swa_matrix_t *matrix = &swa_head(model)->matrix;
    const int64_t end = swa_round_up(matrix->n, 2), width = kernels->panel;
    unsigned char *slice = head->transposed + (size_t)thread * head->slice_bytes;
    float *out = head->d_normed + panel * width;
    for (int64_t first = 0; first < end && !swa_cancelled(head->run); first += TRANSPOSED_ROWS) {
        int64_t depth = swa_min(TRANSPOSED_ROWS, end - first);
        swa_transpose_panel(kernels, model->bf16_activations, matrix, panel, first, first + depth, slice);
        swa_panel_product(model, head->m, depth, head->d_logits, first, head->d_stride, slice, out, head->normed_stride,
                          first > 0);
    }
    swa_advance(head->run, 2 * (uint64_t)(head->m * matrix->n) * (uint64_t)swa_min(width, matrix->k - panel * width));
}

static void layout_head_back(head_back_t *head, const swa_model_t *model, int64_t n_rows, int n_threads,
                             swa_arena_t *arena)
{
    const swa_config_t *c = &model->config;
    const int64_t m = swa_min(n_rows, ROW_BLOCK);
    head->n_blocks = block_count(c->vocab_size);
    head->d_stride = swa_activation_stride(c->vocab_size);
    head->normed_stride = swa_round_up(c->hidden_size, model->kernels->panel);
    head->slice_bytes = (size_t)(TRANSPOSED_ROWS * model->kernels->panel) * sizeof(float);
    head->logits = swa_carve(arena, (size_t)(m * c->vocab_size), sizeof(float));
    head->d_logits = swa_carve(arena, (size_t)(m * head->d_stride), swa_activation_size(model));
    head->d_normed = swa_carve(arena, (size_t)(m * head->normed_stride), sizeof(float));
    head->blocks = swa_carve(arena, (size_t)(n_threads * head->n_blocks), sizeof(block_t));
    head->transposed = swa_carve(arena, (size_t)n_threads, head->slice_bytes);
}

size_t swa_head_back_bytes(const swa_model_t *model, int64_t n_rows, int n_threads)
{
    head_back_t head;
    swa_arena_t arena = {0};
    layout_head_back(&head, model, n_rows, n_threads, &arena);
    return swa_add_sizes(arena.used, swa_head_bytes(model, swa_min(n_rows, ROW_BLOCK), n_threads));
}

static swa_status_t score_block_back(head_back_t *head)
{
    const swa_model_t *model = head->model;
    const int64_t hidden = model->config.hidden_size;
    swa_status_t status = swa_logit_rows(model, head->run, head->x, head->m, head->logits);
    if (status != SWA_OK)
        return status;
    swa_parallel_for(head->run->n_threads, head->m, loss_row, head);
    swa_parallel_for(head->run->n_threads, head->normed_stride / model->kernels->panel, head_back_panel, head);
    if (swa_cancelled(head->run))
        return SWA_ERROR_CANCELLED;
    memset(head->d_x, 0, (size_t)(head->m * hidden) * sizeof(float));
    for (int64_t r = 0; r < head->m; r++)
        model->kernels->rms_norm_back(hidden, head->x + r * hidden, model->norm.data, model->config.rms_norm_eps,
                                      head->d_normed + r * head->normed_stride, head->d_x + r * hidden);
    return SWA_OK;
}

swa_status_t swa_score_rows_back(const swa_model_t *model, swa_run_t *run, const float *x, int64_t n_rows,
                                 const int32_t *targets, const float *reference, float weight, double *loss,
                                 uint8_t *greedy, float *d_x)
{
    const int64_t hidden = model->config.hidden_size, vocab_size = model->config.vocab_size;
    head_back_t head = {.model = model, .run = run, .weight = weight};
    swa_arena_t arena = {0};
    layout_head_back(&head, model, n_rows, run->n_threads, &arena);
    unsigned char *memory = swa_allocate(arena.used, 1);
    if (!memory)
        return SWA_ERROR_MEMORY;
    arena = (swa_arena_t){.base = memory};
    layout_head_back(&head, model, n_rows, run->n_threads, &arena);
    swa_status_t status = SWA_OK;
    for (int64_t row = 0; status == SWA_OK && row < n_rows; row += ROW_BLOCK) {
        head.m = swa_min(ROW_BLOCK, n_rows - row);
        head.x = x + row * hidden;
        head.d_x = d_x + row * hidden;
        head.targets = targets + row;
        head.reference = reference ? reference + row * vocab_size : NULL;
        head.loss = loss + row;
        head.greedy = greedy + row;
        status = score_block_back(&head);
    }
    swa_release(memory);
    return status;
}
