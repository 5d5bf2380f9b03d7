/* SPDX-License-Identifier: MIT
 *
 * The whole interface of the C helper. cffi reads this file as it is, so it
 * holds declarations only: no includes, no guards, no macros but integers.
 *
 * The helper owns what Python has no call for: the batch I/O queue, aligned
 * buffers, mapped metadata under a SIGBUS guard, bit scans, fallocate. It knows
 * bytes, bits and descriptors, never an image format. Every call that can fail
 * returns -errno; mmcow/native.py is the one place that translates.
 *
 * A queue or view belongs to the process that made it. In a forked child every turn and
 * access returns -EBADF, and closing touches nothing of the parent's.
 */

/* ---- I/O queue ---------------------------------------------------------- */

#define MMC_BACKEND_AUTO 0 /* io_uring where the kernel grants it, else the pool */
#define MMC_BACKEND_URING 1
#define MMC_BACKEND_POOL 2

/* One thread uses the queue at a time: the kernel need not interrupt it for what has completed. With
 * several it works as well, but what one has submitted may wait for its next system call. */
#define MMC_QUEUE_ONE_THREAD 1

#define MMC_READ 0      /* address, length */
#define MMC_WRITE 1     /* address, length */
#define MMC_READV 2     /* address: struct iovec[], length: how many */
#define MMC_WRITEV 3    /* address: struct iovec[], length: how many */
#define MMC_DATASYNC 4  /* fdatasync */
#define MMC_FALLOCATE 5 /* mode, offset, length */
#define MMC_MSYNC 6     /* address, length: msync(MS_SYNC); fd unused */
#define MMC_NOP 7       /* completes with 0: wakes a thread that waits */

/* One request. The queue copies it, and an iovec array, before mmc_queue_turn
 * returns; the buffers stay the caller's and must live until completion. */
struct mmc_op {
    uint64_t token;   /* comes back in mmc_done */
    uint64_t offset;  /* byte offset in the file */
    uint64_t length;  /* bytes, or number of iovecs */
    uint64_t address; /* of the buffer, the iovec array or the mapping */
    int32_t fd;
    int32_t code; /* MMC_READ ...; an unknown one refuses the whole turn: -EINVAL */
    int32_t mode; /* FALLOCATE: mode bits */
    int32_t reserved;
};

/* result: bytes moved, 0 for the other codes, or -errno. Short transfers are
 * continued inside. A read that meets the end of the file reports the bytes that
 * were there and zeroes the rest of the buffer. A write that stops making
 * progress reports -EIO. */
struct mmc_done {
    uint64_t token;
    int64_t result;
};

struct mmc_queue;

/* flags: MMC_QUEUE_ONE_THREAD or 0. */
struct mmc_queue *mmc_queue_open(int backend, uint32_t depth, int flags, int *error);
int mmc_queue_backend(struct mmc_queue *queue);
/* A descriptor that polls readable while completions wait. */
int mmc_queue_fd(struct mmc_queue *queue);
/* Submits all `count` ops (any number; those over the depth wait inside), then
 * collects up to `max` completions. timeout_ms: 0 never waits, -1 waits for at
 * least one, else at most that long. Returns the number collected, 0 on time-out,
 * -EINTR on a signal (the ops are submitted all the same), other -errno if the ops
 * could not be taken (then none was). A request of the helper's own that completes ends the
 * wait as well, and is not counted. Safe from several threads: a thread that
 * waits inside does not keep another from submitting; of two that wait, one may
 * return 0 early. */
int mmc_queue_turn(struct mmc_queue *queue, const struct mmc_op *ops, uint32_t count,
                   struct mmc_done *done, uint32_t max, int timeout_ms);
/* Runs one op to its end in this thread, where nothing is in flight: a sync through the ring or the
 * pool is handed to another thread, which costs a lone one more than it gains. Returns 1, 0 where
 * something is in flight (nothing was done), or -errno as mmc_queue_turn. No signal breaks in. */
int mmc_queue_alone(struct mmc_queue *queue, const struct mmc_op *op, struct mmc_done *done);
/* 1 while requests are in flight, the helper's own (see paths) included, else 0. */
int mmc_queue_busy(struct mmc_queue *queue);
/* Waits for everything in flight, drops its results, frees. */
void mmc_queue_close(struct mmc_queue *queue);

/* ---- buffers and files -------------------------------------------------- */

