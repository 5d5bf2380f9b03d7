/* SPDX-License-Identifier: MIT
 *
 * Dirty marks: one bit per unit, in address space that costs memory only where marks
 * were set.
 */
#ifndef MMC_DIRTY_H
#define MMC_DIRTY_H

#include <stdint.h>

struct mmc_dirty {
    uint64_t *words;
    uint64_t bytes; /* of the mapping */
    /* All marks lie in [low, high), so that a snapshot does not scan a large bitmap
     * for a few of them. */
    uint64_t low;
    uint64_t high;
};

int mmc_dirty_open(struct mmc_dirty *dirty, uint64_t units);
void mmc_dirty_close(struct mmc_dirty *dirty);
void mmc_dirty_mark(struct mmc_dirty *dirty, uint64_t first, uint64_t end);
void mmc_dirty_clear(struct mmc_dirty *dirty, uint64_t first, uint64_t end);
uint64_t mmc_dirty_count(const struct mmc_dirty *dirty, uint64_t first, uint64_t end);
/* Finds the first run of marks in [first, end); returns its length, 0 for none. */
uint64_t mmc_dirty_next(const struct mmc_dirty *dirty, uint64_t first, uint64_t end,
                        uint64_t *start);

#endif
