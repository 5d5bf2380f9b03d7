/* SPDX-License-Identifier: MIT
 *
 * One client: bytes received become requests. Nothing that it sends is trusted: lengths are checked
 * before memory is taken, and what it has under way is bounded in number and bytes.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "pump.h"

/* From this length on a payload is worth a call of its own: see receive. */
#define BULK_LEAST (16u << 10)
/* What one client may do before the next has its turn. */
#define RECEIVES_MAX 8
#define BEGINS_MAX 128
/* Replies of the caller's are not in buffers; of these a client may leave so much unread. */
#define UNREAD_MAX (64u << 10)

/* ---- waiting ------------------------------------------------------------ */

static bool is_stopped(const struct mmc_client *client)
{
    return client->is_over || client->is_leaving || client->held;
}

/* Whether a whole request waits in what was received. */
static bool has_backlog(const struct mmc_client *client)
{
    return !client->incoming && !client->skip && client->have - client->at >= NBD_REQUEST_BYTES;
}

/* Whether something could be begun with what was received. */
static bool has_work(const struct mmc_client *client)
{
    const struct mmc_ask *ask = client->incoming;

    if (!ask)
        return has_backlog(client);
    return client->have > client->at ||
           (!client->skip && (!ask->buffer || client->filled == ask->request.length));
}

void mmc_client_rewatch(struct mmc_client *client)
{
    struct epoll_event event = {.data.ptr = client};
    int how = EPOLL_CTL_MOD;

    if (!is_stopped(client) && !has_work(client))
        event.events |= EPOLLIN;
    if (!client->is_over && client->is_blocked)
        event.events |= EPOLLOUT;
    if (event.events == client->watched)
        return;
    /* Not watched at all rather than for nothing: a socket whose peer is gone would always be
     * ready with that. */
    if (!client->watched)
        how = EPOLL_CTL_ADD;
    else if (!event.events)
        how = EPOLL_CTL_DEL;
    client->watched = event.events;
    if (epoll_ctl(client->pump->epoll, how, client->source.fd, &event) < 0)
        mmc_client_part(client, -errno, 0);
}

static void unwatch(struct mmc_client *client)
{
    struct epoll_event nothing = {0};

    if (client->watched)
        epoll_ctl(client->pump->epoll, EPOLL_CTL_DEL, client->source.fd, &nothing);
    client->watched = 0;
}

static void drop_incoming(struct mmc_client *client)
{
    struct mmc_ask *ask = client->incoming;

    client->incoming = NULL;
    client->skip = 0;
    if (ask)
        mmc_ask_give(ask);
}

void mmc_client_part(struct mmc_client *client, int64_t result, uint64_t value)
{
    if (client->is_over)
        return;
    unwatch(client);
    client->is_over = true;
    client->result = result;
    client->value = value;
    drop_incoming(client);
    mmc_client_forget(client);
    mmc_pump_unlist(client, LIST_BUSY);
    mmc_pump_unlist(client, LIST_REPLIES);
    mmc_pump_unlist(client, LIST_ROOM);
    mmc_pump_enlist(client, LIST_PARTED);
}

static void hold(struct mmc_client *client, uint32_t why)
{
    client->held |= why;
}

void mmc_client_ease(struct mmc_client *client)
{
    const struct mmc_pump_limits *limits = &client->pump->limits;

    if (client->asks <= limits->requests / 2 && client->memory <= limits->bytes / 2)
        client->held &= ~(uint32_t)HELD_FULL;
    if (client->unread <= UNREAD_MAX / 2)
        client->held &= ~(uint32_t)HELD_UNREAD;
    /* Its share it may use whoever stands in the line before it. */
    if (client->memory + client->wanted <= limits->share)
        client->held &= ~(uint32_t)HELD_ROOM;
    if (!is_stopped(client) && has_work(client))
        mmc_pump_enlist(client, LIST_BUSY);
    mmc_client_rewatch(client);
}

void mmc_client_leave(struct mmc_client *client)
{
    if (client->is_over || client->is_leaving)
        return;
    client->is_leaving = true;
    mmc_pump_unlist(client, LIST_BUSY);
    mmc_pump_unlist(client, LIST_ROOM);
    drop_incoming(client);
    mmc_client_rewatch(client);
    mmc_pump_enlist(client, LIST_REPLIES); /* which sees whether all is answered */
}

/* ---- room --------------------------------------------------------------- */

