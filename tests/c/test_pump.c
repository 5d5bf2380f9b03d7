/* SPDX-License-Identifier: MIT
 *
 * The pump: clients over socket pairs, a path over a file, and a caller that answers what is no hit
 * by itself. Every test on both back ends of the queue.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "pages.h"
#include "test.h"

#define DISK (8 << 20)
#define ALIGN 512 /* what is not aligned to it is no hit */
#define EVENTS 16

#define READ 0
#define WRITE 1
#define DISC 2
#define FLUSH 3
#define FUA 1

/* ---- a disk with a pump over it ------------------------------------------ */

struct disk {
    struct mmc_queue *queue;
    struct mmc_view *view; /* of the bits; NULL: all is there */
    struct mmc_path *path;
    struct mmc_pump *pump;
    struct mmc_pump_counts counts;
    int fd;
    int clients;
    int parted;
    int64_t result; /* of the last that parted */
    int asked;
    int failed;
    int answers_elsewhere; /* from another thread */
    struct mmc_client *client[64];
};

static struct mmc_pump_limits limits = {
    .room = 4 << 20, .share = 64 << 10, .bytes = 2 << 20, .requests = 32, .payload = 1 << 20};

static void set_path(struct disk *disk, int fd)
{
    const struct mmc_layer layer = {.view = disk->view,
                                    .size = DISK,
                                    .read_end = DISK,
                                    .write_end = DISK,
                                    .cluster_shift = 12,
                                    .file_align = ALIGN,
                                    .memory_align = 1,
                                    .fd = fd};

    CHECK_EQUAL(mmc_path_set(disk->path, DISK, &layer, 1,
                             MMC_PATH_WRITES | (disk->view ? MMC_PATH_ALLOCATES : 0)),
                0);
}

static struct disk *open_disk(int backend, int has_bits)
{
    struct disk *disk = calloc(1, sizeof(*disk));
    int error = 1;

    CHECK(disk);
    disk->fd = scratch_file(DISK);
    disk->queue = mmc_queue_open(backend, 32, 0, &error);
    CHECK_EQUAL(error, 0);
    if (has_bits)
        disk->view = mmc_view_memory(4096, 4096, 512, &error);
    disk->path = mmc_path_open(disk->queue, &error);
    CHECK_EQUAL(error, 0);
    set_path(disk, disk->fd);
    disk->pump = mmc_pump_open(&limits, &error);
    CHECK_EQUAL(error, 0);
    CHECK_EQUAL(mmc_pump_add_queue(disk->pump, disk->queue, 7), 0);
    return disk;
}

/* Returns the client's end. */
static int attach(struct disk *disk, int flags, const void *rest, uint32_t length)
{
    int pair[2];
    int error = 1;

    CHECK_EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    disk->client[disk->clients] = mmc_pump_attach(disk->pump, pair[0], disk->path, &disk->counts,
                                                  (uint64_t)disk->clients << 32 | (uint32_t)pair[0],
                                                  flags, rest, length, &error);
    CHECK_EQUAL(error, 0);
    disk->clients++;
    return pair[1];
}

static void drop(struct disk *disk, int number, int fd)
{
    mmc_client_drop(disk->client[number]);
    disk->client[number] = NULL;
    close(fd);
}

/* ---- the caller ----------------------------------------------------------- */

static void put_simple(uint8_t *into, uint32_t error, uint64_t cookie)
{
    const uint32_t head[2] = {htobe32(0x67446698), htobe32(error)};

    memcpy(into, head, 8);
    cookie = htobe64(cookie);
    memcpy(into + 8, &cookie, 8);
}

struct answer {
    struct disk *disk;
    struct mmc_pump_event event;
};