/* Zeroed. `alignment` is a power of two. Those of 16 KiB and more lie in huge pages where the
 * kernel grants them (pages.h), and are kept for reuse when freed. */
void *mmc_buffer_alloc(uint64_t size, uint64_t alignment, int *error);
void mmc_buffer_free(void *buffer);
/* Gives back to the kernel what nobody uses: buffers kept for reuse, and free memory of the heap,
 * which malloc (glibc's) keeps where it lies below a block in use. Walks the whole heap: for when
 * there is nothing else to do. */
void mmc_memory_trim(void);
int mmc_is_zero(const void *data, uint64_t length); /* 1 or 0 */
/* Number of leading bytes of equal class: scans `length` bytes in blocks of
 * `block`; sets *zero to the first block's class; returns bytes in the run. */
uint64_t mmc_zero_run(const void *data, uint64_t length, uint64_t block, int *zero);
/* Alignment that O_DIRECT needs on this open file, in bytes. Returns 1 and sets
 * both when the kernel told, 0 when it does not know, or -errno. */
int mmc_direct_alignment(int fd, uint32_t *memory, uint32_t *offset);
int mmc_fallocate(int fd, int mode, uint64_t offset, uint64_t length);

/* ---- views: mapped metadata --------------------------------------------- */

/* A view is the live state of a metadata area: a private mapping of the file (or
 * anonymous memory), its dirty marks, one per `unit` bytes, and for a mapping a
 * second, read-only shared one whose address msync takes. Nothing stored here
 * reaches the file by itself. Every access runs under the SIGBUS guard and returns
 * -EFAULT where the file behind the page is gone or unreadable; accesses beyond
 * the size return -ERANGE. `reserve` bytes of address space are set aside for
 * growth. Changes, marks, snapshots and changes of size exclude each other; loads and scans
 * run beside stores. */
struct mmc_view;

struct mmc_view *mmc_view_map(int fd, uint64_t size, uint64_t reserve, uint32_t unit, int *error);
struct mmc_view *mmc_view_memory(uint64_t size, uint64_t reserve, uint32_t unit, int *error);
void mmc_view_close(struct mmc_view *view);
uint64_t mmc_view_size(struct mmc_view *view);
/* -ENOSPC where size exceeds the reserve. A shrink zeroes the private bytes
 * between the new size and the end of its page and forgets dirty marks there. */
int mmc_view_set_size(struct mmc_view *view, uint64_t size);
/* Address of the shared mapping, 0 for memory. */
uint64_t mmc_view_shared(struct mmc_view *view);

int mmc_view_load(struct mmc_view *view, uint64_t offset, void *into, uint64_t length);
int mmc_view_store(struct mmc_view *view, uint64_t offset, const void *from, uint64_t length);
/* Store without a dirty mark: how memory is filled from the file at open. */
int mmc_view_fill(struct mmc_view *view, uint64_t offset, const void *from, uint64_t length);

/* A run of equal bits (first bit, how many, 0 or 1) or of bytes (offset, length,
 * position in the copy). */
struct mmc_run {
    uint64_t start;
    uint64_t count;
    uint64_t value;
};

/* Bits count from byte `base` of the view, least significant first. */
/* Runs that cover bits [first, first+count), at most `max` of them (the last may
 * then end early). Returns how many were stored. */
int mmc_view_bit_runs(struct mmc_view *view, uint64_t base, uint64_t first, uint64_t count,
                      struct mmc_run *runs, uint32_t max);
/* Sets (value 1) or clears bits, atomically per byte, then marks their units. */
int mmc_view_bits_write(struct mmc_view *view, uint64_t base, uint64_t first, uint64_t count,
                        int value);
/* Number of set bits in the range, or -errno. */
int64_t mmc_view_bits_count(struct mmc_view *view, uint64_t base, uint64_t first, uint64_t count);

/* Dirty units in [offset, offset+length), in units. */
uint64_t mmc_view_dirty(struct mmc_view *view, uint64_t offset, uint64_t length);
void mmc_view_mark(struct mmc_view *view, uint64_t offset, uint64_t length);
/* Per dirty unit in the range, in order: clears its mark, then copies it out. Runs
 * of adjacent units are merged; run.value is the position of its first byte in
 * `copy`. Returns the number of runs; stops early when `max` or `copy_size` is used up;
 * on a fault the marks cleared so far are set again. The unit at the end of the
 * view is copied up to the size. */