/* Whether one more request, with a buffer of `length`, may be begun now; charges it. */
static bool admit(struct mmc_client *client, uint32_t length)
{
    struct mmc_pump *pump = client->pump;
    const struct mmc_pump_limits *limits = &pump->limits;
    const struct mmc_client *first = pump->lists[LIST_ROOM].first;
    const bool is_next = !first || first == client;

    if (client->unread > UNREAD_MAX)
        hold(client, HELD_UNREAD);
    if (client->asks >= limits->requests ||
        (client->memory && client->memory + length > limits->bytes))
        hold(client, HELD_FULL);
    if (client->held)
        return false;
    if (length && client->memory + length > limits->share &&
        !(is_next && pump->state.room + length <= limits->room)) {
        hold(client, HELD_ROOM);
        client->wanted = length;
        mmc_pump_enlist(client, LIST_ROOM);
        return false;
    }
    mmc_pump_unlist(client, LIST_ROOM);
    return true;
}

static struct mmc_ask *make_ask(struct mmc_client *client, const struct mmc_nbd_request *request,
                                uint32_t length)
{
    struct mmc_pump *pump = client->pump;
    struct mmc_ask *ask = mmc_ask_take(client);

    if (!ask)
        return NULL;
    ask->request = *request;
    ask->began = pump->now;
    if (!length)
        return ask;
    ask->buffer = mmc_room_take(&pump->room, length);
    if (!ask->buffer) {
        ask->result = -ENOMEM; /* which the caller says */
        return ask;
    }
    ask->charged = length;
    client->memory += length;
    pump->state.room += length;
    return ask;
}

/* ---- requests ----------------------------------------------------------- */

static void finished(struct mmc_transfer *transfer, int64_t result)
{
    struct mmc_ask *ask = (struct mmc_ask *)(void *)transfer;

    ask->result = result;
    mmc_pump_settle(ask);
}

/* Whether a path may be asked at all. FUA means nothing where nothing is written. */
static bool may_hit(const struct mmc_client *client, const struct mmc_ask *ask)
{
    const unsigned for_reads = NBD_CMD_FLAG_FUA | (client->is_structured ? NBD_CMD_FLAG_DF : 0);

    if (!client->path || !client->queue || client->is_refusing || !ask->buffer)
        return false;
    if (ask->request.command == NBD_CMD_READ)
        return !(ask->request.flags & ~for_reads);
    return client->is_writer && !ask->request.flags;
}

static void start(struct mmc_ask *ask)
{
    struct mmc_client *client = ask->client;
    const struct mmc_nbd_request *request = &ask->request;
    const int code = request->command == NBD_CMD_READ ? MMC_READ : MMC_WRITE;
    int rc = MMC_MISS;

    if (may_hit(client, ask)) {
        ask->transfer.finished = finished;
        rc = mmc_path_begin(client->path, &ask->transfer, code, request->offset, ask->buffer,
                            request->length, &client->queue->batch);
        if (rc == MMC_STARTED && ask->transfer.allocates)
            mmc_ahead_follow(client, request->offset, request->length);
    }
    if (rc == MMC_ZEROS)
        mmc_ask_zeros(ask);
    if (rc != MMC_MISS)
        return;
    /* What was somebody else's is not shown, whatever happens to the request. */
    if (request->command == NBD_CMD_READ && ask->buffer)
        memset(ask->buffer, 0, request->length);
    mmc_pump_tell_ask(ask);
}

/* Takes what is there of a payload; the rest is received in place. */
static void take_payload(struct mmc_client *client)
{
    struct mmc_ask *ask = client->incoming;
    const uint32_t left = ask->request.length - client->filled;
    const uint32_t there = client->have - client->at;
    const uint32_t part = there < left ? there : left;

    memcpy((uint8_t *)ask->buffer + client->filled, client->in + client->at, part);
    client->at += part;
    client->filled += part;
}

static void take_skipped(struct mmc_client *client)
{
    const uint32_t there = client->have - client->at;
    const uint32_t part = there < client->skip ? there : client->skip;

    client->at += part;
    client->skip -= part;
}

/* Starts the WRITE whose payload has come, if it has. */
static void end_payload(struct mmc_client *client)
{
    struct mmc_ask *ask = client->incoming;

    if (client->skip)
        take_skipped(client);
    else if (ask->buffer && client->filled < ask->request.length)
        take_payload(client);
    if (client->skip || (ask->buffer && client->filled < ask->request.length))
        return;
    client->incoming = NULL;
    start(ask);
}

