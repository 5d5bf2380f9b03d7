/* SPDX-License-Identifier: MIT
 *
 * The queue on io_uring.
 *
 * liburing sets the ring up; the heads and tails are moved here. Its own calls that
 * submit and wait in one system call (io_uring_submit_and_wait) own the submission
 * side while they sleep, but here a thread that sleeps must not keep another from
 * submitting. So publishing (tail += n, under the queue's lock) and entering the
 * kernel are two steps; the kernel serialises who consumes what was published.
 *
 * Every request in flight has at most one entry in either ring, and no more than
 * `depth` are in flight: the submission ring never lacks room, and the completion
 * ring, at least twice as large, never overflows.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <liburing.h>
#include <stdlib.h>

#include "queue.h"
#include "workers.h"

/* A second of pauses; what then is still not submitted goes with the next turn. */
#define SUBMIT_TRIES 1000

struct uring {
    struct mmc_queue *queue;
    struct io_uring ring;
    /* Guarded by the queue's lock, with the tail of the submission ring. */
    struct mmc_requests waiting; /* over the depth */
    uint32_t in_flight;
    /* Who holds it reads the completion ring, and is the one that sleeps in it. */
    pthread_mutex_t collect;
    struct mmc_workers workers; /* for what the ring lacks: msync */
};

/* ---- submission --------------------------------------------------------- */

/* How many entries are published and not yet consumed by the kernel. */
static uint32_t unsubmitted(struct uring *uring)
{
    struct io_uring_sq *sq = &uring->ring.sq;

    return io_uring_smp_load_acquire(sq->ktail) - io_uring_smp_load_acquire(sq->khead);
}

static void prepare_transfer(struct io_uring_sqe *sqe, struct mmc_request *request)
{
    const bool is_read = request->code == MMC_READ || request->code == MMC_READV;
    uint32_t count;
    const struct iovec *iov = mmc_request_piece(request, &count);

    if (count == 1 && is_read)
        io_uring_prep_read(sqe, request->fd, iov->iov_base, (uint32_t)request->piece,
                           request->offset);
    else if (count == 1)
        io_uring_prep_write(sqe, request->fd, iov->iov_base, (uint32_t)request->piece,
                            request->offset);
    else if (is_read)
        io_uring_prep_readv(sqe, request->fd, iov, count, request->offset);
    else
        io_uring_prep_writev(sqe, request->fd, iov, count, request->offset);
}

static void prepare(struct io_uring_sqe *sqe, struct mmc_request *request)
{
    switch (request->code) {
    case MMC_DATASYNC:
        io_uring_prep_fsync(sqe, request->fd, IORING_FSYNC_DATASYNC);
        break;
    case MMC_FALLOCATE:
        io_uring_prep_fallocate(sqe, request->fd, request->mode, (off_t)request->offset,
                                (off_t)request->left);
        break;
    case MMC_NOP:
        io_uring_prep_nop(sqe);
        break;
    default:
        prepare_transfer(sqe, request);
    }
}

/* Puts the request into the submission ring. The caller holds the queue's lock. */
static void publish(struct uring *uring, struct mmc_request *request)
{
    struct io_uring_sq *sq = &uring->ring.sq;
    const unsigned tail = *sq->ktail;
    const unsigned index = tail & sq->ring_mask;
    struct io_uring_sqe *sqe = &sq->sqes[index];

    if (request->is_blocking)
        io_uring_prep_nop(sqe); /* a worker ran it; this wakes who waits for it */
    else
        prepare(sqe, request);
    io_uring_sqe_set_data(sqe, request);
    sq->array[index] = index;
    io_uring_smp_store_release(sq->ktail, tail + 1);
}

/* Starts the request. The caller holds the queue's lock. */
static void start(struct uring *uring, struct mmc_request *request)
{
    struct mmc_requests one = {0};

    if (!request->is_blocking) {
        publish(uring, request);
        return;
    }
    mmc_requests_push(&one, request);
    if (mmc_workers_give(&uring->workers, &one) < 0) {
        mmc_request_run(request); /* no thread to be had: here, then */
        publish(uring, request);
    }
}

/* Starts waiting requests while there is room. The caller holds the queue's lock. */
static void start_waiting(struct uring *uring)
{
    while (uring->waiting.first && uring->in_flight < uring->queue->depth) {
        uring->in_flight++;
        start(uring, mmc_requests_pop(&uring->waiting));
    }
}

/* ---- entering the kernel ------------------------------------------------ */

/* The kernel is short of memory (EAGAIN, EBUSY), or worse. What is published stays so,
 * and what was taken cannot be refused any more: the only way is to try again. */
