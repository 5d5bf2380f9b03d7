/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "request.h"

/* The kernel moves at most MAX_RW_COUNT = INT_MAX rounded down to a page in one call
 * (fs/read_write.c); asking for more only returns short. 64 KiB pages fit too. */
#define PIECE_MAX ((uint64_t)INT_MAX & ~UINT64_C(0xffff))

/* A descriptor that answers EAGAIN for ever (a non-blocking socket, not a file) must
 * not spin for ever. */
#define RETRIES_MAX 1000

static bool is_read(const struct mmc_request *request)
{
    return request->code == MMC_READ || request->code == MMC_READV;
}

static bool is_transfer(const struct mmc_request *request)
{
    return is_read(request) || request->code == MMC_WRITE || request->code == MMC_WRITEV;
}

/* ---- taking an op ------------------------------------------------------- */

static void set_buffer(struct mmc_request *request, const struct mmc_op *op)
{
    request->iov[0] = (struct iovec){(void *)(uintptr_t)op->address, op->length};
    request->iov_count = 1;
    request->left = op->length;
}

static int set_iovecs(struct mmc_request *request, const struct mmc_op *op)
{
    const struct iovec *from = (const struct iovec *)(uintptr_t)op->address;
    uint64_t i;

    if (op->length > UINT32_MAX || (op->length && !from))
        return -EINVAL;
    if (op->length > MMC_FEW_IOVECS) {
        request->iov = calloc(op->length, sizeof(*from));
        if (!request->iov)
            return -ENOMEM;
    }
    for (i = 0; i < op->length; i++) {
        if (from[i].iov_len == 0)
            continue;
        if (__builtin_add_overflow(request->left, from[i].iov_len, &request->left))
            return -EINVAL;
        request->iov[request->iov_count++] = from[i];
    }
    return 0;
}

static int set_transfer(struct mmc_request *request, const struct mmc_op *op)
{
    uint64_t end;
    int rc = 0;

    if (op->code == MMC_READV || op->code == MMC_WRITEV)
        rc = set_iovecs(request, op);
    else
        set_buffer(request, op);
    if (rc < 0)
        return rc;
    if (__builtin_add_overflow(op->offset, request->left, &end) || end > INT64_MAX)
        return -EINVAL;
    /* An empty transfer has nothing to tell from the end of the file. */
    if (request->left == 0)
        request->code = MMC_NOP;
    return 0;
}

static int set_extent(struct mmc_request *request, const struct mmc_op *op)
{
    if (op->offset > INT64_MAX || op->length > INT64_MAX)
        return -EINVAL;
    request->left = op->length;
    return 0;
}

static int set_code(struct mmc_request *request, const struct mmc_op *op)
{
    switch (op->code) {
    case MMC_READ:
    case MMC_WRITE:
    case MMC_READV:
    case MMC_WRITEV:
        return set_transfer(request, op);
    case MMC_FALLOCATE:
        return set_extent(request, op);
    case MMC_MSYNC:
        set_buffer(request, op);
        return 0;
    case MMC_DATASYNC:
    case MMC_NOP:
        return 0;
    default:
        return -EINVAL;
    }
}

int mmc_request_set(struct mmc_request *request, const struct mmc_op *op)
{
    int rc;

    request->owner = NULL;
    request->token = op->token;
    request->offset = op->offset;
    request->left = 0;
    request->piece = 0;
    request->moved = 0;
    request->result = 0;
    request->iov = request->few;
    request->iov_next = 0;
    request->iov_count = 0;
    request->retries = 0;
    request->is_blocking = op->code == MMC_MSYNC;
    request->fd = op->fd;
    request->code = op->code;
    request->mode = op->mode;
    rc = set_code(request, op);
    if (rc < 0)
        mmc_request_clear(request);
    return rc;
}

void mmc_request_clear(struct mmc_request *request)
{
    if (request->iov != request->few)
        free(request->iov);
    request->iov = request->few;
}

/* ---- progress ----------------------------------------------------------- */

