/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "strict.h"

#include <signal.h>

#include "workers.h"

/* The deepest thing a worker calls is preadv; eight megabytes of stack for each would
 * be locked memory where the host process uses mlockall(MCL_FUTURE). */
#define STACK_BYTES (256 * 1024)

static struct mmc_request *next_job(struct mmc_workers *workers)
{
    struct mmc_request *request;

    pthread_mutex_lock(&workers->lock);
    while (!workers->jobs.first && !workers->stopping) {
        workers->idle++;
        pthread_cond_wait(&workers->work, &workers->lock);
        workers->idle--;
    }
    request = mmc_requests_pop(&workers->jobs);
    pthread_mutex_unlock(&workers->lock);
    return request;
}

static void *work(void *argument)
{
    struct mmc_workers *workers = argument;
    struct mmc_request *request;

    while ((request = next_job(workers))) {
        mmc_request_run(request);
        workers->done(workers->owner, request);
    }
    return NULL;
}

/* Signals are for the host's threads. Those that a crash raises stay open, or the
 * kernel would kill the process before a crash handler could speak. */
static void block_signals(sigset_t *before)
{
    sigset_t all;

    sigfillset(&all);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGFPE);
    sigdelset(&all, SIGILL);
    pthread_sigmask(SIG_SETMASK, &all, before);
}

static int start_thread(struct mmc_workers *workers)
{
    pthread_attr_t attributes;
    sigset_t before;
    int rc;

    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    block_signals(&before);
    rc = pthread_create(&workers->threads[workers->running], &attributes, work, workers);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (rc == 0)
        workers->running++;
    return -rc;
}

/* One thread per job that no sleeper will take, up to the limit. */
static int start_threads(struct mmc_workers *workers, uint64_t jobs)
{
    int rc = 0;

    while (rc == 0 && workers->running < workers->limit && jobs > workers->idle) {
        rc = start_thread(workers);
        jobs--;
    }
    return workers->running ? 0 : rc;
}

void mmc_workers_open(struct mmc_workers *workers, uint32_t limit,
                      void (*done)(void *owner, struct mmc_request *request), void *owner)
{
    *workers = (struct mmc_workers){.done = done, .owner = owner};
    workers->limit = limit < MMC_WORKERS_MAX ? limit : MMC_WORKERS_MAX;
    pthread_mutex_init(&workers->lock, NULL);
    pthread_cond_init(&workers->work, NULL);
}

int mmc_workers_give(struct mmc_workers *workers, struct mmc_requests *jobs)
{
    uint64_t wake = jobs->count;
    int rc;

    pthread_mutex_lock(&workers->lock);
    rc = start_threads(workers, workers->jobs.count + jobs->count);
    if (rc == 0)
        mmc_requests_move(&workers->jobs, jobs);
    if (wake > workers->idle)
        wake = workers->idle;
    pthread_mutex_unlock(&workers->lock);
    while (wake--)
        pthread_cond_signal(&workers->work);
    return rc;
}

void mmc_workers_close(struct mmc_workers *workers)
{
    uint32_t i;

    pthread_mutex_lock(&workers->lock);
    workers->stopping = true;
    pthread_mutex_unlock(&workers->lock);
    pthread_cond_broadcast(&workers->work);
    for (i = 0; i < workers->running; i++)
        pthread_join(workers->threads[i], NULL);
    pthread_cond_destroy(&workers->work);
    pthread_mutex_destroy(&workers->lock);
}
