/* SPDX-License-Identifier: MIT
 *
 * The I/O queue, every test on both back ends, and on io_uring for one thread, where what several
 * threads do is right as well.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "test.h"

static int flags; /* of every queue */

static struct mmc_queue *open_queue(int backend, uint32_t depth)
{
    int error = 1;
    struct mmc_queue *queue = mmc_queue_open(backend, depth, flags, &error);

    CHECK_EQUAL(error, 0);
    CHECK(queue);
    CHECK_EQUAL(mmc_queue_backend(queue), backend);
    return queue;
}

static struct mmc_op op_on(int fd, int code, uint64_t offset, const void *address, uint64_t length)
{
    return (struct mmc_op){.token = 1,
                           .fd = fd,
                           .code = code,
                           .offset = offset,
                           .address = (uint64_t)(uintptr_t)address,
                           .length = length};
}

/* Runs one op to its end. */
static int64_t run(struct mmc_queue *queue, struct mmc_op op)
{
    struct mmc_done done = {0};

    op.token = UINT64_MAX - 1;
    CHECK_EQUAL(mmc_queue_turn(queue, &op, 1, &done, 1, 20000), 1);
    CHECK(done.token == UINT64_MAX - 1);
    return done.result;
}

static double now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

/* ---- random traffic against a copy in memory ---------------------------- */

#define SLOTS 48
#define SLOT 20000
#define FILE_SIZE (SLOTS * SLOT - 7777) /* the last slot meets the end */
#define IOVECS 9

struct slot {
    int is_busy;
    struct mmc_op op;
    uint64_t begin; /* of the transfer in the file */
    uint64_t bytes;
    unsigned char buffer[SLOT];
    struct iovec iov[IOVECS];
};

static unsigned char model[SLOTS * SLOT];
static struct slot slots[SLOTS];

/* Cuts the buffer into random pieces, some of them empty. */
static void cut_buffer(struct slot *slot)
{
    uint64_t at = 0;
    unsigned i;

    for (i = 0; i < IOVECS; i++) {
        const uint64_t left = slot->bytes - at;
        const uint64_t step = i == IOVECS - 1 ? left : random_below(4) ? random_below(left + 1) : 0;

        slot->iov[i] = (struct iovec){slot->buffer + at, step};
        at += step;
    }
}

static void begin_transfer(unsigned index, int fd)
{
    struct slot *slot = &slots[index];
    const int code = (int)random_below(4);
    const int is_write = code == MMC_WRITE || code == MMC_WRITEV;
    const uint64_t room = is_write && index == SLOTS - 1 ? SLOT - 7777 : SLOT;
    const uint64_t from = random_below(room);

    slot->begin = (uint64_t)index * SLOT + from;
    slot->bytes = random_below(room - from + 1);
    random_fill(slot->buffer, slot->bytes);
    if (is_write)
        memcpy(model + slot->begin, slot->buffer, slot->bytes);
    if (code == MMC_READ || code == MMC_WRITE) {
        slot->op = op_on(fd, code, slot->begin, slot->buffer, slot->bytes);
    } else {
        cut_buffer(slot);
        slot->op = op_on(fd, code, slot->begin, slot->iov, IOVECS);
    }
}

static void begin_other(unsigned index, int fd, void *map)
{
    struct slot *slot = &slots[index];

    switch (random_below(4)) {
    case 0:
        slot->op = op_on(fd, MMC_DATASYNC, 0, NULL, 0);
        break;
    case 1:
        slot->op = op_on(-1, MMC_MSYNC, 0, map, FILE_SIZE);
        break;
    case 2:
        slot->op = op_on(fd, MMC_FALLOCATE, (uint64_t)index * SLOT, NULL, SLOT);
        slot->op.mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE;
        memset(model + (uint64_t)index * SLOT, 0, SLOT);
        break;
    default:
        slot->op = op_on(-1, MMC_NOP, 0, NULL, 0);
    }
}

static void check_transfer(const struct slot *slot, int64_t result)
{
    uint64_t there = slot->begin >= FILE_SIZE ? 0 : FILE_SIZE - slot->begin;

    if (there > slot->bytes)
        there = slot->bytes;
    CHECK_EQUAL(result, there);
    CHECK(memcmp(slot->buffer, model + slot->begin, slot->bytes) == 0);
}

