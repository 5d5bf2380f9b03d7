/* SPDX-License-Identifier: MIT
 *
 * Paths, on both back ends: what is a hit, holds, what a sync must know, errors, threads, forks.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "path.h"
#include "queue.h"
#include "test.h"

#define SECTOR 512
#define CLUSTER 4096
#define CLUSTERS 96
#define SIZE (CLUSTERS * CLUSTER)
/* The last cluster is cut by the disk's end. */
#define SHORT_SIZE (SIZE - 3 * SECTOR)
#define ALL UINT64_MAX

/* A top layer with bits over a base that is all there, and shorter. */
struct rig {
    struct mmc_queue *queue;
    struct mmc_path *path;
    struct mmc_view *bits;
    struct mmc_layer layers[2];
};

static _Alignas(CLUSTER) char page[2 * SIZE];

static struct mmc_layer layer_on(int fd, struct mmc_view *bits, uint64_t size)
{
    return (struct mmc_layer){.fd = fd,
                              .view = bits,
                              .size = size,
                              .read_end = size,
                              .write_end = size,
                              .cluster_shift = 12,
                              .file_align = 1,
                              .memory_align = 1};
}

static void apply(struct rig *rig, int hits)
{
    CHECK_EQUAL(mmc_path_set(rig->path, rig->layers[0].size, rig->layers, 2, hits), 0);
}

static void fill(int fd, char byte, uint64_t size)
{
    char block[CLUSTER];
    uint64_t at;

    memset(block, byte, sizeof(block));
    for (at = 0; at < size; at += CLUSTER)
        CHECK_EQUAL(pwrite(fd, block, CLUSTER, (off_t)at), CLUSTER);
}

static void set_up(struct rig *rig, int backend, uint64_t size)
{
    int error = 1;

    rig->queue = mmc_queue_open(backend, 8, 0, &error);
    CHECK_EQUAL(error, 0);
    rig->path = mmc_path_open(rig->queue, &error);
    CHECK_EQUAL(error, 0);
    rig->bits = mmc_view_memory(CLUSTERS / 8, 4096, 512, &error);
    CHECK_EQUAL(error, 0);
    rig->layers[0] = layer_on(scratch_file(SIZE), rig->bits, size);
    rig->layers[1] = layer_on(scratch_file(SIZE), NULL, SIZE / 2);
    fill(rig->layers[0].fd, 'g', SIZE); /* garbage under unset bits */
    fill(rig->layers[1].fd, 'b', SIZE / 2);
    apply(rig, MMC_PATH_WRITES | MMC_PATH_ALLOCATES);
}

static void tear_down(struct rig *rig)
{
    mmc_queue_close(rig->queue);
    mmc_path_close(rig->path);
    mmc_view_close(rig->bits);
    close(rig->layers[0].fd);
    close(rig->layers[1].fd);
}

static int64_t reads(struct rig *rig, uint64_t offset, uint64_t length)
{
    return mmc_path_transfer(rig->path, MMC_READ, offset, page, length);
}

static int64_t writes(struct rig *rig, char byte, uint64_t offset, uint64_t length)
{
    if (length <= SIZE)
        memset(page, byte, length);
    return mmc_path_transfer(rig->path, MMC_WRITE, offset, page, length);
}

/* Reads [offset, offset+length), which must be a hit full of `byte`. */
static void shows(struct rig *rig, char byte, uint64_t offset, uint64_t length)
{
    uint64_t i;

    memset(page, '?', length);
    CHECK_EQUAL(reads(rig, offset, length), length);
    for (i = 0; i < length; i++)
        CHECK_EQUAL(page[i], byte);
}

static int64_t bits_set(struct rig *rig)
{
    return mmc_view_bits_count(rig->bits, 0, 0, CLUSTERS);
}

static void set_bits(struct rig *rig, uint64_t first, uint64_t count)
{
    CHECK_EQUAL(mmc_view_bits_write(rig->bits, 0, first, count, 1), 0);
}

/* ---- what is a hit ------------------------------------------------------ */

