/* One parallel loop for every driver: OpenMP, or a small pthread team (no OpenMP; thread sanitizer). */
#ifndef SWA_PARALLEL_H
#define SWA_PARALLEL_H

#include <stdint.h>

/* Body of task `task` on team member `thread` (0 <= thread < n_threads); must not fail or block. */
typedef void (*swa_task_fn)(void *context, int64_t task, int thread);

/* Runs fn for every task in [0, n_tasks). Tasks are handed out in ascending order, first come first
 * served; which thread runs a task never changes a result. Runs inline when one thread or task suffices. */
void swa_parallel_for(int n_threads, int64_t n_tasks, swa_task_fn fn, void *context);

/* Threads the environment allows (OMP_NUM_THREADS, else CPUs in the affinity mask); at least 1. */
int swa_default_threads(void);

#endif