static unsigned begin_some(struct mmc_op *ops, int fd, void *map)
{
    unsigned count = 0;
    unsigned i;

    for (i = 0; i < SLOTS; i++) {
        if (slots[i].is_busy || random_below(3))
            continue;
        if (random_below(8))
            begin_transfer(i, fd);
        else
            begin_other(i, fd, map);
        slots[i].is_busy = 1;
        slots[i].op.token = i + (UINT64_C(1) << 63);
        ops[count++] = slots[i].op;
    }
    return count;
}

static void end_some(const struct mmc_done *done, int count)
{
    int i;

    for (i = 0; i < count; i++) {
        struct slot *slot = &slots[done[i].token - (UINT64_C(1) << 63)];

        CHECK(slot->is_busy);
        slot->is_busy = 0;
        if (slot->op.code <= MMC_WRITEV)
            check_transfer(slot, done[i].result);
        else
            CHECK_EQUAL(done[i].result, 0);
    }
}

static void test_random_traffic(int backend)
{
    static const int timeouts[] = {-1, 0, 1, 50};
    struct mmc_queue *queue = open_queue(backend, 1 + (uint32_t)random_below(40));
    const int fd = scratch_file(FILE_SIZE);
    void *map = mmap(NULL, FILE_SIZE, PROT_READ, MAP_SHARED, fd, 0);
    struct mmc_op ops[SLOTS];
    struct mmc_done done[SLOTS];
    unsigned busy = 0;
    int round;

    memset(model, 0, sizeof(model));
    for (round = 0; round < 3000 || busy; round++) {
        const unsigned count = round < 3000 ? begin_some(ops, fd, map) : 0;
        const uint32_t max = 1 + (uint32_t)random_below(SLOTS);
        const int timeout = busy + count ? timeouts[random_below(4)] : 0;
        int n = mmc_queue_turn(queue, ops, count, done, max, timeout);

        CHECK(n >= 0 && n <= (int)max);
        CHECK(timeout != -1 || n > 0);
        end_some(done, n);
        busy += count - (unsigned)n;
    }
    munmap(map, FILE_SIZE);
    mmc_queue_close(queue);
    close(fd);
}

/* ---- the end of a file -------------------------------------------------- */

static void check_end(struct mmc_queue *queue, int fd)
{
    char *buffer = NULL;
    struct iovec iov[2];
    char expected[1234];

    CHECK_EQUAL(posix_memalign((void **)&buffer, 4096, 16384), 0);
    memset(expected, 'e', sizeof(expected));
    memset(buffer, 'x', 16384);
    CHECK_EQUAL(run(queue, op_on(fd, MMC_READ, 0, buffer, 8192)), 1234);
    CHECK(memcmp(buffer, expected, 1234) == 0);
    CHECK_EQUAL(mmc_is_zero(buffer + 1234, 8192 - 1234), 1);
    CHECK_EQUAL(buffer[8192], 'x');

    memset(buffer, 'x', 16384);
    iov[0] = (struct iovec){buffer, 512};
    iov[1] = (struct iovec){buffer + 8192, 4096};
    CHECK_EQUAL(run(queue, op_on(fd, MMC_READV, 0, iov, 2)), 1234);
    CHECK(memcmp(buffer + 8192, expected, 1234 - 512) == 0);
    CHECK_EQUAL(mmc_is_zero(buffer + 8192 + 1234 - 512, 4096 - 1234 + 512), 1);

    memset(buffer, 'x', 16384);
    CHECK_EQUAL(run(queue, op_on(fd, MMC_READ, 1 << 20, buffer, 4096)), 0);
    CHECK_EQUAL(mmc_is_zero(buffer, 4096), 1);
    free(buffer);
}

static void test_read_at_the_end(int backend)
{
    struct mmc_queue *queue = open_queue(backend, 4);
    const int fd = scratch_file(0);
    char path[64];
    char bytes[1234];
    int direct;

    memset(bytes, 'e', sizeof(bytes));
    CHECK_EQUAL(pwrite(fd, bytes, sizeof(bytes), 0), sizeof(bytes));
    CHECK_EQUAL(fsync(fd), 0);
    check_end(queue, fd);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    direct = open(path, O_RDONLY | O_DIRECT);
    if (direct >= 0) { /* tmpfs before Linux 6.6 has none */
        check_end(queue, direct);
        close(direct);
    }
    close(fd);
    mmc_queue_close(queue);
}

