/* SPDX-License-Identifier: MIT
 *
 * Loads on paths, on both back ends: which requests are made, misses, flushes, errors, threads.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>

#include "queue.h"
#include "test.h"

#define BLOCK 4096
#define PLACES 512
#define START (3 * BLOCK)
#define SIZE (START + PLACES * BLOCK)

struct rig {
    struct mmc_queue *queue;
    struct mmc_path *path;
    int fd;
};

static struct mmc_layer layer_on(int fd)
{
    return (struct mmc_layer){.fd = fd,
                              .size = SIZE,
                              .read_end = SIZE,
                              .write_end = SIZE,
                              .cluster_shift = 12,
                              .file_align = 1,
                              .memory_align = 1};
}

static void set_up(struct rig *rig, int backend, const struct mmc_layer *layer)
{
    int error = 1;

    rig->fd = scratch_file(SIZE);
    rig->queue = mmc_queue_open(backend, 16, 0, &error);
    CHECK_EQUAL(error, 0);
    rig->path = mmc_path_open(rig->queue, &error);
    CHECK_EQUAL(error, 0);
    if (layer) {
        struct mmc_layer own = *layer;

        if (own.fd == 0)
            own.fd = rig->fd;
        CHECK_EQUAL(mmc_path_set(rig->path, SIZE, &own, 1, MMC_PATH_WRITES), 0);
    }
}

static void tear_down(struct rig *rig)
{
    mmc_queue_close(rig->queue);
    mmc_path_close(rig->path);
    close(rig->fd);
}

static struct mmc_load_plan plan_of(uint64_t count)
{
    return (struct mmc_load_plan){.start = START,
                                  .length = PLACES * BLOCK,
                                  .first = random_below(PLACES) * BLOCK,
                                  .step = random_below(2 * PLACES) * BLOCK,
                                  .block = BLOCK,
                                  .count = count,
                                  .seed = test_seed,
                                  .depth = 1 + (uint32_t)random_below(40),
                                  .read_percent = 0,
                                  .is_random = 1,
                                  .pattern = 0x5a,
                                  .drains = 1};
}

static struct mmc_load *open_load(const struct rig *rig, const struct mmc_load_plan *plan)
{
    int error = 1;
    struct mmc_load *load = mmc_load_open(rig->path, plan, &error);

    CHECK_EQUAL(error, 0);
    CHECK(load);
    return load;
}

/* Runs on until the load wants something. */
static int run(struct mmc_load *load)
{
    uint32_t collected = 0;
    struct mmc_done done;
    int why = 0;

    while (why == 0)
        why = mmc_load_run(load, 100, &done, 1, &collected);
    CHECK_EQUAL(collected, 0);
    CHECK(why > 0);
    return why;
}

static uint64_t finished(struct mmc_load *load)
{
    struct mmc_load_error error = {.number = 1};
    const uint64_t count = mmc_load_finished(load, &error);

    CHECK_EQUAL(error.number, 0);
    return count;
}

/* ---- the contract's arithmetic, a second time --------------------------- */

