/* SPDX-License-Identifier: MIT
 *
 * A view's dirty units: marked, counted, taken out, and the clean pages between them
 * given back.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

#include "view.h"

/* Cuts a range to the view, so that no sum over it can wrap. */
static uint64_t clip(struct mmc_view *view, uint64_t offset, uint64_t length)
{
    const uint64_t size = mmc_view_size(view);

    if (mmc_view_allow(view, 0, 0) < 0 || offset >= size)
        return 0;
    return length < size - offset ? length : size - offset;
}

void mmc_view_mark_held(struct mmc_view *view, uint64_t offset, uint64_t length)
{
    length = clip(view, offset, length);
    atomic_thread_fence(memory_order_release); /* the store before its mark */
    if (length)
        mmc_dirty_mark(&view->dirty, mmc_view_first_unit(view, offset),
                       mmc_view_end_unit(view, offset, length));
}

void mmc_view_mark(struct mmc_view *view, uint64_t offset, uint64_t length)
{
    if (mmc_view_allow(view, 0, 0) < 0)
        return;
    pthread_mutex_lock(&view->changes);
    mmc_view_mark_held(view, offset, length);
    pthread_mutex_unlock(&view->changes);
}

uint64_t mmc_view_dirty(struct mmc_view *view, uint64_t offset, uint64_t length)
{
    uint64_t count;

    length = clip(view, offset, length);
    if (length == 0)
        return 0;
    pthread_mutex_lock(&view->changes);
    count = mmc_dirty_count(&view->dirty, mmc_view_first_unit(view, offset),
                            mmc_view_end_unit(view, offset, length));
    pthread_mutex_unlock(&view->changes);
    return count;
}

/* ---- snapshot ----------------------------------------------------------- */

struct snapshot {
    struct mmc_view *view;
    uint64_t at; /* next unit to look at */
    uint64_t end;
    struct mmc_run *runs;
    uint32_t max;
    uint32_t count;
    char *copy;
    uint64_t room;
    uint64_t used;
    uint64_t size; /* of the view */
};

static uint64_t unit_offset(const struct mmc_view *view, uint64_t unit)
{
    return unit << view->unit_shift;
}

/* How many of the units [start, start+count) the rest of the copy can hold. */
static uint64_t units_that_fit(const struct snapshot *shot, uint64_t start, uint64_t count)
{
    const uint64_t offset = unit_offset(shot->view, start);
    const uint64_t room = shot->room - shot->used;

    if (room >= shot->size - offset)
        return count;
    return count < room >> shot->view->unit_shift ? count : room >> shot->view->unit_shift;
}

static void take_run(struct snapshot *shot, uint64_t start, uint64_t count)
{
    const uint64_t offset = unit_offset(shot->view, start);
    uint64_t length = count << shot->view->unit_shift;

    if (length > shot->size - offset)
        length = shot->size - offset;
    shot->runs[shot->count] = (struct mmc_run){offset, length, shot->used};
    shot->count++;
    shot->at = start + count;
    mmc_dirty_clear(&shot->view->dirty, start, start + count);
    /* Clears the mark, THEN copies, and a fault in the copy must find all of it noted. */
    atomic_thread_fence(memory_order_seq_cst);
    memcpy(shot->copy + shot->used, shot->view->bytes + offset, length);
    shot->used += length;
}

static int64_t snapshot_body(void *context)
{
    struct snapshot *shot = context;
    uint64_t start;

    while (shot->count < shot->max) {
        uint64_t count = mmc_dirty_next(&shot->view->dirty, shot->at, shot->end, &start);

        if (count)
            count = units_that_fit(shot, start, count);
        if (count == 0)
            break;
        take_run(shot, start, count);
    }
    return shot->count;
}

static void mark_again(const struct snapshot *shot)
{
    uint32_t i;

    for (i = 0; i < shot->count; i++)
        mmc_view_mark_held(shot->view, shot->runs[i].start, shot->runs[i].count);
}

int mmc_view_snapshot(struct mmc_view *view, uint64_t offset, uint64_t length, struct mmc_run *runs,
                      uint32_t max, void *copy, uint64_t copy_size)
{
    struct snapshot shot = {
        .view = view, .runs = runs, .copy = copy, .room = copy_size, .size = mmc_view_size(view)};
    int rc = mmc_view_allow(view, 0, 0);

    if (rc < 0)
        return rc;
    length = clip(view, offset, length);
    shot.max = max < INT32_MAX ? max : INT32_MAX;
    shot.at = mmc_view_first_unit(view, offset);
    shot.end = mmc_view_end_unit(view, offset, length);
    pthread_mutex_lock(&view->changes);
    rc = (int)mmc_view_access(view, snapshot_body, &shot);
    if (rc < 0)
        mark_again(&shot);
    pthread_mutex_unlock(&view->changes);
    return rc;
}

/* ---- release ------------------------------------------------------------ */

static int release_pages(struct mmc_view *view, uint64_t from, uint64_t to)
{
    if (from >= to)
        return 0;
    return madvise(view->bytes + from, to - from, MADV_DONTNEED) < 0 ? -errno : 0;
}

static int release_clean(struct mmc_view *view)
{
    const uint64_t page = mmc_page_size();
    const uint64_t units = mmc_view_end_unit(view, 0, mmc_view_size(view));
    uint64_t at = 0; /* the next page to give back */
    uint64_t unit = 0;
    uint64_t start;
    uint64_t count;
    int rc = 0;

    while (rc == 0 && (count = mmc_dirty_next(&view->dirty, unit, units, &start))) {
        rc = release_pages(view, at, unit_offset(view, start) / page * page);
        unit = start + count;
        at = (unit_offset(view, unit) + page - 1) / page * page;
    }
    if (rc == 0)
        rc = release_pages(view, at, view->reserve);
    return rc;
}

int mmc_view_release(struct mmc_view *view)
{
    int rc = mmc_view_allow(view, 0, 0);

    if (rc < 0 || !view->shared)
        return rc;
    pthread_mutex_lock(&view->changes);
    rc = release_clean(view);
    pthread_mutex_unlock(&view->changes);
    return rc;
}