/* ---- what cannot be ------------------------------------------------------ */

static void test_bad_ops_are_refused_together(int backend)
{
    struct mmc_queue *queue = open_queue(backend, 4);
    const int fd = scratch_file(100);
    char byte = 'a';
    struct mmc_op ops[3] = {op_on(fd, MMC_WRITE, 0, &byte, 1), op_on(fd, 99, 0, NULL, 0),
                            op_on(fd, MMC_WRITE, 1, &byte, 1)};
    struct mmc_done done[3];

    CHECK_EQUAL(mmc_queue_turn(queue, ops, 3, done, 3, 100), -EINVAL);
    ops[1] = op_on(fd, MMC_READ, INT64_MAX, &byte, 2);
    CHECK_EQUAL(mmc_queue_turn(queue, ops, 3, done, 3, 100), -EINVAL);
    ops[1] = op_on(fd, MMC_READV, 0, NULL, 2);
    CHECK_EQUAL(mmc_queue_turn(queue, ops, 3, done, 3, 100), -EINVAL);
    CHECK_EQUAL(mmc_queue_turn(queue, NULL, 0, done, 3, 10), 0); /* none was taken */
    CHECK_EQUAL(pread(fd, &byte, 1, 0), 1);
    CHECK_EQUAL(byte, 0);
    close(fd);
    mmc_queue_close(queue);
}

static void test_errors_come_back(int backend)
{
    struct mmc_queue *queue = open_queue(backend, 4);
    const int fd = scratch_file(8192);
    const int read_only = open("/dev/null", O_RDONLY);
    char byte;

    CHECK_EQUAL(run(queue, op_on(-1, MMC_READ, 0, &byte, 1)), -EBADF);
    CHECK_EQUAL(run(queue, op_on(read_only, MMC_WRITE, 0, &byte, 1)), -EBADF);
    CHECK_EQUAL(run(queue, op_on(fd, MMC_READ, 0, (void *)1, 4096)), -EFAULT);
    CHECK_EQUAL(run(queue, op_on(fd, MMC_FALLOCATE, 0, NULL, 0)), -EINVAL);
    CHECK_EQUAL(run(queue, op_on(-1, MMC_MSYNC, 0, (void *)1, 1)), -EINVAL);
    CHECK_EQUAL(run(queue, op_on(-1, MMC_DATASYNC, 0, NULL, 0)), -EBADF);
    CHECK_EQUAL(run(queue, op_on(fd, MMC_READ, 0, NULL, 0)), 0);
    CHECK_EQUAL(run(queue, op_on(fd, MMC_READV, 0, NULL, 0)), 0);
    CHECK_EQUAL(run(queue, op_on(-1, MMC_NOP, 0, NULL, 0)), 0);
    close(fd);
    close(read_only);
    mmc_queue_close(queue);
}

/* ---- size and number ----------------------------------------------------- */

#define MANY_IOVECS 5000

static void test_more_iovecs_than_one_call_takes(int backend)
{
    static struct iovec iov[MANY_IOVECS];
    static char data[MANY_IOVECS * 3];
    static char back[MANY_IOVECS * 3];
    struct mmc_queue *queue = open_queue(backend, 4);
    const int fd = scratch_file(0);
    unsigned i;

    random_fill(data, sizeof(data));
    for (i = 0; i < MANY_IOVECS; i++)
        iov[i] = (struct iovec){data + i * 3, 3};
    CHECK_EQUAL(run(queue, op_on(fd, MMC_WRITEV, 5, iov, MANY_IOVECS)), sizeof(data));
    CHECK_EQUAL(pread(fd, back, sizeof(back), 5), sizeof(back));
    CHECK(memcmp(data, back, sizeof(data)) == 0);
    for (i = 0; i < MANY_IOVECS; i++)
        iov[i].iov_base = back + i * 3;
    memset(back, 0, sizeof(back));
    CHECK_EQUAL(run(queue, op_on(fd, MMC_READV, 5, iov, MANY_IOVECS)), sizeof(data));
    CHECK(memcmp(data, back, sizeof(data)) == 0);
    close(fd);
    mmc_queue_close(queue);
}

