/* SPDX-License-Identifier: MIT
 *
 * What Python has no call for on files, and on what was read from them.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include "mmc.h"

/* Each byte equals the one sixteen before it, and the first sixteen are zero: this
 * lets the C library's vectorised memcmp do the work. */
int mmc_is_zero(const void *data, uint64_t length)
{
    static const char zeros[16];
    const char *bytes = data;

    if (length <= sizeof(zeros))
        return memcmp(bytes, zeros, length) == 0;
    return memcmp(bytes, zeros, sizeof(zeros)) == 0 &&
           memcmp(bytes, bytes + sizeof(zeros), length - sizeof(zeros)) == 0;
}

uint64_t mmc_zero_run(const void *data, uint64_t length, uint64_t block, int *zero)
{
    const char *bytes = data;
    uint64_t at = 0;

    if (block == 0)
        block = length;
    *zero = mmc_is_zero(bytes, length < block ? length : block);
    while (at < length) {
        const uint64_t step = length - at < block ? length - at : block;

        if (mmc_is_zero(bytes + at, step) != *zero)
            break;
        at += step;
    }
    return at;
}

/* A block device answers this on every kernel; statx does for it since 6.1 only. */
static int device_alignment(int fd, uint32_t *memory, uint32_t *offset)
{
    struct stat st;
    int sector;

    if (fstat(fd, &st) < 0)
        return -errno;
    if (!S_ISBLK(st.st_mode) || ioctl(fd, BLKSSZGET, &sector) < 0)
        return 0;
    *memory = (uint32_t)sector;
    *offset = (uint32_t)sector;
    return 1;
}

int mmc_direct_alignment(int fd, uint32_t *memory, uint32_t *offset)
{
#ifdef STATX_DIOALIGN /* Linux 6.1 */
    struct statx stx;

    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) < 0)
        return -errno;
    if (stx.stx_mask & STATX_DIOALIGN) {
        *memory = stx.stx_dio_mem_align;
        *offset = stx.stx_dio_offset_align;
        return 1;
    }
#endif
    return device_alignment(fd, memory, offset);
}

int mmc_fallocate(int fd, int mode, uint64_t offset, uint64_t length)
{
    if (offset > INT64_MAX || length > INT64_MAX)
        return -EINVAL;
    while (fallocate(fd, mode, (off_t)offset, (off_t)length) < 0)
        if (errno != EINTR)
            return -errno;
    return 0;
}
