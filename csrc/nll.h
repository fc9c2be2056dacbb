/* From residual rows to log-probabilities and logits. */
#ifndef SWA_NLL_H
#define SWA_NLL_H

#include "forward.h"

/* nll[i] = -log p(targets[i]) after residual row i, greedy[i] = whether the target has the largest logit (the first of
 * equals). The lm_head runs in vocabulary blocks; n_rows x vocab_size logits never exist. */
swa_status_t swa_score_rows(const swa_model_t *model, swa_run_t *run, const float *x, int64_t n_rows,
                            const int32_t *targets, double *nll, uint8_t *greedy);
/* logits[i][vocab_size] of residual row i */
swa_status_t swa_logit_rows(const swa_model_t *model, swa_run_t *run, const float *x, int64_t n_rows, float *logits);
/* The loss of every row and its gradient: loss[i] is the NLL as above or, with reference [n_rows][vocab_size] (logits),
 * KL(reference || model) of row i; d_x[i][hidden_size] = weight * d loss[i] / d x[i]. Logits exist for a few rows at a
 * time. */
swa_status_t swa_score_rows_back(const swa_model_t *model, swa_run_t *run, const float *x, int64_t n_rows,
                                 const int32_t *targets, const float *reference, float weight, double *loss,
                                 uint8_t *greedy, float *d_x);
size_t swa_head_back_bytes(const swa_model_t *model, int64_t n_rows, int n_threads);
uint64_t swa_head_cost(const swa_model_t *model, int64_t n_rows);
size_t swa_head_bytes(const swa_model_t *model, int64_t n_rows, int n_threads);

#endif