int mmc_view_snapshot(struct mmc_view *view, uint64_t offset, uint64_t length,
                      struct mmc_run *runs, uint32_t max, void *copy, uint64_t copy_size);
/* Gives pages without a dirty unit back to the file (mapped views only). Never call
 * it after a failed sync. */
int mmc_view_release(struct mmc_view *view);

/* ---- paths: requests that need no decision ------------------------------ */

/* One layer of a disk as the helper sees it, top first: a bit per cluster, or all there. */
struct mmc_layer {
    struct mmc_view *view; /* of the bits (set: in this layer); NULL: every byte is here */
    uint64_t bits;         /* the byte of the view where they begin */
    uint64_t size;         /* of the layer: what is beyond reads as zeros */
    uint64_t start;        /* in the file, of the disk's byte 0 */
    uint64_t read_end;     /* in the file: transfers beyond it are misses */
    uint64_t write_end;
    uint32_t cluster_shift;
    uint32_t file_align;   /* of offsets and lengths; 1: none is needed */
    uint32_t memory_align; /* of buffers */
    int32_t fd;
};

#define MMC_PATH_LAYERS 16
/* What hits there are besides reads. */
#define MMC_PATH_WRITES 1    /* writes to clusters of the top layer */
#define MMC_PATH_ALLOCATES 2 /* writes of whole clusters that are not there yet */
#define MMC_PATH_GUARDED 4   /* but not to the first sector */

#define MMC_HOLD_WRITES 1
#define MMC_HOLD_ALL 3

struct mmc_path;

/* The path misses everything until the first mmc_path_set. */
struct mmc_path *mmc_path_open(struct mmc_queue *queue, int *error);
/* With nothing in flight. */
void mmc_path_close(struct mmc_path *path);
/* Replaces the table; `count` 0 makes everything a miss. Only while all is held and drained, or
 * before the first use. -EINVAL for more than MMC_PATH_LAYERS. */
int mmc_path_set(struct mmc_path *path, uint64_t size, const struct mmc_layer *layers,
                 uint32_t count, int hits);
/* Holds [start, end): from here on hits of that kind that touch it are misses. Returns the hold's
 * number, or -ENOMEM. */
int64_t mmc_path_hold(struct mmc_path *path, uint64_t start, uint64_t end, int kind);
/* Transfers in flight that such a hold would forbid. */
uint32_t mmc_path_busy(struct mmc_path *path, uint64_t start, uint64_t end, int kind);
void mmc_path_release(struct mmc_path *path, int64_t hold);
/* Notes that a holder waits, or that none does any more: while one does, whoever turns the queue
 * in the helper comes back after each transfer. */
void mmc_path_await(struct mmc_path *path, int awaited);
/* A sync has failed: from here on writes miss, and what is being allocated ends with -EIO. */
void mmc_path_fail(struct mmc_path *path);
/* 1 when writes were begun since the last call or are in flight, else 0: a sync is due. */
int mmc_path_take_written(struct mmc_path *path);
/* Transfers one range at once, in this thread, without the queue. Returns length, 0 for a miss, or
 * -errno; -EBADF in a forked child. code: MMC_READ or MMC_WRITE. */
int64_t mmc_path_transfer(struct mmc_path *path, int code, uint64_t offset, void *address,
                          uint64_t length);

/* ---- loads: requests for measuring -------------------------------------- */

#define MMC_TIME_BITS 5 /* each power of two of ns in 1 << MMC_TIME_BITS buckets */
#define MMC_TIME_BUCKETS 1920

/* Times of requests in ns. A time t of n bits is counted in bucket (s << MMC_TIME_BITS) + (t >> s),
 * where s is what n has more than MMC_TIME_BITS + 1. */
struct mmc_times {
    uint64_t count;
    uint64_t total;
    uint64_t least;
    uint64_t most;
    uint64_t buckets[MMC_TIME_BUCKETS];
};

/* Requests of `block` bytes inside the range of `length` bytes at `start`. In order: one at `first`
 * (counted from `start`), each other one `step` behind the last, modulo `length`; where it would
 * pass the end it is at `first` again. Random: the n-th (from 0) is at block * place; the place is
 * draw(2 n) * places >> 64, with as many places as blocks fit. Where draw(2 n + 1) * 100 >> 64 is
 * below read_percent it is a read. draw(i): the i-th value of splitmix64 from `seed`. */
