/* SPDX-License-Identifier: MIT
 *
 * Regions of whole huge pages. Most are chunks, of which a transfer gets the first run of leaves
 * that is long enough: nothing is wasted but the rest of its last leaf, whatever its length. What
 * is too long for a chunk has a region of its own.
 *
 * A huge page costs its 2 MiB from the first touch on. Of those in which nothing is taken, kept
 * regions included, MMC_PAGES_KEPT_MAX bytes stay; the others are given back to the kernel.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "bits.h"
#include "pages.h"

#define HUGE (UINT64_C(2) << 20)
#define CHUNK (UINT64_C(16) << 20)
#define CHUNK_SERVES (UINT64_C(8) << 20)
#define LEAF UINT64_C(4096)
#define LEAVES (CHUNK / LEAF)
#define PAGES (CHUNK / HUGE)
#define PAGE_LEAVES (HUGE / LEAF)
#define ROUNDED(length) (((length) + LEAF - 1) & ~(LEAF - 1))

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(address, length) ASAN_POISON_MEMORY_REGION(address, length)
#define UNPOISON(address, length) ASAN_UNPOISON_MEMORY_REGION(address, length)
#else
#define POISON(address, length) ((void)(address), (void)(length))
#define UNPOISON(address, length) ((void)(address), (void)(length))
#endif

struct chunk {
    uint64_t busy[LEAVES / 64]; /* leaves that are taken */
    uint64_t last[LEAVES / 64]; /* those with which a run of them ends */
    uint64_t free;              /* leaves that are not */
    bool is_held[PAGES];        /* huge pages that may be in memory */
};

struct region {
    char *start;
    uint64_t length;
    struct chunk *chunk; /* NULL: all of it is one transfer's */
    bool is_unused;      /* and was one's that is over */
};

/* `lock` guards all of these; taken last of all locks. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct region *regions; /* by address */
static uint32_t count;
static uint32_t room; /* for so many */
static uint64_t held;
static uint64_t taken;
static uint64_t unused; /* bytes of `held` of which nothing is taken */

static pthread_once_t watching = PTHREAD_ONCE_INIT;

/* ---- forks -------------------------------------------------------------- */

static void before_fork(void)
{
    pthread_mutex_lock(&lock);
}

static void after_fork(void)
{
    pthread_mutex_unlock(&lock);
}

/* A child may go on: its only thread must not find the lock held by one that is not there. */
static void watch_forks(void)
{
    pthread_atfork(before_fork, after_fork, after_fork);
}

/* ---- regions ------------------------------------------------------------ */

