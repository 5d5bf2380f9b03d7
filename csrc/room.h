/* SPDX-License-Identifier: MIT
 *
 * Buffers for one thread, aligned to a page, not zeroed. Small ones are kept for reuse, up to
 * ROOM_KEPT_MAX bytes of them; large ones (pages.h) are not: each would keep its whole chunk.
 */
#ifndef MMC_ROOM_H
#define MMC_ROOM_H

#include <stdint.h>

#define MMC_ROOM_SIZES 2 /* that are kept: 4 KiB and 8 KiB */

struct mmc_spare {
    struct mmc_spare *next;
};

struct mmc_room {
    struct mmc_spare *kept[MMC_ROOM_SIZES];
    uint64_t kept_bytes;
};

/* NULL where there is no memory. */
void *mmc_room_take(struct mmc_room *room, uint64_t length);
/* `length` as it was taken. */
void mmc_room_give(struct mmc_room *room, void *buffer, uint64_t length);
/* Frees what is kept. */
void mmc_room_clear(struct mmc_room *room);

#endif
