/* SPDX-License-Identifier: MIT
 *
 * Memory for transfers: against a model, shared by threads, across forks.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
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
        return 1 + random_below(9 * MIB);
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
    uint64_t alignment = 4096;
    int i;

    piece->length = random_length();
    piece->bytes = mmc_pages_take(piece->length);
    CHECK(piece->bytes);
    while (alignment < piece->length && alignment < 2 * MIB)
        alignment *= 2;
    CHECK_EQUAL((uintptr_t)piece->bytes % alignment, 0);
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

static uint64_t rounded(uint64_t length)
{
    uint64_t block = 4096;

    if (length > 4 * MIB)
        return (length + 2 * MIB - 1) & ~(2 * MIB - 1);
    while (block < length)
        block *= 2;
    return block;
}

static void check_counts(const struct piece *pieces)
{
    uint64_t held, taken, expected = 0;
    int i;

    for (i = 0; i < SLOTS; i++)
        expected += pieces[i].length ? rounded(pieces[i].length) : 0;
    mmc_pages_count(&held, &taken);
    CHECK_EQUAL(taken, expected);
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

/* However a chunk was cut up and in whatever order it comes back, it is whole again. */
static void test_halves_are_joined(void)
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
    CHECK_EQUAL(after, before);
    for (i = 0; i < 3; i++)
        CHECK_EQUAL(mmc_pages_give(leaves[i]), 1);
}

static void test_what_is_foreign(void)
{
    char *large = mmc_pages_take(5 * MIB);
    char outside;

    CHECK_EQUAL(mmc_pages_give(&outside), 0);
    CHECK_EQUAL(mmc_pages_give(NULL), 0);
    CHECK(!mmc_pages_take(UINT64_MAX));
    CHECK(!mmc_pages_take(UINT64_C(1) << 62));
    CHECK_EQUAL(mmc_pages_give(large), 1);
    CHECK_EQUAL(mmc_pages_give(large), 0);
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
    RUN(test_halves_are_joined());
    RUN(test_what_is_foreign());
    /* ThreadSanitizer has no word on forks of threaded programs but a warning. */
    RUN(test_threads_and_forks(argc > 2 ? 0 : 200));
    return 0;
}
