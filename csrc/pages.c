/* SPDX-License-Identifier: MIT
 *
 * Regions of whole huge pages. A region of one chunk is shared out by halves (a buddy system); one
 * that is larger is a single transfer's and goes back to the kernel with it.
 *
 * The tree of a chunk has a node for each block that halving can make, node 1 for the whole, 2n and
 * 2n+1 for the halves of n. A node tells the largest free block below it, as order + 1, or 0 for
 * none. Below a block that is taken the nodes still tell of free memory: only its own is 0.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "pages.h"

#define HUGE (UINT64_C(2) << 20)
#define CHUNK (UINT64_C(4) << 20)
#define LEAF UINT64_C(4096)
#define TOP_ORDER 10 /* LEAF << TOP_ORDER is CHUNK */
#define LEAVES (1u << TOP_ORDER)

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(address, length) ASAN_POISON_MEMORY_REGION(address, length)
#define UNPOISON(address, length) ASAN_UNPOISON_MEMORY_REGION(address, length)
#else
#define POISON(address, length) ((void)(address), (void)(length))
#define UNPOISON(address, length) ((void)(address), (void)(length))
#endif

struct region {
    char *start;
    uint64_t length;
    uint8_t *tree; /* NULL: all of it is one transfer's */
};

/* `lock` guards all of these; taken last of all locks. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct region *regions; /* by address */
static uint32_t count;
static uint32_t room; /* for so many */
static uint64_t held;
static uint64_t taken;
static uint64_t unused; /* bytes of chunks of which nothing is taken */

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

/* Whole, without a tree. NULL where there is no memory. */
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
    held += length;
    return &regions[place];
}

static void drop(struct region *region)
{
    const uint32_t place = (uint32_t)(region - regions);

    UNPOISON(region->start, region->length);
    munmap(region->start, region->length);
    free(region->tree);
    held -= region->length;
    count--;
    memmove(region, region + 1, (count - place) * sizeof(*regions));
}

/* ---- chunks ------------------------------------------------------------- */

static uint32_t order_of(uint64_t length)
{
    uint32_t order = 0;

    while (LEAF << order < length)
        order++;
    return order;
}

static uint8_t larger(uint8_t a, uint8_t b)
{
    return a > b ? a : b;
}

/* All of it is free. */
static uint8_t *new_tree(void)
{
    uint8_t *tree = malloc(2 * LEAVES);
    uint32_t order, node;

    if (!tree)
        return NULL;
    for (order = TOP_ORDER + 1, node = 1; node < 2 * LEAVES; node++) {
        if ((node & (node - 1)) == 0)
            order--;
        tree[node] = (uint8_t)(order + 1);
    }
    return tree;
}

static struct region *add_chunk(void)
{
    uint8_t *tree = new_tree();
    struct region *chunk = tree ? add(CHUNK) : NULL;

    if (!chunk) {
        free(tree);
        return NULL;
    }
    POISON(chunk->start, CHUNK);
    chunk->tree = tree;
    unused += CHUNK;
    return chunk;
}

static struct region *chunk_with(uint32_t order)
{
    uint32_t i;

    for (i = 0; i < count; i++) {
        if (regions[i].tree && regions[i].tree[1] > order)
            return &regions[i];
    }
    return add_chunk();
}

static void *carve(struct region *chunk, uint32_t order)
{
    uint8_t *tree = chunk->tree;
    uint32_t node = 1, level;
    char *block;

    if (tree[1] == TOP_ORDER + 1)
        unused -= CHUNK;
    for (level = TOP_ORDER; level > order; level--) {
        node *= 2;
        if (tree[node] <= order)
            node++;
    }
    tree[node] = 0;
    block = chunk->start + (((uint64_t)node << order) - LEAVES) * LEAF;
    while (node /= 2)
        tree[node] = larger(tree[2 * node], tree[2 * node + 1]);
    taken += LEAF << order;
    UNPOISON(block, LEAF << order);
    return block;
}

static void give_block(struct region *chunk, char *block)
{
    uint8_t *tree = chunk->tree;
    uint32_t node = LEAVES + (uint32_t)((uint64_t)(block - chunk->start) / LEAF);
    uint32_t order = 0;

    for (; tree[node]; order++)
        node /= 2;
    POISON(block, LEAF << order);
    taken -= LEAF << order;
    tree[node] = (uint8_t)(order + 1);
    while (node /= 2) {
        const uint8_t left = tree[2 * node], right = tree[2 * node + 1];

        order++;
        /* Two free halves are a free whole. */
        tree[node] = left == order && right == order ? (uint8_t)(order + 1) : larger(left, right);
    }
    if (tree[1] != TOP_ORDER + 1)
        return;
    unused += CHUNK;
    if (unused > MMC_PAGES_KEPT_MAX) {
        unused -= CHUNK;
        drop(chunk);
    }
}

/* ---- the interface ------------------------------------------------------ */

static void *take_whole(uint64_t length)
{
    struct region *region;

    if (length > INT64_MAX)
        return NULL;
    region = add((length + HUGE - 1) & ~(HUGE - 1));
    if (!region)
        return NULL;
    taken += region->length;
    return region->start;
}

void *mmc_pages_take(uint64_t length)
{
    void *buffer = NULL;
    struct region *chunk;

    pthread_once(&watching, watch_forks);
    pthread_mutex_lock(&lock);
    if (length > CHUNK) {
        buffer = take_whole(length);
    } else {
        chunk = chunk_with(order_of(length));
        if (chunk)
            buffer = carve(chunk, order_of(length));
    }
    pthread_mutex_unlock(&lock);
    return buffer;
}

int mmc_pages_give(void *buffer)
{
    struct region *region;

    pthread_mutex_lock(&lock);
    region = find(buffer);
    if (region && region->tree) {
        give_block(region, buffer);
    } else if (region) {
        taken -= region->length;
        drop(region);
    }
    pthread_mutex_unlock(&lock);
    return region != NULL;
}

void mmc_pages_count(uint64_t *all, uint64_t *out)
{
    pthread_mutex_lock(&lock);
    *all = held;
    *out = taken;
    pthread_mutex_unlock(&lock);
}