static void *answer(void *argument)
{
    struct answer *work = argument;
    const struct mmc_pump_event *event = &work->event;
    void *buffer = (void *)(uintptr_t)event->address;
    uint8_t head[16];
    int how = MMC_REPLY_BYTES;
    uint32_t error = 0;

    if (event->kind == MMC_PUMP_FAILED) {
        error = 5;
    } else if (event->length > limits.payload || event->offset + event->length > DISK) {
        error = 22;
    } else if (event->command == READ && event->length) {
        CHECK_EQUAL(pread(work->disk->fd, buffer, event->length, (off_t)event->offset),
                    event->length);
        how = MMC_REPLY_BUFFER;
    } else if (event->command == WRITE && event->length) {
        CHECK_EQUAL(pwrite(work->disk->fd, buffer, event->length, (off_t)event->offset),
                    event->length);
    }
    put_simple(head, error, event->cookie);
    mmc_pump_reply(work->disk->pump, event->handle, head, sizeof(head), how);
    free(work);
    return NULL;
}

static void handle(struct disk *disk, const struct mmc_pump_event *event)
{
    struct answer *work;
    pthread_t thread;

    if (event->kind == MMC_PUMP_PARTED) {
        disk->parted++;
        disk->result = event->result;
        drop(disk, (int)(event->number >> 32), (int)(uint32_t)event->number);
        return;
    }
    if (event->kind == MMC_PUMP_ENDED)
        return;
    CHECK(event->kind == MMC_PUMP_ASKED || event->kind == MMC_PUMP_FAILED);
    disk->asked += event->kind == MMC_PUMP_ASKED;
    disk->failed += event->kind == MMC_PUMP_FAILED;
    work = malloc(sizeof(*work));
    *work = (struct answer){disk, *event};
    if (disk->answers_elsewhere && pthread_create(&thread, NULL, answer, work) == 0)
        pthread_detach(thread);
    else
        answer(work);
}

static void turn(struct disk *disk, int timeout_ms)
{
    struct mmc_pump_event events[EVENTS];
    const int n = mmc_pump_turn(disk->pump, timeout_ms, events, EVENTS);
    int i;

    CHECK(n >= 0 || n == -EINTR);
    for (i = 0; i < n; i++)
        handle(disk, &events[i]);
}

static void turn_until_parted(struct disk *disk, int count)
{
    while (disk->parted < count)
        turn(disk, 1000);
}

/* Once the last client is gone. */
static void check_room_is_given_back(void)
{
    uint64_t held, taken;

    mmc_pages_count(&held, &taken);
    CHECK_EQUAL(taken, 0);
}

static void close_disk(struct disk *disk)
{
    const struct mmc_pump_state *state = mmc_pump_state(disk->pump);

    while (state->unanswered || state->room || mmc_queue_busy(disk->queue))
        turn(disk, 10);
    CHECK_EQUAL(state->waiting, 0);
    check_room_is_given_back();
    mmc_pump_close(disk->pump);
    mmc_path_close(disk->path);
    mmc_queue_close(disk->queue);
    if (disk->view)
        mmc_view_close(disk->view);
    close(disk->fd);
    free(disk);
}

/* ---- a client -------------------------------------------------------------- */

static void put_request(uint8_t *into, int command, int flags, uint64_t cookie, uint64_t offset,
                        uint32_t length)
{
    const uint32_t magic = htobe32(0x25609513);
    const uint16_t small[2] = {htobe16((uint16_t)flags), htobe16((uint16_t)command)};

    memcpy(into, &magic, 4);
    memcpy(into + 4, small, 4);
    cookie = htobe64(cookie);
    offset = htobe64(offset);
    length = htobe32(length);
    memcpy(into + 8, &cookie, 8);
    memcpy(into + 16, &offset, 8);
    memcpy(into + 24, &length, 4);
}

static void send_all(int fd, const void *from, uint64_t length)
{
    const uint8_t *at = from;

    while (length) {
        const ssize_t n = send(fd, at, length, MSG_NOSIGNAL);

        CHECK(n > 0);
        at += n;
        length -= (uint64_t)n;
    }
}

static void receive_all(int fd, void *into, uint64_t length)
{
    CHECK_EQUAL(recv(fd, into, length, MSG_WAITALL), length);
}

static uint64_t get(const uint8_t *from, int bytes)
{
    uint64_t value = 0;

    while (bytes--)
        value = value << 8 | *from++;
    return value;
}