struct mmc_load_plan {
    uint64_t start;
    uint64_t length;
    uint64_t first; /* for a random load without a meaning, as `step` */
    uint64_t step;
    uint64_t block;
    uint64_t count; /* of requests; UINT64_MAX: until mmc_load_stop */
    uint64_t seed;
    uint64_t flush_every; /* writes; 0: never */
    uint32_t depth;
    uint32_t read_percent;
    int32_t is_random;
    int32_t pattern;   /* the byte that is written */
    int32_t drains;    /* before a flush nothing may be in flight */
    int32_t is_shared; /* other threads turn the queue at the same time */
};

/* Why a load wants its caller. */
#define MMC_LOAD_MISSED 1 /* there are misses to be done the long way */
#define MMC_LOAD_FLUSH 2  /* a flush is due: nothing is begun until mmc_load_resume */
#define MMC_LOAD_OVER 4   /* everything is done */

/* A request that the path does not do. */
struct mmc_miss {
    uint64_t offset;
    uint64_t address; /* of `block` bytes */
    uint32_t slot;
    int32_t code; /* MMC_READ or MMC_WRITE */
};

/* The request that stopped a load. */
struct mmc_load_error {
    uint64_t offset;
    int32_t code;   /* MMC_READ or MMC_WRITE */
    int32_t number; /* -errno; 0: there was none */
};

struct mmc_load;

/* Keeps `depth` requests in flight over a path, which must outlive it. -EINVAL, -ENOMEM. */
struct mmc_load *mmc_load_open(struct mmc_path *path, const struct mmc_load_plan *plan, int *error);
/* With nothing in flight; else it is leaked. */
void mmc_load_close(struct mmc_load *load);
/* Goes on until the caller is wanted (MMC_LOAD_...), the slice is over, a holder of the path waits,
 * a signal came (all 0) or completions of the queue's other requests were collected: `collected`
 * of them, at most `max`, are in `done`. Other -errno if the queue cannot be turned. One thread
 * at a time. Several shared loads of one queue may run at once, each for short slices: a request
 * may be collected by another's thread, which does not wake this one. */
int mmc_load_run(struct mmc_load *load, int slice_ms, struct mmc_done *done, uint32_t max,
                 uint32_t *collected);
/* Takes misses out; each is to be ended by mmc_load_done. Returns how many. */
uint32_t mmc_load_misses(struct mmc_load *load, struct mmc_miss *misses, uint32_t max);
/* The miss in this slot has ended. A negative result stops the load. */
void mmc_load_done(struct mmc_load *load, uint32_t slot, int64_t result);
/* After MMC_LOAD_FLUSH: begin requests again. */
void mmc_load_resume(struct mmc_load *load);
/* Begin no more requests. From any thread. */
void mmc_load_stop(struct mmc_load *load);
/* More (1) or less (-1) of what the caller does for the load, a flush: it is not over before. */
void mmc_load_busy(struct mmc_load *load, int change);
/* How many requests were done without an error, and the first one that failed. */
uint64_t mmc_load_finished(struct mmc_load *load, struct mmc_load_error *error);
/* Of reads (MMC_READ) or writes. Changes while the load runs; valid until it is closed. */
const struct mmc_times *mmc_load_times(struct mmc_load *load, int code);

/* ---- pump: NBD clients whose requests need no decision ------------------- */

/* Serves clients after their negotiation: receives, finishes by itself what is a hit of a path, and
 * hands everything else to the caller, who answers. A pump belongs to one thread, but for
 * mmc_pump_reply; the queues may be shared with others. */
struct mmc_pump;
struct mmc_client;

struct mmc_pump_limits {
    uint64_t room;     /* bytes of buffers, for all clients together */
    uint64_t share;    /* what a client may have of it whatever the others hold */
    uint64_t bytes;    /* a client's most; one request may always be begun */
    uint32_t requests; /* a client's most, until their replies have left */
    uint32_t payload;  /* the longest READ or WRITE that is given a buffer */
};

/* What the caller may look at between turns. */
struct mmc_pump_state {
    uint64_t room;      /* bytes of buffers in use */
    uint64_t allocated; /* hits that made clusters the top layer's, so far */
    uint32_t waiting;   /* clients that wait for room */
    uint32_t unanswered; /* requests in the caller's hands */
};

