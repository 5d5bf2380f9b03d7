/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "path.h"
#include "process.h"
#include "queue.h"

#define SECTOR 512

/* What one transfer moves at most: the long way goes in pieces, and holds them apart. */
#define READ_MAX (16 << 20)
#define WRITE_MAX (4 << 20)

struct hold {
    struct hold *next;
    int64_t number;
    uint64_t start;
    uint64_t end;
    int kind;
};

struct mmc_path {
    pthread_mutex_t lock; /* guards all below; before a view's */
    struct mmc_queue *queue;
    uint32_t process;
    uint64_t size; /* of the disk */
    struct mmc_layer layers[MMC_PATH_LAYERS];
    uint32_t count;
    int hits;
    struct hold *holds;
    int64_t last_hold;
    struct mmc_transfer *flying;
    uint32_t writing; /* of those in flight */
    bool wrote;       /* since it was last asked */
    bool failed;
    bool awaited;
};

/* A read of a fragmented range in more runs than this is a miss. */
#define PARTS_MAX 16

/* A range of the disk, and the layer whose file answers for it; NULL for zeros. */
struct place {
    uint64_t offset;
    uint64_t length;
    const struct mmc_layer *layer;
};

/* Where a whole transfer goes: runs in order, without gaps. */
struct route {
    struct place places[PARTS_MAX];
    uint32_t count;
    uint32_t stored; /* of them, not zeros */
    bool allocates;
};

/* One run of a transfer that has several. */
struct mmc_part {
    struct mmc_request request; /* first, as in a transfer */
    struct mmc_transfer *transfer;
};

/* ---- life --------------------------------------------------------------- */

/* No path any more, or a forked child, where the lock may be held by a thread that is not there.
 * A coroutine that is thrown away may still give back its hold, or say that its sync has failed. */
static bool is_foreign(const struct mmc_path *path)
{
    return !path || path->process != mmc_process();
}

struct mmc_path *mmc_path_open(struct mmc_queue *queue, int *error)
{
    struct mmc_path *path = calloc(1, sizeof(*path));

    *error = path ? 0 : -ENOMEM;
    if (!path)
        return NULL;
    pthread_mutex_init(&path->lock, NULL);
    path->queue = queue;
    path->process = mmc_process();
    return path;
}

void mmc_path_close(struct mmc_path *path)
{
    struct hold *hold;

    if (is_foreign(path))
        return;
    while ((hold = path->holds)) {
        path->holds = hold->next;
        free(hold);
    }
    pthread_mutex_destroy(&path->lock);
    free(path);
}

int mmc_path_set(struct mmc_path *path, uint64_t size, const struct mmc_layer *layers,
                 uint32_t count, int hits)
{
    if (count > MMC_PATH_LAYERS)
        return -EINVAL;
    if (is_foreign(path))
        return 0;
    pthread_mutex_lock(&path->lock);
    path->size = size;
    path->count = count;
    path->hits = hits;
    if (count)
        memcpy(path->layers, layers, count * sizeof(*layers));
    pthread_mutex_unlock(&path->lock);
    return 0;
}

struct mmc_queue *mmc_path_queue(struct mmc_path *path)
{
    return path->queue;
}

/* ---- holds -------------------------------------------------------------- */

static bool concerns(int kind, bool is_write)
{
    return is_write || kind == MMC_HOLD_ALL;
}

static bool touches(uint64_t start, uint64_t end, uint64_t offset, uint64_t length)
{
    return offset < end && start < offset + length;
}

static bool is_held(const struct mmc_path *path, const struct place *place, bool is_write)
{
    const struct hold *hold;

    for (hold = path->holds; hold; hold = hold->next)
        if (concerns(hold->kind, is_write) &&
            touches(hold->start, hold->end, place->offset, place->length))
            return true;
    return false;
}

int64_t mmc_path_hold(struct mmc_path *path, uint64_t start, uint64_t end, int kind)
{
    struct hold *hold;

    if (is_foreign(path))
        return 0;
    hold = malloc(sizeof(*hold));
    if (!hold)
        return -ENOMEM;
    pthread_mutex_lock(&path->lock);
    *hold = (struct hold){path->holds, ++path->last_hold, start, end, kind};
    path->holds = hold;
    pthread_mutex_unlock(&path->lock);
    return hold->number;
}

void mmc_path_release(struct mmc_path *path, int64_t number)
{
    struct hold **at;
    struct hold *hold = NULL;

    if (is_foreign(path))
        return;
    pthread_mutex_lock(&path->lock);
    for (at = &path->holds; *at; at = &(*at)->next) {
        if ((*at)->number != number)
            continue;
        hold = *at;
        *at = hold->next;
        break;
    }
    pthread_mutex_unlock(&path->lock);
    free(hold);
}