static void ask(int fd, int command, int flags, uint64_t cookie, uint64_t offset, uint32_t length,
                const void *payload)
{
    uint8_t head[28];

    put_request(head, command, flags, cookie, offset, length);
    send_all(fd, head, sizeof(head));
    if (payload)
        send_all(fd, payload, length);
}

#define SLOT (96 << 10)
#define SLOTS 20
#define REGION (SLOT * SLOTS)

struct guest {
    pthread_t thread;
    int fd;
    uint64_t start; /* of its own region */
    uint64_t state;
    uint8_t *model; /* of the whole disk */
    int is_structured;
    struct {
        int is_busy;
        int is_write;
        uint64_t offset;
        uint32_t length;
    } slot[SLOTS];
};

static void begin_one(struct guest *guest, unsigned number)
{
    const int is_write = (int)random_below(2);
    const uint32_t unit = random_below(4) ? 512 : 1;
    uint32_t length = (uint32_t)random_below(random_below(4) ? 9000 : SLOT / 2);
    uint64_t offset = random_below(SLOT / 2);

    length -= length % unit;
    offset -= offset % unit;
    offset += guest->start + number * SLOT;
    guest->slot[number].is_busy = 1;
    guest->slot[number].is_write = is_write;
    guest->slot[number].offset = offset;
    guest->slot[number].length = length;
    if (is_write)
        random_fill(guest->model + offset, length);
    ask(guest->fd, is_write ? WRITE : READ, random_below(8) ? 0 : FUA, number + 1000, offset,
        length, is_write ? guest->model + offset : NULL);
}

/* Reads a reply: the pump's as agreed; the caller of these tests makes simple ones only. */
static void end_one(struct guest *guest)
{
    static _Thread_local uint8_t data[SLOT];
    uint8_t head[28];
    unsigned number;
    int has_data;

    receive_all(guest->fd, head, 16);
    if (get(head, 4) == 0x67446698) {
        CHECK_EQUAL(get(head + 4, 4), 0);
        number = (unsigned)get(head + 8, 8) - 1000;
        CHECK(number < SLOTS && guest->slot[number].is_busy);
        has_data = !guest->slot[number].is_write;
    } else {
        CHECK_EQUAL(get(head, 4), 0x668e33ef);
        CHECK(guest->is_structured);
        receive_all(guest->fd, head + 16, 4);
        CHECK_EQUAL(get(head + 4, 2), 1);
        number = (unsigned)get(head + 8, 8) - 1000;
        CHECK(number < SLOTS && guest->slot[number].is_busy);
        has_data = get(head + 6, 2) == 1;
        CHECK_EQUAL(has_data, !guest->slot[number].is_write);
        CHECK_EQUAL(get(head + 16, 4), has_data ? guest->slot[number].length + 8 : 0);
        if (has_data) {
            receive_all(guest->fd, head, 8);
            CHECK_EQUAL(get(head, 8), guest->slot[number].offset);
        }
    }
    if (has_data && guest->slot[number].length) {
        receive_all(guest->fd, data, guest->slot[number].length);
        CHECK(memcmp(data, guest->model + guest->slot[number].offset, guest->slot[number].length) ==
              0);
    }
    guest->slot[number].is_busy = 0;
}

static void *be_guest(void *argument)
{
    struct guest *guest = argument;
    unsigned busy = 0;
    int left = 600;

    random_state = guest->state;
    while (left || busy) {
        const unsigned number = (unsigned)random_below(SLOTS);

        if (left && !guest->slot[number].is_busy) {
            begin_one(guest, number);
            busy++;
            left--;
        }
        if (busy && (!left || busy > 12 || random_below(2) == 0)) {
            end_one(guest);
            busy--;
        }
    }
    ask(guest->fd, DISC, 0, 1, 0, 0, NULL);
    CHECK_EQUAL(recv(guest->fd, &busy, 1, 0), 0);
    close(guest->fd);
    return NULL;
}

