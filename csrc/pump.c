/* SPDX-License-Identifier: MIT
 *
 * Turns of the pump. A client that asks for what is a hit costs, for all of its requests that came
 * together: the wait, one receive, one submission, the wait, one send.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "process.h"
#include "pump.h"
#include "queue.h"

#define READY_MAX 64
#define DONE_MAX 64
/* A reply for which there was no memory. */
#define NO_WORDS UINT32_MAX

#define NS_PER_MS UINT64_C(1000000)
#define NS_PER_US UINT64_C(1000)
/* How long a turn may be at work: one that may wait, and one in somebody else's loop. */
#define WORK_NS (100 * NS_PER_MS)
#define GLANCE_NS (1 * NS_PER_MS)
/* The ring's completions interrupt a wait as signals do. The caller, who may have a handler to run,
 * is back after so long. */
#define SIGNAL_NS (10 * NS_PER_MS)
/* How long a wait may be spent looking, after one that was at most so long; see look. */
#define SPIN_NS (200 * NS_PER_US)
#define BRISK_NS (300 * NS_PER_US)
#define UNSPUN 8
/* Hits that allocate until the caller looks at how much metadata waits to be written. */
#define ALLOCATED_MAX 4096

/* ---- what the caller is told -------------------------------------------- */

struct mmc_pump_event *mmc_pump_tell(struct mmc_pump *pump, int kind, uint64_t number)
{
    struct mmc_pump_event *event;

    if (pump->count >= pump->max)
        return NULL;
    event = &pump->events[pump->count++];
    *event = (struct mmc_pump_event){.kind = kind, .number = number};
    return event;
}

void mmc_pump_tell_ask(struct mmc_ask *ask)
{
    struct mmc_pump *pump = ask->client->pump;
    const int kind = ask->result < 0 ? MMC_PUMP_FAILED : MMC_PUMP_ASKED;
    struct mmc_pump_event *event = mmc_pump_tell(pump, kind, ask->client->number);

    if (!event) {
        mmc_asks_push(&pump->untold, ask);
        return;
    }
    event->handle = (uintptr_t)ask;
    event->address = (uintptr_t)ask->buffer;
    event->result = ask->result;
    event->flags = ask->request.flags;
    event->command = ask->request.command;
    event->cookie = ask->request.cookie;
    event->offset = ask->request.offset;
    event->length = ask->request.length;
    pump->state.unanswered++;
}

static void tell_untold(struct mmc_pump *pump)
{
    struct mmc_ask *ask;

    while (pump->count < pump->max && (ask = mmc_asks_pop(&pump->untold))) {
        if (ask->client->is_over)
            mmc_ask_give(ask);
        else
            mmc_pump_tell_ask(ask);
    }
}

static void tell_parted(struct mmc_pump *pump)
{
    struct mmc_client *client;

    while (pump->count < pump->max && (client = mmc_pump_next(pump, LIST_PARTED))) {
        struct mmc_pump_event *event = mmc_pump_tell(pump, MMC_PUMP_PARTED, client->number);

        event->result = client->result;
        event->offset = client->value;
    }
}

static void tell_ended(struct mmc_pump *pump)
{
    if (pump->has_ended && mmc_pump_tell(pump, MMC_PUMP_ENDED, 0))
        pump->has_ended = false;
}

/* ---- requests that are over --------------------------------------------- */

void mmc_pump_settle(struct mmc_ask *ask)
{
    struct mmc_pump *pump = ask->client->pump;
    bool wakes;

    pthread_mutex_lock(&pump->lock);
    mmc_asks_push(&pump->settled, ask);
    wakes = !pump->is_woken && !(pump->is_turning && pthread_equal(pump->thread, pthread_self()));
    pump->is_woken |= wakes;
    pthread_mutex_unlock(&pump->lock);
    if (wakes)
        eventfd_write(pump->wake.fd, 1);
}

static void end_hit(struct mmc_ask *ask)
{
    struct mmc_client *client = ask->client;
    struct mmc_pump *pump = client->pump;

    if (ask->transfer.allocates && ++pump->state.allocated % ALLOCATED_MAX == 0)
        pump->must_return = true;
    pump->has_ended |= mmc_path_is_awaited(client->path);
    if (ask->is_reserve)
        mmc_ahead_end(ask);
    else if (client->is_over)
        mmc_ask_give(ask);
    else if (ask->result < 0)
        mmc_pump_tell_ask(ask);
    else
        mmc_ask_succeed(ask);
}