static void test_reads(void)
{
    struct rig rig;

    set_up(&rig, MMC_BACKEND_AUTO, SHORT_SIZE);
    set_bits(&rig, 4, 2);
    shows(&rig, 'b', 0, 4 * CLUSTER);
    shows(&rig, 'g', 4 * CLUSTER, 2 * CLUSTER);
    shows(&rig, 'g', 4 * CLUSTER + 7, CLUSTER);
    shows(&rig, 0, SIZE / 2, SHORT_SIZE - SIZE / 2); /* past the end of the base */
    /* Two files: not in one transfer. */
    CHECK_EQUAL(reads(&rig, 3 * CLUSTER, 2 * CLUSTER), 0);
    /* One run of a file, then zeros. */
    CHECK_EQUAL(reads(&rig, SIZE / 2 - SECTOR, CLUSTER), CLUSTER);
    CHECK_EQUAL(page[SECTOR - 1], 'b');
    CHECK_EQUAL(page[SECTOR], 0);
    /* Nothing, and what is not inside the disk. */
    CHECK_EQUAL(reads(&rig, 0, 0), 0);
    CHECK_EQUAL(reads(&rig, SHORT_SIZE - SECTOR, 2 * SECTOR), 0);
    CHECK_EQUAL(reads(&rig, SHORT_SIZE, SECTOR), 0);
    CHECK_EQUAL(reads(&rig, ALL, SECTOR), 0);
    CHECK_EQUAL(reads(&rig, SECTOR, ALL), 0);
    CHECK_EQUAL(reads(&rig, ALL - SECTOR + 1, SECTOR), 0);
    /* No table, no hits. */
    CHECK_EQUAL(mmc_path_set(rig.path, SIZE, NULL, 0, 0), 0);
    CHECK_EQUAL(reads(&rig, 0, SECTOR), 0);
    tear_down(&rig);
}

static void test_writes(void)
{
    struct rig rig;

    set_up(&rig, MMC_BACKEND_AUTO, SHORT_SIZE);
    CHECK_EQUAL(writes(&rig, 'w', 2 * CLUSTER, SECTOR), 0); /* a part of a cluster below */
    CHECK_EQUAL(writes(&rig, 'w', 2 * CLUSTER + SECTOR, CLUSTER), 0);
    CHECK_EQUAL(bits_set(&rig), 0);
    shows(&rig, 'b', 2 * CLUSTER, CLUSTER);
    CHECK_EQUAL(writes(&rig, 'w', 2 * CLUSTER, 2 * CLUSTER), 2 * CLUSTER);
    CHECK_EQUAL(bits_set(&rig), 2);
    CHECK_EQUAL(mmc_view_dirty(rig.bits, 0, CLUSTERS / 8), 1);
    shows(&rig, 'w', 2 * CLUSTER, 2 * CLUSTER);
    CHECK_EQUAL(writes(&rig, 'p', 2 * CLUSTER + SECTOR, SECTOR), SECTOR); /* it is there now */
    shows(&rig, 'p', 2 * CLUSTER + SECTOR, SECTOR);
    /* Half there and half not: whole clusters only. */
    CHECK_EQUAL(writes(&rig, 'm', 3 * CLUSTER + SECTOR, CLUSTER), 0);
    CHECK_EQUAL(writes(&rig, 'm', 3 * CLUSTER, 2 * CLUSTER), 2 * CLUSTER);
    CHECK_EQUAL(bits_set(&rig), 3);
    /* The last cluster ends with the disk. */
    CHECK_EQUAL(writes(&rig, 'e', SIZE - CLUSTER, CLUSTER - 4 * SECTOR), 0);
    CHECK_EQUAL(writes(&rig, 'e', SIZE - CLUSTER, CLUSTER - 3 * SECTOR), CLUSTER - 3 * SECTOR);
    CHECK_EQUAL(bits_set(&rig), 4);
    CHECK_EQUAL(writes(&rig, 'e', SHORT_SIZE - SECTOR, 2 * SECTOR), 0);
    CHECK_EQUAL(writes(&rig, 'e', 0, ALL), 0);
    tear_down(&rig);
}