/* The iovec array belongs to the caller again as soon as the turn returns. */
static void test_iovecs_are_copied(int backend)
{
    struct mmc_queue *queue = open_queue(backend, 1);
    const int fd = scratch_file(0);
    char data[8] = "abcdefg";
    char back[8];
    struct iovec iov[2] = {{data, 3}, {data + 3, 5}};
    struct mmc_op ops[3] = {op_on(fd, MMC_DATASYNC, 0, NULL, 0),
                            op_on(fd, MMC_DATASYNC, 0, NULL, 0), op_on(fd, MMC_WRITEV, 0, iov, 2)};
    struct mmc_done done[3];
    int n;

    n = mmc_queue_turn(queue, ops, 3, done, 1, 0); /* the write waits over the depth */
    memset(iov, 0xff, sizeof(iov));
    while (n < 3)
        n += mmc_queue_turn(queue, NULL, 0, done, 3, -1);
    CHECK_EQUAL(pread(fd, back, 8, 0), 8);
    CHECK(memcmp(data, back, 8) == 0);
    close(fd);
    mmc_queue_close(queue);
}

#define MANY_OPS 20000

static void test_far_more_ops_than_the_depth(int backend)
{
    static struct mmc_op ops[MANY_OPS];
    static unsigned char seen[MANY_OPS];
    static char bytes[MANY_OPS];
    struct mmc_queue *queue = open_queue(backend, 7);
    const int fd = scratch_file(0);
    struct mmc_done done[100];
    int collected = 0;
    int i;

    memset(seen, 0, sizeof(seen));
    for (i = 0; i < MANY_OPS; i++) {
        bytes[i] = (char)i;
        ops[i] = op_on(fd, i % 16 ? MMC_WRITE : MMC_NOP, (uint64_t)i, &bytes[i], 1);
        ops[i].token = (uint64_t)i;
    }
    CHECK_EQUAL(mmc_queue_turn(queue, ops, MANY_OPS, NULL, 0, -1), 0);
    memset(ops, 0xff, sizeof(ops));
    while (collected < MANY_OPS) {
        const int n = mmc_queue_turn(queue, NULL, 0, done, 100, -1);

        CHECK(n > 0);
        for (i = 0; i < n; i++) {
            CHECK_EQUAL(done[i].result, done[i].token % 16 ? 1 : 0);
            CHECK_EQUAL(seen[done[i].token]++, 0);
        }
        collected += n;
    }
    CHECK_EQUAL(mmc_queue_turn(queue, NULL, 0, done, 100, 0), 0);
    close(fd);
    mmc_queue_close(queue);
}

static void test_close_waits_for_what_is_in_flight(int backend)
{
    static char data[1 << 20];
    struct mmc_queue *queue = open_queue(backend, 3);
    const int fd = scratch_file(0);
    struct mmc_op ops[8];
    char byte;
    unsigned i;

    memset(data, 'd', sizeof(data));
    for (i = 0; i < 8; i++)
        ops[i] = op_on(fd, MMC_WRITE, i * sizeof(data), data, sizeof(data));
    CHECK_EQUAL(mmc_queue_turn(queue, ops, 8, NULL, 0, 0), 0);
    mmc_queue_close(queue);
    CHECK_EQUAL(pread(fd, &byte, 1, 8 * sizeof(data) - 1), 1);
    CHECK_EQUAL(byte, 'd');
    close(fd);
    mmc_queue_close(NULL);
}

/* ---- waiting ------------------------------------------------------------- */

static void test_alone_only_with_nothing_in_flight(int backend)
{
    struct mmc_queue *queue = open_queue(backend, 4);
    const int fd = scratch_file(4096);
    struct mmc_op write = op_on(fd, MMC_WRITE, 512, "bytes", 5);
    struct mmc_op nothing = op_on(-1, MMC_NOP, 0, NULL, 0);
    struct mmc_op wrong = op_on(fd, 99, 0, NULL, 0);
    struct mmc_done done = {0};
    char found[5];

    write.token = 7;
    CHECK_EQUAL(mmc_queue_alone(queue, &write, &done), 1);
    CHECK_EQUAL(done.token, 7);
    CHECK_EQUAL(done.result, 5);
    CHECK_EQUAL(pread(fd, found, 5, 512), 5);
    CHECK(memcmp(found, "bytes", 5) == 0);
    CHECK_EQUAL(mmc_queue_alone(queue, &wrong, &done), -EINVAL);
    CHECK_EQUAL(mmc_queue_turn(queue, &nothing, 1, NULL, 0, 0), 0);
    CHECK_EQUAL(mmc_queue_alone(queue, &write, &done), 0);
    CHECK_EQUAL(mmc_queue_turn(queue, NULL, 0, &done, 1, -1), 1);
    CHECK_EQUAL(mmc_queue_alone(queue, &write, &done), 1);
    close(fd);
    mmc_queue_close(queue);
}

