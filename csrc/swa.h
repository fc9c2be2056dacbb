/* Public C types of the engine: config, model, policy, run control, status codes. No Python, no threads. */
#ifndef SWA_H
#define SWA_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    SWA_OK = 0,
    SWA_ERROR_MEMORY,    /* an allocation failed */
    SWA_ERROR_CANCELLED, /* run->cancelled was set */
    SWA_ERROR_VALUE,     /* bad argument; the message buffer says which */
} swa_status_t;

typedef enum { SWA_FLOAT32, SWA_BFLOAT16 } swa_dtype_t;                        /* compute type of a model */
typedef enum { SWA_SOURCE_F32, SWA_SOURCE_F16, SWA_SOURCE_BF16 } swa_source_t; /* type of loaded bytes */

enum { SWA_MESSAGE_BYTES = 256, SWA_NO_FLIP = -1, SWA_MAX_CHOICES = 8, SWA_MAX_HEAD_DIM = 1024 };

typedef struct swa_kernels swa_kernels_t; /* one ISA tier's kernel table, kernels.h */
typedef struct swa_model swa_model_t;     /* packed weights, weights.c */
typedef struct swa_session swa_session_t; /* KV cache of one sequence, decode.c */

typedef struct {
    int64_t vocab_size, hidden_size, intermediate_size;
    int64_t n_layers, n_heads, n_kv_heads, head_dim;
    float rms_norm_eps;
    bool tied;    /* lm_head shares the embedding matrix */
    bool qk_norm; /* qwen3: RMSNorm over head_dim of every query and key head, before RoPE */
    bool q_bias, k_bias, v_bias, o_bias, gate_bias, up_bias, down_bias;
    const float *inv_freq; /* [head_dim / 2]; copied by swa_model_create */
    float rope_scale;      /* multiplies cos and sin (yarn's attention factor); 1 otherwise */
} swa_config_t;

/* Who attends to what, per layer. Row t < full_from[l] sees keys {j <= t: window[l] == 0, or j > t - window[l],
 * or j < sinks[l]}; rows t >= full_from[l] see every key j <= t. */
typedef struct {
    const int64_t *window, *sinks, *full_from; /* each [n_layers] */
} swa_policy_t;

/* Control block of one call: the caller may set `cancelled` and read `done` from another thread. */
typedef struct {
    int n_threads;
    atomic_int cancelled;
    atomic_ullong done;  /* FLOPs finished */
    atomic_ullong total; /* FLOPs of the whole call, set at its start */
} swa_run_t;

static inline bool swa_cancelled(const swa_run_t *run)
{
    return atomic_load_explicit(&run->cancelled, memory_order_relaxed) != 0;
}

static inline void swa_advance(swa_run_t *run, uint64_t cost)
{
    atomic_fetch_add_explicit(&run->done, cost, memory_order_relaxed);
}

/* dispatch.c: tiers in ascending order of preference. */
enum { SWA_MAX_TIERS = 8 };
int swa_tiers_built(const char *names[SWA_MAX_TIERS]);   /* compiled in; returns their number */
bool swa_tier_supported(const char *name);               /* built, and this CPU and OS run it */
const swa_kernels_t *swa_kernels_find(const char *name); /* NULL if not supported; name NULL: the best */
const char *swa_kernels_name(const swa_kernels_t *kernels);

/* weights.c. `message` buffers have SWA_MESSAGE_BYTES and are written on SWA_ERROR_VALUE. */
/* `planned`: no memory for weights, which can then not be loaded: it tells sizes only. */
swa_status_t swa_model_create(const swa_config_t *config, swa_dtype_t dtype, const swa_kernels_t *kernels, bool planned,
                              swa_model_t **out, char *message);
void swa_model_free(swa_model_t *model); /* NULL is fine */
swa_status_t swa_model_load_rows(swa_model_t *model, const char *tensor, int64_t layer, int64_t row_start,
                                 swa_source_t source, const void *data, size_t n_bytes, int n_threads, char *message);
swa_status_t swa_model_finish(swa_model_t *model, char *message); /* names the first incomplete tensor */
size_t swa_model_bytes(const swa_model_t *model);
const swa_config_t *swa_model_config(const swa_model_t *model);

/* All ids must be in [0, vocab_size); the caller checks. Outputs are caller-allocated. */
/* nll.c: answer tokens are ids[prompt_len ..]; nll [n_tokens - prompt_len] in nats, greedy likewise 0 or 1. */
swa_status_t swa_nll(const swa_model_t *model, swa_run_t *run, const int32_t *ids, int64_t n_tokens, int64_t prompt_len,
                     const swa_policy_t *policy, double *nll, uint8_t *greedy);
/* logits [n_tokens - first_row][vocab_size] */
swa_status_t swa_logits(const swa_model_t *model, swa_run_t *run, const int32_t *ids, int64_t n_tokens,
                        const swa_policy_t *policy, int64_t first_row, float *logits);
/* sweep.c: run l is the base policy with window[l] replaced by flip_window[l]; SWA_NO_FLIP: no run (rows NaN, 0).
 * A flip to full (0) keeps full_from[l] and sinks[l], which then change nothing. */