static void test_what_the_caller_allows(void)
{
    struct rig rig;

    set_up(&rig, MMC_BACKEND_AUTO, SIZE);
    apply(&rig, 0);
    CHECK_EQUAL(writes(&rig, 'w', 0, CLUSTER), 0);
    apply(&rig, MMC_PATH_WRITES);
    CHECK_EQUAL(writes(&rig, 'w', CLUSTER, CLUSTER), 0);
    set_bits(&rig, 0, 1);
    CHECK_EQUAL(writes(&rig, 'w', 0, CLUSTER), CLUSTER);
    apply(&rig, MMC_PATH_WRITES | MMC_PATH_ALLOCATES | MMC_PATH_GUARDED);
    CHECK_EQUAL(writes(&rig, 'x', 0, SECTOR), 0);
    CHECK_EQUAL(writes(&rig, 'x', SECTOR - 1, SECTOR), 0);
    CHECK_EQUAL(writes(&rig, 'x', SECTOR, SECTOR), SECTOR);
    shows(&rig, 'w', 0, SECTOR);
    CHECK_EQUAL(mmc_path_set(rig.path, SIZE, rig.layers, MMC_PATH_LAYERS + 1, 0), -EINVAL);
    tear_down(&rig);
}

static void test_alignment_and_ends(void)
{
    struct rig rig;

    set_up(&rig, MMC_BACKEND_AUTO, SIZE);
    set_bits(&rig, 0, CLUSTERS);
    rig.layers[0].file_align = SECTOR;
    rig.layers[0].memory_align = 4;
    rig.layers[0].start = SECTOR; /* of the disk in the file */
    rig.layers[0].read_end = SIZE - SECTOR;
    rig.layers[0].write_end = SIZE - 2 * SECTOR;
    apply(&rig, MMC_PATH_WRITES);
    CHECK_EQUAL(writes(&rig, 'w', 0, SECTOR), SECTOR);
    CHECK_EQUAL(pread(rig.layers[0].fd, page, 1, SECTOR), 1);
    CHECK_EQUAL(page[0], 'w');
    CHECK_EQUAL(writes(&rig, 'w', 1, SECTOR), 0);
    CHECK_EQUAL(writes(&rig, 'w', SECTOR, SECTOR + 4), 0);
    CHECK_EQUAL(reads(&rig, 4, SECTOR), 0);
    CHECK_EQUAL(mmc_path_transfer(rig.path, MMC_READ, 0, page + 4, SECTOR), SECTOR);
    CHECK_EQUAL(mmc_path_transfer(rig.path, MMC_READ, 0, page + 2, SECTOR), 0);
    CHECK_EQUAL(reads(&rig, SIZE - 3 * SECTOR, SECTOR), SECTOR);
    CHECK_EQUAL(reads(&rig, SIZE - 3 * SECTOR, 2 * SECTOR), 0);
    CHECK_EQUAL(writes(&rig, 'w', SIZE - 4 * SECTOR, SECTOR), SECTOR);
    CHECK_EQUAL(writes(&rig, 'w', SIZE - 3 * SECTOR, SECTOR), 0);
    tear_down(&rig);
}

/* A view that is too small for the table, and a page of it that the file lost. */
static void test_bits_that_cannot_be_read(void)
{
    const int file = scratch_file(4096);
    struct rig rig;
    int error = 1;

    set_up(&rig, MMC_BACKEND_AUTO, SIZE);
    rig.layers[0].bits = CLUSTERS / 8 - 1;
    apply(&rig, MMC_PATH_WRITES | MMC_PATH_ALLOCATES);
    CHECK_EQUAL(reads(&rig, 64 * CLUSTER, CLUSTER), 0);
    CHECK_EQUAL(writes(&rig, 'w', 64 * CLUSTER, CLUSTER), -ERANGE);
    rig.layers[0].bits = 0;
    rig.layers[0].view = mmc_view_map(file, 4096, 4096, 512, &error);
    CHECK_EQUAL(error, 0);
    apply(&rig, MMC_PATH_WRITES | MMC_PATH_ALLOCATES);
    CHECK_EQUAL(writes(&rig, 'w', 0, CLUSTER), CLUSTER);
    CHECK_EQUAL(ftruncate(file, 0), 0);
    CHECK_EQUAL(reads(&rig, 0, CLUSTER), 0);
    CHECK_EQUAL(writes(&rig, 'w', 0, CLUSTER), -EFAULT);
    CHECK_EQUAL(mmc_path_busy(rig.path, 0, ALL, MMC_HOLD_ALL), 0);
    mmc_view_close(rig.layers[0].view);
    close(file);
    tear_down(&rig);
}