static void test_time_out(int backend)
{
    struct mmc_queue *queue = open_queue(backend, 4);
    struct mmc_done done;
    const double begin = now();

    CHECK_EQUAL(mmc_queue_turn(queue, NULL, 0, &done, 1, 0), 0);
    CHECK(now() - begin < 0.05);
    CHECK_EQUAL(mmc_queue_turn(queue, NULL, 0, &done, 1, 100), 0);
    CHECK(now() - begin >= 0.1);
    mmc_queue_close(queue);
}

static void test_descriptor_polls(int backend)
{
    struct mmc_queue *queue = open_queue(backend, 4);
    struct pollfd poll_fd = {.fd = mmc_queue_fd(queue), .events = POLLIN};
    struct mmc_op ops[2] = {op_on(-1, MMC_NOP, 0, NULL, 0), op_on(-1, MMC_NOP, 0, NULL, 0)};
    struct mmc_done done[2];

    CHECK_EQUAL(poll(&poll_fd, 1, 0), 0);
    CHECK_EQUAL(mmc_queue_turn(queue, ops, 2, NULL, 0, 0), 0);
    CHECK_EQUAL(poll(&poll_fd, 1, 5000), 1);
    while (mmc_queue_turn(queue, NULL, 0, done, 1, -1) != 1)
        ;
    CHECK_EQUAL(poll(&poll_fd, 1, 5000), 1); /* one is left */
    while (mmc_queue_turn(queue, NULL, 0, done, 1, -1) != 1)
        ;
    CHECK_EQUAL(poll(&poll_fd, 1, 0), 0);
    mmc_queue_close(queue);
}

static void do_nothing(int number)
{
    (void)number;
}

static void *signal_soon(void *argument)
{
    usleep(50000);
    pthread_kill(*(pthread_t *)argument, SIGUSR1);
    return NULL;
}

/* Also where ops were submitted by the very call that the signal interrupts: the pipe
 * never answers, so only the signal can end the wait. */
static void check_interruption(struct mmc_queue *queue, const struct mmc_op *ops, uint32_t count)
{
    const pthread_t self = pthread_self();
    struct mmc_done done;
    pthread_t thread;

    CHECK_EQUAL(pthread_create(&thread, NULL, signal_soon, (void *)(uintptr_t)&self), 0);
    CHECK_EQUAL(mmc_queue_turn(queue, ops, count, &done, 1, -1), -EINTR);
    pthread_join(thread, NULL);
}

static void test_signal_interrupts(int backend)
{
    struct sigaction action = {.sa_handler = do_nothing};
    struct mmc_queue *queue = open_queue(backend, 4);
    char byte = 0;
    int ends[2];
    struct mmc_op op;

    CHECK_EQUAL(sigaction(SIGUSR1, &action, NULL), 0);
    CHECK_EQUAL(pipe(ends), 0);
    check_interruption(queue, NULL, 0);
    if (backend == MMC_BACKEND_URING) { /* the pool's preadv refuses a pipe at once */
        struct mmc_done done;

        op = op_on(ends[0], MMC_READ, 0, &byte, 1);
        check_interruption(queue, &op, 1);
        CHECK_EQUAL(write(ends[1], "p", 1), 1);
        CHECK_EQUAL(mmc_queue_turn(queue, NULL, 0, &done, 1, -1), 1);
        CHECK_EQUAL(done.result, 1);
        CHECK_EQUAL(byte, 'p');
    }
    close(ends[0]);
    close(ends[1]);
    mmc_queue_close(queue);
}

/* ---- threads ------------------------------------------------------------- */

