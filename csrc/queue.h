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

struct mmc_backend {
    int number; /* MMC_BACKEND_... */
    int (*open)(struct mmc_queue *queue);
    int (*fd)(struct mmc_queue *queue);
    /* Takes `fresh` (all of them, or none and returns -errno), then collects. */
    int (*turn)(struct mmc_queue *queue, struct mmc_requests *fresh, struct mmc_done *done,
                uint32_t max, int timeout_ms);
    void (*close)(struct mmc_queue *queue);
};

struct mmc_queue {
    pthread_mutex_t lock;      /* the submission side: guards `spare` and `outstanding` */
    struct mmc_requests spare; /* kept for reuse */
    uint64_t outstanding;      /* taken and not yet collected */
    uint32_t depth;
    uint32_t process; /* mmc_process() of the owner */
    const struct mmc_backend *backend;
    void *state; /* the back end's */
};

extern const struct mmc_backend mmc_pool_backend;
#ifdef MMC_HAVE_URING
extern const struct mmc_backend mmc_uring_backend;
#endif

/* Takes collected requests back. The caller holds the queue's lock. */
void mmc_queue_retire(struct mmc_queue *queue, struct mmc_requests *finished);

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