static void end_answered(struct mmc_ask *ask)
{
    struct mmc_client *client = ask->client;

    client->pump->state.unanswered--;
    if (ask->length == NO_WORDS)
        mmc_client_part(client, -ENOMEM, 0);
    if (client->is_over)
        mmc_ask_give(ask);
    else
        mmc_ask_answer(ask);
}

static void take_settled(struct mmc_pump *pump)
{
    struct mmc_asks settled;
    struct mmc_ask *ask;
    eventfd_t drained;
    bool was_woken;

    pthread_mutex_lock(&pump->lock);
    settled = pump->settled;
    pump->settled = (struct mmc_asks){0};
    was_woken = pump->is_woken;
    pump->is_woken = false;
    pthread_mutex_unlock(&pump->lock);
    if (was_woken)
        eventfd_read(pump->wake.fd, &drained);
    while ((ask = mmc_asks_pop(&settled))) {
        if (ask->is_answered)
            end_answered(ask);
        else
            end_hit(ask);
    }
}

static bool set_words(struct mmc_ask *ask, const void *bytes, uint32_t length)
{
    uint8_t *into = ask->head;

    if (length > sizeof(ask->head))
        into = ask->words = malloc(length);
    if (into && length)
        memcpy(into, bytes, length);
    return into != NULL;
}

void mmc_pump_reply(struct mmc_pump *pump, uint64_t handle, const void *bytes, uint32_t length,
                    int how)
{
    struct mmc_ask *ask = (struct mmc_ask *)(uintptr_t)handle;

    (void)pump;
    ask->is_answered = true;
    ask->is_leaked = how == MMC_REPLY_LEAK;
    ask->length = length;
    ask->body = how == MMC_REPLY_BUFFER ? ask->request.length : 0;
    if (!set_words(ask, bytes, length))
        ask->length = NO_WORDS;
    mmc_pump_settle(ask);
}

/* ---- queues ------------------------------------------------------------- */

/* Collects: hits are settled, what is the caller's goes to it. */
static void collect(struct mmc_pump *pump, struct mmc_pump_queue *queue)
{
    struct mmc_done done[DONE_MAX];
    uint32_t room = pump->max - pump->count;
    int n, i;

    if (room > DONE_MAX)
        room = DONE_MAX;
    if (!room) /* the queue's descriptor tells again */
        return;
    pump->now = mmc_clock_ns(); /* when they ended, as far as the latencies go */
    n = mmc_queue_turn(queue->queue, NULL, 0, done, room, 0);
    for (i = 0; i < n; i++) {
        struct mmc_pump_event *event = mmc_pump_tell(pump, MMC_PUMP_RESULT, queue->number);

        event->handle = done[i].token;
        event->result = done[i].result;
    }
}

/* What was begun goes to the kernel in one call, and what that answers at once is taken. */
static void push(struct mmc_pump *pump)
{
    struct mmc_pump_queue *queue;
    bool has_pushed = false;

    for (queue = pump->queues; queue; queue = queue->next) {
        if (!queue->batch.first)
            continue;
        mmc_queue_push(queue->queue, &queue->batch);
        collect(pump, queue);
        has_pushed = true;
    }
    if (has_pushed)
        take_settled(pump);
}

/* ---- turns -------------------------------------------------------------- */

/* The first in the line may try again where there is room for it; its success lets the next one. */
static void wake_waiting(struct mmc_pump *pump)
{
    struct mmc_client *first = pump->lists[LIST_ROOM].first;

    if (!first || pump->state.room + first->wanted > pump->limits.room)
        return;
    first->held &= ~(uint32_t)HELD_ROOM;
    mmc_pump_enlist(first, LIST_BUSY);
}

/* Each client that is busy has its turn, once. */
static void continue_busy(struct mmc_pump *pump)
{
    struct mmc_client *last = pump->lists[LIST_BUSY].last;
    struct mmc_client *client = NULL;

    while (client != last && pump->count < pump->max && (client = mmc_pump_next(pump, LIST_BUSY)))
        mmc_client_continue(client);
}