struct collector {
    pthread_t thread;
    struct mmc_queue *queue;
    int stops;
};

static void *collect(void *argument)
{
    struct collector *collector = argument;
    struct mmc_done done[4];

    while (!__atomic_load_n(&collector->stops, __ATOMIC_ACQUIRE))
        CHECK(mmc_queue_turn(collector->queue, NULL, 0, done, 4, 5) <= 0);
    return NULL;
}

#define GUESTS 4

static void test_random_traffic(int backend, int is_shared)
{
    static struct guest guests[GUESTS];
    struct disk *disk = open_disk(backend, 0);
    struct collector collector = {.queue = disk->queue};
    uint8_t *model = calloc(1, DISK);
    uint8_t *found = malloc(DISK);
    unsigned i;

    disk->answers_elsewhere = is_shared;
    if (is_shared)
        CHECK_EQUAL(pthread_create(&collector.thread, NULL, collect, &collector), 0);
    for (i = 0; i < GUESTS; i++) {
        guests[i] = (struct guest){.start = i * REGION,
                                   .state = test_seed * 31 + i + 1,
                                   .model = model,
                                   .is_structured = (int)i & 1};
        guests[i].fd =
            attach(disk, MMC_CLIENT_WRITES | (guests[i].is_structured ? MMC_CLIENT_STRUCTURED : 0),
                   NULL, 0);
        CHECK_EQUAL(pthread_create(&guests[i].thread, NULL, be_guest, &guests[i]), 0);
    }
    turn_until_parted(disk, GUESTS);
    for (i = 0; i < GUESTS; i++)
        CHECK_EQUAL(pthread_join(guests[i].thread, NULL), 0);
    __atomic_store_n(&collector.stops, 1, __ATOMIC_RELEASE);
    if (is_shared)
        CHECK_EQUAL(pthread_join(collector.thread, NULL), 0);
    CHECK(disk->counts.operations[READ] > 100 && disk->counts.operations[WRITE] > 100);
    CHECK(disk->asked > 100);
    CHECK_EQUAL(disk->counts.operations[READ] + disk->counts.operations[WRITE] +
                    (uint64_t)disk->asked,
                GUESTS * 600);
    CHECK_EQUAL(pread(disk->fd, found, DISK, 0), DISK);
    CHECK(memcmp(found, model, DISK) == 0);
    close_disk(disk);
    free(found);
    free(model);
}

/* ---- single things --------------------------------------------------------- */

static void test_zeros(int backend)
{
    struct disk *disk = open_disk(backend, 1);
    const int plain = attach(disk, 0, NULL, 0);
    const int structured = attach(disk, MMC_CLIENT_STRUCTURED, NULL, 0);
    uint8_t *data = malloc(300 << 10);
    int i;

    ask(plain, READ, 0, 5, 0, 200 << 10, NULL);
    ask(structured, READ, 0, 6, 65536, 200 << 10, NULL);
    for (i = 0; i < 20; i++)
        turn(disk, 1);
    receive_all(plain, data, 16 + (200 << 10));
    CHECK_EQUAL(get(data + 8, 8), 5);
    CHECK_EQUAL(mmc_is_zero(data + 16, 200 << 10), 1);
    receive_all(structured, data, 32);
    CHECK_EQUAL(get(data + 6, 2), 2);
    CHECK_EQUAL(get(data + 8, 8), 6);
    CHECK_EQUAL(get(data + 20, 8), 65536);
    CHECK_EQUAL(get(data + 28, 4), 200 << 10);
    CHECK_EQUAL(disk->asked, 0);
    close(plain);
    close(structured);
    turn_until_parted(disk, 2);
    CHECK_EQUAL(disk->result, 0);
    close_disk(disk);
    free(data);
}

/* Many requests that are answered at once came before what another client asks, which is still not
 * answered last. */
