/* SPDX-License-Identifier: MIT */
#include "strict.h"

#include <stdlib.h>

#include "pages.h"
#include "room.h"

#define LEAST 4096u
#define ALIGNMENT 4096u
#define ROOM_KEPT_MAX (32u << 20)

/* Which size, or MMC_ROOM_SIZES where it is larger than all of them. */
static uint32_t size_number(uint64_t length)
{
    uint32_t number = 0;

    while (number < MMC_ROOM_SIZES && ((uint64_t)LEAST << number) < length)
        number++;
    return number;
}

static void *allocate(uint64_t length)
{
    void *buffer;

    if (length >= MMC_PAGES_MIN)
        return mmc_pages_take(length);
    return posix_memalign(&buffer, ALIGNMENT, length) == 0 ? buffer : NULL;
}

static void release(void *buffer)
{
    if (!mmc_pages_give(buffer))
        free(buffer);
}

void *mmc_room_take(struct mmc_room *room, uint64_t length)
{
    const uint32_t number = size_number(length);
    struct mmc_spare *spare;

    if (number == MMC_ROOM_SIZES)
        return allocate(length);
    spare = room->kept[number];
    if (!spare)
        return allocate((uint64_t)LEAST << number);
    room->kept[number] = spare->next;
    room->kept_bytes -= (uint64_t)LEAST << number;
    return spare;
}

void mmc_room_give(struct mmc_room *room, void *buffer, uint64_t length)
{
    const uint32_t number = size_number(length);
    struct mmc_spare *spare = buffer;

    if (number == MMC_ROOM_SIZES ||
        room->kept_bytes + ((uint64_t)LEAST << number) > ROOM_KEPT_MAX) {
        release(buffer);
        return;
    }
    spare->next = room->kept[number];
    room->kept[number] = spare;
    room->kept_bytes += (uint64_t)LEAST << number;
}

void mmc_room_clear(struct mmc_room *room)
{
    uint32_t number;

    for (number = 0; number < MMC_ROOM_SIZES; number++) {
        while (room->kept[number]) {
            struct mmc_spare *spare = room->kept[number];

            room->kept[number] = spare->next;
            release(spare);
        }
    }
    room->kept_bytes = 0;
}