static void send_replies(struct mmc_pump *pump)
{
    struct mmc_client *last = pump->lists[LIST_REPLIES].last;
    struct mmc_client *client = NULL;

    while (client != last && (client = mmc_pump_next(pump, LIST_REPLIES)))
        if (!client->is_blocked || client->is_leaving)
            mmc_client_send(client);
}

static void work(struct mmc_pump *pump)
{
    take_settled(pump);
    wake_waiting(pump);
    continue_busy(pump);
    push(pump);
    send_replies(pump);
    tell_untold(pump);
    tell_parted(pump);
    tell_ended(pump);
}

static bool has_more(const struct mmc_pump *pump)
{
    const struct mmc_client *first = pump->lists[LIST_ROOM].first;

    return pump->lists[LIST_BUSY].first || pump->lists[LIST_REPLIES].first ||
           (first && pump->state.room + first->wanted <= pump->limits.room);
}

static void serve_client(struct mmc_client *client, uint32_t events)
{
    if (client->is_over)
        return;
    if (client->is_blocked && (events & (EPOLLOUT | EPOLLHUP | EPOLLERR))) {
        client->is_blocked = false;
        mmc_client_send(client);
    }
    if (!client->is_over && (client->watched & events & EPOLLIN))
        mmc_client_receive(client);
    else if (!client->is_over && (client->watched & EPOLLIN) && (events & (EPOLLHUP | EPOLLERR)))
        mmc_client_receive(client);
}

static void serve(struct mmc_pump *pump, const struct epoll_event *ready, int count)
{
    eventfd_t drained;
    int i;

    for (i = 0; i < count; i++) {
        struct mmc_source *source = ready[i].data.ptr;

        switch (source->kind) {
        case SOURCE_CLIENT:
            serve_client((struct mmc_client *)source, ready[i].events);
            break;
        case SOURCE_QUEUE:
            collect(pump, (struct mmc_pump_queue *)source);
            break;
        case SOURCE_WAKE:
            eventfd_read(source->fd, &drained);
            break;
        default:
            pump->must_return = true;
        }
    }
}

static int ms_until(const struct mmc_pump *pump, uint64_t deadline)
{
    if (deadline <= pump->now)
        return 0;
    return (int)((deadline - pump->now + NS_PER_MS - 1) / NS_PER_MS);
}

static void collect_all(struct mmc_pump *pump)
{
    struct mmc_pump_queue *queue;

    for (queue = pump->queues; queue; queue = queue->next)
        collect(pump, queue);
}

/* A thread that sleeps is woken late, on a virtual machine by as much as a request takes. Where the
 * last wait was short the next is spent looking, for a while; where nothing came in it, it was in
 * vain, and the next few are slept through. So what nobody uses costs nothing. */
static int look(struct mmc_pump *pump, struct epoll_event *ready)
{
    uint64_t until;
    int n;

    if (!pump->is_brisk || pump->unspun) {
        pump->unspun -= pump->unspun > 0;
        return 0;
    }
    until = mmc_clock_ns() + SPIN_NS;
    do {
        n = epoll_wait(pump->epoll, ready, READY_MAX, 0);
        if (n == 0)
            sched_yield(); /* to clients: they may have no other CPU */
    } while (n == 0 && mmc_clock_ns() < until);
    if (n == 0)
        pump->unspun = UNSPUN;
    return n;
}

static int wait_for(struct mmc_pump *pump, struct epoll_event *ready, int ms)
{
    uint64_t start;
    int n;

    if (!ms)
        return epoll_wait(pump->epoll, ready, READY_MAX, 0);
    n = look(pump, ready);
    if (n)
        return n;
    start = mmc_clock_ns();
    n = epoll_wait(pump->epoll, ready, READY_MAX, ms);
    pump->is_brisk = n != 0 && mmc_clock_ns() - start < BRISK_NS;
    return n;
}

/* Waits, at most until `deadline` (UINT64_MAX: for ever). Returns how many were ready. */
static int wait(struct mmc_pump *pump, uint64_t deadline)
{
    struct epoll_event ready[READY_MAX];
    int ms = -1;
    int n;

    if (pump->interrupted && deadline > pump->interrupted + SIGNAL_NS)
        deadline = pump->interrupted + SIGNAL_NS;
    if (has_more(pump))
        ms = 0;
    else if (deadline != UINT64_MAX)
        ms = ms_until(pump, deadline);
    n = wait_for(pump, ready, ms);
    pump->now = mmc_clock_ns();
    if (n >= 0) {
        serve(pump, ready, n);
        return n;
    }
    if (!pump->interrupted)
        pump->interrupted = pump->now;
    collect_all(pump);
    return 1;
}

