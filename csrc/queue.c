/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>

#include "process.h"
#include "queue.h"

#define DEPTH_MAX 4096

/* Requests kept for reuse; a burst beyond it goes back to malloc. */
#define SPARE_MAX 1024

/* ---- time --------------------------------------------------------------- */

#define NS_PER_S 1000000000L
#define NS_PER_MS 1000000L

uint64_t mmc_clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

struct mmc_deadline mmc_deadline_in(int timeout_ms)
{
    struct mmc_deadline deadline = {.is_never = timeout_ms < 0};

    /* Neither "never" nor "now" needs the clock. */
    if (timeout_ms <= 0)
        return deadline;
    clock_gettime(CLOCK_MONOTONIC, &deadline.at);
    deadline.at.tv_sec += timeout_ms / 1000;
    deadline.at.tv_nsec += (timeout_ms % 1000) * NS_PER_MS;
    if (deadline.at.tv_nsec >= NS_PER_S) {
        deadline.at.tv_sec++;
        deadline.at.tv_nsec -= NS_PER_S;
    }
    return deadline;
}

struct timespec *mmc_deadline_left(const struct mmc_deadline *deadline, struct timespec *left)
{
    struct timespec now;

    if (deadline->is_never)
        return NULL;
    clock_gettime(CLOCK_MONOTONIC, &now);
    left->tv_sec = deadline->at.tv_sec - now.tv_sec;
    left->tv_nsec = deadline->at.tv_nsec - now.tv_nsec;
    if (left->tv_nsec < 0) {
        left->tv_sec--;
        left->tv_nsec += NS_PER_S;
    }
    if (left->tv_sec < 0)
        *left = (struct timespec){0};
    return left;
}

int mmc_wait_readable(int fd, const struct mmc_deadline *deadline)
{
    struct pollfd poll = {.fd = fd, .events = POLLIN};
    struct timespec left;
    int rc = ppoll(&poll, 1, mmc_deadline_left(deadline, &left), NULL);

    if (rc >= 0)
        return rc;
    return errno == EINTR ? -EINTR : 0; /* ENOMEM: the caller's next turn waits again */
}

/* ---- requests ----------------------------------------------------------- */

static void discard(struct mmc_requests *list)
{
    struct mmc_request *request;

    while ((request = mmc_requests_pop(list))) {
        mmc_request_clear(request);
        free(request);
    }
}

void mmc_queue_sort(struct mmc_request *request, struct mmc_collect *collect,
                    struct mmc_requests *copies)
{
    if (request->owner) {
        mmc_requests_push(&collect->owned, request);
        return;
    }
    collect->done[collect->count++] = (struct mmc_done){request->token, request->result};
    mmc_requests_push(copies, request);
}

void mmc_queue_retire(struct mmc_queue *queue, uint64_t count, struct mmc_requests *copies)
{
    struct mmc_request *request;

    queue->outstanding -= count;
    while ((request = mmc_requests_pop(copies))) {
        mmc_request_clear(request);
        if (queue->spare.count < SPARE_MAX)
            mmc_requests_push(&queue->spare, request);
        else
            free(request);
    }
}

static void take_spare(struct mmc_queue *queue, struct mmc_requests *into, uint32_t count)
{
    pthread_mutex_lock(&queue->lock);
    while (count-- && queue->spare.first)
        mmc_requests_push(into, mmc_requests_pop(&queue->spare));
    pthread_mutex_unlock(&queue->lock);
}

/* Copies one op into a spare request or a new one, at the end of `fresh`. */
static int copy_op(struct mmc_requests *spare, struct mmc_requests *fresh, const struct mmc_op *op)
{
    struct mmc_request *request = mmc_requests_pop(spare);
    int rc;

    if (!request)
        request = malloc(sizeof(*request));
    if (!request)
        return -ENOMEM;
    rc = mmc_request_set(request, op);
    if (rc < 0) {
        free(request);
        return rc;
    }
    mmc_requests_push(fresh, request);
    return 0;
}

/* Copies all the ops, or none and returns -errno. */
static int copy_ops(struct mmc_queue *queue, const struct mmc_op *ops, uint32_t count,
                    struct mmc_requests *fresh)
{
    struct mmc_requests spare = {0};
    uint32_t i;
    int rc = 0;

    if (count)
        take_spare(queue, &spare, count);
    for (i = 0; i < count && rc == 0; i++)
        rc = copy_op(&spare, fresh, &ops[i]);
    if (rc < 0)
        discard(fresh);
    discard(&spare);
    return rc;
}

/* ---- the interface ------------------------------------------------------ */