static void pause_briefly(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

/* Hands over what is published, without waiting for completions. */
static void submit(struct uring *uring)
{
    unsigned tries = 0;
    uint32_t count;

    while ((count = unsubmitted(uring)) && tries < SUBMIT_TRIES) {
        if (io_uring_enter((unsigned)uring->ring.ring_fd, count, 0, 0, NULL) >= 0)
            continue;
        pause_briefly();
        tries++;
    }
}

/* Lets the kernel put into the ring what has completed, where it waits for this thread to come. */
static void take_in(struct uring *uring)
{
#ifdef IORING_SQ_TASKRUN
    if (IO_URING_READ_ONCE(*uring->ring.sq.kflags) & IORING_SQ_TASKRUN)
        io_uring_enter((unsigned)uring->ring.ring_fd, 0, 0, IORING_ENTER_GETEVENTS, NULL);
#else
    (void)uring;
#endif
}

enum wake { WAKE_LOOK, WAKE_SIGNAL, WAKE_TROUBLE };

/* Hands over what is published and sleeps until there is a completion: one system
 * call. Returns why it woke, as far as that matters where nothing has completed. */
static enum wake submit_and_wait(struct uring *uring, const struct mmc_deadline *deadline)
{
    struct io_uring_getevents_arg argument = {0};
    struct __kernel_timespec timeout;
    struct timespec left;
    const uint32_t count = unsubmitted(uring);
    int rc;

    if (mmc_deadline_left(deadline, &left)) {
        timeout.tv_sec = left.tv_sec;
        timeout.tv_nsec = left.tv_nsec;
        argument.ts = (uint64_t)(uintptr_t)&timeout;
    }
    rc = io_uring_enter2((unsigned)uring->ring.ring_fd, count, 1,
                         IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, (sigset_t *)&argument,
                         sizeof(argument));
    if (rc == -EINTR)
        return WAKE_SIGNAL;
    if (rc < 0)
        return rc == -ETIME ? WAKE_LOOK : WAKE_TROUBLE;
    /* Where something was submitted, that count hides why the sleep ended. With all of
     * it submitted and nothing completed it was the clock, which the caller asks first,
     * or a signal. With less, another thread had submitted it: no sleep. */
    return count && (uint32_t)rc == count ? WAKE_SIGNAL : WAKE_LOOK;
}

/* ---- completion --------------------------------------------------------- */

static bool has_completions(struct uring *uring)
{
    struct io_uring_cq *cq = &uring->ring.cq;

    return io_uring_smp_load_acquire(cq->ktail) != *cq->khead;
}

/* Reads finished requests off the ring while there is room for their results; those that need
 * another issue go into `again`. Returns how many. The caller holds the lock `collect`. */
static uint32_t read_ring(struct uring *uring, struct mmc_collect *into,
                          struct mmc_requests *copies, struct mmc_requests *again)
{
    struct io_uring_cq *cq = &uring->ring.cq;
    const unsigned tail = io_uring_smp_load_acquire(cq->ktail);
    unsigned head = *cq->khead;
    uint32_t n = 0;

    for (; head != tail && into->count < into->max; head++) {
        const struct io_uring_cqe *cqe = &cq->cqes[head & cq->ring_mask];
        struct mmc_request *request = io_uring_cqe_get_data(cqe);

        if (!request->is_blocking && !mmc_request_settle(request, cqe->res)) {
            /* O_NONBLOCK on a file whose file system knows no NOWAIT may answer EAGAIN
             * for ever (REQ_F_NOWAIT in io_uring/rw.c; not seen on Linux 6.18). A
             * blocking call does not care for the flag on files. */
            request->is_blocking = cqe->res == -EAGAIN;
            mmc_requests_push(again, request);
            continue;
        }
        mmc_queue_sort(request, into, copies);
        n++;
    }
    io_uring_smp_store_release(cq->khead, head);
    return n;
}

/* Collects what is there, and publishes what that makes room for. */
static uint32_t reap(struct uring *uring, struct mmc_collect *into)
{
    struct mmc_requests copies = {0};
    struct mmc_requests again = {0};
    struct mmc_request *request;
    uint32_t n;

    if (!has_completions(uring))
        return 0;
    n = read_ring(uring, into, &copies, &again);
    pthread_mutex_lock(&uring->queue->lock);
    while ((request = mmc_requests_pop(&again)))
        start(uring, request);
    uring->in_flight -= n;
    mmc_queue_retire(uring->queue, n, &copies);
    start_waiting(uring);
    pthread_mutex_unlock(&uring->queue->lock);
    return n;
}

static bool is_over(const struct mmc_deadline *deadline)
{
    struct timespec left;

    return mmc_deadline_left(deadline, &left) && left.tv_sec == 0 && left.tv_nsec == 0;
}

/* Waits for a completion worth reporting: 0, or -EINTR. The caller holds the lock `collect`. */
static int wait_and_reap(struct uring *uring, struct mmc_collect *into, int timeout_ms)
{
    const struct mmc_deadline deadline = mmc_deadline_in(timeout_ms);

    for (;;) {
        const enum wake wake = submit_and_wait(uring, &deadline);
        const bool is_idle = !has_completions(uring);

        if (reap(uring, into))
            return 0;
        if (is_over(&deadline))
            return 0;
        if (wake == WAKE_SIGNAL && is_idle)
            return -EINTR;
        if (wake == WAKE_TROUBLE)
            pause_briefly();
    }
}

/* Another thread sleeps in the ring: sleep beside it, on the descriptor. */
static int wait_beside(struct uring *uring, struct mmc_collect *into, int timeout_ms)
{
    const struct mmc_deadline deadline = mmc_deadline_in(timeout_ms);
    int rc = mmc_wait_readable(uring->ring.ring_fd, &deadline);

    if (rc <= 0)
        return rc;
    if (pthread_mutex_trylock(&uring->collect) != 0)
        return 0;
    reap(uring, into);
    pthread_mutex_unlock(&uring->collect);
    submit(uring);
    return 0;
}

static int collect(struct uring *uring, struct mmc_collect *into, int timeout_ms)
{
    int rc = 0;

    if (pthread_mutex_trylock(&uring->collect) != 0) {
        submit(uring);
        return timeout_ms ? wait_beside(uring, into, timeout_ms) : 0;
    }
    /* Before the look, not after it: what the page cache answers completes at once. */
    if (timeout_ms == 0 || has_completions(uring)) {
        submit(uring);
        take_in(uring);
    }
    if (reap(uring, into) == 0 && timeout_ms != 0)
        rc = wait_and_reap(uring, into, timeout_ms);
    pthread_mutex_unlock(&uring->collect);
    submit(uring);
    return rc;
}

/* ---- the back end ------------------------------------------------------- */

/* Called by a worker: its result goes through the ring, so that one wait sees all. */
static void worker_done(void *owner, struct mmc_request *request)
{
    struct uring *uring = owner;

    pthread_mutex_lock(&uring->queue->lock);
    publish(uring, request);
    pthread_mutex_unlock(&uring->queue->lock);
    submit(uring);
}

static bool has_opcodes(struct io_uring *ring)
{
    static const int needed[] = {IORING_OP_NOP,      IORING_OP_READ,   IORING_OP_WRITE,
                                 IORING_OP_READV,    IORING_OP_WRITEV, IORING_OP_FSYNC,
                                 IORING_OP_FALLOCATE};
    struct io_uring_probe *probe = io_uring_get_probe_ring(ring);
    bool all = probe != NULL;
    size_t i;

    for (i = 0; all && i < sizeof(needed) / sizeof(needed[0]); i++)
        all = io_uring_opcode_supported(probe, needed[i]);
    if (probe)
        io_uring_free_probe(probe);
    return all;
}

/* COOP_TASKRUN (5.19) saves an interrupt for each completion, a fifteenth of the time of a write of
 * 4 KiB at depth 64. But then the completions of a thread that submitted and went on computing wait
 * until it enters the kernel, and with them another thread that waits for them: for a queue of one
 * thread only. EXT_ARG (5.11) is the time-out. */
static int open_ring(struct io_uring *ring, uint32_t depth, bool has_one_thread)
{
    int rc = -EINVAL;

#ifdef IORING_SETUP_TASKRUN_FLAG
    if (has_one_thread)
        rc =
            io_uring_queue_init(depth, ring, IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG);
#else
    (void)has_one_thread;
#endif
    if (rc == -EINVAL)
        rc = io_uring_queue_init(depth, ring, 0);
    if (rc < 0)
        return rc;
    if ((ring->features & IORING_FEAT_EXT_ARG) && has_opcodes(ring)) {
        io_uring_ring_dontfork(ring);
        return 0;
    }
    io_uring_queue_exit(ring);
    return -ENOSYS;
}

static int uring_open(struct mmc_queue *queue)
{
    struct uring *uring = calloc(1, sizeof(*uring));
    int rc;

    if (!uring)
        return -ENOMEM;
    rc = open_ring(&uring->ring, queue->depth, queue->has_one_thread);
    if (rc < 0) {
        free(uring);
        return rc;
    }
    uring->queue = queue;
    pthread_mutex_init(&uring->collect, NULL);
    mmc_workers_open(&uring->workers, queue->depth, worker_done, uring);
    queue->state = uring;
    return 0;
}

static int uring_fd(struct mmc_queue *queue)
{
    return ((struct uring *)queue->state)->ring.ring_fd;
}

static int uring_turn(struct mmc_queue *queue, struct mmc_requests *fresh, struct mmc_collect *into,
                      int timeout_ms)
{
    struct uring *uring = queue->state;
    int rc;

    if (fresh->first) {
        pthread_mutex_lock(&queue->lock);
        queue->outstanding += fresh->count;
        mmc_requests_move(&uring->waiting, fresh);
        start_waiting(uring);
        pthread_mutex_unlock(&queue->lock);
    }
    if (into->max == 0) {
        submit(uring);
        return 0;
    }
    rc = collect(uring, into, timeout_ms);
    return into->count ? (int)into->count : rc;
}

static void uring_close(struct mmc_queue *queue)
{
    struct uring *uring = queue->state;

    /* First the workers: one may still be on its way out of the ring. */
    mmc_workers_close(&uring->workers);
    io_uring_queue_exit(&uring->ring);
    pthread_mutex_destroy(&uring->collect);
    free(uring);
}

const struct mmc_backend mmc_uring_backend = {
    .number = MMC_BACKEND_URING,
    .open = uring_open,
    .fd = uring_fd,
    .turn = uring_turn,
    .close = uring_close,
};
