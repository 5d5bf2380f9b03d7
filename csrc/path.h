/* SPDX-License-Identifier: MIT
 *
 * Requests that need no decision: a table of where bytes are, and transfers that are one
 * write of one file, or a few reads.
 *
 *     load.c  pump.c  mmc_path_transfer     who has requests
 *            path.c                         finds the bytes, or says "miss"
 *            queue.c                        moves them
 *
 * A miss is no error: the caller above has the request done the long way. Everything that
 * changes the table, or needs a range for itself, holds it first (mmc_path_hold): what
 * touches a held range misses, and the holder waits until what was in flight is done.
 *
 * Lock order: a path's lock, then a view's. Neither is held in a call of `finished`.
 */
#ifndef MMC_PATH_H
#define MMC_PATH_H

#include <stdbool.h>
#include <stdint.h>

#include "mmc.h"
#include "request.h"

#define MMC_MISS 0    /* nothing was begun */
#define MMC_STARTED 1 /* requests are in the list; `finished` will be called */
#define MMC_ZEROS 2   /* a read that meets nothing but zeros: the caller makes them */

struct mmc_part;

/* One hit. Part of its owner's own structure, which must live until `finished`. */
struct mmc_transfer {
    struct mmc_request request; /* first: the queue's handle on it, where it is one run of a file */
    struct mmc_part *parts;     /* where it is several */
    uint32_t left;              /* of them, in flight */
    int64_t error;              /* of the first that failed */
    struct mmc_path *path;
    struct mmc_transfer *next; /* of those in flight */
    struct mmc_transfer *previous;
    uint64_t offset; /* of the disk */
    uint64_t length;
    bool is_write;
    bool allocates; /* its clusters become this layer's when the bytes are written */
    /* Called once, by whichever thread collects from the queue, without a lock held, when the
     * transfer is over and what it allocates is published. result: length or -errno. */
    void (*finished)(struct mmc_transfer *transfer, int64_t result);
};

/* Looks the range up and, where it is a hit, puts the request at the end of `batch`, to be given
 * to mmc_queue_push with others. code: MMC_READ or MMC_WRITE. The range is checked here. */
int mmc_path_begin(struct mmc_path *path, struct mmc_transfer *transfer, int code, uint64_t offset,
                   void *address, uint64_t length, struct mmc_requests *batch);

/* Sets space aside for a range of the disk in the top layer's file, whose content stays; of use
 * ahead of writes that allocate. A transfer like a write in all else. */
int mmc_path_reserve(struct mmc_path *path, struct mmc_transfer *transfer, uint64_t offset,
                     uint64_t length, struct mmc_requests *batch);

/* Whether a holder waits for transfers in flight: it has to be told of the next one that ends. */
bool mmc_path_is_awaited(struct mmc_path *path);
/* The queue that this path's batches go to. */
struct mmc_queue *mmc_path_queue(struct mmc_path *path);

#endif
