/* SPDX-License-Identifier: MIT */
#include "strict.h"

#include "pages.h"
#include "room.h"

#define LEAST 4096u
#define ROOM_KEPT_MAX (32u << 20)

/* Which size, or MMC_ROOM_SIZES where it is larger than all of them. */
static uint32_t size_number(uint64_t length)
{
    uint32_t number = 0;

    while (number < MMC_ROOM_SIZES && ((uint64_t)LEAST << number) < length)
        number++;
    return number;
}

void *mmc_room_take(struct mmc_room *room, uint64_t length)
{
    const uint32_t number = size_number(length);
    struct mmc_spare *spare;

    if (number == MMC_ROOM_SIZES)
        return mmc_memory_take(length, LEAST);
    spare = room->kept[number];
    if (!spare)
        return mmc_memory_take((uint64_t)LEAST << number, LEAST);
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
        mmc_memory_give(buffer);
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
            mmc_memory_give(spare);
        }
    }
    room->kept_bytes = 0;
}
