/* SPDX-License-Identifier: MIT
 *
 * Aligned, zeroed buffers for the caller of the helper.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "mmc.h"
#include "pages.h"

/* What mmc_pages_take() promises of this length. */
static int is_enough(uint64_t length, uint64_t alignment)
{
    return alignment <= length && alignment <= (UINT64_C(2) << 20);
}

/* Zeroed: Python may write it out before it has filled it, and old bytes of this
 * process have no business in a disk image. */
void *mmc_buffer_alloc(uint64_t size, uint64_t alignment, int *error)
{
    void *buffer = NULL;

    if (alignment < sizeof(void *))
        alignment = sizeof(void *);
    *error = alignment & (alignment - 1) ? -EINVAL : 0;
    if (*error < 0)
        return NULL;
    if (size < MMC_PAGES_MIN || !is_enough(size, alignment))
        *error = -posix_memalign(&buffer, alignment, size ? size : 1);
    else if (!(buffer = mmc_pages_take(size)))
        *error = -ENOMEM;
    if (*error < 0)
        return NULL;
    memset(buffer, 0, size);
    return buffer;
}

void mmc_buffer_free(void *buffer)
{
    if (!mmc_pages_give(buffer))
        free(buffer);
}