static void test_turns_are_bounded(int backend)
{
    enum { MANY = 1500, HEAD = 28, HOLE = 32 };
    struct disk *disk = open_disk(backend, 1);
    const int greedy = attach(disk, MMC_CLIENT_STRUCTURED, NULL, 0);
    const int modest = attach(disk, MMC_CLIENT_STRUCTURED, NULL, 0);
    uint8_t *requests = malloc(MANY * HEAD);
    uint8_t *replies = malloc(MANY * HOLE);
    ssize_t before;
    int i;

    for (i = 0; i < MANY; i++)
        put_request(requests + (size_t)i * HEAD, READ, 0, (uint64_t)i, 0, 64 << 10);
    send_all(greedy, requests, MANY * HEAD);
    ask(modest, FLUSH, 0, 7, 0, 0, NULL);
    while (disk->asked == 0) /* which ends the turn at once */
        turn(disk, 0);
    before = recv(greedy, replies, MANY * HOLE, MSG_DONTWAIT);
    CHECK(before <= 4 * 128 * HOLE);
    close(greedy);
    close(modest);
    turn_until_parted(disk, 2);
    close_disk(disk);
    free(requests);
    free(replies);
}

static void test_what_came_before_it_was_attached(int backend)
{
    struct disk *disk = open_disk(backend, 0);
    uint8_t rest[28 + 28 + 300];
    uint8_t reply[16 + 512 + 16];
    int fd;

    put_request(rest, READ, 0, 1, 0, 512);
    put_request(rest + 28, WRITE, 0, 2, 512, 512);
    memset(rest + 56, 'w', 300);
    fd = attach(disk, MMC_CLIENT_WRITES, rest, sizeof(rest));
    turn(disk, 0);
    send_all(fd, rest + 56, 212);
    while (disk->counts.operations[WRITE] == 0 || disk->counts.operations[READ] == 0)
        turn(disk, 100);
    turn(disk, 0);
    receive_all(fd, reply, sizeof(reply));
    CHECK_EQUAL(pread(disk->fd, reply, 512, 512), 512);
    CHECK(reply[0] == 'w' && reply[511] == 'w');
    close(fd);
    turn_until_parted(disk, 1);
    close_disk(disk);
}

static void test_nonsense_ends_it(int backend)
{
    struct disk *disk = open_disk(backend, 0);
    const int fd = attach(disk, 0, NULL, 0);
    uint8_t nonsense[28] = {1, 2, 3, 4};

    send_all(fd, nonsense, sizeof(nonsense));
    turn_until_parted(disk, 1);
    CHECK_EQUAL(disk->result, -EPROTO);
    close(fd);
    close_disk(disk);
}

/* Too long to be given a buffer: passed over, and told. */
static void test_payload_that_is_too_long(int backend)
{
    struct disk *disk = open_disk(backend, 0);
    const int fd = attach(disk, MMC_CLIENT_WRITES, NULL, 0);
    uint8_t head[28];
    uint8_t reply[16];
    uint8_t *payload = calloc(1, 64 << 10);
    unsigned i;

    put_request(head, WRITE, 0, 3, 0, 2 << 20);
    send_all(fd, head, sizeof(head));
    for (i = 0; i < 32; i++) {
        send_all(fd, payload, 64 << 10);
        turn(disk, 0);
        CHECK_EQUAL(mmc_pump_state(disk->pump)->room, 0);
    }
    while (!disk->asked)
        turn(disk, 100);
    turn(disk, 0);
    receive_all(fd, reply, sizeof(reply));
    CHECK_EQUAL(get(reply + 4, 4), 22);
    close(fd);
    turn_until_parted(disk, 1);
    close_disk(disk);
    free(payload);
}

/* One that only asks is not read from for ever, and costs no more than it may. */
static void test_replies_that_nobody_reads(int backend)
{
    struct disk *disk = open_disk(backend, 0);
    const int fd = attach(disk, 0, NULL, 0);
    struct mmc_client_facts facts;
    uint8_t head[28];
    int blocked = 0;

    put_request(head, READ, 0, 3, 0, 128 << 10);
    while (blocked < 100) {
        if (send(fd, head, sizeof(head), MSG_DONTWAIT) != sizeof(head))
            blocked++;
        turn(disk, blocked ? 1 : 0);
        mmc_client_facts(disk->client[0], &facts);
        CHECK(facts.requests <= limits.requests);
        CHECK(facts.memory <= limits.bytes);
    }
    CHECK(facts.is_awaited);
    CHECK(facts.unsent > (1 << 20));
    close(fd);
    turn_until_parted(disk, 1);
    close_disk(disk);
}

