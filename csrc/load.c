/* SPDX-License-Identifier: MIT
 *
 * A load on a path: which request comes next, how many are in flight, how long each took.
 *
 * `lock` guards the slots, the counters and the times: with several threads on one queue a
 * transfer is finished by whichever of them collects it. It is taken before a path's lock, and
 * not held while the queue is turned.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "path.h"
#include "queue.h"

#define PAGE 4096

struct slot {
    struct mmc_transfer transfer; /* first: what the path knows of it */
    struct mmc_load *load;
    struct slot *next; /* of the free ones, or of the missed ones */
    uint64_t begin;    /* ns */
    void *source;      /* of writes; a read never meets it */
    void *buffer;      /* of reads */
};

struct mmc_load {
    pthread_mutex_t lock;
    struct mmc_path *path;
    struct mmc_load_plan plan;
    uint64_t places; /* of random requests */
    uint64_t next;   /* where the next one in order goes, from the range's start on */
    uint64_t issued;
    uint64_t to_flush; /* writes until the next flush */
    bool flush_due;    /* it is somebody's turn to flush; nothing is begun until mmc_load_resume */
    bool stopped;
    struct mmc_load_error error;
    uint32_t flying; /* in the queue */
    uint32_t handed; /* misses, and what else the caller does for the load */
    uint64_t finished;
    struct slot *idle;
    struct slot *missed;
    struct slot *slots;
    char *sources;
    char *buffers;
    struct mmc_times times[2]; /* of reads, of writes */
};

/* ---- which request comes n-th ------------------------------------------- */