#define MMC_PUMP_ASKED 1  /* a request for the caller: handle, cookie ... command */
#define MMC_PUMP_FAILED 2 /* the same of one that failed: result; of a hit, or for want of memory */
#define MMC_PUMP_PARTED 3 /* a client is through: result */
#define MMC_PUMP_RESULT 4 /* of an op of the caller's: handle is its token */
#define MMC_PUMP_ENDED 5  /* transfers ended on a path where somebody waits for that */

struct mmc_pump_event {
    int32_t kind;
    uint16_t flags;
    uint16_t command;
    uint64_t number; /* as given for the client or the queue */
    uint64_t handle;
    int64_t result; /* PARTED: 0 when all was answered, -EPROTO for bytes that are no request
                     * (offset: what was there), else why it was lost */
    uint64_t cookie;
    uint64_t offset;
    uint64_t address; /* of the buffer: a WRITE's bytes, a READ's room; 0: none */
    uint32_t length;
    uint32_t reserved;
};

/* Hits of one export, by MMC_READ and MMC_WRITE; bucket n of `latency` counts those that took
 * less than 2^n microseconds, and not less than half. The caller's memory. */
struct mmc_pump_counts {
    uint64_t operations[2];
    uint64_t bytes[2];
    uint64_t latency[32];
};

struct mmc_pump *mmc_pump_open(const struct mmc_pump_limits *limits, int *error);
/* With all clients dropped. Where requests are in the caller's hands still, or in flight, it leaks
 * rather than free what is in use. */
void mmc_pump_close(struct mmc_pump *pump);
/* Polls readable when a turn is due. */
int mmc_pump_fd(struct mmc_pump *pump);
const struct mmc_pump_state *mmc_pump_state(struct mmc_pump *pump);
/* Turns end when this descriptor polls readable. */
int mmc_pump_watch(struct mmc_pump *pump, int fd);
/* The pump collects what completes in the queue. Before the first client of its paths. */
int mmc_pump_add_queue(struct mmc_pump *pump, struct mmc_queue *queue, uint64_t number);
/* Nothing uses it any more; a turn of the queue by others collects what is in flight. */
void mmc_pump_drop_queue(struct mmc_pump *pump, struct mmc_queue *queue);

/* Serves clients until there are events, for at most timeout_ms (-1: for ever, 0: what is there),
 * or until the caller had better look around: after a tenth of a second at work, after
 * transfers that somebody waits for, when the watched descriptor is readable, when a client begins
 * to wait for room. Returns the number of events, -EINTR, -EBADF in a forked child. */
int mmc_pump_turn(struct mmc_pump *pump, int timeout_ms, struct mmc_pump_event *events,
                  uint32_t max);

#define MMC_CLIENT_STRUCTURED 1 /* structured replies were agreed */
#define MMC_CLIENT_WRITES 2     /* may write */

/* Takes a connected socket on; it stays the caller's. `rest`: bytes that came already. `path` and
 * `counts` may be NULL: then all requests are the caller's. */
struct mmc_client *mmc_pump_attach(struct mmc_pump *pump, int fd, struct mmc_path *path,
                                   struct mmc_pump_counts *counts, uint64_t number, int flags,
                                   const void *rest, uint32_t length, int *error);
/* From here on every request is the caller's. */
void mmc_client_refuse(struct mmc_client *client);
/* Nothing more is received: PARTED when all is answered. */
void mmc_client_leave(struct mmc_client *client);
/* The end, also after PARTED. Requests in flight or in the caller's hands go on, unanswered. */
void mmc_client_drop(struct mmc_client *client);

struct mmc_client_facts {
    uint64_t memory; /* bytes of buffers */
    uint64_t unsent; /* bytes of replies */
    uint64_t moved;  /* bytes received and sent, ever */
    uint32_t requests;
    uint32_t is_awaited; /* 1: the rest of a payload has to come, or replies have to be read */
};

void mmc_client_facts(struct mmc_client *client, struct mmc_client_facts *facts);

#define MMC_REPLY_BYTES 0  /* the bytes given are all */
#define MMC_REPLY_BUFFER 1 /* and the request's buffer follows */
#define MMC_REPLY_LEAK 2   /* the buffer may still be written to: it is never used again */

/* Answers a request, once, from any thread; also of a client that is gone. */
void mmc_pump_reply(struct mmc_pump *pump, uint64_t handle, const void *bytes, uint32_t length,
                    int how);
