/* SPDX-License-Identifier: MIT
 *
 * The least a test program needs. A failed CHECK says where and what, then aborts, so
 * that a sanitizer or a debugger sees the place.
 */
#ifndef MMC_TEST_H
#define MMC_TEST_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "mmc.h"

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s is false (seed %llu)\n", __FILE__, __LINE__, #condition,    \
                    (unsigned long long)test_seed);                                                \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

#define CHECK_EQUAL(left, right)                                                                   \
    do {                                                                                           \
        const long long left_ = (long long)(left);                                                 \
        const long long right_ = (long long)(right);                                               \
        if (left_ != right_) {                                                                     \
            fprintf(stderr, "%s:%d: %s is %lld, not %lld (seed %llu)\n", __FILE__, __LINE__,       \
                    #left, left_, right_, (unsigned long long)test_seed);                          \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

#define RUN(test)                                                                                  \
    do {                                                                                           \
        test;                                                                                      \
        printf("ok %s\n", #test);                                                                  \
    } while (0)

static uint64_t test_seed;
static _Thread_local uint64_t random_state;

/* Takes the seed from the first argument, or from the clock. */
static inline void test_begin(int argc, char **argv)
{
    test_seed = argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)time(NULL);
    random_state = test_seed * 2 + 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    alarm(300); /* a request that is lost hangs its test */
    printf("%s: seed %llu\n", argv[0], (unsigned long long)test_seed);
}

/* xorshift64* (Vigna 2016): repeatable from the printed seed. */
static inline uint64_t random_below(uint64_t limit)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (random_state * UINT64_C(2685821657736338717) >> 11) % limit;
}

static inline void random_fill(void *memory, uint64_t length)
{
    unsigned char *bytes = memory;
    uint64_t i;

    for (i = 0; i < length; i++)
        bytes[i] = (unsigned char)random_below(256);
}

/* A file without a name; goes with its descriptor. */
static inline int scratch_file(uint64_t size)
{
    char name[] = "/tmp/mmc-test-XXXXXX";
    int fd = mkstemp(name);

    CHECK(fd >= 0);
    unlink(name);
    CHECK(ftruncate(fd, (off_t)size) == 0);
    return fd;
}

#endif