/* Begins one request; false where it has to wait or nothing follows. */
static bool begin(struct mmc_client *client)
{
    struct mmc_nbd_request request;
    const bool is_known = mmc_nbd_parse(client->in + client->at, &request);
    const bool is_write = request.command == NBD_CMD_WRITE;
    const bool is_long = request.length > client->pump->limits.payload;
    const bool is_carrier = is_write || request.command == NBD_CMD_READ;
    const uint32_t length = is_carrier && !is_long ? request.length : 0;
    struct mmc_ask *ask;

    if (!is_known) {
        mmc_client_part(client, -EPROTO, request.magic);
        return false;
    }
    if (request.command == NBD_CMD_DISC && !(request.flags & ~NBD_CMD_FLAG_FUA)) {
        mmc_client_leave(client);
        return false;
    }
    if (!admit(client, length))
        return false;
    ask = make_ask(client, &request, length);
    if (!ask) {
        mmc_client_part(client, -ENOMEM, 0);
        return false;
    }
    client->at += NBD_REQUEST_BYTES;
    if (is_write)
        client->is_bulk = request.length >= BULK_LEAST;
    if (is_write && request.length) {
        client->incoming = ask;
        client->filled = 0;
        client->skip = ask->buffer ? 0 : request.length;
        end_payload(client);
    } else {
        start(ask);
    }
    /* It may have the caller look at much: others get their turn first. */
    return request.command != NBD_CMD_BLOCK_STATUS;
}

/* Moves the beginning of a request that is not whole to where its rest fits. */
static void settle_in(struct mmc_client *client)
{
    const uint32_t rest = client->have - client->at;

    if (rest >= NBD_REQUEST_BYTES || client->at == 0)
        return;
    memmove(client->in, client->in + client->at, rest);
    client->at = 0;
    client->have = rest;
}

static void parse(struct mmc_client *client)
{
    const struct mmc_pump *pump = client->pump;
    unsigned left = BEGINS_MAX;

    while (!is_stopped(client) && pump->count < pump->max && left--) {
        if (client->incoming) {
            end_payload(client);
            if (client->incoming)
                break;
            continue;
        }
        if (!has_backlog(client) || !begin(client))
            break;
    }
    if (client->is_over)
        return;
    settle_in(client);
    if (!is_stopped(client) && has_work(client))
        mmc_pump_enlist(client, LIST_BUSY);
}

void mmc_client_continue(struct mmc_client *client)
{
    parse(client);
    /* One that cannot use the room now must not stand in the way. */
    if (client->is_in[LIST_ROOM] && !(client->held & HELD_ROOM))
        mmc_pump_unlist(client, LIST_ROOM);
    if (!client->is_over)
        mmc_client_rewatch(client);
}

/* ---- receiving ---------------------------------------------------------- */

/* Where the next bytes go: the rest of a payload straight into its buffer, behind it the next
 * requests. While a client sends long payloads only one request's head is received with each, so
 * that the next payload, too, goes straight to its place. Returns how much that is. */
static uint64_t make_iovecs(struct mmc_client *client, struct iovec *iov, int *count)
{
    const struct mmc_ask *ask = client->incoming;
    uint32_t room = IN_BYTES - client->have;
    uint64_t total = 0;

    *count = 0;
    if (ask && ask->buffer && client->filled < ask->request.length) {
        total = ask->request.length - client->filled;
        iov[(*count)++] = (struct iovec){(uint8_t *)ask->buffer + client->filled, (size_t)total};
    }
    if (client->is_bulk && !client->skip && client->have < NBD_REQUEST_BYTES)
        room = NBD_REQUEST_BYTES - client->have;
    if (room)
        iov[(*count)++] = (struct iovec){client->in + client->have, room};
    return total + room;
}

static void note_received(struct mmc_client *client, uint32_t bytes)
{
    const struct mmc_ask *ask = client->incoming;

    client->moved += bytes;
    if (ask && ask->buffer) {
        const uint32_t left = ask->request.length - client->filled;
        const uint32_t part = bytes < left ? bytes : left;

        client->filled += part;
        bytes -= part;
    }
    client->have += bytes;
}

/* Receives once: 1 when there may be more, 0 when that was all, or -errno. */
static int receive(struct mmc_client *client)
{
    struct iovec iov[2];
    struct msghdr message = {.msg_iov = iov};
    int count;
    const uint64_t total = make_iovecs(client, iov, &count);
    ssize_t n;

    message.msg_iovlen = (size_t)count;
    if (count == 1)
        n = recv(client->source.fd, iov[0].iov_base, iov[0].iov_len, MSG_DONTWAIT);
    else
        n = recvmsg(client->source.fd, &message, MSG_DONTWAIT);
    if (n < 0)
        return errno == EAGAIN ? 0 : errno == EINTR ? 1 : -errno;
    if (n == 0) {
        mmc_client_leave(client);
        return 0;
    }
    note_received(client, (uint32_t)n);
    return (uint64_t)n == total;
}

void mmc_client_receive(struct mmc_client *client)
{
    unsigned tries = RECEIVES_MAX;
    int rc = 1;

    while (rc > 0 && tries-- && !is_stopped(client) && !client->is_in[LIST_BUSY]) {
        rc = receive(client);
        if (rc < 0)
            mmc_client_part(client, rc, 0);
        else
            parse(client);
    }
    if (!client->is_over)
        mmc_client_rewatch(client);
}