uint32_t mmc_path_busy(struct mmc_path *path, uint64_t start, uint64_t end, int kind)
{
    const struct mmc_transfer *transfer;
    uint32_t count = 0;

    if (is_foreign(path))
        return 0;
    pthread_mutex_lock(&path->lock);
    for (transfer = path->flying; transfer; transfer = transfer->next)
        count += concerns(kind, transfer->is_write) &&
                 touches(start, end, transfer->offset, transfer->length);
    pthread_mutex_unlock(&path->lock);
    return count;
}

void mmc_path_await(struct mmc_path *path, int awaited)
{
    if (is_foreign(path))
        return;
    pthread_mutex_lock(&path->lock);
    path->awaited = awaited != 0;
    pthread_mutex_unlock(&path->lock);
}

bool mmc_path_is_awaited(struct mmc_path *path)
{
    bool awaited;

    if (is_foreign(path))
        return false;
    pthread_mutex_lock(&path->lock);
    awaited = path->awaited;
    pthread_mutex_unlock(&path->lock);
    return awaited;
}

void mmc_path_fail(struct mmc_path *path)
{
    if (is_foreign(path))
        return;
    pthread_mutex_lock(&path->lock);
    path->failed = true;
    pthread_mutex_unlock(&path->lock);
}

int mmc_path_take_written(struct mmc_path *path)
{
    bool written;

    if (is_foreign(path))
        return 0;
    pthread_mutex_lock(&path->lock);
    written = path->wrote;
    /* What is in flight may land behind the sync that follows: the next one is due, too. */
    path->wrote = path->writing != 0;
    pthread_mutex_unlock(&path->lock);
    return written;
}

/* ---- finding the bytes -------------------------------------------------- */

static uint64_t first_cluster(const struct mmc_layer *layer, uint64_t offset)
{
    return offset >> layer->cluster_shift;
}

/* How many clusters a range touches. */
static uint64_t clusters(const struct mmc_layer *layer, uint64_t offset, uint64_t length)
{
    return first_cluster(layer, offset + length - 1) - first_cluster(layer, offset) + 1;
}

/* Cuts `place`, which lies inside the layer, to its first run: 1 where this layer has it, 0 where
 * it has not, or -1 for a fault, which the long way meets too, and explains. */
static int first_run(const struct mmc_layer *layer, struct place *place)
{
    const uint64_t first = first_cluster(layer, place->offset);
    struct mmc_run run;
    uint64_t end;

    if (!layer->view)
        return 1;
    if (mmc_view_bit_runs(layer->view, layer->bits, first,
                          clusters(layer, place->offset, place->length), &run, 1) != 1)
        return -1;
    end = (run.start + run.count) << layer->cluster_shift;
    if (end - place->offset < place->length)
        place->length = end - place->offset;
    return (int)run.value;
}

static bool add(struct route *route, const struct place *place)
{
    if (route->count == PARTS_MAX)
        return false;
    route->places[route->count++] = *place;
    route->stored += place->layer != NULL;
    return true;
}

/* Follows a read from layer `depth` down: false where that is a miss. */
static bool follow(const struct mmc_path *path, uint32_t depth, uint64_t offset, uint64_t end,
                   struct route *route)
{
    const struct mmc_layer *layer = &path->layers[depth];

    while (offset < end) {
        struct place place = {offset, end - offset, NULL};
        int has = 0;

        if (depth == path->count || offset >= layer->size)
            return add(route, &place);
        if (place.length > layer->size - offset)
            place.length = layer->size - offset;
        has = first_run(layer, &place);
        if (has < 0)
            return false;
        offset += place.length;
        if (has) {
            place.layer = layer;
            if (!add(route, &place))
                return false;
        } else if (!follow(path, depth + 1, place.offset, offset, route)) {
            return false;
        }
    }
    return true;
}

/* Whether the range ends at the edges of clusters; the last may be cut by the disk's end. */
static bool is_whole(const struct mmc_path *path, const struct mmc_layer *layer,
                     const struct place *place)
{
    const uint64_t rest = (UINT64_C(1) << layer->cluster_shift) - 1;
    const uint64_t end = place->offset + place->length;

    return (place->offset & rest) == 0 && ((end & rest) == 0 || end == path->size);
}

static bool find_write(const struct mmc_path *path, const struct place *range, struct route *route)
{
    struct place run = *range;

    if (!path->count || path->failed || !(path->hits & MMC_PATH_WRITES))
        return false;
    if ((path->hits & MMC_PATH_GUARDED) && range->offset < SECTOR)
        return false;
    if (first_run(&path->layers[0], &run) != 1 || run.length != range->length) {
        if (!(path->hits & MMC_PATH_ALLOCATES) || !is_whole(path, &path->layers[0], range))
            return false;
        route->allocates = true;
    }
    run = *range;
    run.layer = &path->layers[0];
    return add(route, &run);
}

