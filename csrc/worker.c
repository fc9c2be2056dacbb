/* Why a thread of its own: signals stay with Python's threads, and libgomp, whose thread pool does not survive a fork
 * on the thread that forks, keeps its pool here; after a fork the child starts a new worker, with a new pool. */
#ifndef __APPLE__
#define _POSIX_C_SOURCE 200809L /* pthread_condattr_setclock */
#endif
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include "worker.h"

enum { STACK_BYTES = 8 << 20 }; /* member 0 of every parallel loop runs here */

static struct {
    pthread_mutex_t lock;
    pthread_cond_t submitted, finished;
    pthread_t thread;
    bool initialised, running, stopping;
    swa_job_t *first, *last, *current;
    uint64_t process; /* counts the forks that led here */
} worker = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void *run_jobs(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&worker.lock);
    for (;;) {
        while (!worker.first && !worker.stopping)
            pthread_cond_wait(&worker.submitted, &worker.lock);
        if (!worker.first)
            break;
        swa_job_t *job = worker.current = worker.first;
        worker.first = job->next;
        pthread_mutex_unlock(&worker.lock);
        job->fn(job);
        pthread_mutex_lock(&worker.lock);
        worker.current = NULL;
        job->finished = true; /* from here on the job belongs to its owner again */
        pthread_cond_broadcast(&worker.finished);
    }
    pthread_mutex_unlock(&worker.lock);
    return NULL;
}

static void before_fork(void) { pthread_mutex_lock(&worker.lock); }

static void after_fork_in_parent(void) { pthread_mutex_unlock(&worker.lock); }

static void initialise_conditions(void)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
#ifndef __APPLE__
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
#endif
    pthread_cond_init(&worker.submitted, NULL);
    pthread_cond_init(&worker.finished, &attributes);
    pthread_condattr_destroy(&attributes);
}

static void after_fork_in_child(void)
{
    pthread_mutex_init(&worker.lock, NULL);
    initialise_conditions();
    worker.running = worker.stopping = false;
    worker.first = worker.last = worker.current = NULL;
    worker.process++;
}

/* All but those that a thread's own fault raises: blocked, they would end the process without asking their handlers. */
static sigset_t blocked_signals(void)
{
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP};
    sigset_t signals;
    sigfillset(&signals);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&signals, faults[i]);
    return signals;
}

/* Called with the lock held. */
static bool start(void)
{
    if (!worker.initialised) {
        if (pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child))
            return false;
        initialise_conditions();
        worker.initialised = true;
    }
    if (worker.running)
        return !worker.stopping;
    sigset_t blocked = blocked_signals(), previous;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_sigmask(SIG_SETMASK, &blocked, &previous);
    worker.running = pthread_create(&worker.thread, &attributes, run_jobs, NULL) == 0;
    pthread_sigmask(SIG_SETMASK, &previous, NULL);
    pthread_attr_destroy(&attributes);
    return worker.running;
}

bool swa_worker_submit(swa_job_t *job)
{
    pthread_mutex_lock(&worker.lock);
    bool started = start();
    if (started) {
        job->next = NULL;
        job->finished = false;
        job->process = worker.process;
        if (worker.first)
            worker.last->next = job;
        else
            worker.first = job;
        worker.last = job;
        pthread_cond_signal(&worker.submitted);
    }
    pthread_mutex_unlock(&worker.lock);
    return started;
}

/* Called with the lock held. */
static swa_job_state_t state_of(const swa_job_t *job)
{
    return job->finished ? SWA_JOB_FINISHED : job->process == worker.process ? SWA_JOB_PENDING : SWA_JOB_LOST;
}

/* pthread_cond_timedwait on a clock that never jumps. */
static int wait_until(const struct timespec *deadline)
{
#ifdef __APPLE__
    struct timespec now, left;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int64_t nanoseconds = (deadline->tv_sec - now.tv_sec) * 1000000000LL + deadline->tv_nsec - now.tv_nsec;
    nanoseconds = nanoseconds < 0 ? 0 : nanoseconds;
    left = (struct timespec){nanoseconds / 1000000000, nanoseconds % 1000000000};
    return pthread_cond_timedwait_relative_np(&worker.finished, &worker.lock, &left);
#else
    return pthread_cond_timedwait(&worker.finished, &worker.lock, deadline);
#endif
}

swa_job_state_t swa_worker_wait(swa_job_t *job, int milliseconds)
{
    struct timespec deadline;
    clock_gettime(CLOCK_MONOTONIC, &deadline);
    int64_t nanoseconds = deadline.tv_nsec + milliseconds * INT64_C(1000000);
    deadline.tv_sec += nanoseconds / 1000000000;
    deadline.tv_nsec = nanoseconds % 1000000000;

    pthread_mutex_lock(&worker.lock);
    while (state_of(job) == SWA_JOB_PENDING && wait_until(&deadline) == 0)
        ;
    swa_job_state_t state = state_of(job);
    pthread_mutex_unlock(&worker.lock);
    return state;
}

bool swa_worker_withdraw(swa_job_t *job)
{
    pthread_mutex_lock(&worker.lock);
    swa_job_t **link = &worker.first, *before = NULL;
    while (*link && *link != job) {
        before = *link;
        link = &before->next;
    }
    bool found = *link != NULL;
    if (found) {
        *link = job->next;
        if (worker.last == job)
            worker.last = before;
    }
    pthread_mutex_unlock(&worker.lock);
    return found;
}

void swa_worker_stop(void)
{
    pthread_mutex_lock(&worker.lock);
    bool stop = worker.running && !worker.stopping;
    if (stop) {
        worker.stopping = true;
        if (worker.current)
            atomic_store(worker.current->cancelled, 1);
        for (swa_job_t *job = worker.first; job; job = job->next)
            atomic_store(job->cancelled, 1);
        pthread_cond_signal(&worker.submitted);
    }
    pthread_mutex_unlock(&worker.lock);
    if (!stop)
        return;
    pthread_join(worker.thread, NULL);
    pthread_mutex_lock(&worker.lock);
    worker.running = worker.stopping = false;
    pthread_mutex_unlock(&worker.lock);
}