/* ---- transfers in flight ------------------------------------------------ */

struct flight {
    struct mmc_transfer transfer; /* first */
    int is_done;
    int64_t result;
};

static void landed(struct mmc_transfer *transfer, int64_t result)
{
    struct flight *flight = (struct flight *)(void *)transfer;

    flight->result = result;
    __atomic_store_n(&flight->is_done, 1, __ATOMIC_RELEASE);
}

static int take_off(struct rig *rig, struct flight *flight, int code, uint64_t offset, void *from,
                    uint64_t length, struct mmc_requests *batch)
{
    flight->is_done = 0;
    flight->transfer.finished = landed;
    return mmc_path_begin(rig->path, &flight->transfer, code, offset, from, length, batch);
}

static int64_t land(struct rig *rig, struct flight *flight, struct mmc_requests *batch)
{
    struct mmc_done done;

    mmc_queue_push(rig->queue, batch);
    while (!__atomic_load_n(&flight->is_done, __ATOMIC_ACQUIRE))
        CHECK(mmc_queue_turn(rig->queue, NULL, 0, &done, 1, 10) <= 0);
    return flight->result;
}

static void test_holds(int backend)
{
    struct mmc_requests batch = {0};
    struct flight read, write;
    int64_t hold, all;
    struct rig rig;

    set_up(&rig, backend, SIZE);
    hold = mmc_path_hold(rig.path, CLUSTER, 2 * CLUSTER, MMC_HOLD_WRITES);
    CHECK(hold > 0);
    CHECK_EQUAL(writes(&rig, 'w', CLUSTER, CLUSTER), 0);
    CHECK_EQUAL(writes(&rig, 'w', 0, 2 * CLUSTER), 0);
    CHECK_EQUAL(writes(&rig, 'w', 0, CLUSTER), CLUSTER);
    CHECK_EQUAL(writes(&rig, 'w', 2 * CLUSTER, CLUSTER), CLUSTER);
    shows(&rig, 'b', CLUSTER, CLUSTER);
    CHECK_EQUAL(take_off(&rig, &read, MMC_READ, CLUSTER, page, CLUSTER, &batch), MMC_STARTED);
    CHECK_EQUAL(mmc_path_busy(rig.path, 0, ALL, MMC_HOLD_WRITES), 0);
    CHECK_EQUAL(mmc_path_busy(rig.path, 0, ALL, MMC_HOLD_ALL), 1);
    CHECK_EQUAL(take_off(&rig, &write, MMC_WRITE, 0, page + CLUSTER, CLUSTER, &batch), MMC_STARTED);
    CHECK_EQUAL(mmc_path_busy(rig.path, 0, ALL, MMC_HOLD_ALL), 2);
    CHECK_EQUAL(mmc_path_busy(rig.path, CLUSTER - 1, CLUSTER, MMC_HOLD_WRITES), 1);
    CHECK_EQUAL(mmc_path_busy(rig.path, CLUSTER, ALL, MMC_HOLD_WRITES), 0);
    CHECK_EQUAL(land(&rig, &read, &batch), CLUSTER);
    CHECK_EQUAL(land(&rig, &write, &batch), CLUSTER);
    CHECK_EQUAL(mmc_path_busy(rig.path, 0, ALL, MMC_HOLD_ALL), 0);
    all = mmc_path_hold(rig.path, 0, ALL, MMC_HOLD_ALL);
    CHECK_EQUAL(reads(&rig, 0, CLUSTER), 0);
    mmc_path_release(rig.path, all);
    mmc_path_release(rig.path, all); /* of no effect */
    CHECK_EQUAL(reads(&rig, 0, CLUSTER), CLUSTER);
    CHECK_EQUAL(writes(&rig, 'w', CLUSTER, CLUSTER), 0);
    mmc_path_release(rig.path, hold);
    CHECK_EQUAL(writes(&rig, 'w', CLUSTER, CLUSTER), CLUSTER);
    mmc_path_hold(rig.path, 0, ALL, MMC_HOLD_ALL); /* freed with the path */
    tear_down(&rig);
}