static int run(struct mmc_pump *pump, int timeout_ms)
{
    const uint64_t start = pump->now;
    const uint64_t until = start + (timeout_ms ? WORK_NS : GLANCE_NS);
    const uint64_t deadline =
        timeout_ms < 0 ? UINT64_MAX : start + (uint64_t)timeout_ms * NS_PER_MS;
    int n = 1;

    for (;;) {
        work(pump);
        if (pump->count || pump->must_return)
            return 0;
        if (pump->interrupted && pump->now >= pump->interrupted + SIGNAL_NS)
            return -EINTR;
        if (n > 0 && pump->now >= until)
            return 0;
        if (n == 0 && pump->now >= deadline && !has_more(pump))
            return 0;
        n = wait(pump, deadline);
    }
}

static void set_turning(struct mmc_pump *pump, bool is_turning)
{
    pthread_mutex_lock(&pump->lock);
    pump->thread = pthread_self();
    pump->is_turning = is_turning;
    pthread_mutex_unlock(&pump->lock);
}

/* Work that is left makes the pump's descriptor readable, for who waits with that. */
static void wake_again(struct mmc_pump *pump)
{
    bool wakes;

    pthread_mutex_lock(&pump->lock);
    wakes = !pump->is_woken && (pump->settled.first || pump->untold.first ||
                                pump->lists[LIST_PARTED].first || has_more(pump));
    pump->is_woken |= wakes;
    pump->is_turning = false;
    pthread_mutex_unlock(&pump->lock);
    if (wakes)
        eventfd_write(pump->wake.fd, 1);
}

int mmc_pump_turn(struct mmc_pump *pump, int timeout_ms, struct mmc_pump_event *events,
                  uint32_t max)
{
    int rc;

    if (pump->process != mmc_process())
        return -EBADF;
    pump->events = events;
    pump->count = 0;
    pump->max = max;
    pump->must_return = false;
    pump->interrupted = 0;
    pump->now = mmc_clock_ns();
    set_turning(pump, true);
    rc = run(pump, timeout_ms);
    if (pump->count)
        rc = (int)pump->count;
    pump->count = 0;
    pump->max = 0; /* outside of turns nothing can be told */
    wake_again(pump);
    return rc;
}

/* ---- life --------------------------------------------------------------- */

static int watch(struct mmc_pump *pump, struct mmc_source *source)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = source};

    return epoll_ctl(pump->epoll, EPOLL_CTL_ADD, source->fd, &event) < 0 ? -errno : 0;
}

static int open_descriptors(struct mmc_pump *pump)
{
    pump->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (pump->epoll < 0)
        return -errno;
    pump->wake = (struct mmc_source){SOURCE_WAKE, eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)};
    if (pump->wake.fd < 0)
        return -errno;
    return watch(pump, &pump->wake);
}

static void free_pump(struct mmc_pump *pump)
{
    while (pump->spare) {
        struct mmc_ask *ask = pump->spare;

        pump->spare = ask->next;
        free(ask);
    }
    mmc_room_clear(&pump->room);
    pthread_mutex_destroy(&pump->lock);
    free(pump);
}

static void close_descriptors(struct mmc_pump *pump)
{
    if (pump->epoll >= 0)
        close(pump->epoll);
    if (pump->wake.fd >= 0)
        close(pump->wake.fd);
}

struct mmc_pump *mmc_pump_open(const struct mmc_pump_limits *limits, int *error)
{
    struct mmc_pump *pump = calloc(1, sizeof(*pump));

    *error = -ENOMEM;
    if (!pump)
        return NULL;
    pthread_mutex_init(&pump->lock, NULL);
    pump->limits = *limits;
    pump->process = mmc_process();
    pump->wake.fd = -1;
    *error = open_descriptors(pump);
    if (*error == 0)
        return pump;
    close_descriptors(pump);
    free_pump(pump);
    return NULL;
}

/* What was settled since the last turn, of clients that are gone. */
static void forget_settled(struct mmc_pump *pump)
{
    struct mmc_ask *ask;

    take_settled(pump);
    while ((ask = mmc_asks_pop(&pump->untold)))
        mmc_ask_give(ask);
}

