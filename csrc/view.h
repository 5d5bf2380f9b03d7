/* SPDX-License-Identifier: MIT */
#ifndef MMC_VIEW_H
#define MMC_VIEW_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "dirty.h"
#include "mmc.h"

struct mmc_view {
    pthread_mutex_t changes; /* one change at a time: paths change bits from other threads */
    char *bytes;  /* the live state: private mapping of the file, or memory */
    char *shared; /* read-only shared mapping of the file, NULL for memory */
    uint64_t size;
    uint64_t reserve;    /* bytes mapped, whole pages */
    unsigned unit_shift; /* a dirty unit is 1 << unit_shift bytes */
    uint32_t process;    /* mmc_process() of the owner */
    struct mmc_dirty dirty;
};

uint64_t mmc_page_size(void);

/* 0 when [offset, offset+length) lies in the view, else -ERANGE; -EBADF in a forked
 * child, where the mapping does not exist. */
int mmc_view_allow(struct mmc_view *view, uint64_t offset, uint64_t length);

/* Runs an access: a mapping's under the guard, memory's as it is. */
int64_t mmc_view_access(struct mmc_view *view, int64_t (*body)(void *context), void *context);

/* mmc_view_mark, with `changes` held. */
void mmc_view_mark_held(struct mmc_view *view, uint64_t offset, uint64_t length);

/* The units that [offset, offset+length) touches. */
uint64_t mmc_view_first_unit(const struct mmc_view *view, uint64_t offset);
uint64_t mmc_view_end_unit(const struct mmc_view *view, uint64_t offset, uint64_t length);

#endif
