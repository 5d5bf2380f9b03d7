/* SPDX-License-Identifier: MIT
 *
 * What the two back ends of the I/O queue share.
 *
 *     mmc_queue_turn        queue.c    copies the ops, gives them to the back end
 *       uring.c | pool.c               moves them; says what is finished
 *         request.c                    what a result means, for both
 *         workers.c                    threads: the pool, and msync beside the ring
 *
 * Lock order: the ring's `collect`, then the queue's `lock`, then the pool's `ready`
 * or the workers' own. None is held while a thread sleeps, but `collect`: it says who
 * waits in the kernel.
 */
#ifndef MMC_QUEUE_H
#define MMC_QUEUE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "mmc.h"
#include "request.h"

/* Where collected requests go. */
struct mmc_collect {
    struct mmc_done *done;
    uint32_t max;
    uint32_t count;            /* of `done` in use */
    struct mmc_requests owned; /* for whoever owns them */
};

struct mmc_backend {
    int number; /* MMC_BACKEND_... */
    int (*open)(struct mmc_queue *queue);
    int (*fd)(struct mmc_queue *queue);
    /* Takes `fresh` (all of them, or none and returns -errno), then collects: those with an owner
     * into `owned`, which ends a wait as well. */
    int (*turn)(struct mmc_queue *queue, struct mmc_requests *fresh, struct mmc_collect *collect,
                int timeout_ms);
    void (*close)(struct mmc_queue *queue);
};

struct mmc_queue {
    pthread_mutex_t lock;      /* the submission side: guards `spare` and `outstanding` */
    struct mmc_requests spare; /* kept for reuse */
    uint64_t outstanding;      /* taken and not yet collected */
    uint32_t depth;
    uint32_t process; /* mmc_process() of the owner */
    bool has_one_thread;
    const struct mmc_backend *backend;
    void *state; /* the back end's */
};

extern const struct mmc_backend mmc_pool_backend;
#ifdef MMC_HAVE_URING
extern const struct mmc_backend mmc_uring_backend;
#endif

/* Puts a finished request where it belongs: its result into `collect`, itself into `copies` where
 * it is a copy of an op. */
void mmc_queue_sort(struct mmc_request *request, struct mmc_collect *collect,
                    struct mmc_requests *copies);
/* Takes `count` collected requests off the account, and the copies among them back. The caller
 * holds the queue's lock. */
void mmc_queue_retire(struct mmc_queue *queue, uint64_t count, struct mmc_requests *copies);

/* Submits the helper's own requests; the list is empty afterwards. What cannot be submitted is
 * finished with that error. Never waits. */
void mmc_queue_push(struct mmc_queue *queue, struct mmc_requests *batch);

/* The monotonic clock. */
uint64_t mmc_clock_ns(void);

/* When a wait ends; timeout_ms as in mmc_queue_turn. */
struct mmc_deadline {
    bool is_never;
    struct timespec at;
};

struct mmc_deadline mmc_deadline_in(int timeout_ms);
/* Fills in the time left, at least 0, and returns it: NULL for ever, as ppoll has it. */
struct timespec *mmc_deadline_left(const struct mmc_deadline *deadline, struct timespec *left);
/* Sleeps until `fd` polls readable: 1, 0 on time-out, or -EINTR. */
int mmc_wait_readable(int fd, const struct mmc_deadline *deadline);

#endif
