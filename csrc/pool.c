/* SPDX-License-Identifier: MIT
 *
 * The queue where the kernel grants no io_uring: threads and an eventfd.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "queue.h"
#include "workers.h"

struct pool {
    struct mmc_workers workers;
    pthread_mutex_t ready; /* guards `finished` and the eventfd's state */
    struct mmc_requests finished;
    int eventfd; /* readable exactly while `finished` holds something */
};

/* Called by a worker. */
static void pool_done(void *owner, struct mmc_request *request)
{
    struct pool *pool = owner;

    pthread_mutex_lock(&pool->ready);
    if (!pool->finished.first)
        eventfd_write(pool->eventfd, 1);
    mmc_requests_push(&pool->finished, request);
    pthread_mutex_unlock(&pool->ready);
}

static int pool_open(struct mmc_queue *queue)
{
    struct pool *pool = calloc(1, sizeof(*pool));

    if (!pool)
        return -ENOMEM;
    pool->eventfd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (pool->eventfd < 0) {
        const int rc = -errno;

        free(pool);
        return rc;
    }
    pthread_mutex_init(&pool->ready, NULL);
    mmc_workers_open(&pool->workers, queue->depth, pool_done, pool);
    queue->state = pool;
    return 0;
}

static int pool_fd(struct mmc_queue *queue)
{
    return ((struct pool *)queue->state)->eventfd;
}

static int pool_submit(struct mmc_queue *queue, struct mmc_requests *fresh)
{
    struct pool *pool = queue->state;
    const uint64_t count = fresh->count;
    int rc;

    if (count == 0)
        return 0;
    /* Under the lock: a fast worker's request must not be retired uncounted. */
    pthread_mutex_lock(&queue->lock);
    rc = mmc_workers_give(&pool->workers, fresh);
    if (rc == 0)
        queue->outstanding += count;
    pthread_mutex_unlock(&queue->lock);
    return rc;
}

static uint32_t pool_reap(struct pool *pool, struct mmc_collect *into, struct mmc_requests *copies)
{
    eventfd_t drained;
    uint32_t n;

    pthread_mutex_lock(&pool->ready);
    for (n = 0; into->count < into->max && pool->finished.first; n++)
        mmc_queue_sort(mmc_requests_pop(&pool->finished), into, copies);
    if (n && !pool->finished.first)
        eventfd_read(pool->eventfd, &drained);
    pthread_mutex_unlock(&pool->ready);
    return n;
}

static int pool_collect(struct mmc_queue *queue, struct mmc_collect *into, int timeout_ms)
{
    const struct mmc_deadline deadline = mmc_deadline_in(timeout_ms);
    struct pool *pool = queue->state;
    struct mmc_requests copies = {0};
    uint32_t n = pool_reap(pool, into, &copies);

    while (n == 0 && timeout_ms != 0) {
        int rc = mmc_wait_readable(pool->eventfd, &deadline);

        if (rc <= 0)
            return rc;
        n = pool_reap(pool, into, &copies);
    }
    pthread_mutex_lock(&queue->lock);
    mmc_queue_retire(queue, n, &copies);
    pthread_mutex_unlock(&queue->lock);
    return (int)into->count;
}

static int pool_turn(struct mmc_queue *queue, struct mmc_requests *fresh, struct mmc_collect *into,
                     int timeout_ms)
{
    int rc = pool_submit(queue, fresh);

    if (rc < 0 || into->max == 0)
        return rc;
    return pool_collect(queue, into, timeout_ms);
}

static void pool_close(struct mmc_queue *queue)
{
    struct pool *pool = queue->state;

    mmc_workers_close(&pool->workers);
    close(pool->eventfd);
    pthread_mutex_destroy(&pool->ready);
    free(pool);
}

const struct mmc_backend mmc_pool_backend = {
    .number = MMC_BACKEND_POOL,
    .open = pool_open,
    .fd = pool_fd,
    .turn = pool_turn,
    .close = pool_close,
};
