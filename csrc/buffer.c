/* SPDX-License-Identifier: MIT
 *
 * Aligned, zeroed buffers for the caller of the helper.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <string.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "mmc.h"
#include "pages.h"

/* Zeroed: Python may write it out before it has filled it, and old bytes of this
 * process have no business in a disk image. */
void *mmc_buffer_alloc(uint64_t size, uint64_t alignment, int *error)
{
    void *buffer;

    if (alignment < sizeof(void *))
        alignment = sizeof(void *);
    *error = alignment & (alignment - 1) ? -EINVAL : 0;
    if (*error < 0)
        return NULL;
    buffer = mmc_memory_take(size, alignment);
    if (buffer)
        memset(buffer, 0, size);
    else
        *error = -ENOMEM;
    return buffer;
}

void mmc_buffer_free(void *buffer)
{
    mmc_memory_give(buffer);
}

void mmc_memory_trim(void)
{
    mmc_pages_trim();
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}