struct iovec *mmc_request_piece(struct mmc_request *request, uint32_t *count)
{
    struct iovec *first = &request->iov[request->iov_next];
    uint32_t most = request->iov_count - request->iov_next;
    uint64_t bytes = 0;
    uint32_t n;

    if (most > IOV_MAX)
        most = IOV_MAX;
    for (n = 0; n < most && bytes < PIECE_MAX; n++)
        bytes += first[n].iov_len;
    request->piece = bytes < PIECE_MAX ? bytes : PIECE_MAX;
    *count = n;
    return first;
}

static void advance(struct mmc_request *request, uint64_t bytes)
{
    request->offset += bytes;
    request->left -= bytes;
    request->moved += (int64_t)bytes;
    while (bytes) {
        struct iovec *iov = &request->iov[request->iov_next];
        uint64_t step = bytes < iov->iov_len ? bytes : iov->iov_len;

        iov->iov_base = (char *)iov->iov_base + step;
        iov->iov_len -= step;
        bytes -= step;
        if (iov->iov_len == 0)
            request->iov_next++;
    }
}

static void zero_rest(struct mmc_request *request)
{
    uint32_t i;

    for (i = request->iov_next; i < request->iov_count; i++)
        memset(request->iov[i].iov_base, 0, request->iov[i].iov_len);
}

/* Whether a read that came back short has met the end. Asked instead of read again:
 * under O_DIRECT the odd end leaves an odd offset, from which file systems that use
 * blockdev_direct_IO (FAT, ext4 before 5.5) refuse to read. A short read before the end
 * (a bad sector behind it) is read on, and reports that. */
static bool is_at_end(const struct mmc_request *request)
{
    struct stat st;

    return fstat(request->fd, &st) == 0 && S_ISREG(st.st_mode) &&
           (uint64_t)st.st_size <= request->offset;
}

static bool finish(struct mmc_request *request, int64_t result)
{
    request->result = result;
    return true;
}

static bool settle_transfer(struct mmc_request *request, uint64_t bytes)
{
    const bool is_short = bytes < request->piece;

    if (bytes == 0 && !is_read(request))
        return finish(request, -EIO);
    advance(request, bytes);
    if (request->left == 0)
        return finish(request, request->moved);
    if (bytes == 0 || (is_short && is_read(request) && is_at_end(request))) {
        zero_rest(request);
        return finish(request, request->moved);
    }
    return false;
}

/* ECANCELED: nobody cancels here, but when a thread exits, io_uring drops what it had
 * submitted and no worker had begun (io_worker_handle_work in io_uring/io-wq.c): since
 * Linux 5.16 not of regular files and block devices, where tests never saw it. */
static bool is_transient(int64_t result)
{
    return result == -EINTR || result == -EAGAIN || result == -ECANCELED;
}

bool mmc_request_settle(struct mmc_request *request, int64_t result)
{
    if (is_transient(result) && request->retries++ < RETRIES_MAX)
        return false;
    if (result < 0)
        return finish(request, result);
    if (is_transfer(request))
        return settle_transfer(request, (uint64_t)result);
    return true;
}

/* ---- blocking calls ----------------------------------------------------- */

static int64_t issue_transfer(struct mmc_request *request)
{
    uint32_t count;
    const struct iovec *iov = mmc_request_piece(request, &count);
    const off_t offset = (off_t)request->offset;

    if (is_read(request))
        return preadv(request->fd, iov, (int)count, offset);
    return pwritev(request->fd, iov, (int)count, offset);
}

static int64_t issue(struct mmc_request *request)
{
    switch (request->code) {
    case MMC_DATASYNC:
        return fdatasync(request->fd);
    case MMC_FALLOCATE:
        return fallocate(request->fd, request->mode, (off_t)request->offset, (off_t)request->left);
    case MMC_MSYNC:
        return msync(request->iov[0].iov_base, request->iov[0].iov_len, MS_SYNC);
    case MMC_NOP:
        return 0;
    default:
        return issue_transfer(request);
    }
}

void mmc_request_run(struct mmc_request *request)
{
    int64_t result;

    do {
        result = issue(request);
        if (result < 0)
            result = -errno;
    } while (!mmc_request_settle(request, result));
}