static int open_backend(struct mmc_queue *queue, const struct mmc_backend *backend)
{
    queue->backend = backend;
    return backend->open(queue);
}

static int choose_backend(struct mmc_queue *queue, int backend)
{
    int rc = -ENOSYS;

    if (backend < MMC_BACKEND_AUTO || backend > MMC_BACKEND_POOL)
        return -EINVAL;
#ifdef MMC_HAVE_URING
    if (backend != MMC_BACKEND_POOL)
        rc = open_backend(queue, &mmc_uring_backend);
#endif
    if (rc == 0 || backend == MMC_BACKEND_URING)
        return rc;
    return open_backend(queue, &mmc_pool_backend);
}

static uint32_t clamp_depth(uint32_t depth)
{
    if (depth == 0)
        return 1;
    return depth < DEPTH_MAX ? depth : DEPTH_MAX;
}

struct mmc_queue *mmc_queue_open(int backend, uint32_t depth, int flags, int *error)
{
    const bool is_sound = (flags & ~MMC_QUEUE_ONE_THREAD) == 0;
    struct mmc_queue *queue = is_sound ? calloc(1, sizeof(*queue)) : NULL;

    if (!queue) {
        *error = is_sound ? -ENOMEM : -EINVAL;
        return NULL;
    }
    pthread_mutex_init(&queue->lock, NULL);
    queue->depth = clamp_depth(depth);
    queue->has_one_thread = flags & MMC_QUEUE_ONE_THREAD;
    queue->process = mmc_process();
    *error = choose_backend(queue, backend);
    if (*error == 0)
        return queue;
    pthread_mutex_destroy(&queue->lock);
    free(queue);
    return NULL;
}

int mmc_queue_backend(struct mmc_queue *queue)
{
    return queue->backend->number;
}

int mmc_queue_fd(struct mmc_queue *queue)
{
    return queue->backend->fd(queue);
}

static void tell_owners(struct mmc_requests *owned)
{
    struct mmc_request *request;

    while ((request = mmc_requests_pop(owned)))
        request->owner(request);
}

int mmc_queue_turn(struct mmc_queue *queue, const struct mmc_op *ops, uint32_t count,
                   struct mmc_done *done, uint32_t max, int timeout_ms)
{
    struct mmc_collect collect = {.done = done, .max = max};
    struct mmc_requests fresh = {0};
    int rc;

    if (queue->process != mmc_process())
        return -EBADF;
    rc = copy_ops(queue, ops, count, &fresh);
    if (rc < 0)
        return rc;
    rc = queue->backend->turn(queue, &fresh, &collect, timeout_ms);
    discard(&fresh);
    tell_owners(&collect.owned);
    return rc;
}

int mmc_queue_alone(struct mmc_queue *queue, const struct mmc_op *op, struct mmc_done *done)
{
    struct mmc_request request;
    int rc;

    if (queue->process != mmc_process())
        return -EBADF;
    if (mmc_queue_busy(queue))
        return 0;
    rc = mmc_request_set(&request, op);
    if (rc < 0)
        return rc;
    mmc_request_run(&request);
    mmc_request_clear(&request);
    *done = (struct mmc_done){op->token, request.result};
    return 1;
}

void mmc_queue_push(struct mmc_queue *queue, struct mmc_requests *batch)
{
    struct mmc_collect nothing = {0};
    struct mmc_request *request;
    int rc = -EBADF;

    if (queue->process == mmc_process())
        rc = queue->backend->turn(queue, batch, &nothing, 0);
    while ((request = mmc_requests_pop(batch))) {
        request->result = rc;
        request->owner(request);
    }
}

int mmc_queue_busy(struct mmc_queue *queue)
{
    uint64_t outstanding;

    pthread_mutex_lock(&queue->lock);
    outstanding = queue->outstanding;
    pthread_mutex_unlock(&queue->lock);
    return outstanding != 0;
}

void mmc_queue_close(struct mmc_queue *queue)
{
    struct mmc_done dropped[64];
    int rc = 0;

    if (!queue)
        return;
    /* In a forked child nothing of this may be touched: locks may be held by threads
     * that are not here. The descriptor closes with the child. */
    if (queue->process != mmc_process())
        return;
    while (mmc_queue_busy(queue) && (rc >= 0 || rc == -EINTR))
        rc = mmc_queue_turn(queue, NULL, 0, dropped, 64, -1);
    /* Better a leak than memory freed that the kernel still writes to. */
    if (mmc_queue_busy(queue))
        return;
    queue->backend->close(queue);
    discard(&queue->spare);
    pthread_mutex_destroy(&queue->lock);
    free(queue);
}