/* The first hogs all room with payloads that never come; the next waits until it is dropped. */
static void test_room_is_shared_out(int backend)
{
    struct disk *disk = open_disk(backend, 0);
    int hogs[8];
    uint8_t reply[16];
    uint8_t *payload = calloc(1, 1 << 20);
    unsigned i;
    int small;

    for (i = 0; i < 8; i++) {
        hogs[i] = attach(disk, MMC_CLIENT_WRITES, NULL, 0);
        ask(hogs[i], WRITE, 0, i, 0, 1 << 20, NULL);
        turn(disk, 0);
        turn(disk, 0);
    }
    CHECK_EQUAL(mmc_pump_state(disk->pump)->room, 4 << 20);
    CHECK_EQUAL(mmc_pump_state(disk->pump)->waiting, 4);
    small = attach(disk, MMC_CLIENT_WRITES, NULL, 0);
    ask(small, WRITE, 0, 99, 0, 4096, payload); /* within its share */
    while (disk->counts.operations[WRITE] == 0)
        turn(disk, 100);
    turn(disk, 0);
    receive_all(small, reply, 16);
    CHECK_EQUAL(get(reply + 8, 8), 99);
    for (i = 0; i < 4; i++)
        close(hogs[i]);
    turn_until_parted(disk, 4);
    turn(disk, 0);
    turn(disk, 0);
    CHECK_EQUAL(mmc_pump_state(disk->pump)->waiting, 0);
    for (i = 4; i < 8; i++)
        close(hogs[i]);
    close(small);
    turn_until_parted(disk, 9);
    close_disk(disk);
    free(payload);
}

static void test_clients_that_vanish(int backend)
{
    struct disk *disk = open_disk(backend, 0);
    uint8_t *payload = calloc(1, 64 << 10);
    unsigned round;

    for (round = 0; round < 60; round++) {
        const int fd = attach(disk, MMC_CLIENT_WRITES, NULL, 0);
        unsigned i;

        for (i = 0; i < 6; i++)
            ask(fd, READ, 0, i, i * 4096 + (round & 1), 4096, NULL);
        ask(fd, WRITE, 0, 9, 0, 64 << 10, NULL);
        send_all(fd, payload, random_below(64 << 10));
        if (random_below(2))
            turn(disk, 0);
        if (random_below(2)) {
            close(fd);
            turn_until_parted(disk, (int)round + 1);
        } else { /* the caller does not want it any more */
            disk->parted++;
            mmc_client_drop(disk->client[disk->clients - 1]);
            close(fd);
        }
        disk->clients = 0;
    }
    close_disk(disk);
    free(payload);
}

static void test_errors_are_the_callers(int backend)
{
    struct disk *disk = open_disk(backend, 0);
    const int write_only = open("/dev/null", O_WRONLY);
    const int fd = attach(disk, 0, NULL, 0);
    uint8_t reply[16];

    set_path(disk, write_only);
    ask(fd, READ, 0, 77, 0, 4096, NULL);
    while (!disk->failed)
        turn(disk, 100);
    turn(disk, 0);
    receive_all(fd, reply, 16);
    CHECK_EQUAL(get(reply + 4, 4), 5);
    CHECK_EQUAL(get(reply + 8, 8), 77);
    CHECK_EQUAL(disk->counts.operations[READ], 0);
    close(fd);
    turn_until_parted(disk, 1);
    close_disk(disk);
    close(write_only);
}

static uint64_t space_used(int fd)
{
    struct stat facts;

    CHECK_EQUAL(fstat(fd, &facts), 0);
    CHECK_EQUAL(facts.st_size, DISK);
    return (uint64_t)facts.st_blocks * 512;
}

