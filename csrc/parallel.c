/* The parallel loop on OpenMP, or on a team of pthreads that each calling thread keeps. */
#ifdef __linux__
#define _GNU_SOURCE /* sched_getaffinity */
#include <sched.h>
#endif
#include <stdbool.h>
#include <stdlib.h>

#include "parallel.h"

#ifdef _OPENMP

#include <omp.h>

void swa_parallel_for(int n_threads, int64_t n_tasks, swa_task_fn fn, void *context)
{
    if (n_threads > n_tasks)
        n_threads = (int)n_tasks;
    if (n_threads <= 1) {
        for (int64_t task = 0; task < n_tasks; task++)
            fn(context, task, 0);
        return;
    }
#pragma omp parallel for num_threads(n_threads) schedule(monotonic : dynamic, 1)
    for (int64_t task = 0; task < n_tasks; task++)
        fn(context, task, omp_get_thread_num());
}

int swa_default_threads(void) { return omp_get_max_threads(); }

#else

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

/* Helper i is member i + 1 of every loop that wants more than i helpers; the calling thread is member 0. */
typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t begin, end;
    int n_helpers; /* started so far */
    int n_wanted;  /* helpers in the current loop */
    int n_busy;    /* of them, still at work */
    uint64_t loop; /* number of the current loop */
    swa_task_fn fn;
    void *context;
    int64_t n_tasks;
    atomic_llong next_task;
} team_t;

typedef struct {
    team_t *team;
    int index;
    uint64_t loop; /* the last loop before it started */
} helper_t;

/* One per calling thread, for the life of the process: the child of a fork has new threads, hence a new team. */
static _Thread_local team_t *own_team;

static void work(team_t *team, int member)
{
    for (int64_t task; (task = atomic_fetch_add(&team->next_task, 1)) < team->n_tasks;)
        team->fn(team->context, task, member);
}

static void *help(void *argument)
{
    helper_t helper = *(helper_t *)argument;
    team_t *team = helper.team;
    free(argument);
    pthread_mutex_lock(&team->lock);
    for (;;) {
        while (team->loop == helper.loop)
            pthread_cond_wait(&team->begin, &team->lock);
        helper.loop = team->loop;
        if (helper.index >= team->n_wanted)
            continue;
        pthread_mutex_unlock(&team->lock);
        work(team, helper.index + 1);
        pthread_mutex_lock(&team->lock);
        if (--team->n_busy == 0)
            pthread_cond_signal(&team->end);
    }
    return NULL;
}

static bool start_helper(team_t *team)
{
    pthread_t thread;
    helper_t *helper = malloc(sizeof *helper);
    if (!helper)
        return false;
    *helper = (helper_t){team, team->n_helpers, team->loop};
    if (pthread_create(&thread, NULL, help, helper)) {
        free(helper);
        return false;
    }
    pthread_detach(thread);
    team->n_helpers++;
    return true;
}

static team_t *team_of_this_thread(void)
{
    if (!own_team && (own_team = calloc(1, sizeof *own_team))) {
        pthread_mutex_init(&own_team->lock, NULL);
        pthread_cond_init(&own_team->begin, NULL);
        pthread_cond_init(&own_team->end, NULL);
    }
    return own_team;
}

void swa_parallel_for(int n_threads, int64_t n_tasks, swa_task_fn fn, void *context)
{
    if (n_threads > n_tasks)
        n_threads = (int)n_tasks;
    team_t *team = n_threads > 1 ? team_of_this_thread() : NULL;
    if (!team) {
        for (int64_t task = 0; task < n_tasks; task++)
            fn(context, task, 0);
        return;
    }
    while (team->n_helpers < n_threads - 1 && start_helper(team))
        ;
    pthread_mutex_lock(&team->lock);
    team->fn = fn;
    team->context = context;
    team->n_tasks = n_tasks;
    atomic_store(&team->next_task, 0);
    team->n_wanted = team->n_busy = n_threads - 1 < team->n_helpers ? n_threads - 1 : team->n_helpers;
    team->loop++;
    pthread_cond_broadcast(&team->begin);
    pthread_mutex_unlock(&team->lock);

    work(team, 0);
    pthread_mutex_lock(&team->lock);
    while (team->n_busy > 0)
        pthread_cond_wait(&team->end, &team->lock);
    pthread_mutex_unlock(&team->lock);
}

int swa_default_threads(void)
{
    const char *wanted = getenv("OMP_NUM_THREADS");
    long n = wanted ? strtol(wanted, NULL, 10) : 0;
#ifdef __linux__
    cpu_set_t cpus;
    if (n < 1 && sched_getaffinity(0, sizeof cpus, &cpus) == 0)
        n = CPU_COUNT(&cpus);
#endif
    if (n < 1)
        n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > 1024 ? 1024 : (int)n;
}

#endif
