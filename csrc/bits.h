/* SPDX-License-Identifier: MIT
 *
 * Bits in memory, counted from the start of `words`, least significant first in each
 * byte. Memory is read and written in aligned 64-bit words, by relaxed atomics; a
 * range may begin and end inside a word, whose other bits stay as they are.
 */
#ifndef MMC_BITS_H
#define MMC_BITS_H

#include <stdint.h>

/* First bit in [first, end) that equals `value`; `end` where there is none. */
uint64_t mmc_bits_next(const uint64_t *words, uint64_t first, uint64_t end, int value);
/* How many bits in [first, end) are set. */
uint64_t mmc_bits_count(const uint64_t *words, uint64_t first, uint64_t end);
/* Makes all bits in [first, end) equal `value`. */
void mmc_bits_fill(uint64_t *words, uint64_t first, uint64_t end, int value);

#endif
