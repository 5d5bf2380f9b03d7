/* SPDX-License-Identifier: MIT
 *
 * A view's life, and its bytes. Bits are in view_bits.c, dirty units in snapshot.c.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guard.h"
#include "process.h"
#include "view.h"

/* ---- opening and closing ------------------------------------------------ */

uint64_t mmc_page_size(void)
{
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

static uint64_t page_up(uint64_t size)
{
    const uint64_t page = mmc_page_size();

    return (size + page - 1) / page * page;
}

/* NORESERVE: a private writable map of 64 GiB is ENOMEM without it. RANDOM: 1000 random
 * reads of a sparse 2 GiB file filled 1.4 GB of page cache without it, 4 MB with it. */
static int map(struct mmc_view *view, int protection, int flags, int fd, char **into)
{
    void *address = mmap(NULL, view->reserve, protection, flags | MAP_NORESERVE, fd, 0);

    if (address == MAP_FAILED)
        return -errno;
    *into = address;
    madvise(address, view->reserve, MADV_RANDOM);
    /* A child's copy would pin the parent's pages and copy each on its next store. */
    if (madvise(address, view->reserve, MADV_DONTFORK) < 0)
        return -errno;
    return 0;
}

static int map_all(struct mmc_view *view, int fd)
{
    int rc;

    if (fd < 0)
        rc = map(view, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, &view->bytes);
    else
        rc = map(view, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, &view->bytes);
    if (rc == 0 && fd >= 0)
        rc = map(view, PROT_READ, MAP_SHARED, fd, &view->shared);
    if (rc == 0)
        rc = mmc_dirty_open(&view->dirty, (view->reserve >> view->unit_shift) + 1);
    return rc;
}

static int view_init(struct mmc_view *view, int fd, uint64_t size, uint64_t reserve, uint32_t unit)
{
    if (reserve < size)
        reserve = size;
    if (reserve > INT64_MAX / 2 || unit == 0 || (unit & (unit - 1)))
        return -EINVAL;
    pthread_mutex_init(&view->changes, NULL);
    view->size = size;
    view->reserve = page_up(reserve ? reserve : 1);
    view->unit_shift = (unsigned)__builtin_ctz(unit);
    view->process = mmc_process();
    return map_all(view, fd);
}

static struct mmc_view *view_open(int fd, uint64_t size, uint64_t reserve, uint32_t unit,
                                  int *error)
{
    struct mmc_view *view = calloc(1, sizeof(*view));

    if (!view) {
        *error = -ENOMEM;
        return NULL;
    }
    *error = view_init(view, fd, size, reserve, unit);
    if (*error == 0)
        return view;
    mmc_view_close(view);
    return NULL;
}

static int64_t touch_nothing(void *context)
{
    (void)context;
    return 0;
}

struct mmc_view *mmc_view_map(int fd, uint64_t size, uint64_t reserve, uint32_t unit, int *error)
{
    if (fd < 0) {
        *error = -EBADF;
        return NULL;
    }
    struct mmc_view *view = view_open(fd, size, reserve, unit, error);
    if (!view)
        return NULL;
    /* A host that grants no signal handler (seccomp) is told at once: memory serves it. */
    int64_t guarded = mmc_guard_run(view->bytes, view->reserve, touch_nothing, NULL);
    if (guarded < 0) {
        *error = (int)guarded;
        mmc_view_close(view);
        return NULL;
    }
    return view;
}

struct mmc_view *mmc_view_memory(uint64_t size, uint64_t reserve, uint32_t unit, int *error)
{
    return view_open(-1, size, reserve, unit, error);
}

void mmc_view_close(struct mmc_view *view)
{
    if (!view)
        return;
    /* In a forked child these addresses are free, or already something else's. */
    if (view->process == mmc_process()) {
        if (view->bytes)
            munmap(view->bytes, view->reserve);
        if (view->shared)
            munmap(view->shared, view->reserve);
        mmc_dirty_close(&view->dirty);
        pthread_mutex_destroy(&view->changes);
    }
    free(view);
}

/* ---- access ------------------------------------------------------------- */

uint64_t mmc_view_size(struct mmc_view *view)
{
    return __atomic_load_n(&view->size, __ATOMIC_RELAXED);
}

uint64_t mmc_view_shared(struct mmc_view *view)
{
    return (uint64_t)(uintptr_t)view->shared;
}

int mmc_view_allow(struct mmc_view *view, uint64_t offset, uint64_t length)
{
    const uint64_t size = mmc_view_size(view);

    if (view->process != mmc_process())
        return -EBADF;
    return offset <= size && length <= size - offset ? 0 : -ERANGE;
}

int64_t mmc_view_access(struct mmc_view *view, int64_t (*body)(void *context), void *context)
{
    if (!view->shared)
        return body(context);
    return mmc_guard_run(view->bytes, view->reserve, body, context);
}

uint64_t mmc_view_first_unit(const struct mmc_view *view, uint64_t offset)
{
    return offset >> view->unit_shift;
}

uint64_t mmc_view_end_unit(const struct mmc_view *view, uint64_t offset, uint64_t length)
{
    return length ? ((offset + length - 1) >> view->unit_shift) + 1 : offset >> view->unit_shift;
}

/* ---- bytes -------------------------------------------------------------- */

/* Widths mix on the same memory, which only may_alias permits. */
typedef uint16_t __attribute__((may_alias)) word16_t;
typedef uint32_t __attribute__((may_alias)) word32_t;
typedef uint64_t __attribute__((may_alias)) word64_t;

struct bytes_access {
    char *view; /* in the view: aligned as the offset is */
    char *memory;
    uint64_t length;
};

/* The widest aligned step: a table entry at its natural alignment is loaded and stored
 * in one piece, whatever surrounds it. */
static unsigned step_at(const char *address, uint64_t length)
{
    const uintptr_t at = (uintptr_t)address;

    if (length >= 8 && at % 8 == 0)
        return 8;
    if (length >= 4 && at % 4 == 0)
        return 4;
    if (length >= 2 && at % 2 == 0)
        return 2;
    return 1;
}

#define LOAD(type)                                                                                 \
    do {                                                                                           \
        const type value = __atomic_load_n((const type *)(const void *)from, __ATOMIC_RELAXED);    \
        memcpy(to, &value, sizeof(value));                                                         \
    } while (0)

#define STORE(type)                                                                                \
    do {                                                                                           \
        type value;                                                                                \
        memcpy(&value, from, sizeof(value));                                                       \
        __atomic_store_n((type *)(void *)to, value, __ATOMIC_RELAXED);                             \
    } while (0)

static void load_step(char *to, const char *from, unsigned step)
{
    switch (step) {
    case 8:
        LOAD(word64_t);
        break;
    case 4:
        LOAD(word32_t);
        break;
    case 2:
        LOAD(word16_t);
        break;
    default:
        LOAD(char);
    }
}

static void store_step(char *to, const char *from, unsigned step)
{
    switch (step) {
    case 8:
        STORE(word64_t);
        break;
    case 4:
        STORE(word32_t);
        break;
    case 2:
        STORE(word16_t);
        break;
    default:
        STORE(char);
    }
}

static int64_t load_body(void *context)
{
    const struct bytes_access access = *(const struct bytes_access *)context;
    uint64_t at = 0;

    while (at < access.length) {
        const unsigned step = step_at(access.view + at, access.length - at);

        load_step(access.memory + at, access.view + at, step);
        at += step;
    }
    return 0;
}

static int64_t store_body(void *context)
{
    const struct bytes_access access = *(const struct bytes_access *)context;
    uint64_t at = 0;

    while (at < access.length) {
        const unsigned step = step_at(access.view + at, access.length - at);

        store_step(access.view + at, access.memory + at, step);
        at += step;
    }
    return 0;
}

static int copy_bytes(struct mmc_view *view, uint64_t offset, char *memory, uint64_t length,
                      int64_t (*body)(void *context))
{
    struct bytes_access access = {NULL, memory, length};
    int rc = mmc_view_allow(view, offset, length);

    if (rc < 0)
        return rc;
    access.view = view->bytes + offset;
    return (int)mmc_view_access(view, body, &access);
}

int mmc_view_load(struct mmc_view *view, uint64_t offset, void *into, uint64_t length)
{
    return copy_bytes(view, offset, into, length, load_body);
}

int mmc_view_fill(struct mmc_view *view, uint64_t offset, const void *from, uint64_t length)
{
    return copy_bytes(view, offset, (char *)(uintptr_t)from, length, store_body);
}

/* Stores, THEN marks: a snapshot clears the mark and then copies, so a store that its
 * copy missed is still marked after it. */
int mmc_view_store(struct mmc_view *view, uint64_t offset, const void *from, uint64_t length)
{
    int rc = mmc_view_allow(view, offset, length);

    if (rc < 0)
        return rc;
    pthread_mutex_lock(&view->changes);
    rc = mmc_view_fill(view, offset, from, length);
    if (rc == 0)
        mmc_view_mark_held(view, offset, length);
    pthread_mutex_unlock(&view->changes);
    return rc;
}

/* ---- size --------------------------------------------------------------- */

static int64_t zero_body(void *context)
{
    const struct bytes_access *access = context;

    memset(access->view, 0, access->length);
    return 0;
}

/* What lies beyond the new end must read zero after a later growth. Whole pages are
 * given back; the rest of the last one keeps the old bytes through a truncation where
 * it is private, so it is zeroed. */
static int drop_tail(struct mmc_view *view, uint64_t from, uint64_t old_size)
{
    const uint64_t page_end = page_up(from);
    struct bytes_access access = {view->bytes + from, NULL, page_end - from};

    /* Under mlockall this is EINVAL: memory is zeroed instead, and of a mapping the
     * truncation that follows takes the pages. */
    if (page_end < old_size &&
        madvise(view->bytes + page_end, page_up(old_size) - page_end, MADV_DONTNEED) < 0 &&
        !view->shared)
        access.length = old_size - from;
    return access.length ? (int)mmc_view_access(view, zero_body, &access) : 0;
}

static int set_size(struct mmc_view *view, uint64_t size)
{
    const uint64_t old_size = mmc_view_size(view);

    __atomic_store_n(&view->size, size, __ATOMIC_RELAXED);
    if (size >= old_size)
        return 0;
    mmc_dirty_clear(&view->dirty, mmc_view_end_unit(view, 0, size), UINT64_MAX);
    return drop_tail(view, size, old_size);
}

int mmc_view_set_size(struct mmc_view *view, uint64_t size)
{
    int rc = mmc_view_allow(view, 0, 0);

    if (rc < 0)
        return rc;
    if (size > view->reserve)
        return -ENOSPC;
    pthread_mutex_lock(&view->changes);
    rc = set_size(view, size);
    pthread_mutex_unlock(&view->changes);
    return rc;
}
