/* One call of the engine, computed on the worker while the calling thread listens to signals. */
#ifndef SWA_PYRUN_H
#define SWA_PYRUN_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "swa.h"
#include "worker.h"

/* First member of what a call computes with. All of it is heap memory: at interpreter shutdown the thread that waits
 * for a call, with its stack, may end before the worker has let go of the call. */
typedef struct swa_call swa_call_t;
struct swa_call {
    swa_job_t job;
    swa_run_t run;
    swa_status_t (*compute)(swa_call_t *call); /* on the worker, without the GIL */
    swa_status_t status;
    char message[SWA_MESSAGE_BYTES]; /* where status is SWA_ERROR_VALUE */
};

/* Zeroed memory for a call of `size` bytes; PyMem_RawFree frees it. NULL with MemoryError. */
void *swa_call_new(size_t size, int n_threads, swa_status_t (*compute)(swa_call_t *call));

/* Queues the call behind all others of the process and waits for it, the GIL released. `owner` is what the call works
 * on: its progress callback must not start another call on it. `progress` is NULL, None or a callable (done, total).
 * Returns 0, or -1 with an exception set: the call's own error, or what a signal handler or the callback raised, which
 * cancels the call. */
int swa_call_run(swa_call_t *call, const void *owner, PyObject *progress);

#endif
