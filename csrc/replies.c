/* SPDX-License-Identifier: MIT
 *
 * Replies, and their way out. Those that are ready together leave in one call; payloads leave from
 * the buffer that they were read into.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "pump.h"

#define IOVECS 128
/* A socket takes less than that before it is full; then others have their turn. */
#define SENDS_MAX 16

#define NS_PER_US 1000

/* What a READ of zeros is made of where holes cannot be told. */
static uint8_t zeros[64 << 10];

/* ---- making them -------------------------------------------------------- */

static void append(struct mmc_ask *ask, uint32_t length, uint32_t body)
{
    struct mmc_client *client = ask->client;

    ask->length = length;
    ask->body = body;
    mmc_asks_push(&client->replies, ask);
    mmc_pump_enlist(client, LIST_REPLIES);
}

static void count(const struct mmc_ask *ask)
{
    struct mmc_pump_counts *counts = ask->client->counts;
    const uint64_t us = (ask->client->pump->now - ask->began) / NS_PER_US;
    const int bits = us ? 64 - __builtin_clzll(us) : 0;

    if (!counts)
        return;
    counts->operations[ask->request.command]++;
    counts->bytes[ask->request.command] += ask->request.length;
    counts->latency[bits < 31 ? bits : 31]++;
}

void mmc_ask_succeed(struct mmc_ask *ask)
{
    const bool is_structured = ask->client->is_structured;

    count(ask);
    if (ask->request.command == NBD_CMD_READ)
        append(ask, mmc_nbd_data(ask->head, &ask->request, is_structured), ask->request.length);
    else
        append(ask, mmc_nbd_done(ask->head, &ask->request, is_structured), 0);
}

void mmc_ask_zeros(struct mmc_ask *ask)
{
    struct mmc_pump *pump = ask->client->pump;

    count(ask);
    mmc_room_give(&pump->room, ask->buffer, ask->request.length);
    ask->buffer = NULL;
    if (ask->client->is_structured)
        append(ask, mmc_nbd_hole(ask->head, &ask->request), 0);
    else
        append(ask, mmc_nbd_data(ask->head, &ask->request, false), ask->request.length);
}

void mmc_ask_answer(struct mmc_ask *ask)
{
    ask->client->unread += ask->length;
    append(ask, ask->length, ask->body);
}

/* ---- sending them ------------------------------------------------------- */

struct gather {
    struct iovec iov[IOVECS];
    uint32_t count;
    uint64_t skip; /* bytes that have left already */
    uint64_t total;
};

static void add(struct gather *gather, const void *from, uint64_t length)
{
    const uint64_t skip = gather->skip < length ? gather->skip : length;

    gather->skip -= skip;
    if (skip == length || gather->count == IOVECS)
        return;
    gather->iov[gather->count++] =
        (struct iovec){(uint8_t *)(uintptr_t)from + skip, (size_t)(length - skip)};
    gather->total += length - skip;
}

static void add_zeros(struct gather *gather, uint64_t length)
{
    while (length) {
        const uint64_t part = length < sizeof(zeros) ? length : sizeof(zeros);

        add(gather, zeros, part);
        length -= part;
    }
}

static void add_reply(struct gather *gather, const struct mmc_ask *ask)
{
    add(gather, ask->words ? ask->words : ask->head, ask->length);
    if (!ask->body)
        return;
    if (ask->buffer)
        add(gather, ask->buffer, ask->body);
    else
        add_zeros(gather, ask->body);
}

static void gather_replies(const struct mmc_client *client, struct gather *gather)
{
    const struct mmc_ask *ask;

    gather->count = 0;
    gather->total = 0;
    gather->skip = client->sent;
    for (ask = client->replies.first; ask && gather->count < IOVECS; ask = ask->next)
        add_reply(gather, ask);
}

/* Takes what has left off the list. */
static void advance(struct mmc_client *client, uint64_t bytes)
{
    struct mmc_ask *ask;

    client->moved += bytes;
    client->sent += bytes;
    while ((ask = client->replies.first)) {
        const uint64_t whole = (uint64_t)ask->length + ask->body;

        if (client->sent < whole)
            break;
        client->sent -= whole;
        mmc_asks_pop(&client->replies);
        if (ask->is_answered)
            client->unread -= ask->length;
        mmc_ask_give(ask);
    }
}

/* Returns 1 when there may be more to send now, 0 when not, or -errno. */
static int send_some(struct mmc_client *client)
{
    struct gather gather;
    struct msghdr message = {.msg_iov = gather.iov};
    ssize_t n;

    gather_replies(client, &gather);
    message.msg_iovlen = gather.count;
    n = sendmsg(client->source.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno == EINTR)
        return 1;
    if (n < 0 && errno != EAGAIN)
        return -errno;
    client->is_blocked = n < (ssize_t)gather.total;
    if (n >= 0) /* also of nothing: a reply may be empty */
        advance(client, (uint64_t)n);
    return !client->is_blocked && client->replies.first;
}

void mmc_client_send(struct mmc_client *client)
{
    unsigned tries = SENDS_MAX;
    int rc = client->replies.first != NULL;

    if (client->is_over)
        return;
    while (rc > 0 && tries--)
        rc = send_some(client);
    if (rc > 0)
        mmc_pump_enlist(client, LIST_REPLIES);
    if (rc < 0)
        mmc_client_part(client, rc, 0);
    else if (client->is_leaving && client->asks == 0)
        mmc_client_part(client, 0, 0);
    else
        mmc_client_ease(client);
}

void mmc_client_forget(struct mmc_client *client)
{
    struct mmc_ask *ask;

    client->sent = 0;
    client->unread = 0;
    while ((ask = mmc_asks_pop(&client->replies)))
        mmc_ask_give(ask);
}