static bool fits(const struct place *place, bool is_write, uintptr_t address)
{
    const struct mmc_layer *layer = place->layer;
    const uint64_t start = layer->start + place->offset;

    return start + place->length <= (is_write ? layer->write_end : layer->read_end) &&
           (start & (layer->file_align - 1)) == 0 &&
           (place->length & (layer->file_align - 1)) == 0 &&
           (address & (layer->memory_align - 1)) == 0;
}

static int find(const struct mmc_path *path, const struct place *range, bool is_write,
                const char *address, struct route *route)
{
    uint32_t i;

    if (range->length == 0 || range->length > (is_write ? WRITE_MAX : READ_MAX) || !path->count)
        return MMC_MISS;
    if (range->offset > path->size || range->length > path->size - range->offset)
        return MMC_MISS;
    if (is_held(path, range, is_write))
        return MMC_MISS;
    if (is_write ? !find_write(path, range, route)
                 : !follow(path, 0, range->offset, range->offset + range->length, route))
        return MMC_MISS;
    for (i = 0; i < route->count; i++) {
        const struct place *place = &route->places[i];

        if (place->layer &&
            !fits(place, is_write, (uintptr_t)address + place->offset - range->offset))
            return MMC_MISS;
    }
    return route->stored ? MMC_STARTED : MMC_ZEROS;
}

/* ---- in flight ---------------------------------------------------------- */

static void link_in(struct mmc_path *path, struct mmc_transfer *transfer)
{
    transfer->previous = NULL;
    transfer->next = path->flying;
    if (path->flying)
        path->flying->previous = transfer;
    path->flying = transfer;
    path->writing += transfer->is_write;
    path->wrote |= transfer->is_write;
}

static void link_out(struct mmc_path *path, struct mmc_transfer *transfer)
{
    if (transfer->previous)
        transfer->previous->next = transfer->next;
    else
        path->flying = transfer->next;
    if (transfer->next)
        transfer->next->previous = transfer->previous;
    path->writing -= transfer->is_write;
}

/* Makes the clusters this layer's: their bytes are written. The caller holds the lock. */
static int64_t publish(struct mmc_path *path, const struct mmc_transfer *transfer)
{
    const struct mmc_layer *top = &path->layers[0];

    /* A sync has failed meanwhile: nothing is changed any more. */
    if (path->failed)
        return -EIO;
    return mmc_view_bits_write(top->view, top->bits, first_cluster(top, transfer->offset),
                               clusters(top, transfer->offset, transfer->length), 1);
}

/* The end of every hit. Bytes that the file lacks were made zeros by the request. */
static int64_t conclude(struct mmc_transfer *transfer, int64_t result)
{
    struct mmc_path *path = transfer->path;

    if (result >= 0)
        result = (int64_t)transfer->length;
    pthread_mutex_lock(&path->lock);
    if (transfer->allocates && result >= 0) {
        const int64_t rc = publish(path, transfer);

        result = rc < 0 ? rc : result;
    }
    link_out(path, transfer);
    pthread_mutex_unlock(&path->lock);
    free(transfer->parts);
    transfer->parts = NULL;
    return result;
}

static void finish(struct mmc_request *request)
{
    struct mmc_transfer *transfer = (struct mmc_transfer *)(void *)request;

    transfer->finished(transfer, conclude(transfer, request->result));
}

/* One part is done; the last one ends the transfer. Parts may end in several threads. */
static void finish_part(struct mmc_request *request)
{
    struct mmc_transfer *transfer = ((struct mmc_part *)(void *)request)->transfer;
    struct mmc_path *path = transfer->path;
    bool is_last;

    pthread_mutex_lock(&path->lock);
    if (request->result < 0 && transfer->error == 0)
        transfer->error = request->result;
    is_last = --transfer->left == 0;
    pthread_mutex_unlock(&path->lock);
    if (is_last)
        transfer->finished(transfer, conclude(transfer, transfer->error));
}

/* ---- requests ----------------------------------------------------------- */

static void set_request(struct mmc_request *request, const struct place *place, int code,
                        char *address)
{
    const struct mmc_op op = {.offset = place->layer->start + place->offset,
                              .length = place->length,
                              .address = (uintptr_t)address,
                              .fd = place->layer->fd,
                              .code = code};

    mmc_request_set(request, &op); /* one buffer, a checked range: no error */
}

/* Sets up a part for each stored run, and makes the zeros between. */
static void set_parts(struct mmc_transfer *transfer, const struct route *route, int code,
                      char *address)
{
    uint32_t i;

    for (i = 0; i < route->count; i++) {
        const struct place *place = &route->places[i];
        char *at = address + (place->offset - transfer->offset);

        if (!place->layer) {
            memset(at, 0, place->length);
            continue;
        }
        transfer->parts[transfer->left].transfer = transfer;
        set_request(&transfer->parts[transfer->left].request, place, code, at);
        transfer->left++;
    }
}

