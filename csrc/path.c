/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
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

/* A range of the disk, and the file's bytes that answer for it. */
struct place {
    uint64_t offset;
    uint64_t length;
    const struct mmc_layer *layer;
    bool allocates;
};

/* ---- life --------------------------------------------------------------- */

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

    if (!path || path->process != mmc_process())
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
    struct hold *hold = malloc(sizeof(*hold));

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

    pthread_mutex_lock(&path->lock);
    for (transfer = path->flying; transfer; transfer = transfer->next)
        count += concerns(kind, transfer->is_write) &&
                 touches(start, end, transfer->offset, transfer->length);
    pthread_mutex_unlock(&path->lock);
    return count;
}

void mmc_path_await(struct mmc_path *path, int awaited)
{
    pthread_mutex_lock(&path->lock);
    path->awaited = awaited != 0;
    pthread_mutex_unlock(&path->lock);
}

bool mmc_path_is_awaited(struct mmc_path *path)
{
    bool awaited;

    pthread_mutex_lock(&path->lock);
    awaited = path->awaited;
    pthread_mutex_unlock(&path->lock);
    return awaited;
}

void mmc_path_fail(struct mmc_path *path)
{
    pthread_mutex_lock(&path->lock);
    path->failed = true;
    pthread_mutex_unlock(&path->lock);
}

int mmc_path_take_written(struct mmc_path *path)
{
    bool written;

    pthread_mutex_lock(&path->lock);
    written = path->wrote || path->writing;
    path->wrote = false;
    pthread_mutex_unlock(&path->lock);
    return written;
}

/* ---- finding the bytes -------------------------------------------------- */

/* The clusters that a range touches. */
static uint64_t first_cluster(const struct mmc_layer *layer, uint64_t offset)
{
    return offset >> layer->cluster_shift;
}

static uint64_t clusters(const struct mmc_layer *layer, const struct place *place)
{
    return first_cluster(layer, place->offset + place->length - 1) -
           first_cluster(layer, place->offset) + 1;
}

/* Whether all of the range is in this layer (1), none of it is (0), or neither (-1). */
static int has(const struct mmc_layer *layer, const struct place *place)
{
    const uint64_t count = clusters(layer, place);
    struct mmc_run run;

    if (!layer->view)
        return 1;
    if (mmc_view_bit_runs(layer->view, layer->bits, first_cluster(layer, place->offset), count,
                          &run, 1) != 1)
        return -1; /* a fault: the long way meets it too, and explains it */
    return run.count == count ? (int)run.value : -1;
}

/* A read goes down to the layer that has the range. */
static int find_read(const struct mmc_path *path, struct place *place)
{
    uint32_t i;

    for (i = 0; i < path->count; i++) {
        const struct mmc_layer *layer = &path->layers[i];

        if (place->offset >= layer->size)
            return MMC_ZEROS;
        if (place->length > layer->size - place->offset)
            return MMC_MISS;
        switch (has(layer, place)) {
        case 1:
            place->layer = layer;
            return MMC_STARTED;
        case 0:
            break;
        default:
            return MMC_MISS;
        }
    }
    return path->count ? MMC_ZEROS : MMC_MISS;
}

/* Whether the range ends at the edges of clusters; the last may be cut by the disk's end. */
static bool is_whole(const struct mmc_path *path, const struct mmc_layer *layer,
                     const struct place *place)
{
    const uint64_t rest = (UINT64_C(1) << layer->cluster_shift) - 1;
    const uint64_t end = place->offset + place->length;

    return (place->offset & rest) == 0 && ((end & rest) == 0 || end == path->size);
}

static int find_write(const struct mmc_path *path, struct place *place)
{
    const struct mmc_layer *top = &path->layers[0];

    if (!path->count || path->failed || !(path->hits & MMC_PATH_WRITES))
        return MMC_MISS;
    if ((path->hits & MMC_PATH_GUARDED) && place->offset < SECTOR)
        return MMC_MISS;
    place->layer = top;
    if (has(top, place) == 1)
        return MMC_STARTED;
    if (!(path->hits & MMC_PATH_ALLOCATES) || !is_whole(path, top, place))
        return MMC_MISS;
    place->allocates = true;
    return MMC_STARTED;
}