static uint64_t draw(uint64_t seed, uint64_t number)
{
    uint64_t value = seed + (number + 1) * UINT64_C(0x9e3779b97f4a7c15);

    value = (value ^ (value >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    value = (value ^ (value >> 27)) * UINT64_C(0x94d049bb133111eb);
    return value ^ (value >> 31);
}

static uint64_t below(uint64_t value, uint64_t limit)
{
    return (uint64_t)((unsigned __int128)value * limit >> 64);
}

/* Which places the first requests of the plan write. */
static uint64_t expect(const struct mmc_load_plan *plan, unsigned char *is_written)
{
    uint64_t writes = 0;
    uint64_t place;
    uint64_t n;

    memset(is_written, 0, PLACES);
    for (n = 0; n < plan->count; n++) {
        if (below(draw(plan->seed, 2 * n + 1), 100) < plan->read_percent)
            continue;
        place = plan->is_random ? below(draw(plan->seed, 2 * n), PLACES)
                                : (plan->first + n * plan->step) / BLOCK % PLACES;
        is_written[place] = 1;
        writes++;
    }
    return writes;
}

static void check_file(int fd, const struct mmc_load_plan *plan, const unsigned char *is_written)
{
    unsigned char block[BLOCK];
    unsigned char wanted[BLOCK];
    uint64_t i;

    for (i = 0; i < PLACES; i++) {
        memset(wanted, is_written[i] ? plan->pattern : 0, BLOCK);
        CHECK_EQUAL(pread(fd, block, BLOCK, (off_t)(START + i * BLOCK)), BLOCK);
        CHECK_EQUAL(memcmp(block, wanted, BLOCK), 0);
    }
    memset(wanted, 0, BLOCK);
    CHECK_EQUAL(pread(fd, block, BLOCK, START - BLOCK), BLOCK);
    CHECK_EQUAL(memcmp(block, wanted, BLOCK), 0);
}

static void check_times(const struct mmc_times *times, uint64_t count)
{
    uint64_t counted = 0;
    uint32_t i;

    CHECK_EQUAL(times->count, count);
    for (i = 0; i < MMC_TIME_BUCKETS; i++)
        counted += times->buckets[i];
    CHECK_EQUAL(counted, count);
    if (!count)
        return;
    CHECK(times->least > 0 && times->least <= times->most);
    CHECK(times->total >= times->least * count && times->total <= times->most * count);
}

/* ---- tests -------------------------------------------------------------- */

static void test_requests(int backend, int is_random, uint32_t read_percent)
{
    const struct mmc_layer layer = layer_on(0);
    struct mmc_load_plan plan = plan_of(100 + random_below(900));
    unsigned char is_written[PLACES];
    struct mmc_load *load;
    struct rig rig;
    uint64_t writes;

    plan.is_random = is_random;
    plan.read_percent = read_percent;
    set_up(&rig, backend, &layer);
    load = open_load(&rig, &plan);
    CHECK_EQUAL(run(load), MMC_LOAD_OVER);
    writes = expect(&plan, is_written);
    CHECK_EQUAL(finished(load), plan.count);
    check_times(mmc_load_times(load, MMC_WRITE), writes);
    check_times(mmc_load_times(load, MMC_READ), plan.count - writes);
    check_file(rig.fd, &plan, is_written);
    mmc_load_close(load);
    tear_down(&rig);
}

/* One after the other, none is on its way in the time of another: together they take no longer than
 * all of it. */
static void test_times_of_one_at_a_time(int backend)
{
    const struct mmc_layer layer = layer_on(0);
    struct mmc_load_plan plan = plan_of(1000);
    struct mmc_load *load;
    struct rig rig;
    uint64_t began;

    plan.depth = 1;
    set_up(&rig, backend, &layer);
    load = open_load(&rig, &plan);
    began = mmc_clock_ns();
    CHECK_EQUAL(run(load), MMC_LOAD_OVER);
    CHECK(mmc_load_times(load, MMC_WRITE)->total <= mmc_clock_ns() - began);
    mmc_load_close(load);
    tear_down(&rig);
}

/* Without a table everything is a miss, and the caller is asked for each exactly once. */
static void test_misses(int backend)
{
    struct mmc_load_plan plan = plan_of(200);
    unsigned char is_written[PLACES];
    struct mmc_miss misses[8];
    struct mmc_load *load;
    struct rig rig;
    uint32_t n;
    uint32_t i;
    int why;

    set_up(&rig, backend, NULL);
    load = open_load(&rig, &plan);
    while ((why = run(load)) == MMC_LOAD_MISSED) {
        while ((n = mmc_load_misses(load, misses, 8))) {
            for (i = 0; i < n; i++) {
                CHECK_EQUAL(misses[i].code, MMC_WRITE);
                CHECK_EQUAL(pwrite(rig.fd, (void *)(uintptr_t)misses[i].address, BLOCK,
                                   (off_t)misses[i].offset),
                            BLOCK);
                mmc_load_done(load, misses[i].slot, BLOCK);
            }
        }
    }
    CHECK_EQUAL(why, MMC_LOAD_OVER);
    CHECK_EQUAL(finished(load), 200);
    check_times(mmc_load_times(load, MMC_WRITE), expect(&plan, is_written));
    check_file(rig.fd, &plan, is_written);
    mmc_load_close(load);
    tear_down(&rig);
}

/* Every `flush_every` writes the load pauses until it is told to go on. */
static void test_flushes(int backend, int drains)
{
    const struct mmc_layer layer = layer_on(0);
    struct mmc_load_plan plan = plan_of(100);
    struct mmc_load *load;
    struct rig rig;
    unsigned flushes = 0;
    int why;

    plan.flush_every = 30;
    plan.drains = drains;
    set_up(&rig, backend, &layer);
    load = open_load(&rig, &plan);
    while ((why = run(load)) == MMC_LOAD_FLUSH) {
        uint32_t collected;
        struct mmc_done done;

        flushes++;
        if (drains)
            CHECK_EQUAL(finished(load), flushes * 30);
        CHECK(finished(load) <= flushes * 30);
        /* Until then nothing is begun. */
        mmc_load_run(load, 1, &done, 1, &collected);
        CHECK(finished(load) <= flushes * 30);
        if (drains) { /* nor is a flush asked for twice */
            mmc_load_busy(load, 1);
            CHECK_EQUAL(mmc_load_run(load, 1, &done, 1, &collected), 0);
            mmc_load_busy(load, -1);
        }
        mmc_load_resume(load);
    }
    CHECK_EQUAL(why, MMC_LOAD_OVER);
    CHECK_EQUAL(flushes, 3);
    CHECK_EQUAL(finished(load), 100);
    mmc_load_close(load);
    tear_down(&rig);
}

static void test_error(int backend)
{
    const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    const struct mmc_layer layer = layer_on(null);
    struct mmc_load_plan plan = plan_of(UINT64_MAX);
    struct mmc_load *load;
    struct mmc_load_error error = {0};
    struct rig rig;

    set_up(&rig, backend, &layer);
    load = open_load(&rig, &plan);
    CHECK_EQUAL(run(load), MMC_LOAD_OVER);
    CHECK_EQUAL(mmc_load_finished(load, &error), 0);
    CHECK_EQUAL(error.number, -EBADF);
    CHECK_EQUAL(error.code, MMC_WRITE);
    CHECK(error.offset >= START && error.offset < SIZE && error.offset % BLOCK == 0);
    check_times(mmc_load_times(load, MMC_WRITE), 0);
    mmc_load_close(load);
    tear_down(&rig);
    close(null);
}

/* A layer that ends before the range: zeros, which nothing has to be asked for. */
static void test_zeros(int backend)
{
    struct mmc_layer layer = layer_on(0);
    struct mmc_load_plan plan = plan_of(1000);
    struct mmc_load *load;
    struct rig rig;

    layer.size = BLOCK;
    plan.read_percent = 100;
    set_up(&rig, backend, &layer);
    load = open_load(&rig, &plan);
    CHECK_EQUAL(run(load), MMC_LOAD_OVER);
    CHECK_EQUAL(finished(load), 1000);
    mmc_load_close(load);
    tear_down(&rig);
}

/* A load without an end is stopped, and foreign completions come out. */
static void test_stop_and_foreign_requests(int backend)
{
    const struct mmc_layer layer = layer_on(0);
    struct mmc_load_plan plan = plan_of(UINT64_MAX);
    const struct mmc_op op = {.token = 77, .code = MMC_NOP};
    uint32_t collected = 0;
    struct mmc_load *load;
    struct mmc_done done = {0};
    struct rig rig;

    set_up(&rig, backend, &layer);
    load = open_load(&rig, &plan);
    CHECK_EQUAL(mmc_load_run(load, 20, &done, 1, &collected), 0);
    CHECK(finished(load) > 0);
    CHECK_EQUAL(mmc_queue_turn(rig.queue, &op, 1, NULL, 0, 0), 0);
    while (!collected)
        CHECK_EQUAL(mmc_load_run(load, 100, &done, 1, &collected), 0);
    CHECK_EQUAL(done.token, 77);
    mmc_load_stop(load);
    CHECK_EQUAL(run(load), MMC_LOAD_OVER);
    check_times(mmc_load_times(load, MMC_WRITE), finished(load));
    mmc_load_close(load);
    tear_down(&rig);
}

/* ---- several loads over one queue --------------------------------------- */

#define THREADS 3
#define EACH 2000

static void *run_short_slices(void *argument)
{
    struct mmc_load *load = argument;
    uint32_t collected = 0;
    struct mmc_done done;

    while (!(mmc_load_run(load, 2, &done, 1, &collected) & MMC_LOAD_OVER))
        continue;
    return NULL;
}

static void test_threads(int backend)
{
    const struct mmc_layer layer = layer_on(0);
    struct mmc_load_plan plan = plan_of(EACH);
    struct mmc_load *loads[THREADS];
    pthread_t threads[THREADS];
    struct rig rig;
    int i;

    plan.read_percent = 50;
    plan.is_shared = 1;
    set_up(&rig, backend, &layer);
    for (i = 0; i < THREADS; i++) {
        plan.seed += 1;
        loads[i] = open_load(&rig, &plan);
        CHECK_EQUAL(pthread_create(&threads[i], NULL, run_short_slices, loads[i]), 0);
    }
    for (i = 0; i < THREADS; i++) {
        CHECK_EQUAL(pthread_join(threads[i], NULL), 0);
        CHECK_EQUAL(finished(loads[i]), EACH);
        mmc_load_close(loads[i]);
    }
    tear_down(&rig);
}

static void test_plans(void)
{
    struct mmc_load_plan plan = plan_of(1);
    struct rig rig;
    int error = 0;

    set_up(&rig, MMC_BACKEND_POOL, NULL);
    plan.length = plan.block - 1;
    CHECK(!mmc_load_open(rig.path, &plan, &error));
    CHECK_EQUAL(error, -EINVAL);
    plan = plan_of(1);
    plan.first = plan.length - plan.block + 1;
    CHECK(!mmc_load_open(rig.path, &plan, &error));
    CHECK_EQUAL(error, -EINVAL);
    plan = plan_of(1);
    plan.start = INT64_MAX - plan.length + 1;
    CHECK(!mmc_load_open(rig.path, &plan, &error));
    CHECK_EQUAL(error, -EINVAL);
    plan = plan_of(1);
    plan.start = 0;
    plan.block = plan.length = INT64_MAX - 5;
    plan.first = 0;
    CHECK(!mmc_load_open(rig.path, &plan, &error));
    CHECK_EQUAL(error, -ENOMEM);
    mmc_load_close(NULL);
    tear_down(&rig);
}

static void test_all(int backend)
{
    RUN(test_requests(backend, 1, 0));
    RUN(test_requests(backend, 1, 100));
    RUN(test_requests(backend, 1, 70));
    RUN(test_requests(backend, 0, 0));
    RUN(test_requests(backend, 0, 30));
    RUN(test_times_of_one_at_a_time(backend));
    RUN(test_misses(backend));
    RUN(test_flushes(backend, 1));
    RUN(test_flushes(backend, 0));
    RUN(test_error(backend));
    RUN(test_zeros(backend));
    RUN(test_stop_and_foreign_requests(backend));
    RUN(test_threads(backend));
}

int main(int argc, char **argv)
{
    int error = 0;
    struct mmc_queue *queue;

    test_begin(argc, argv);
    RUN(test_plans());
    test_all(MMC_BACKEND_POOL);
    /* The ring's memory is the kernel's: what it writes no sanitizer of threads sees. */
    if (argc > 2 && strcmp(argv[2], "pool") == 0)
        return 0;
    queue = mmc_queue_open(MMC_BACKEND_URING, 1, 0, &error);
    mmc_queue_close(queue);
    if (error == 0)
        test_all(MMC_BACKEND_URING);
    return 0;
}
