/* SPDX-License-Identifier: MIT
 *
 * Threads that run blocking requests. They start with demand and sleep without it.
 */
#ifndef MMC_WORKERS_H
#define MMC_WORKERS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "request.h"

#define MMC_WORKERS_MAX 16

struct mmc_workers {
    pthread_mutex_t lock; /* guards all below; the innermost lock of a queue */
    pthread_cond_t work;
    struct mmc_requests jobs;
    uint32_t running; /* threads started */
    uint32_t idle;    /* of these, asleep */
    uint32_t limit;
    bool stopping;
    void (*done)(void *owner, struct mmc_request *request); /* called without the lock */
    void *owner;
    pthread_t threads[MMC_WORKERS_MAX];
};

void mmc_workers_open(struct mmc_workers *workers, uint32_t limit,
                      void (*done)(void *owner, struct mmc_request *request), void *owner);
/* Takes all the jobs. Returns -errno, and took none, where not even one thread starts. */
int mmc_workers_give(struct mmc_workers *workers, struct mmc_requests *jobs);
/* Ends the threads, once the jobs given are run. */
void mmc_workers_close(struct mmc_workers *workers);

#endif