static bool is_aligned(const struct mmc_layer *layer, const struct place *place,
                       const void *address)
{
    return ((place->offset + layer->start) & (layer->file_align - 1)) == 0 &&
           (place->length & (layer->file_align - 1)) == 0 &&
           ((uintptr_t)address & (layer->memory_align - 1)) == 0;
}

static int find(const struct mmc_path *path, struct place *place, bool is_write,
                const void *address)
{
    int rc;

    if (place->length == 0 || place->length > (is_write ? WRITE_MAX : READ_MAX))
        return MMC_MISS;
    if (place->offset > path->size || place->length > path->size - place->offset)
        return MMC_MISS;
    if (is_held(path, place, is_write))
        return MMC_MISS;
    rc = is_write ? find_write(path, place) : find_read(path, place);
    if (rc != MMC_STARTED)
        return rc;
    const uint64_t end = place->layer->start + place->offset + place->length;
    const uint64_t last = is_write ? place->layer->write_end : place->layer->read_end;

    return end <= last && is_aligned(place->layer, place, address) ? MMC_STARTED : MMC_MISS;
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
    const struct place place = {.offset = transfer->offset, .length = transfer->length};

    /* A sync has failed meanwhile: nothing is changed any more. */
    if (path->failed)
        return -EIO;
    return mmc_view_bits_write(top->view, top->bits, first_cluster(top, place.offset),
                               clusters(top, &place), 1);
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
    return result;
}

static void finish(struct mmc_request *request)
{
    struct mmc_transfer *transfer = (struct mmc_transfer *)(void *)request;

    transfer->finished(transfer, conclude(transfer, request->result));
}

/* Finds the range and, for a hit, counts it as in flight. */
static int begin(struct mmc_path *path, struct mmc_transfer *transfer, int code, uint64_t offset,
                 void *address, uint64_t length)
{
    struct place place = {.offset = offset, .length = length};
    struct mmc_op op = {.length = length, .address = (uintptr_t)address, .code = code};
    int rc;

    transfer->path = path;
    transfer->offset = offset;
    transfer->length = length;
    transfer->is_write = code == MMC_WRITE;
    pthread_mutex_lock(&path->lock);
    rc = find(path, &place, transfer->is_write, address);
    if (rc == MMC_STARTED) {
        transfer->allocates = place.allocates;
        op.offset = place.layer->start + offset;
        op.fd = place.layer->fd;
        link_in(path, transfer);
    }
    pthread_mutex_unlock(&path->lock);
    if (rc == MMC_STARTED)
        mmc_request_set(&transfer->request, &op); /* one buffer, checked range: no error */
    return rc;
}

int mmc_path_begin(struct mmc_path *path, struct mmc_transfer *transfer, int code, uint64_t offset,
                   void *address, uint64_t length, struct mmc_requests *batch)
{
    const int rc = begin(path, transfer, code, offset, address, length);

    if (rc != MMC_STARTED)
        return rc;
    transfer->request.owner = finish;
    mmc_requests_push(batch, &transfer->request);
    return rc;
}

int64_t mmc_path_transfer(struct mmc_path *path, int code, uint64_t offset, void *address,
                          uint64_t length)
{
    struct mmc_transfer transfer;
    int rc;

    if (path->process != mmc_process())
        return -EBADF;
    rc = begin(path, &transfer, code, offset, address, length);
    if (rc == MMC_ZEROS)
        memset(address, 0, length);
    if (rc != MMC_STARTED)
        return rc == MMC_ZEROS ? (int64_t)length : 0;
    mmc_request_run(&transfer.request);
    return conclude(&transfer, transfer.request.result);
}
