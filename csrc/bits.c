/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "strict.h"

#include <endian.h>

#include "bits.h"

#define WORD_BITS 64
#define ALL UINT64_MAX

/* The same memory is stored to by other widths too (store_atomic in view.c). */
typedef uint64_t __attribute__((may_alias)) word_t;

static uint64_t load(const uint64_t *words, uint64_t index)
{
    return le64toh(__atomic_load_n((const word_t *)words + index, __ATOMIC_RELAXED));
}

/* The bits of word `index` that lie in [first, end), which has at least one there. */
static uint64_t mask_of(uint64_t index, uint64_t first, uint64_t end)
{
    uint64_t mask = ALL;

    if (first > index * WORD_BITS)
        mask &= ALL << (first % WORD_BITS);
    if (end < (index + 1) * WORD_BITS)
        mask &= ~(ALL << (end % WORD_BITS));
    return mask;
}

uint64_t mmc_bits_next(const uint64_t *words, uint64_t first, uint64_t end, int value)
{
    const uint64_t flip = value ? 0 : ALL;
    uint64_t index = first / WORD_BITS;
    uint64_t word;
    uint64_t found;

    if (first >= end)
        return end;
    word = (load(words, index) ^ flip) & (ALL << (first % WORD_BITS));
    while (word == 0) {
        if (++index * WORD_BITS >= end)
            return end;
        word = load(words, index) ^ flip;
    }
    found = index * WORD_BITS + (uint64_t)__builtin_ctzll(word);
    return found < end ? found : end;
}

uint64_t mmc_bits_count(const uint64_t *words, uint64_t first, uint64_t end)
{
    uint64_t index;
    uint64_t count = 0;

    for (index = first / WORD_BITS; index * WORD_BITS < end && first < end; index++)
        count += (uint64_t)__builtin_popcountll(load(words, index) & mask_of(index, first, end));
    return count;
}

static void fill_word(word_t *word, uint64_t mask, int value)
{
    if (mask == ALL)
        __atomic_store_n(word, value ? ALL : 0, __ATOMIC_RELAXED);
    else if (value)
        __atomic_fetch_or(word, htole64(mask), __ATOMIC_RELAXED);
    else
        __atomic_fetch_and(word, htole64(~mask), __ATOMIC_RELAXED);
}

void mmc_bits_fill(uint64_t *words, uint64_t first, uint64_t end, int value)
{
    uint64_t index;

    for (index = first / WORD_BITS; index * WORD_BITS < end && first < end; index++)
        fill_word((word_t *)words + index, mask_of(index, first, end), value);
}