/* splitmix64 (Steele, Lea, Flood 2014): any member of the sequence may be asked for. */
static uint64_t draw(uint64_t seed, uint64_t number)
{
    uint64_t value = seed + (number + 1) * UINT64_C(0x9e3779b97f4a7c15);

    value = (value ^ (value >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    value = (value ^ (value >> 27)) * UINT64_C(0x94d049bb133111eb);
    return value ^ (value >> 31);
}

/* A number below `limit`. */
static uint64_t scaled(uint64_t value, uint64_t limit)
{
    return (uint64_t)((unsigned __int128)value * limit >> 64);
}

/* Of the number-th request, which is the next one. */
static uint64_t take_offset(struct mmc_load *load, uint64_t number)
{
    const struct mmc_load_plan *plan = &load->plan;
    const uint64_t offset = load->next;

    if (plan->is_random)
        return plan->start + scaled(draw(plan->seed, 2 * number), load->places) * plan->block;
    load->next += plan->step; /* both are less than the length */
    if (load->next >= plan->length)
        load->next -= plan->length;
    if (load->next > plan->length - plan->block)
        load->next = plan->first;
    return plan->start + offset;
}

static bool is_read(const struct mmc_load_plan *plan, uint64_t number)
{
    if (plan->read_percent == 0 || plan->read_percent == 100)
        return plan->read_percent == 100;
    return scaled(draw(plan->seed, 2 * number + 1), 100) < plan->read_percent;
}

/* ---- times -------------------------------------------------------------- */

static uint32_t bucket_of(uint64_t ns)
{
    const uint32_t bits = ns ? 64 - (uint32_t)__builtin_clzll(ns) : 0;
    const uint32_t shift = bits > MMC_TIME_BITS + 1 ? bits - MMC_TIME_BITS - 1 : 0;

    return (shift << MMC_TIME_BITS) + (uint32_t)(ns >> shift);
}

static void note(struct mmc_times *times, uint64_t ns)
{
    if (!times->count || ns < times->least)
        times->least = ns;
    if (ns > times->most)
        times->most = ns;
    times->count++;
    times->total += ns;
    times->buckets[bucket_of(ns)]++;
}

/* ---- life --------------------------------------------------------------- */

static bool is_sound(const struct mmc_load_plan *plan)
{
    return plan->block > 0 && plan->block <= plan->length && plan->length <= INT64_MAX &&
           plan->start <= INT64_MAX - plan->length && plan->first <= plan->length - plan->block &&
           plan->depth > 0 && plan->read_percent <= 100;
}

/* Memory for all slots, `room` bytes each, where some of the requests use it. */
static int make_buffers(struct mmc_load *load, uint64_t room)
{
    const struct mmc_load_plan *plan = &load->plan;
    const uint64_t size = room * plan->depth;
    int error = 0;

    if (room < plan->block || room > SIZE_MAX / plan->depth)
        return -ENOMEM;
    if (plan->read_percent > 0)
        load->buffers = mmc_buffer_alloc(size, PAGE, &error);
    if (plan->read_percent < 100 && error == 0)
        load->sources = mmc_buffer_alloc(size, PAGE, &error);
    if (load->sources && plan->pattern)
        memset(load->sources, plan->pattern, size);
    return error;
}

static int make_slots(struct mmc_load *load)
{
    const uint64_t room = (load->plan.block + PAGE - 1) & ~(uint64_t)(PAGE - 1);
    const int rc = make_buffers(load, room);
    uint32_t i;

    if (rc < 0)
        return rc;
    load->slots = calloc(load->plan.depth, sizeof(*load->slots));
    if (!load->slots)
        return -ENOMEM;
    for (i = load->plan.depth; i-- > 0;) {
        struct slot *slot = &load->slots[i];

        slot->load = load;
        slot->source = load->sources ? load->sources + i * room : NULL;
        slot->buffer = load->buffers ? load->buffers + i * room : NULL;
        slot->next = load->idle;
        load->idle = slot;
    }
    return 0;
}

static void destroy(struct mmc_load *load)
{
    pthread_mutex_destroy(&load->lock);
    mmc_buffer_free(load->sources);
    mmc_buffer_free(load->buffers);
    free(load->slots);
    free(load);
}

struct mmc_load *mmc_load_open(struct mmc_path *path, const struct mmc_load_plan *plan, int *error)
{
    struct mmc_load *load;

    *error = is_sound(plan) ? -ENOMEM : -EINVAL;
    load = *error == -ENOMEM ? calloc(1, sizeof(*load)) : NULL;
    if (!load)
        return NULL;
    pthread_mutex_init(&load->lock, NULL);
    load->path = path;
    load->plan = *plan;
    load->plan.step %= plan->length;
    load->places = plan->length / plan->block;
    load->next = plan->first;
    load->to_flush = plan->flush_every;
    *error = make_slots(load);
    if (*error == 0)
        return load;
    destroy(load);
    return NULL;
}

void mmc_load_close(struct mmc_load *load)
{
    /* Better a leak than memory freed that the kernel still writes to. */
    if (load && load->flying == 0 && load->handed == 0)
        destroy(load);
}

/* ---- the end of a request ----------------------------------------------- */

/* The caller holds the lock. */
static void conclude(struct mmc_load *load, struct slot *slot, int64_t result, uint64_t now)
{
    slot->next = load->idle;
    load->idle = slot;
    if (result >= 0) {
        note(&load->times[slot->transfer.is_write], now - slot->begin);
        load->finished++;
        return;
    }
    load->stopped = true;
    if (!load->error.number)
        load->error = (struct mmc_load_error){
            .offset = slot->transfer.offset,
            .code = slot->transfer.is_write ? MMC_WRITE : MMC_READ,
            .number = (int32_t)result,
        };
}

static void transfer_finished(struct mmc_transfer *transfer, int64_t result)
{
    struct slot *slot = (struct slot *)(void *)transfer;
    struct mmc_load *load = slot->load;
    const uint64_t now = mmc_clock_ns();

    pthread_mutex_lock(&load->lock);
    load->flying--;
    conclude(load, slot, result, now);
    pthread_mutex_unlock(&load->lock);
}

void mmc_load_done(struct mmc_load *load, uint32_t number, int64_t result)
{
    const uint64_t now = mmc_clock_ns();

    pthread_mutex_lock(&load->lock);
    load->handed--;
    conclude(load, &load->slots[number], result, now);
    pthread_mutex_unlock(&load->lock);
}

/* ---- the beginning of one ----------------------------------------------- */

static bool is_over(const struct mmc_load *load)
{
    return load->stopped || load->issued == load->plan.count;
}

/* With one request at a time the queue only costs: a fifth of the requests of 4 KiB a second. False
 * where the path wants the queue, or misses. The caller holds the lock: nobody else is in here. */
static bool ran_alone(struct mmc_load *load, struct slot *slot, int code, uint64_t offset)
{
    const uint64_t length = load->plan.block;
    int64_t result;

    if (load->plan.depth != 1)
        return false;
    result = mmc_path_transfer(load->path, code, offset,
                               code == MMC_READ ? slot->buffer : slot->source, length);
    if (result == 0)
        return false;
    slot->transfer.offset = offset;
    slot->transfer.is_write = code == MMC_WRITE;
    conclude(load, slot, result, mmc_clock_ns());
    return true;
}

static void count_towards_flush(struct mmc_load *load)
{
    if (load->plan.flush_every && --load->to_flush == 0) {
        load->to_flush = load->plan.flush_every;
        load->flush_due = true;
    }
}

/* Begins the next request in a free slot. The caller holds the lock. */
static void begin_one(struct mmc_load *load, struct slot *slot, struct mmc_requests *batch)
{
    const struct mmc_load_plan *plan = &load->plan;
    const uint64_t number = load->issued++;
    const int code = is_read(plan, number) ? MMC_READ : MMC_WRITE;
    const uint64_t offset = take_offset(load, number);

    if (code == MMC_WRITE)
        count_towards_flush(load);
    slot->begin = mmc_clock_ns(); /* its own: the one before in the batch may be over already */
    if (ran_alone(load, slot, code, offset))
        return;
    slot->transfer.finished = transfer_finished;
    switch (mmc_path_begin(load->path, &slot->transfer, code, offset,
                           code == MMC_READ ? slot->buffer : slot->source, plan->block, batch)) {
    case MMC_STARTED:
        load->flying++;
        break;
    case MMC_ZEROS:
        memset(slot->buffer, 0, plan->block);
        conclude(load, slot, 0, mmc_clock_ns());
        break;
    default:
        load->handed++;
        slot->next = load->missed;
        load->missed = slot;
    }
}

/* How many are begun and handed over together: the disk has work while the rest is made ready. A
 * disk may answer only when its queue is empty, then many places fall free at once. Thousands of
 * 4 KiB requests a second by ones, twos, fours and eights: writes at depth 16 116, 111, 120 and
 * 112, at depth 64 162, 167, 167 and 160; reads at depth 16 78, 78, 74 and 72. */
static uint32_t together(const struct mmc_load_plan *plan)
{
    return plan->read_percent == 0 && plan->depth <= 16 ? 4 : 2;
}

/* Begins what there is room for, and no more than that. */
static void begin_some(struct mmc_load *load, struct mmc_requests *batch)
{
    uint32_t left = together(&load->plan);

    while (left-- && load->idle && !load->flush_due && !is_over(load)) {
        struct slot *slot = load->idle;

        load->idle = slot->next;
        begin_one(load, slot, batch);
    }
}

/* ---- running ------------------------------------------------------------ */

/* Why the caller is wanted; 0 while it is not. */
static int wanted(struct mmc_load *load)
{
    int why = 0;

    pthread_mutex_lock(&load->lock);
    const bool is_idle = load->flying + load->handed == 0;

    if (load->missed)
        why |= MMC_LOAD_MISSED;
    if (load->flush_due && !load->stopped && (is_idle || !load->plan.drains))
        why |= MMC_LOAD_FLUSH;
    if (is_idle && is_over(load) && !why)
        why |= MMC_LOAD_OVER;
    pthread_mutex_unlock(&load->lock);
    return why;
}

/* How long to wait for completions. What is in flight comes to this thread, unless others turn the
 * queue too: no timer is needed then. */
static int patience(struct mmc_load *load, int slice_ms)
{
    bool can_begin;
    bool comes;

    pthread_mutex_lock(&load->lock);
    can_begin = load->idle && !load->flush_due && !is_over(load);
    comes = load->flying && !load->plan.is_shared;
    pthread_mutex_unlock(&load->lock);
    if (can_begin)
        return 0;
    return comes ? -1 : slice_ms;
}

static void push_some(struct mmc_load *load)
{
    struct mmc_requests batch = {0};

    pthread_mutex_lock(&load->lock);
    begin_some(load, &batch);
    pthread_mutex_unlock(&load->lock);
    if (batch.first)
        mmc_queue_push(mmc_path_queue(load->path), &batch);
}

int mmc_load_run(struct mmc_load *load, int slice_ms, struct mmc_done *done, uint32_t max,
                 uint32_t *collected)
{
    struct mmc_queue *queue = mmc_path_queue(load->path);
    const uint64_t end = mmc_clock_ns() + (uint64_t)slice_ms * UINT64_C(1000000);
    int why;
    int rc;

    *collected = 0;
    for (;;) {
        if (mmc_clock_ns() >= end)
            return wanted(load);
        push_some(load);
        why = wanted(load);
        if (why)
            return why;
        rc = mmc_queue_turn(queue, NULL, 0, done, max, patience(load, slice_ms));
        if (rc < 0)
            return rc == -EINTR ? 0 : rc;
        *collected = (uint32_t)rc;
        if (rc > 0 || mmc_path_is_awaited(load->path))
            return wanted(load);
    }
}

uint32_t mmc_load_misses(struct mmc_load *load, struct mmc_miss *misses, uint32_t max)
{
    uint32_t n = 0;

    pthread_mutex_lock(&load->lock);
    for (; n < max && load->missed; n++) {
        struct slot *slot = load->missed;

        load->missed = slot->next;
        misses[n] = (struct mmc_miss){
            .offset = slot->transfer.offset,
            .address = (uintptr_t)(slot->transfer.is_write ? slot->source : slot->buffer),
            .slot = (uint32_t)(slot - load->slots),
            .code = slot->transfer.is_write ? MMC_WRITE : MMC_READ,
        };
    }
    pthread_mutex_unlock(&load->lock);
    return n;
}

void mmc_load_resume(struct mmc_load *load)
{
    pthread_mutex_lock(&load->lock);
    load->flush_due = false;
    pthread_mutex_unlock(&load->lock);
}

void mmc_load_busy(struct mmc_load *load, int change)
{
    pthread_mutex_lock(&load->lock);
    load->handed += (uint32_t)change;
    pthread_mutex_unlock(&load->lock);
}

void mmc_load_stop(struct mmc_load *load)
{
    pthread_mutex_lock(&load->lock);
    load->stopped = true;
    pthread_mutex_unlock(&load->lock);
}

uint64_t mmc_load_finished(struct mmc_load *load, struct mmc_load_error *error)
{
    uint64_t finished;

    pthread_mutex_lock(&load->lock);
    finished = load->finished;
    *error = load->error;
    pthread_mutex_unlock(&load->lock);
    return finished;
}

const struct mmc_times *mmc_load_times(struct mmc_load *load, int code)
{
    return &load->times[code == MMC_WRITE];
}
