/* The process's worker: one thread, with every signal blocked, that runs jobs first come, first served. */
#ifndef SWA_WORKER_H
#define SWA_WORKER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct swa_job swa_job_t;
struct swa_job {
    void (*fn)(swa_job_t *job);
    atomic_int *cancelled; /* swa_worker_stop sets it; `fn` should then return soon */
    /* the worker's own: */
    swa_job_t *next;
    bool finished;
    uint64_t process;
};

typedef enum {
    SWA_JOB_FINISHED,
    SWA_JOB_PENDING, /* queued or running */
    SWA_JOB_LOST,    /* submitted before a fork that made this process: nothing runs it here */
} swa_job_state_t;

/* The job must stay where it is until it is finished, lost or withdrawn. False: no thread could be started,
 * or swa_worker_stop is at work. */
bool swa_worker_submit(swa_job_t *job);

/* Waits until the job is no longer pending, or for so many milliseconds. */
swa_job_state_t swa_worker_wait(swa_job_t *job, int milliseconds);

/* Takes a job out of the queue. False: too late, it has begun. */
bool swa_worker_withdraw(swa_job_t *job);

/* Cancels all jobs, waits for the last and ends the thread; a later submit starts a new one. */
void swa_worker_stop(void);

#endif
