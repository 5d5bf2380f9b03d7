/* SPDX-License-Identifier: MIT
 *
 * One request inside the queue: the copy of an op, and how far it has come. What a
 * result means (short, interrupted, end of file) is decided here once, for both
 * back ends.
 */
#ifndef MMC_REQUEST_H
#define MMC_REQUEST_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "mmc.h"

/* More requests than this have their iovecs in memory of their own. */
#define MMC_FEW_IOVECS 4

struct mmc_request {
    struct mmc_request *next;
    /* NULL for a copied op, whose result is reported by its token. Else the request is part of
     * something of the helper's own, is never copied or freed here, and this is called when it is
     * finished, by the thread that collects it and without a lock held. */
    void (*owner)(struct mmc_request *request);
    uint64_t token;
    uint64_t offset; /* of the next byte to move */
    uint64_t left;   /* bytes still to move; FALLOCATE and MSYNC: the length */
    uint64_t piece;  /* bytes asked for by the last issue */
    int64_t moved;
    int64_t result;
    struct iovec *iov; /* `few` or allocated; never has an empty entry */
    uint32_t iov_next;
    uint32_t iov_count;
    uint32_t retries;
    bool is_blocking; /* for a worker, also where there is a ring */
    int32_t fd;
    int32_t code;
    int32_t mode;
    struct iovec few[MMC_FEW_IOVECS];
};

/* Copies and checks the op. Returns 0, -EINVAL or -ENOMEM. */
int mmc_request_set(struct mmc_request *request, const struct mmc_op *op);
void mmc_request_clear(struct mmc_request *request);

/* The iovecs of the next piece, as many as one call takes; notes its size. */
struct iovec *mmc_request_piece(struct mmc_request *request, uint32_t *count);

/* Takes the result of a call (bytes or -errno). True when the request is finished and
 * `result` is set, false when it has to be issued again. */
bool mmc_request_settle(struct mmc_request *request, int64_t result);

/* Runs the request to its end with blocking calls. */
void mmc_request_run(struct mmc_request *request);

/* ---- a list, first in first out ----------------------------------------- */

struct mmc_requests {
    struct mmc_request *first;
    struct mmc_request *last;
    uint64_t count;
};

static inline void mmc_requests_push(struct mmc_requests *list, struct mmc_request *request)
{
    request->next = NULL;
    if (list->last)
        list->last->next = request;
    else
        list->first = request;
    list->last = request;
    list->count++;
}

static inline struct mmc_request *mmc_requests_pop(struct mmc_requests *list)
{
    struct mmc_request *request = list->first;

    if (!request)
        return NULL;
    list->first = request->next;
    if (!list->first)
        list->last = NULL;
    list->count--;
    return request;
}

/* Moves all of `from` to the end of `list`. */
static inline void mmc_requests_move(struct mmc_requests *list, struct mmc_requests *from)
{
    if (!from->first)
        return;
    if (list->last)
        list->last->next = from->first;
    else
        list->first = from->first;
    list->last = from->last;
    list->count += from->count;
    *from = (struct mmc_requests){0};
}

#endif