struct waiter {
    struct mmc_queue *queue;
    struct mmc_done done;
    int n;
};

static void *wait_for_one(void *argument)
{
    struct waiter *waiter = argument;

    do
        waiter->n = mmc_queue_turn(waiter->queue, NULL, 0, &waiter->done, 1, -1);
    while (waiter->n == 0);
    return NULL;
}

static void test_waiting_keeps_nobody_from_submitting(int backend)
{
    struct waiter waiter = {.queue = open_queue(backend, 4)};
    struct mmc_op op = op_on(-1, MMC_NOP, 0, NULL, 0);
    struct mmc_done done;
    pthread_t thread;
    double begin;
    int n;

    CHECK_EQUAL(pthread_create(&thread, NULL, wait_for_one, &waiter), 0);
    usleep(50000);
    begin = now();
    op.token = 77;
    n = mmc_queue_turn(waiter.queue, &op, 1, &done, 1, 0);
    CHECK(now() - begin < 0.05);
    if (n == 1) { /* this thread got it: the other needs another */
        CHECK_EQUAL(done.token, 77);
        CHECK_EQUAL(mmc_queue_turn(waiter.queue, &op, 1, NULL, 0, 0), 0);
    }
    pthread_join(thread, NULL);
    CHECK_EQUAL(waiter.n, 1);
    CHECK_EQUAL(waiter.done.token, 77);
    mmc_queue_close(waiter.queue);
}

#define THREADS 6
#define OPS_PER_THREAD 3000

struct shared_queue {
    struct mmc_queue *queue;
    int fd;
    uint64_t collected; /* by all threads */
};

struct submitter {
    struct shared_queue *shared;
    unsigned number;
};

