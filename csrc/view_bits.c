/* SPDX-License-Identifier: MIT
 *
 * Bits of a view, 64 at a time. Words are aligned, so one never reaches into a page
 * that the range does not touch.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>

#include "bits.h"
#include "view.h"

struct bits_access {
    uint64_t *words;
    uint64_t base; /* in bits; the caller's bit 0 */
    uint64_t first;
    uint64_t end;
    struct mmc_run *runs;
    uint32_t max;
    int value;
};

/* Bytes that hold bits [first, first+count), relative to the base. */
static uint64_t first_byte(uint64_t first)
{
    return first / 8;
}

static uint64_t end_byte(uint64_t first, uint64_t count)
{
    return (first + count + 7) / 8;
}

/* Checks the range and fills in `access`. */
static int locate(struct mmc_view *view, uint64_t base, uint64_t first, uint64_t count,
                  struct bits_access *access)
{
    const uint64_t size = mmc_view_size(view);
    int rc = mmc_view_allow(view, base, 0);

    if (rc < 0)
        return rc;
    /* Sizes are below 2^62 (view_init), so these products do not wrap. */
    if (first > (size - base) * 8 || count > (size - base) * 8 - first)
        return -ERANGE;
    access->words = (uint64_t *)(void *)view->bytes;
    access->base = base * 8;
    access->first = base * 8 + first;
    access->end = access->first + count;
    return 0;
}

static int64_t runs_body(void *context)
{
    const struct bits_access *access = context;
    uint64_t at = access->first;
    int value = at < access->end && mmc_bits_next(access->words, at, at + 1, 1) == at;
    uint32_t n;

    for (n = 0; n < access->max && at < access->end; n++) {
        /* Not from `at` itself, which was looked at: another thread may have changed it since, and
         * a run is never empty. */
        const uint64_t end = mmc_bits_next(access->words, at + 1, access->end, !value);

        access->runs[n] = (struct mmc_run){at - access->base, end - at, (uint64_t)value};
        at = end;
        value = !value;
    }
    return n;
}

int mmc_view_bit_runs(struct mmc_view *view, uint64_t base, uint64_t first, uint64_t count,
                      struct mmc_run *runs, uint32_t max)
{
    struct bits_access access = {.runs = runs, .max = max < INT32_MAX ? max : INT32_MAX};
    int rc = locate(view, base, first, count, &access);

    return rc < 0 ? rc : (int)mmc_view_access(view, runs_body, &access);
}

static int64_t write_body(void *context)
{
    const struct bits_access *access = context;

    mmc_bits_fill(access->words, access->first, access->end, access->value);
    return 0;
}

int mmc_view_bits_write(struct mmc_view *view, uint64_t base, uint64_t first, uint64_t count,
                        int value)
{
    struct bits_access access = {.value = value};
    int rc = locate(view, base, first, count, &access);

    if (rc < 0)
        return rc;
    pthread_mutex_lock(&view->changes);
    rc = (int)mmc_view_access(view, write_body, &access);
    if (rc == 0 && count)
        mmc_view_mark_held(view, base + first_byte(first),
                           end_byte(first, count) - first_byte(first));
    pthread_mutex_unlock(&view->changes);
    return rc;
}

static int64_t count_body(void *context)
{
    const struct bits_access *access = context;

    return (int64_t)mmc_bits_count(access->words, access->first, access->end);
}

int64_t mmc_view_bits_count(struct mmc_view *view, uint64_t base, uint64_t first, uint64_t count)
{
    struct bits_access access = {0};
    int rc = locate(view, base, first, count, &access);

    return rc < 0 ? rc : mmc_view_access(view, count_body, &access);
}