swa_status_t swa_sweep(const swa_model_t *model, swa_run_t *run, const int32_t *ids, int64_t n_tokens,
                       int64_t prompt_len, const swa_policy_t *policy, const int64_t *flip_window, double *base_nll,
                       uint8_t *base_greedy, double *run_nll, uint8_t *run_greedy);

/* gates.c: layer l's attention output is the sum over choices c < n_choices of weights[l][c] times attention under
 * window[l][c]; sinks and full_from are the layer's. */
typedef struct {
    int64_t n_choices;
    const int64_t *window, *sinks, *full_from; /* [n_layers][n_choices], [n_layers], [n_layers] */
    const double *weights;                     /* [n_layers][n_choices], >= 0, their sum 1 */
} swa_gates_t;
/* loss and greedy [n_tokens - prompt_len]: the answer's NLL or, with reference (logits [n_tokens - prompt_len][V]),
 * KL(reference || model) of every answer row. gradient [n_layers][n_choices][n_kv_heads]: of the mean loss with respect
 * to weights[l][c], through the query heads of a KV head, relative to choice 0. */
swa_status_t swa_gates(const swa_model_t *model, swa_run_t *run, const int32_t *ids, int64_t n_tokens,
                       int64_t prompt_len, const swa_gates_t *gates, const float *reference, double *loss,
                       uint8_t *greedy, double *gradient);
size_t swa_gates_bytes(const swa_model_t *model, int64_t n_tokens, int64_t n_choices, int n_threads);

/* mass.c: mass [n_layers][n_heads], the share of attention that the last n_last rows, on average, give to the last
 * near_window keys (their own included) and the first near_sinks; window [n_layers] as the layers attend, 0: full. */
swa_status_t swa_attention_mass(const swa_model_t *model, swa_run_t *run, const int32_t *ids, int64_t n_tokens,
                                const int64_t *window, int64_t near_window, int64_t near_sinks, int64_t n_last,
                                double *mass);

/* decode.c: prefill of all ids, then one token a step. decode_window[l] 0: that layer keeps every key. */
swa_status_t swa_session_start(const swa_model_t *model, swa_run_t *run, const int32_t *ids, int64_t n_tokens,
                               const swa_policy_t *policy, const int64_t *decode_window, const int64_t *decode_sinks,
                               int64_t capacity, swa_session_t **out);
swa_status_t swa_session_step(swa_session_t *session, swa_run_t *run, int32_t token);
const float *swa_session_logits(const swa_session_t *session); /* [vocab_size], of the last token fed */
int64_t swa_session_tokens(const swa_session_t *session);
int64_t swa_session_capacity(const swa_session_t *session);
size_t swa_session_kv_bytes(const swa_session_t *session);
void swa_session_free(swa_session_t *session);

typedef enum { SWA_WORK_NLL, SWA_WORK_SWEEP, SWA_WORK_LOGITS, SWA_WORK_DECODE } swa_work_t;
/* Bytes a call allocates beside the weights and its outputs. n_prefix: rows shared by all runs of a sweep. */
size_t swa_workspace_bytes(const swa_model_t *model, swa_work_t work, int64_t n_tokens, int64_t n_prefix,
                           int n_threads);

/* Test hooks (hooks.c): one kernel or driver at a time, float32 in and out, for the oracles in tests/ and for
 * benchmarks. `seconds`: the driver's own, with packing keys and values, without packing weights. */
swa_status_t swa_hook_attention(const swa_kernels_t *kernels, swa_dtype_t dtype, int n_threads, const float *q,
                                const float *k, const float *v, int64_t n_tokens, int64_t n_heads, int64_t n_kv_heads,
                                int64_t head_dim, int64_t window, int64_t sinks, int64_t full_from, float *out,
                                double *seconds);
swa_status_t swa_hook_linear(const swa_kernels_t *kernels, swa_dtype_t dtype, int n_threads, const float *x,
                             const float *w, int64_t m, int64_t n, int64_t k, float *out, double *seconds);
void swa_hook_rms_norm(const swa_kernels_t *kernels, const float *x, const float *weight, int64_t m, int64_t n,
                       float eps, float *out);
void swa_hook_silu_mul(const swa_kernels_t *kernels, const float *gate, const float *up, int64_t n, float *out);
swa_status_t swa_hook_log_prob(const swa_kernels_t *kernels, const float *logits, int64_t m, int64_t vocab_size,
                               const int64_t *targets, double *nll, uint8_t *greedy);
/* What the tier reaches at most: FLOP/s of products in registers, or bytes/s read from a buffer of n_bytes. */
typedef enum { SWA_PEAK_F32, SWA_PEAK_BF16, SWA_PEAK_READ } swa_peak_t;
swa_status_t swa_hook_peak(const swa_kernels_t *kernels, swa_peak_t kind, int n_threads, int64_t n_bytes,
                           double *per_second);
swa_status_t swa_hook_bf16_round_trip(const swa_kernels_t *kernels, const uint16_t *in, int64_t n, uint16_t *out);

#endif