/* How many begin at or before an address. */
static uint32_t place_of(const char *address)
{
    uint32_t low = 0, high = count;

    while (low < high) {
        const uint32_t middle = (low + high) / 2;

        if (regions[middle].start <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static struct region *find(const char *address)
{
    const uint32_t place = place_of(address);
    struct region *region = place ? &regions[place - 1] : NULL;

    return region && address < region->start + region->length ? region : NULL;
}

static bool has_room(void)
{
    struct region *more;

    if (count < room)
        return true;
    more = realloc(regions, (room + 64) * sizeof(*regions));
    if (!more)
        return false;
    regions = more;
    room += 64;
    return true;
}

/* Only at a multiple of its size can a huge page lie. */
static char *map(uint64_t length)
{
    char *address =
        mmap(NULL, length + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t skip;

    if (address == MAP_FAILED)
        return NULL;
    skip = -(uintptr_t)address & (HUGE - 1);
    if (skip)
        munmap(address, skip);
    munmap(address + skip + length, HUGE - skip);
    /* Where that is refused (no huge pages in this kernel) the memory is as good as any. */
    madvise(address + skip, length, MADV_HUGEPAGE);
    return address + skip;
}

/* NULL where there is no memory. */
static struct region *add(uint64_t length)
{
    char *start = has_room() ? map(length) : NULL;
    uint32_t place;

    if (!start)
        return NULL;
    place = place_of(start);
    memmove(&regions[place + 1], &regions[place], (count - place) * sizeof(*regions));
    regions[place] = (struct region){.start = start, .length = length};
    count++;
    return &regions[place];
}

static void drop(struct region *region)
{
    const uint32_t place = (uint32_t)(region - regions);

    UNPOISON(region->start, region->length);
    munmap(region->start, region->length);
    free(region->chunk);
    count--;
    memmove(region, region + 1, (count - place) * sizeof(*regions));
}

/* ---- huge pages of chunks ----------------------------------------------- */

static bool is_idle(const struct chunk *chunk, uint64_t page)
{
    const uint64_t end = (page + 1) * PAGE_LEAVES;

    return mmc_bits_next(chunk->busy, page * PAGE_LEAVES, end, 1) == end;
}

static void begin_page(struct chunk *chunk, uint64_t page)
{
    if (!chunk->is_held[page])
        held += HUGE;
    else if (is_idle(chunk, page))
        unused -= HUGE;
    chunk->is_held[page] = true;
}

static void release_page(struct region *region, uint64_t page)
{
    madvise(region->start + page * HUGE, HUGE, MADV_DONTNEED);
    region->chunk->is_held[page] = false;
    held -= HUGE;
}

static void end_page(struct region *region, uint64_t page)
{
    if (!is_idle(region->chunk, page))
        return;
    if (unused + HUGE <= MMC_PAGES_KEPT_MAX)
        unused += HUGE;
    else
        release_page(region, page);
}

static bool holds_any(const struct chunk *chunk)
{
    return memchr(chunk->is_held, true, sizeof(chunk->is_held)) != NULL;
}

static void release_idle(struct region *region)
{
    uint64_t page;

    for (page = 0; page < PAGES; page++) {
        if (region->chunk->is_held[page] && is_idle(region->chunk, page)) {
            release_page(region, page);
            unused -= HUGE;
        }
    }
}

/* ---- chunks ------------------------------------------------------------- */

static struct region *add_chunk(void)
{
    struct chunk *chunk = calloc(1, sizeof(*chunk));
    struct region *region = chunk ? add(CHUNK) : NULL;

    if (!region) {
        free(chunk);
        return NULL;
    }
    POISON(region->start, CHUNK);
    chunk->free = LEAVES;
    region->chunk = chunk;
    return region;
}

/* The first of so many free leaves in a row, or LEAVES. */
static uint64_t find_run(const struct chunk *chunk, uint64_t leaves)
{
    uint64_t first = mmc_bits_next(chunk->busy, 0, LEAVES, 0);

    while (first + leaves <= LEAVES) {
        const uint64_t end = mmc_bits_next(chunk->busy, first, first + leaves, 1);

        if (end == first + leaves)
            return first;
        first = mmc_bits_next(chunk->busy, end, LEAVES, 0);
    }
    return LEAVES;
}

static void *take_run(struct region *region, uint64_t first, uint64_t leaves)
{
    struct chunk *chunk = region->chunk;
    const uint64_t end = first + leaves;
    uint64_t page;

    for (page = first / PAGE_LEAVES; page * PAGE_LEAVES < end; page++)
        begin_page(chunk, page);
    mmc_bits_fill(chunk->busy, first, end, 1);
    mmc_bits_fill(chunk->last, end - 1, end, 1);
    chunk->free -= leaves;
    taken += leaves * LEAF;
    UNPOISON(region->start + first * LEAF, leaves * LEAF);
    return region->start + first * LEAF;
}

/* The lowest there is, so that what lies above comes free. */
static void *take_of_chunks(uint64_t leaves)
{
    struct region *fresh;
    uint64_t first;
    uint32_t i;

    for (i = 0; i < count; i++) {
        const struct chunk *chunk = regions[i].chunk;

        if (!chunk || chunk->free < leaves)
            continue;
        first = find_run(chunk, leaves);
        if (first < LEAVES)
            return take_run(&regions[i], first, leaves);
    }
    fresh = add_chunk();
    return fresh ? take_run(fresh, 0, leaves) : NULL;
}

static void give_run(struct region *region, const char *buffer)
{
    struct chunk *chunk = region->chunk;
    const uint64_t first = (uint64_t)(buffer - region->start) / LEAF;
    const uint64_t last = mmc_bits_next(chunk->last, first, LEAVES, 1);
    const uint64_t leaves = last + 1 - first;
    uint64_t page;

    if (mmc_bits_next(chunk->busy, first, LEAVES, 0) <= last) /* given back twice */
        abort();
    mmc_bits_fill(chunk->busy, first, last + 1, 0);
    mmc_bits_fill(chunk->last, last, last + 1, 0);
    chunk->free += leaves;
    taken -= leaves * LEAF;
    POISON(buffer, leaves * LEAF);
    for (page = first / PAGE_LEAVES; page <= last / PAGE_LEAVES; page++)
        end_page(region, page);
    if (!holds_any(chunk))
        drop(region);
}

/* ---- regions of one transfer -------------------------------------------- */

/* One that was kept, unless it is much longer: callers account for the length. */
static struct region *find_whole(uint64_t length)
{
    uint32_t i;

    for (i = 0; i < count; i++) {
        const struct region *region = &regions[i];

        if (region->is_unused && region->length >= length && region->length - length <= length / 8)
            return &regions[i];
    }
    return NULL;
}

static void *take_whole(uint64_t length)
{
    struct region *region = find_whole(length);

    if (region) {
        region->is_unused = false;
        unused -= region->length;
        UNPOISON(region->start, region->length);
    } else {
        region = length <= INT64_MAX ? add(ROUNDED(length)) : NULL;
        if (!region)
            return NULL;
        held += region->length;
    }
    taken += region->length;
    return region->start;
}

static void drop_whole(struct region *region)
{
    held -= region->length;
    drop(region);
}

static void give_whole(struct region *region)
{
    if (region->is_unused) /* given back twice */
        abort();
    taken -= region->length;
    if (unused + region->length > MMC_PAGES_KEPT_MAX) {
        drop_whole(region);
        return;
    }
    region->is_unused = true;
    unused += region->length;
    POISON(region->start, region->length);
}

/* ---- the interface ------------------------------------------------------ */

void *mmc_pages_take(uint64_t length)
{
    void *buffer;

    pthread_once(&watching, watch_forks);
    pthread_mutex_lock(&lock);
    if (length > CHUNK_SERVES)
        buffer = take_whole(length);
    else
        buffer = take_of_chunks(length ? ROUNDED(length) / LEAF : 1);
    pthread_mutex_unlock(&lock);
    return buffer;
}

int mmc_pages_give(void *buffer)
{
    struct region *region;

    pthread_mutex_lock(&lock);
    region = find(buffer);
    if (region && region->chunk)
        give_run(region, buffer);
    else if (region)
        give_whole(region);
    pthread_mutex_unlock(&lock);
    return region != NULL;
}

void mmc_pages_trim(void)
{
    uint32_t i;

    pthread_mutex_lock(&lock);
    for (i = count; i-- > 0;) {
        struct region *region = &regions[i];

        if (region->is_unused) {
            unused -= region->length;
            drop_whole(region);
        } else if (region->chunk) {
            release_idle(region);
            if (!holds_any(region->chunk))
                drop(region);
        }
    }
    pthread_mutex_unlock(&lock);
}

void mmc_pages_count(uint64_t *all, uint64_t *out)
{
    pthread_mutex_lock(&lock);
    *all = held;
    *out = taken;
    pthread_mutex_unlock(&lock);
}

/* ---- of any length ------------------------------------------------------ */

void *mmc_memory_take(uint64_t length, uint64_t alignment)
{
    void *buffer = NULL;

    if (length >= MMC_PAGES_MIN && alignment <= LEAF)
        buffer = mmc_pages_take(length);
    if (!buffer && posix_memalign(&buffer, alignment, length ? length : 1) != 0)
        return NULL;
    return buffer;
}

void mmc_memory_give(void *buffer)
{
    if (!mmc_pages_give(buffer))
        free(buffer);
}
