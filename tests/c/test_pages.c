/* SPDX-License-Identifier: MIT
 *
 * Memory for transfers: against a model, shared by threads, across forks.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "pages.h"
#include "test.h"

#define MIB (UINT64_C(1) << 20)
#define SLOTS 120

struct piece {
    unsigned char *bytes;
    uint64_t length;
    unsigned char mark;
};

static uint64_t random_length(void)
{
    const uint64_t kind = random_below(20);

    if (kind == 0)
        return 1 + random_below(20 * MIB);
    if (kind < 5)
        return 1 + random_below(2 * MIB);
    return 1 + random_below(64 << 10);
}

/* The ends and a place in between: writing all of it would test memset. */
static void mark(struct piece *piece, unsigned char value)
{
    piece->mark = value;
    piece->bytes[0] = value;
    piece->bytes[piece->length / 2] = value;
    piece->bytes[piece->length - 1] = value;
}

static void check_mark(const struct piece *piece)
{
    CHECK_EQUAL(piece->bytes[0], piece->mark);
    CHECK_EQUAL(piece->bytes[piece->length / 2], piece->mark);
    CHECK_EQUAL(piece->bytes[piece->length - 1], piece->mark);
}

static int overlap(const struct piece *a, const struct piece *b)
{
    return a->bytes < b->bytes + b->length && b->bytes < a->bytes + a->length;
}

static void take(struct piece *pieces, struct piece *piece)
{
    int i;

    piece->length = random_length();
    piece->bytes = mmc_pages_take(piece->length);
    CHECK(piece->bytes);
    CHECK_EQUAL((uintptr_t)piece->bytes % 4096, 0);
    for (i = 0; i < SLOTS; i++)
        CHECK(&pieces[i] == piece || !pieces[i].length || !overlap(&pieces[i], piece));
    mark(piece, (unsigned char)random_below(256));
}

static void give(struct piece *piece)
{
    check_mark(piece);
    CHECK_EQUAL(mmc_pages_give(piece->bytes), 1);
    piece->length = 0;
}

/* No more is taken than was asked for, but for the last 4 KiB, and an eighth where a large one is
 * used again. */
static void check_counts(const struct piece *pieces)
{
    uint64_t held, taken, least = 0, most = 0;
    int i;

    for (i = 0; i < SLOTS; i++) {
        const uint64_t rounded = (pieces[i].length + 4095) & ~UINT64_C(4095);

        least += rounded;
        most += rounded + (rounded > 8 * MIB ? rounded / 8 : 0);
    }
    mmc_pages_count(&held, &taken);
    CHECK(taken >= least && taken <= most);
    CHECK(held >= taken);
}

static void test_random_steps(void)
{
    struct piece pieces[SLOTS] = {0};
    uint64_t held, taken;
    int step, i;

    for (step = 0; step < 20000; step++) {
        struct piece *piece = &pieces[random_below(SLOTS)];

        if (piece->length)
            give(piece);
        else
            take(pieces, piece);
        if (step % 100 == 0)
            check_counts(pieces);
    }
    for (i = 0; i < SLOTS; i++) {
        if (pieces[i].length)
            give(&pieces[i]);
    }
    mmc_pages_count(&held, &taken);
    CHECK_EQUAL(taken, 0);
    CHECK(held <= MMC_PAGES_KEPT_MAX);
}

/* However a chunk was cut up and in whatever order it comes back, it serves large ones again. */
static void test_runs_are_joined(void)
{
    void *leaves[3 * 1024];
    uint64_t before, after, taken;
    int i;

    for (i = 0; i < 3 * 1024; i++)
        leaves[i] = mmc_pages_take(4096);
    mmc_pages_count(&before, &taken);
    CHECK_EQUAL(taken, 12 * MIB);
    for (i = 3 * 1024; i > 0; i--) {
        const uint64_t other = random_below((uint64_t)i);
        void *leaf = leaves[other];

        leaves[other] = leaves[i - 1];
        CHECK_EQUAL(mmc_pages_give(leaf), 1);
    }
    for (i = 0; i < 3; i++)
        leaves[i] = mmc_pages_take(4 * MIB);
    mmc_pages_count(&after, &taken);
    CHECK(after <= before + 4 * MIB); /* its 14 MiB in a row, and what begins them */
    for (i = 0; i < 3; i++)
        CHECK_EQUAL(mmc_pages_give(leaves[i]), 1);
}

/* A burst's memory goes back, also where buffers of other lengths come and go meanwhile. */
static void test_memory_goes_back(void)
{
    static void *buffers[1024];
    uint64_t held, taken;
    int i;

    for (i = 0; i < 1024; i++)
        buffers[i] = mmc_pages_take(i % 2 ? 260 << 10 : 100 << 10);
    for (i = 0; i < 1024; i += 2)
        CHECK_EQUAL(mmc_pages_give(buffers[i]), 1);
    for (i = 0; i < 1024; i += 2)
        buffers[i] = mmc_pages_take(20 << 10);
    for (i = 0; i < 1024; i++)
        CHECK_EQUAL(mmc_pages_give(buffers[i]), 1);
    mmc_pages_count(&held, &taken);
    CHECK_EQUAL(taken, 0);
    CHECK(held <= MMC_PAGES_KEPT_MAX);
}