void mmc_pump_close(struct mmc_pump *pump)
{
    if (!pump)
        return;
    if (pump->process != mmc_process())
        return;
    forget_settled(pump);
    while (pump->queues)
        mmc_pump_drop_queue(pump, pump->queues->queue);
    if (pump->asks)
        return;
    close_descriptors(pump);
    free_pump(pump);
}

int mmc_pump_fd(struct mmc_pump *pump)
{
    return pump->epoll;
}

const struct mmc_pump_state *mmc_pump_state(struct mmc_pump *pump)
{
    return &pump->state;
}

int mmc_pump_watch(struct mmc_pump *pump, int fd)
{
    pump->other = (struct mmc_source){SOURCE_OTHER, fd};
    return watch(pump, &pump->other);
}

int mmc_pump_add_queue(struct mmc_pump *pump, struct mmc_queue *queue, uint64_t number)
{
    struct mmc_pump_queue *one = calloc(1, sizeof(*one));
    int rc;

    if (!one)
        return -ENOMEM;
    one->source = (struct mmc_source){SOURCE_QUEUE, mmc_queue_fd(queue)};
    one->queue = queue;
    one->number = number;
    rc = watch(pump, &one->source);
    if (rc < 0) {
        free(one);
        return rc;
    }
    one->next = pump->queues;
    pump->queues = one;
    return 0;
}

void mmc_pump_drop_queue(struct mmc_pump *pump, struct mmc_queue *queue)
{
    struct mmc_pump_queue **at = &pump->queues;
    struct epoll_event nothing = {0};
    struct mmc_pump_queue *one;

    while (*at && (*at)->queue != queue)
        at = &(*at)->next;
    one = *at;
    if (!one)
        return;
    take_settled(pump);
    *at = one->next;
    epoll_ctl(pump->epoll, EPOLL_CTL_DEL, one->source.fd, &nothing);
    free(one);
}

/* ---- clients ------------------------------------------------------------ */

static struct mmc_pump_queue *queue_of(const struct mmc_pump *pump, struct mmc_path *path)
{
    struct mmc_pump_queue *queue = pump->queues;

    while (path && queue && queue->queue != mmc_path_queue(path))
        queue = queue->next;
    return path ? queue : NULL;
}

struct mmc_client *mmc_pump_attach(struct mmc_pump *pump, int fd, struct mmc_path *path,
                                   struct mmc_pump_counts *counts, uint64_t number, int flags,
                                   const void *rest, uint32_t length, int *error)
{
    struct mmc_client *client = calloc(1, sizeof(*client));

    *error = length > IN_BYTES ? -EINVAL : -ENOMEM;
    if (!client)
        return NULL;
    client->in = length > IN_BYTES ? NULL : malloc(IN_BYTES);
    if (!client->in) {
        free(client);
        return NULL;
    }
    *error = 0;
    client->source = (struct mmc_source){SOURCE_CLIENT, fd};
    client->pump = pump;
    client->path = path;
    client->queue = queue_of(pump, path);
    client->counts = counts;
    client->number = number;
    client->is_structured = flags & MMC_CLIENT_STRUCTURED;
    client->is_writer = flags & MMC_CLIENT_WRITES;
    if (length)
        memcpy(client->in, rest, length);
    client->have = length;
    pump->clients++;
    mmc_pump_enlist(client, LIST_BUSY);
    return client;
}

void mmc_client_refuse(struct mmc_client *client)
{
    client->is_refusing = true;
}

void mmc_client_drop(struct mmc_client *client)
{
    mmc_client_part(client, 0, 0);
    mmc_pump_unlist(client, LIST_PARTED);
    client->is_dropped = true;
    if (client->asks == 0)
        mmc_client_free(client);
}

static uint64_t unsent(const struct mmc_client *client)
{
    const struct mmc_ask *ask;
    uint64_t bytes = 0;

    for (ask = client->replies.first; ask; ask = ask->next)
        bytes += (uint64_t)ask->length + ask->body;
    return bytes - client->sent;
}

void mmc_client_facts(struct mmc_client *client, struct mmc_client_facts *facts)
{
    *facts = (struct mmc_client_facts){
        .memory = client->memory,
        .unsent = unsent(client),
        .moved = client->moved,
        .requests = client->asks,
        .is_awaited = client->incoming || client->is_blocked,
    };
}
