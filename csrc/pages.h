/* SPDX-License-Identifier: MIT
 *
 * Memory for transfers, carved from huge pages where the kernel grants them.
 *
 * A disk takes a transfer as a list of pieces that lie together in physical memory. 1 MiB in
 * pages of 4 KiB is 256 pieces, more than a virtio disk takes at once (254), and in a huge page it
 * is one. On virtio-blk below ext4 (Linux 6.18, O_DIRECT) this made 983 reads a second of 1 MiB,
 * 8 in flight, 3099; 17139 of 64 KiB, 16 in flight, 35138; 50694 of 16 KiB, 64 in flight, 70393;
 * those of 4 KiB stayed as they were.
 *
 * Any thread may call. Up to MMC_PAGES_KEPT_MAX bytes are kept that nobody uses: memory taken anew
 * is zeroed by the kernel, which costs 420 us for 1 MiB in small pages where reuse costs 8.
 */
#ifndef MMC_PAGES_H
#define MMC_PAGES_H

#include <stdint.h>

/* Below, a transfer gains nothing, and a huge page would only make the process larger. */
#define MMC_PAGES_MIN (16u << 10)
#define MMC_PAGES_KEPT_MAX (32u << 20)

/* Not zeroed, aligned to 4 KiB, no more than `length` up to the next 4 KiB. NULL where there is no
 * memory, or no room for a whole chunk. */
void *mmc_pages_take(uint64_t length);
/* Whether `buffer` came from here, and was given back now. A second time it is a crash. */
int mmc_pages_give(void *buffer);
/* Keeps nothing that nobody uses. */
void mmc_pages_trim(void);
/* Bytes held from the kernel (of those only that may have been touched), and handed out. */
void mmc_pages_count(uint64_t *held, uint64_t *taken);

/* Memory of any length, not zeroed, from above where it is large and there; NULL where there is
 * none. Otherwise as posix_memalign(). */
void *mmc_memory_take(uint64_t length, uint64_t alignment);
void mmc_memory_give(void *buffer);

#endif
