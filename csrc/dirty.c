/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>

#include "bits.h"
#include "dirty.h"

static uint64_t get(const uint64_t *mark)
{
    return __atomic_load_n(mark, __ATOMIC_RELAXED);
}

static void set(uint64_t *mark, uint64_t value)
{
    __atomic_store_n(mark, value, __ATOMIC_RELAXED);
}

int mmc_dirty_open(struct mmc_dirty *dirty, uint64_t units)
{
    void *map;

    *dirty = (struct mmc_dirty){.bytes = (units / 64 + 1) * sizeof(uint64_t)};
    map = mmap(NULL, dirty->bytes, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED)
        return -errno;
    madvise(map, dirty->bytes, MADV_DONTFORK);
    dirty->words = map;
    return 0;
}

void mmc_dirty_close(struct mmc_dirty *dirty)
{
    if (dirty->words)
        munmap(dirty->words, dirty->bytes);
}

void mmc_dirty_mark(struct mmc_dirty *dirty, uint64_t first, uint64_t end)
{
    if (first >= end)
        return;
    mmc_bits_fill(dirty->words, first, end, 1);
    if (get(&dirty->low) >= get(&dirty->high)) {
        set(&dirty->low, first);
        set(&dirty->high, end);
        return;
    }
    if (first < get(&dirty->low))
        set(&dirty->low, first);
    if (end > get(&dirty->high))
        set(&dirty->high, end);
}

void mmc_dirty_clear(struct mmc_dirty *dirty, uint64_t first, uint64_t end)
{
    const uint64_t low = get(&dirty->low);
    const uint64_t high = get(&dirty->high);
    const uint64_t from = first > low ? first : low;
    const uint64_t to = end < high ? end : high;

    if (from >= to)
        return;
    mmc_bits_fill(dirty->words, from, to, 0);
    if (from == low)
        set(&dirty->low, to);
    else if (to == high)
        set(&dirty->high, from);
}

uint64_t mmc_dirty_count(const struct mmc_dirty *dirty, uint64_t first, uint64_t end)
{
    const uint64_t low = get(&dirty->low);
    const uint64_t high = get(&dirty->high);

    return mmc_bits_count(dirty->words, first > low ? first : low, end < high ? end : high);
}

uint64_t mmc_dirty_next(const struct mmc_dirty *dirty, uint64_t first, uint64_t end,
                        uint64_t *start)
{
    const uint64_t low = get(&dirty->low);
    const uint64_t high = get(&dirty->high);

    if (first < low)
        first = low;
    if (end > high)
        end = high;
    if (first >= end)
        return 0;
    *start = mmc_bits_next(dirty->words, first, end, 1);
    return mmc_bits_next(dirty->words, *start, end, 0) - *start;
}