/* New clusters one after the other: space is set aside ahead, no more than what was written, and
 * none for a client that jumps about. What a run leaves unwritten stays a hole to its reader. */
static void test_space_ahead(int backend)
{
    struct disk *disk = open_disk(backend, 1);
    const int fd = attach(disk, MMC_CLIENT_WRITES, NULL, 0);
    const struct mmc_pump_state *state = mmc_pump_state(disk->pump);
    uint8_t *data = malloc(65536);
    uint64_t most = 0;
    unsigned i;

    random_fill(data, 65536);
    for (i = 0; i < 400; i++) {
        const uint64_t at = i < 128 ? i * 4096 : (uint64_t)(i * 7 % 900 + 800) * 4096;
        const uint64_t written = (i + 1) * 4096;

        ask(fd, WRITE, 0, i, at, 4096, data);
        while (state->allocated <= i)
            turn(disk, 1); /* which lasts: of what the pump did alone it tells nobody */
        turn(disk, 0);
        receive_all(fd, data + 4096, 16);
        CHECK(space_used(disk->fd) <= 2 * written + (64 << 10));
        if (space_used(disk->fd) > written + most)
            most = space_used(disk->fd) - written;
    }
    CHECK(most >= 64 << 10);
    CHECK_EQUAL(disk->counts.operations[WRITE], 400);
    CHECK_EQUAL(disk->asked + disk->failed, 0);
    close(fd);
    turn_until_parted(disk, 1);
    CHECK_EQUAL(mmc_view_bits_count(disk->view, 0, 0, DISK / 4096), 400);
    close_disk(disk);
    free(data);
}

