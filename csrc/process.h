/* SPDX-License-Identifier: MIT */
#ifndef MMC_PROCESS_H
#define MMC_PROCESS_H

#include <stdint.h>

/* A number that differs in every forked child. A queue and a view remember it: their
 * threads, their ring and their mappings (MADV_DONTFORK) stay with the process that
 * made them, and at the same addresses a child may hold something else. */
uint32_t mmc_process(void);

#endif
