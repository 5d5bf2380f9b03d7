/* SPDX-License-Identifier: MIT
 *
 * Access to a file mapping that survives SIGBUS: the file may be truncated, its
 * device may fail, at any moment.
 */
#ifndef MMC_GUARD_H
#define MMC_GUARD_H

#include <stdint.h>

/* Runs body(context) and returns its result, or -EFAULT if it met a SIGBUS inside
 * [start, start+length). The body is left at the faulting access: it must hold no lock,
 * and what it leaves half done must be visible through `context`. Does not nest. */
int64_t mmc_guard_run(const void *start, uint64_t length, int64_t (*body)(void *context),
                      void *context);

#endif