/* Submits from many threads while all of them collect whatever is there. */
static void *submit_and_collect(void *argument)
{
    static char page[4096];
    const struct submitter *submitter = argument;
    struct shared_queue *shared = submitter->shared;
    struct mmc_done done[32];
    unsigned i;

    random_state = test_seed * 2 + submitter->number * 7919 + 1;
    for (i = 0; i < OPS_PER_THREAD; i++) {
        static const int codes[] = {MMC_READ, MMC_READ, MMC_READ, MMC_NOP, MMC_DATASYNC};
        struct mmc_op op = op_on(shared->fd, codes[random_below(5)], 0, page, 0);
        int n = mmc_queue_turn(shared->queue, &op, 1, done, 32, random_below(4) ? 0 : 1);

        CHECK(n >= 0);
        __atomic_fetch_add(&shared->collected, (uint64_t)n, __ATOMIC_RELAXED);
    }
    while (__atomic_load_n(&shared->collected, __ATOMIC_RELAXED) < THREADS * OPS_PER_THREAD) {
        int n = mmc_queue_turn(shared->queue, NULL, 0, done, 32, 10);

        CHECK(n >= 0);
        __atomic_fetch_add(&shared->collected, (uint64_t)n, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void test_many_threads(int backend)
{
    struct shared_queue shared = {.queue = open_queue(backend, 16), .fd = scratch_file(4096)};
    struct submitter submitters[THREADS];
    pthread_t threads[THREADS];
    unsigned i;

    for (i = 0; i < THREADS; i++) {
        submitters[i] = (struct submitter){&shared, i};
        CHECK_EQUAL(pthread_create(&threads[i], NULL, submit_and_collect, &submitters[i]), 0);
    }
    for (i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    CHECK_EQUAL(shared.collected, THREADS * OPS_PER_THREAD);
    close(shared.fd);
    mmc_queue_close(shared.queue);
}

static void *submit_and_exit(void *argument)
{
    struct shared_queue *shared = argument;
    static char data[64][8192];
    struct mmc_op ops[64];
    unsigned i;

    for (i = 0; i < 64; i++)
        ops[i] = i % 4 ? op_on(shared->fd, MMC_WRITE, i * 8192, data[i], 8192)
                       : op_on(shared->fd, MMC_DATASYNC, 0, NULL, 0);
    CHECK_EQUAL(mmc_queue_turn(shared->queue, ops, 64, NULL, 0, 0), 0);
    return NULL;
}

/* io_uring cancels punted work of a thread that exits; nobody may see that. */
static void test_submitter_that_exits(int backend)
{
    struct shared_queue shared = {.queue = open_queue(backend, 64), .fd = scratch_file(0)};
    struct mmc_done done[64];
    int round;

    for (round = 0; round < 20; round++) {
        pthread_t thread;
        int collected = 0;

        CHECK_EQUAL(pthread_create(&thread, NULL, submit_and_exit, &shared), 0);
        pthread_join(thread, NULL);
        while (collected < 64) {
            int n = mmc_queue_turn(shared.queue, NULL, 0, done, 64, -1);
            int i;

            for (i = 0; i < n; i++)
                CHECK(done[i].result == 0 || done[i].result == 8192);
            collected += n;
        }
    }
    close(shared.fd);
    mmc_queue_close(shared.queue);
}

/* ---- forks --------------------------------------------------------------- */

static void test_forked_child_is_harmless(int backend)
{
    struct mmc_queue *queue = open_queue(backend, 4);
    const int fd = scratch_file(4096);
    char byte;
    pid_t child;
    int status;

    CHECK_EQUAL(run(queue, op_on(fd, MMC_READ, 0, &byte, 1)), 1);
    child = fork();
    if (child == 0) {
        struct mmc_op op = op_on(fd, MMC_NOP, 0, NULL, 0);
        struct mmc_done done;

        CHECK_EQUAL(mmc_queue_turn(queue, &op, 1, &done, 1, -1), -EBADF);
        mmc_queue_close(queue);
        _exit(0);
    }
    CHECK_EQUAL(waitpid(child, &status, 0), child);
    CHECK_EQUAL(status, 0);
    CHECK_EQUAL(run(queue, op_on(fd, MMC_READ, 0, &byte, 1)), 1);
    close(fd);
    mmc_queue_close(queue);
}

static void test_open(void)
{
    struct mmc_queue *queue;
    int error = 0;

    CHECK(!mmc_queue_open(7, 8, 0, &error));
    CHECK_EQUAL(error, -EINVAL);
    error = 0;
    CHECK(!mmc_queue_open(MMC_BACKEND_AUTO, 8, 2, &error));
    CHECK_EQUAL(error, -EINVAL);
    queue = mmc_queue_open(MMC_BACKEND_AUTO, 0, 0, &error); /* depth 0 is 1 */
    CHECK(queue);
    CHECK_EQUAL(run(queue, op_on(-1, MMC_NOP, 0, NULL, 0)), 0);
    mmc_queue_close(queue);
}

static void run_all(int backend)
{
    RUN(test_random_traffic(backend));
    RUN(test_read_at_the_end(backend));
    RUN(test_bad_ops_are_refused_together(backend));
    RUN(test_errors_come_back(backend));
    RUN(test_more_iovecs_than_one_call_takes(backend));
    RUN(test_iovecs_are_copied(backend));
    RUN(test_far_more_ops_than_the_depth(backend));
    RUN(test_close_waits_for_what_is_in_flight(backend));
    RUN(test_alone_only_with_nothing_in_flight(backend));
    RUN(test_time_out(backend));
    RUN(test_descriptor_polls(backend));
    RUN(test_signal_interrupts(backend));
    RUN(test_waiting_keeps_nobody_from_submitting(backend));
    RUN(test_many_threads(backend));
    RUN(test_submitter_that_exits(backend));
    RUN(test_forked_child_is_harmless(backend));
}

/* Arguments: seed, and "pool" to leave io_uring out (ThreadSanitizer does not see the
 * kernel hand a request from thread to thread through the ring). */
int main(int argc, char **argv)
{
    struct mmc_queue *queue;
    int error;

    test_begin(argc, argv);
    RUN(test_open());
    printf("-- pool\n");
    run_all(MMC_BACKEND_POOL);
    if (argc > 2 && strcmp(argv[2], "pool") == 0)
        return 0;
    queue = mmc_queue_open(MMC_BACKEND_URING, 1, 0, &error);
    if (!queue) {
        printf("-- io_uring: left out, %s\n", strerror(-error));
        return 0;
    }
    mmc_queue_close(queue);
    printf("-- io_uring\n");
    run_all(MMC_BACKEND_URING);
    flags = MMC_QUEUE_ONE_THREAD;
    printf("-- io_uring, one thread\n");
    run_all(MMC_BACKEND_URING);
    return 0;
}