static void set_transfer(struct mmc_transfer *transfer, struct mmc_path *path, int code,
                         uint64_t offset, uint64_t length)
{
    transfer->parts = NULL;
    transfer->left = 0;
    transfer->error = 0;
    transfer->path = path;
    transfer->offset = offset;
    transfer->length = length;
    transfer->is_write = code != MMC_READ;
    transfer->allocates = false;
}

/* Finds the range and, for a hit of at most `most` stored runs, counts it as in flight. */
static int begin(struct mmc_path *path, struct mmc_transfer *transfer, int code, uint64_t offset,
                 char *address, uint64_t length, uint32_t most)
{
    const struct place range = {offset, length, NULL};
    struct route route = {.count = 0};
    int rc;

    set_transfer(transfer, path, code, offset, length);
    if (is_foreign(path))
        return MMC_MISS;
    pthread_mutex_lock(&path->lock);
    rc = find(path, &range, transfer->is_write, address, &route);
    if (rc == MMC_STARTED && route.stored > most)
        rc = MMC_MISS;
    if (rc == MMC_STARTED && route.count > 1) {
        transfer->parts = calloc(route.stored, sizeof(*transfer->parts));
        rc = transfer->parts ? rc : MMC_MISS;
    }
    if (rc == MMC_STARTED) {
        transfer->allocates = route.allocates;
        if (transfer->parts)
            set_parts(transfer, &route, code, address);
        else
            set_request(&transfer->request, &route.places[0], code, address);
        link_in(path, transfer);
    }
    pthread_mutex_unlock(&path->lock);
    return rc;
}

int mmc_path_begin(struct mmc_path *path, struct mmc_transfer *transfer, int code, uint64_t offset,
                   void *address, uint64_t length, struct mmc_requests *batch)
{
    const int rc = begin(path, transfer, code, offset, address, length, PARTS_MAX);
    uint32_t i;

    if (rc != MMC_STARTED)
        return rc;
    if (!transfer->parts) {
        transfer->request.owner = finish;
        mmc_requests_push(batch, &transfer->request);
        return rc;
    }
    for (i = 0; i < transfer->left; i++) {
        transfer->parts[i].request.owner = finish_part;
        mmc_requests_push(batch, &transfer->parts[i].request);
    }
    return rc;
}

/* Whether that may be done now; cuts the range to what is there. The caller holds the lock. */
static bool can_reserve(const struct mmc_path *path, struct place *range)
{
    const struct mmc_layer *top = &path->layers[0];

    if (!path->count || path->failed || !(path->hits & MMC_PATH_ALLOCATES))
        return false;
    if (range->offset >= path->size || top->start + range->offset >= top->write_end)
        return false;
    if (range->length > path->size - range->offset)
        range->length = path->size - range->offset;
    if (range->length > top->write_end - top->start - range->offset)
        range->length = top->write_end - top->start - range->offset;
    return !is_held(path, range, true);
}

int mmc_path_reserve(struct mmc_path *path, struct mmc_transfer *transfer, uint64_t offset,
                     uint64_t length, struct mmc_requests *batch)
{
    struct place range = {offset, length, NULL};
    struct mmc_op op = {.code = MMC_FALLOCATE, .mode = FALLOC_FL_KEEP_SIZE};
    bool can;

    if (is_foreign(path))
        return MMC_MISS;
    pthread_mutex_lock(&path->lock);
    can = can_reserve(path, &range);
    if (can) {
        set_transfer(transfer, path, MMC_FALLOCATE, offset, range.length);
        op.offset = path->layers[0].start + offset;
        op.length = range.length;
        op.fd = path->layers[0].fd;
        mmc_request_set(&transfer->request, &op);
        link_in(path, transfer);
    }
    pthread_mutex_unlock(&path->lock);
    if (!can)
        return MMC_MISS;
    transfer->request.owner = finish;
    mmc_requests_push(batch, &transfer->request);
    return MMC_STARTED;
}

int64_t mmc_path_transfer(struct mmc_path *path, int code, uint64_t offset, void *address,
                          uint64_t length)
{
    struct mmc_transfer transfer;
    struct mmc_request *request;
    int rc;

    if (is_foreign(path))
        return -EBADF;
    /* Several runs are read faster side by side, by the queue. */
    rc = begin(path, &transfer, code, offset, address, length, 1);
    if (rc == MMC_ZEROS)
        memset(address, 0, length);
    if (rc != MMC_STARTED)
        return rc == MMC_ZEROS ? (int64_t)length : 0;
    request = transfer.parts ? &transfer.parts[0].request : &transfer.request;
    mmc_request_run(request);
    return conclude(&transfer, request->result);
}