/* A sync that is begun while a write is in flight need not cover it. */
static void test_what_a_sync_must_know(int backend)
{
    struct mmc_requests batch = {0};
    struct flight flight;
    struct rig rig;

    set_up(&rig, backend, SIZE);
    CHECK_EQUAL(mmc_path_take_written(rig.path), 0);
    shows(&rig, 'b', 0, CLUSTER);
    CHECK_EQUAL(mmc_path_take_written(rig.path), 0);
    CHECK_EQUAL(writes(&rig, 'w', 0, CLUSTER), CLUSTER);
    CHECK_EQUAL(mmc_path_take_written(rig.path), 1);
    CHECK_EQUAL(mmc_path_take_written(rig.path), 0);
    CHECK_EQUAL(take_off(&rig, &flight, MMC_WRITE, 0, page, CLUSTER, &batch), MMC_STARTED);
    CHECK_EQUAL(mmc_path_take_written(rig.path), 1);
    CHECK_EQUAL(mmc_path_take_written(rig.path), 1);
    CHECK_EQUAL(land(&rig, &flight, &batch), CLUSTER);
    CHECK_EQUAL(mmc_path_take_written(rig.path), 1);
    CHECK_EQUAL(mmc_path_take_written(rig.path), 0);
    tear_down(&rig);
}

static void test_failed(int backend)
{
    struct mmc_requests batch = {0};
    struct flight old, fresh;
    struct rig rig;

    set_up(&rig, backend, SIZE);
    set_bits(&rig, 0, 1);
    CHECK_EQUAL(take_off(&rig, &old, MMC_WRITE, 0, page, CLUSTER, &batch), MMC_STARTED);
    CHECK_EQUAL(take_off(&rig, &fresh, MMC_WRITE, CLUSTER, page, CLUSTER, &batch), MMC_STARTED);
    mmc_path_fail(rig.path);
    CHECK_EQUAL(land(&rig, &fresh, &batch), -EIO);
    CHECK_EQUAL(land(&rig, &old, &batch), CLUSTER);
    CHECK_EQUAL(bits_set(&rig), 1);
    CHECK_EQUAL(writes(&rig, 'w', 0, CLUSTER), 0);
    shows(&rig, 'b', CLUSTER, CLUSTER);
    tear_down(&rig);
}

static void test_errors(int backend)
{
    const struct rlimit small = {CLUSTER, RLIM_INFINITY};
    struct mmc_requests batch = {0};
    struct flight flight;
    struct rlimit before;
    struct rig rig;
    char name[64];
    int fd;

    set_up(&rig, backend, SIZE);
    fd = rig.layers[0].fd;
    snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
    rig.layers[0].fd = open(name, O_RDONLY);
    CHECK(rig.layers[0].fd >= 0);
    apply(&rig, MMC_PATH_WRITES | MMC_PATH_ALLOCATES);
    CHECK_EQUAL(writes(&rig, 'w', 0, CLUSTER), -EBADF);
    CHECK_EQUAL(take_off(&rig, &flight, MMC_WRITE, 0, page, CLUSTER, &batch), MMC_STARTED);
    CHECK_EQUAL(land(&rig, &flight, &batch), -EBADF);
    close(rig.layers[0].fd);
    rig.layers[0].fd = fd;
    apply(&rig, MMC_PATH_WRITES | MMC_PATH_ALLOCATES);
    signal(SIGXFSZ, SIG_IGN);
    CHECK_EQUAL(getrlimit(RLIMIT_FSIZE, &before), 0);
    CHECK_EQUAL(setrlimit(RLIMIT_FSIZE, &small), 0);
    CHECK_EQUAL(writes(&rig, 'w', CLUSTER, CLUSTER), -EFBIG);
    CHECK_EQUAL(setrlimit(RLIMIT_FSIZE, &before), 0);
    CHECK_EQUAL(bits_set(&rig), 0);
    CHECK_EQUAL(mmc_path_busy(rig.path, 0, ALL, MMC_HOLD_ALL), 0);
    shows(&rig, 'b', 0, 2 * CLUSTER);
    tear_down(&rig);
}