/* Taken and given again and again a large one costs no new memory. */
static void test_large_ones_are_kept(void)
{
    char *first = mmc_pages_take(15 * MIB);
    char *second;

    CHECK_EQUAL(mmc_pages_give(first), 1);
    second = mmc_pages_take(15 * MIB - 5000);
    CHECK(second == first);
    CHECK_EQUAL(mmc_pages_give(second), 1);
    second = mmc_pages_take(9 * MIB);
    CHECK(second != first);
    CHECK_EQUAL(mmc_pages_give(second), 1);
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define IS_PLAIN 1 /* a sanitizer has its own memory and its own way to die */
#endif

#ifdef IS_PLAIN
static int dies(void *again)
{
    const pid_t child = fork();
    int status;

    if (child == 0) {
        const struct rlimit none = {0, 0};

        setrlimit(RLIMIT_CORE, &none);
        mmc_memory_give(again);
        _exit(0);
    }
    CHECK_EQUAL(waitpid(child, &status, 0), child);
    return WIFSIGNALED(status);
}

static void test_given_twice_is_a_crash(void)
{
    char *all[3] = {mmc_pages_take(4 * MIB), mmc_pages_take(70 << 10), mmc_pages_take(9 * MIB)};
    char *neighbour = mmc_pages_take(70 << 10);
    int i;

    for (i = 0; i < 3; i++) {
        CHECK_EQUAL(mmc_pages_give(all[i]), 1);
        CHECK(dies(all[i]));
    }
    CHECK_EQUAL(mmc_pages_give(neighbour), 1);
}

/* Where a chunk has no room in the address space a buffer may still have. */
static void test_little_address_space(void)
{
    struct rlimit before, little;
    unsigned long pages = 0;
    void *taken[64];
    void *buffer;
    FILE *file;
    int count = 0;

    CHECK_EQUAL(getrlimit(RLIMIT_AS, &before), 0);
    file = fopen("/proc/self/statm", "r");
    CHECK(file && fscanf(file, "%lu", &pages) == 1);
    fclose(file);
    little = before;
    little.rlim_cur = pages * 4096 + 3 * MIB;
    CHECK_EQUAL(setrlimit(RLIMIT_AS, &little), 0);
    while (count < 64 && (taken[count] = mmc_pages_take(4 * MIB)))
        count++;
    CHECK(count < 64);
    CHECK(!mmc_pages_take(100 << 10));
    buffer = mmc_memory_take(100 << 10, 4096);
    CHECK(buffer);
    mmc_memory_give(buffer);
    CHECK(!mmc_memory_take(64 * MIB, 4096));
    CHECK_EQUAL(setrlimit(RLIMIT_AS, &before), 0);
    while (count--)
        CHECK_EQUAL(mmc_pages_give(taken[count]), 1);
}
#endif

static void test_trim(void)
{
    char *kept = mmc_pages_take(100 << 10);
    char *small = mmc_pages_take(3 * MIB);
    char *large = mmc_pages_take(20 * MIB);
    uint64_t held, taken;

    memset(kept, 7, 100 << 10);
    CHECK_EQUAL(mmc_pages_give(small), 1);
    CHECK_EQUAL(mmc_pages_give(large), 1);
    mmc_pages_trim();
    mmc_pages_count(&held, &taken);
    CHECK_EQUAL(taken, 100 << 10);
    CHECK(held <= 4 * MIB); /* it may lie across two huge pages */
    CHECK_EQUAL(kept[0] + kept[(100 << 10) - 1], 14);
    CHECK_EQUAL(mmc_pages_give(kept), 1);
    mmc_pages_trim();
    mmc_pages_count(&held, &taken);
    CHECK_EQUAL(held, 0);
}

static void test_what_is_foreign(void)
{
    char *large = mmc_pages_take(50 * MIB);
    char outside;

    CHECK_EQUAL(mmc_pages_give(&outside), 0);
    CHECK_EQUAL(mmc_pages_give(NULL), 0);
    CHECK(!mmc_pages_take(UINT64_MAX));
    CHECK(!mmc_pages_take(UINT64_C(1) << 62));
    CHECK_EQUAL(mmc_pages_give(large), 1);
}

static atomic_bool stopping;

static void *hammer(void *seed)
{
    struct piece pieces[SLOTS] = {0};
    int i;

    random_state = (uintptr_t)seed * 2 + 1;
    while (!stopping) {
        struct piece *piece = &pieces[random_below(SLOTS)];

        if (piece->length)
            give(piece);
        else
            take(pieces, piece);
    }
    for (i = 0; i < SLOTS; i++) {
        if (pieces[i].length)
            give(&pieces[i]);
    }
    return NULL;
}

static void fork_and_use(void)
{
    const pid_t child = fork();
    int status;

    CHECK(child >= 0);
    if (child == 0) {
        alarm(20);
        _exit(mmc_pages_give(mmc_pages_take(100000)) == 1 ? 0 : 1);
    }
    CHECK_EQUAL(waitpid(child, &status, 0), child);
    CHECK_EQUAL(status, 0);
}

/* A child forked in the middle of another thread's call must not wait for that thread. */
static void test_threads_and_forks(int forks)
{
    pthread_t threads[3];
    uint64_t held, taken;
    uintptr_t i;

    for (i = 0; i < 3; i++)
        CHECK_EQUAL(pthread_create(&threads[i], NULL, hammer, (void *)(test_seed + i)), 0);
    while (forks--)
        fork_and_use();
    usleep(100000);
    stopping = true;
    for (i = 0; i < 3; i++)
        CHECK_EQUAL(pthread_join(threads[i], NULL), 0);
    mmc_pages_count(&held, &taken);
    CHECK_EQUAL(taken, 0);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_random_steps());
    RUN(test_runs_are_joined());
    RUN(test_memory_goes_back());
    RUN(test_large_ones_are_kept());
    RUN(test_trim());
    RUN(test_what_is_foreign());
#ifdef IS_PLAIN
    RUN(test_given_twice_is_a_crash());
    RUN(test_little_address_space());
#endif
    /* ThreadSanitizer has no word on forks of threaded programs but a warning. */
    RUN(test_threads_and_forks(argc > 2 ? 0 : 200));
    return 0;
}
