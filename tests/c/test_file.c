/* SPDX-License-Identifier: MIT
 *
 * Buffers, zero scans, fallocate, what O_DIRECT demands.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "test.h"

static void test_buffers(void)
{
    uint64_t alignment;
    int round;
    int error = 1;

    for (round = 0; round < 3; round++) { /* later rounds get kept buffers */
        for (alignment = 1; alignment <= 65536; alignment *= 2) {
            char *buffer = mmc_buffer_alloc(100000, alignment, &error);

            CHECK_EQUAL(error, 0);
            CHECK_EQUAL((uintptr_t)buffer % alignment, 0);
            CHECK_EQUAL(mmc_is_zero(buffer, 100000), 1);
            memset(buffer, 0xff, 100000);
            mmc_buffer_free(buffer);
        }
    }
    CHECK(!mmc_buffer_alloc(10, 3000, &error));
    CHECK_EQUAL(error, -EINVAL);
    mmc_buffer_free(mmc_buffer_alloc(0, 4096, &error));
    CHECK_EQUAL(error, 0);
    mmc_buffer_free(NULL);
}

static void test_is_zero(void)
{
    unsigned char bytes[300] = {0};
    uint64_t start;
    uint64_t at;

    CHECK_EQUAL(mmc_is_zero(bytes, 0), 1);
    for (start = 0; start < 20; start++) {
        for (at = 0; at < sizeof(bytes); at++) {
            bytes[at] = 1;
            CHECK_EQUAL(mmc_is_zero(bytes + start, sizeof(bytes) - start), at < start);
            CHECK_EQUAL(mmc_is_zero(bytes, at), 1);
            bytes[at] = 0;
        }
        CHECK_EQUAL(mmc_is_zero(bytes + start, sizeof(bytes) - start), 1);
    }
}

static void test_zero_run(void)
{
    unsigned char bytes[1000] = {0};
    int zero = -1;

    CHECK_EQUAL(mmc_zero_run(bytes, 1000, 128, &zero), 1000);
    CHECK_EQUAL(zero, 1);
    bytes[300] = 1;
    CHECK_EQUAL(mmc_zero_run(bytes, 1000, 128, &zero), 256);
    CHECK_EQUAL(zero, 1);
    CHECK_EQUAL(mmc_zero_run(bytes + 256, 744, 128, &zero), 128);
    CHECK_EQUAL(zero, 0);
    CHECK_EQUAL(mmc_zero_run(bytes, 1000, 0, &zero), 1000); /* 0: one block */
    CHECK_EQUAL(zero, 0);
    CHECK_EQUAL(mmc_zero_run(bytes, 0, 128, &zero), 0);
}

static void test_fallocate(void)
{
    struct stat st;
    const int fd = scratch_file(0);

    CHECK_EQUAL(mmc_fallocate(fd, 0, 0, 8192), 0);
    CHECK_EQUAL(fstat(fd, &st), 0);
    CHECK_EQUAL(st.st_size, 8192);
    CHECK_EQUAL(mmc_fallocate(fd, 0, 0, 0), -EINVAL);
    CHECK_EQUAL(mmc_fallocate(fd, 0, UINT64_MAX, 1), -EINVAL);
    CHECK_EQUAL(mmc_fallocate(-1, 0, 0, 1), -EBADF);
    close(fd);
}

static void test_direct_alignment(void)
{
    uint32_t memory = 0;
    uint32_t offset = 0;
    const int fd = scratch_file(4096);
    const int rc = mmc_direct_alignment(fd, &memory, &offset);

    CHECK(rc == 0 || rc == 1);
    CHECK_EQUAL(memory & (memory - 1), 0);
    CHECK_EQUAL(offset & (offset - 1), 0);
    CHECK_EQUAL(mmc_direct_alignment(-1, &memory, &offset), -EBADF);
    close(fd);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_buffers());
    RUN(test_is_zero());
    RUN(test_zero_run());
    RUN(test_fallocate());
    RUN(test_direct_alignment());
    return 0;
}