static void test_many_runs(int backend)
{
    struct mmc_requests batch = {0};
    struct flight flight;
    struct rig rig;
    uint64_t i;

    set_up(&rig, backend, SIZE);
    for (i = 0; i < CLUSTERS; i += 2)
        set_bits(&rig, i, 1);
    CHECK_EQUAL(take_off(&rig, &flight, MMC_READ, 40 * CLUSTER, page, 14 * CLUSTER, &batch),
                MMC_STARTED);
    CHECK_EQUAL(land(&rig, &flight, &batch), 14 * CLUSTER);
    for (i = 0; i < 14; i++) /* the base ends at cluster 48 */
        CHECK_EQUAL(page[i * CLUSTER + i], i % 2 == 0 ? 'g' : i < 8 ? 'b' : 0);
    CHECK_EQUAL(take_off(&rig, &flight, MMC_READ, 0, page, SIZE, &batch), MMC_MISS);
    CHECK_EQUAL(mmc_path_busy(rig.path, 0, ALL, MMC_HOLD_ALL), 0);
    tear_down(&rig);
}

/* ---- threads ------------------------------------------------------------ */

#define THREADS 4
#define STEPS 1500
/* Sectors of the first clusters belong to all threads in turn, later clusters each to one. */
#define SHARED 6

struct crowd {
    struct rig rig;
    pthread_mutex_t slow; /* one long way at a time, as claims have it */
    int is_over;
};

struct member {
    struct crowd *crowd;
    unsigned number;
    uint64_t seed;
    unsigned char tags[SIZE / SECTOR]; /* of the sectors that are this one's; 0: never written */
};

static bool is_mine(const struct member *member, uint64_t sector)
{
    const uint64_t cluster = sector * SECTOR / CLUSTER;

    return (cluster < SHARED ? sector : cluster) % THREADS == member->number;
}

/* Writes a whole cluster back with one sector changed, or what the base has and that. */
static void write_slowly(struct crowd *crowd, uint64_t offset, const char *from, uint64_t length)
{
    const uint64_t first = offset / CLUSTER, start = first * CLUSTER;
    struct rig *rig = &crowd->rig;
    char content[CLUSTER];
    struct mmc_run run;
    struct mmc_done done;
    int64_t hold;

    pthread_mutex_lock(&crowd->slow);
    hold = mmc_path_hold(rig->path, start, start + CLUSTER, MMC_HOLD_WRITES);
    while (mmc_path_busy(rig->path, start, start + CLUSTER, MMC_HOLD_WRITES))
        CHECK(mmc_queue_turn(rig->queue, NULL, 0, &done, 1, 0) <= 0);
    CHECK_EQUAL(mmc_view_bit_runs(rig->bits, 0, first, 1, &run, 1), 1);
    memset(content, 0, sizeof(content));
    if (run.value || start < SIZE / 2)
        CHECK_EQUAL(pread(rig->layers[run.value ? 0 : 1].fd, content, CLUSTER, (off_t)start),
                    CLUSTER);
    if (random_below(4) == 0)
        usleep(200); /* a hit that was not waited for is overwritten */
    memcpy(content + (offset - start), from, length);
    CHECK_EQUAL(pwrite(rig->layers[0].fd, content, CLUSTER, (off_t)start), CLUSTER);
    CHECK_EQUAL(mmc_view_bits_write(rig->bits, 0, first, 1, 1), 0);
    mmc_path_release(rig->path, hold);
    pthread_mutex_unlock(&crowd->slow);
}

/* One transfer, in this thread or by the queue: length, 0 for a miss. */
static int64_t transfer(struct rig *rig, int code, uint64_t offset, char *memory, uint64_t length)
{
    struct mmc_requests batch = {0};
    struct flight flight;

    if (random_below(2))
        return mmc_path_transfer(rig->path, code, offset, memory, length);
    switch (take_off(rig, &flight, code, offset, memory, length, &batch)) {
    case MMC_STARTED:
        if (random_below(16) == 0)
            usleep(100); /* a holder has to wait that long */
        return land(rig, &flight, &batch);
    case MMC_ZEROS:
        memset(memory, 0, length);
        return (int64_t)length;
    default:
        return 0;
    }
}