static uint64_t address_space(void)
{
    FILE *file = fopen("/proc/self/statm", "r");
    unsigned long pages = 0;

    CHECK(file);
    CHECK_EQUAL(fscanf(file, "%lu", &pages), 1);
    fclose(file);
    return pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* A request for whose buffer there is no memory fails, and the next is served. */
static void test_no_memory(int backend)
{
    const struct mmc_pump_limits before = limits;
    const uint32_t length = 3u << 30;
    struct rlimit space;
    struct rlimit less;
    struct disk *disk;
    uint8_t reply[16 + 512];
    uint8_t head[28];
    int fd;

    limits.payload = length;
    limits.room = limits.bytes = UINT64_MAX / 2;
    disk = open_disk(backend, 0);
    limits = before;
    fd = attach(disk, MMC_CLIENT_WRITES, NULL, 0);
    CHECK_EQUAL(getrlimit(RLIMIT_AS, &space), 0);
    less = (struct rlimit){address_space() + (1u << 30), space.rlim_max};
    CHECK_EQUAL(setrlimit(RLIMIT_AS, &less), 0);
    put_request(head, READ, 0, 1, 0, length);
    send_all(fd, head, sizeof(head));
    while (!disk->failed)
        turn(disk, 100);
    CHECK_EQUAL(setrlimit(RLIMIT_AS, &space), 0);
    turn(disk, 0);
    receive_all(fd, reply, 16);
    CHECK_EQUAL(get(reply + 4, 4), 5);
    ask(fd, READ, 0, 2, 0, 512, NULL);
    while (disk->counts.operations[READ] == 0)
        turn(disk, 100);
    turn(disk, 0);
    receive_all(fd, reply, 16 + 512);
    close(fd);
    turn_until_parted(disk, 1);
    close_disk(disk);
}

static void test_who_may_not_write_and_who_is_refused(int backend)
{
    struct disk *disk = open_disk(backend, 0);
    const int fd = attach(disk, 0, NULL, 0);
    uint8_t data[16 + 512] = {0};

    ask(fd, WRITE, 0, 1, 0, 512, data);
    while (disk->asked < 1)
        turn(disk, 100);
    turn(disk, 0);
    receive_all(fd, data, 16);
    CHECK_EQUAL(disk->counts.operations[WRITE], 0);
    mmc_client_refuse(disk->client[0]);
    ask(fd, READ, 0, 2, 0, 512, NULL);
    while (disk->asked < 2)
        turn(disk, 100);
    turn(disk, 0);
    receive_all(fd, data, 16 + 512);
    CHECK_EQUAL(disk->counts.operations[READ], 0);
    mmc_client_leave(disk->client[0]);
    turn_until_parted(disk, 1);
    CHECK_EQUAL(recv(fd, data, 1, 0), 0);
    close(fd);
    close_disk(disk);
}

/* The kernel may interrupt a wait for its own reasons. */
static int turn_once(struct mmc_pump *pump, int timeout_ms, struct mmc_pump_event *event)
{
    int n;

    do
        n = mmc_pump_turn(pump, timeout_ms, event, 1);
    while (n == -EINTR);
    return n;
}

static void test_results_of_the_callers_own(int backend)
{
    struct disk *disk = open_disk(backend, 0);
    const struct mmc_op op = {.token = 4711, .code = MMC_NOP};
    struct mmc_pump_event event;

    CHECK_EQUAL(mmc_queue_turn(disk->queue, &op, 1, NULL, 0, 0), 0);
    CHECK_EQUAL(turn_once(disk->pump, 5000, &event), 1);
    CHECK_EQUAL(event.kind, MMC_PUMP_RESULT);
    CHECK_EQUAL(event.number, 7);
    CHECK_EQUAL(event.handle, 4711);
    close_disk(disk);
}

static void test_returns_for_another_descriptor(int backend)
{
    struct disk *disk = open_disk(backend, 0);
    struct mmc_pump_event event;
    int pipes[2];

    CHECK_EQUAL(pipe(pipes), 0);
    CHECK_EQUAL(mmc_pump_watch(disk->pump, pipes[0]), 0);
    CHECK_EQUAL(turn_once(disk->pump, 20, &event), 0);
    CHECK_EQUAL(write(pipes[1], "x", 1), 1);
    CHECK_EQUAL(turn_once(disk->pump, -1, &event), 0);
    close_disk(disk);
    close(pipes[0]);
    close(pipes[1]);
}

static void test_forked_child(int backend)
{
    struct disk *disk = open_disk(backend, 0);
    struct mmc_pump_event event;
    const pid_t child = fork();
    int status;

    if (child == 0) {
        const int rc = mmc_pump_turn(disk->pump, 0, &event, 1);

        mmc_pump_close(disk->pump);
        _exit(rc == -EBADF ? 0 : 1);
    }
    CHECK_EQUAL(waitpid(child, &status, 0), child);
    CHECK_EQUAL(status, 0);
    close_disk(disk);
}

static void run_all(int backend)
{
    printf("-- backend %d\n", backend);
    RUN(test_random_traffic(backend, 0));
    RUN(test_random_traffic(backend, 1));
    RUN(test_zeros(backend));
    RUN(test_turns_are_bounded(backend));
    RUN(test_what_came_before_it_was_attached(backend));
    RUN(test_nonsense_ends_it(backend));
    RUN(test_payload_that_is_too_long(backend));
    RUN(test_replies_that_nobody_reads(backend));
    RUN(test_room_is_shared_out(backend));
    RUN(test_clients_that_vanish(backend));
    RUN(test_errors_are_the_callers(backend));
    RUN(test_space_ahead(backend));
    RUN(test_no_memory(backend));
    RUN(test_who_may_not_write_and_who_is_refused(backend));
    RUN(test_results_of_the_callers_own(backend));
    RUN(test_returns_for_another_descriptor(backend));
    RUN(test_forked_child(backend));
}

static int has_uring(void)
{
    int error;
    struct mmc_queue *queue = mmc_queue_open(MMC_BACKEND_URING, 1, 0, &error);

    mmc_queue_close(queue);
    return queue != NULL;
}

int main(int argc, char **argv)
{
    const int only_pool = argc > 2 && strcmp(argv[2], "pool") == 0;

    test_begin(argc, argv);
    if (!only_pool && has_uring())
        run_all(MMC_BACKEND_URING);
    run_all(MMC_BACKEND_POOL);
    return 0;
}
