#include "pyrun.h"

enum { SLICE_MILLISECONDS = 50 };

/* A call that this thread waits for: while its callback or a signal handler runs, others may begin inside it. */
typedef struct waiting waiting_t;
struct waiting {
    const void *owner; /* what the call works on, or NULL */
    const waiting_t *outer;
};

static _Thread_local const waiting_t *innermost;

static bool interrupts_call_on(const void *owner)
{
    const waiting_t *call = innermost;
    while (call && call->owner != owner)
        call = call->outer;
    return call != NULL;
}

static void run_job(swa_job_t *job)
{
    swa_call_t *call = (swa_call_t *)((char *)job - offsetof(swa_call_t, job));
    call->status = atomic_load(&call->run.cancelled) ? SWA_ERROR_CANCELLED : call->compute(call);
}

void *swa_call_new(size_t size, int n_threads, swa_status_t (*compute)(swa_call_t *call))
{
    swa_call_t *call = PyMem_RawCalloc(1, size);
    if (!call)
        return PyErr_NoMemory();
    call->job.fn = run_job;
    call->job.cancelled = &call->run.cancelled;
    call->run.n_threads = n_threads;
    call->compute = compute;
    return call;
}

static int report(PyObject *progress, unsigned long long done, unsigned long long total)
{
    if (!progress || progress == Py_None || total == 0)
        return 0;
    PyObject *result = PyObject_CallFunction(progress, "dd", (double)done, (double)total);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* Waits until the call is over. False: it never will be, in the child of a fork. Leaves an exception set where a signal
 * handler or the callback raised one. */
static bool wait_for(swa_call_t *call, PyObject *progress)
{
    for (;;) {
        swa_job_state_t state;
        Py_BEGIN_ALLOW_THREADS
        state = swa_worker_wait(&call->job, SLICE_MILLISECONDS);
        Py_END_ALLOW_THREADS
        if (state != SWA_JOB_PENDING)
            return state == SWA_JOB_FINISHED;
        if (PyErr_Occurred()) /* cancelled already */
            continue;
        if (PyErr_CheckSignals() < 0 ||
            report(progress, atomic_load(&call->run.done), atomic_load(&call->run.total)) < 0) {
            atomic_store(&call->run.cancelled, 1);
            if (swa_worker_withdraw(&call->job))
                return true;
        }
    }
}

static int raise_status(const swa_call_t *call)
{
    switch (call->status) {
    case SWA_OK: return 0;
    case SWA_ERROR_MEMORY: PyErr_NoMemory(); break;
    case SWA_ERROR_VALUE: PyErr_SetString(PyExc_ValueError, call->message); break;
    case SWA_ERROR_CANCELLED:
        PyErr_SetString(PyExc_RuntimeError, "the call was cancelled: the interpreter is shutting down");
        break;
    }
    return -1;
}

int swa_call_run(swa_call_t *call, const void *owner, PyObject *progress)
{
    if (progress && progress != Py_None && !PyCallable_Check(progress)) {
        PyErr_SetString(PyExc_TypeError, "progress must be None or a callable");
        return -1;
    }
    if (owner && interrupts_call_on(owner)) {
        PyErr_SetString(PyExc_RuntimeError,
                        "a progress callback or signal handler cannot use the model whose call it interrupts");
        return -1;
    }
    if (!swa_worker_submit(&call->job)) {
        PyErr_SetString(PyExc_RuntimeError, "cannot start the worker thread");
        return -1;
    }
    const waiting_t waiting = {owner, innermost};
    innermost = &waiting;
    bool over = wait_for(call, progress);
    if (!over && !PyErr_Occurred())
        PyErr_SetString(PyExc_RuntimeError, "this process was forked during the call: only its parent has the result");
    if (!PyErr_Occurred() && raise_status(call) == 0) {
        unsigned long long total = atomic_load(&call->run.total);
        report(progress, total, total);
    }
    innermost = waiting.outer;
    return PyErr_Occurred() ? -1 : 0;
}