static void check_sector(const struct member *member, uint64_t sector, const char *found)
{
    const char base = sector * SECTOR < SIZE / 2 ? 'b' : 0;
    const char expected = member->tags[sector] ? (char)member->tags[sector] : base;
    unsigned i;

    for (i = 0; i < SECTOR; i++)
        CHECK_EQUAL(found[i], expected);
}

static void step(struct member *member)
{
    struct crowd *crowd = member->crowd;
    uint64_t sector, length = SECTOR, i;
    char memory[CLUSTER];

    const uint64_t most = random_below(2) ? SIZE / SECTOR : SHARED * CLUSTER / SECTOR;

    do
        sector = random_below(most);
    while (!is_mine(member, sector));
    if (sector >= SHARED * CLUSTER / SECTOR && random_below(2)) {
        sector -= sector % (CLUSTER / SECTOR);
        length = CLUSTER;
    }
    if (random_below(3) == 0) {
        if (transfer(&crowd->rig, MMC_READ, sector * SECTOR, memory, length))
            for (i = 0; i < length / SECTOR; i++)
                check_sector(member, sector + i, memory + i * SECTOR);
        return;
    }
    const unsigned char tag = (unsigned char)(1 + random_below(255));
    memset(memory, tag, length);
    if (random_below(8) == 0 ||
        !transfer(&crowd->rig, MMC_WRITE, sector * SECTOR, memory, length))
        write_slowly(crowd, sector * SECTOR, memory, length);
    memset(member->tags + sector, tag, length / SECTOR);
}

static void *live(void *context)
{
    struct member *member = context;
    unsigned i;

    random_state = member->seed;
    for (i = 0; i < STEPS; i++)
        step(member);
    return NULL;
}

/* Looks at the bits while they change: runs are never empty, have no gaps, and differ in turn. */
static void *watch(void *context)
{
    struct crowd *crowd = context;
    struct mmc_run runs[CLUSTERS], taken[4];
    char copy[512];

    while (!__atomic_load_n(&crowd->is_over, __ATOMIC_ACQUIRE)) {
        const int n = mmc_view_bit_runs(crowd->rig.bits, 0, 1, CLUSTERS - 1, runs, CLUSTERS);
        uint64_t at = 1;
        int i;

        CHECK(n > 0);
        for (i = 0; i < n; i++) {
            CHECK_EQUAL(runs[i].start, at);
            CHECK(runs[i].count > 0);
            CHECK(i == 0 || runs[i].value != runs[i - 1].value);
            at += runs[i].count;
        }
        CHECK_EQUAL(at, CLUSTERS);
        CHECK(mmc_view_snapshot(crowd->rig.bits, 0, CLUSTERS / 8, taken, 4, copy, 512) >= 0);
        mmc_path_take_written(crowd->rig.path);
    }
    return NULL;
}

static void test_threads(int backend)
{
    struct member *members = calloc(THREADS, sizeof(*members));
    struct crowd crowd = {.slow = PTHREAD_MUTEX_INITIALIZER};
    pthread_t threads[THREADS], watcher;
    uint64_t sector;
    unsigned i;

    CHECK(members);
    set_up(&crowd.rig, backend, SIZE);
    CHECK_EQUAL(pthread_create(&watcher, NULL, watch, &crowd), 0);
    for (i = 0; i < THREADS; i++) {
        members[i].crowd = &crowd;
        members[i].number = i;
        members[i].seed = test_seed * 977 + i * 2 + 1;
        CHECK_EQUAL(pthread_create(&threads[i], NULL, live, &members[i]), 0);
    }
    for (i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    __atomic_store_n(&crowd.is_over, 1, __ATOMIC_RELEASE);
    pthread_join(watcher, NULL);
    CHECK_EQUAL(mmc_path_busy(crowd.rig.path, 0, ALL, MMC_HOLD_ALL), 0);
    for (sector = 0; sector < SIZE / SECTOR; sector++) {
        for (i = 0; !is_mine(&members[i], sector); i++)
            ;
        CHECK_EQUAL(reads(&crowd.rig, sector * SECTOR, SECTOR), SECTOR);
        check_sector(&members[i], sector, page);
    }
    free(members);
    tear_down(&crowd.rig);
}

/* ---- forks -------------------------------------------------------------- */

static void *hammer(void *context)
{
    struct crowd *crowd = context;

    while (!__atomic_load_n(&crowd->is_over, __ATOMIC_ACQUIRE))
        mmc_path_release(crowd->rig.path,
                         mmc_path_hold(crowd->rig.path, 0, CLUSTER, MMC_HOLD_WRITES));
    return NULL;
}

/* What a child may still call by accident does nothing, and waits for no lock that a thread of the
 * parent held when it was forked. */
static void *of_child(struct rig *rig)
{
    struct mmc_requests batch = {0};
    struct flight flight;

    alarm(20);
    mmc_path_release(rig->path, mmc_path_hold(rig->path, 0, ALL, MMC_HOLD_ALL));
    mmc_path_await(rig->path, 1);
    mmc_path_fail(rig->path);
    CHECK(!mmc_path_is_awaited(rig->path));
    CHECK_EQUAL(mmc_path_busy(rig->path, 0, ALL, MMC_HOLD_ALL), 0);
    CHECK_EQUAL(mmc_path_take_written(rig->path), 0);
    CHECK_EQUAL(mmc_path_set(rig->path, 0, NULL, 0, 0), 0);
    CHECK_EQUAL(reads(rig, 0, CLUSTER), -EBADF);
    CHECK_EQUAL(take_off(rig, &flight, MMC_READ, 0, page, CLUSTER, &batch), MMC_MISS);
    mmc_path_close(rig->path);
    _exit(0);
}

static void test_no_path(void)
{
    mmc_path_release(NULL, mmc_path_hold(NULL, 0, ALL, MMC_HOLD_ALL));
    mmc_path_await(NULL, 1);
    mmc_path_fail(NULL);
    CHECK_EQUAL(mmc_path_busy(NULL, 0, ALL, MMC_HOLD_ALL), 0);
    CHECK_EQUAL(mmc_path_take_written(NULL), 0);
    CHECK_EQUAL(mmc_path_set(NULL, 0, NULL, 0, 0), 0);
    CHECK_EQUAL(mmc_path_transfer(NULL, MMC_READ, 0, page, CLUSTER), -EBADF);
    mmc_path_close(NULL);
}

static void test_forks(void)
{
    struct crowd crowd = {0};
    pthread_t thread;
    int i, status;

    set_up(&crowd.rig, MMC_BACKEND_POOL, SIZE);
    CHECK_EQUAL(pthread_create(&thread, NULL, hammer, &crowd), 0);
    for (i = 0; i < 50; i++) {
        const pid_t child = fork();

        if (child == 0)
            of_child(&crowd.rig);
        CHECK_EQUAL(waitpid(child, &status, 0), child);
        CHECK_EQUAL(status, 0);
    }
    __atomic_store_n(&crowd.is_over, 1, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    CHECK_EQUAL(reads(&crowd.rig, 0, CLUSTER), CLUSTER);
    tear_down(&crowd.rig);
}

/* ------------------------------------------------------------------------- */

static void test_backend(int backend)
{
    RUN(test_holds(backend));
    RUN(test_what_a_sync_must_know(backend));
    RUN(test_failed(backend));
    RUN(test_errors(backend));
    RUN(test_many_runs(backend));
    RUN(test_threads(backend));
}

/* test_path [SEED] [pool]: with "pool" that back end alone (ThreadSanitizer sees neither what the
 * kernel orders nor where a caught fault jumps to). */
int main(int argc, char **argv)
{
    test_begin(argc, argv);
    test_backend(MMC_BACKEND_POOL);
    if (argc > 2)
        return 0;
    RUN(test_reads());
    RUN(test_writes());
    RUN(test_what_the_caller_allows());
    RUN(test_alignment_and_ends());
    RUN(test_bits_that_cannot_be_read());
    RUN(test_no_path());
    RUN(test_forks());
    test_backend(MMC_BACKEND_AUTO);
    return 0;
}
