/* SPDX-License-Identifier: MIT
 *
 * Bits of a view, and its dirty marks, against one byte per bit.
 */
#define _GNU_SOURCE
#include <errno.h>

#include "test.h"

#define BYTES 700
#define BITS (BYTES * 8)
#define UNIT 64

static struct mmc_view *view;
static unsigned char oracle[BITS];
static unsigned char dirty_oracle[(BYTES + UNIT - 1) / UNIT];

static uint64_t oracle_run(uint64_t from, uint64_t end)
{
    uint64_t at = from;

    while (at < end && oracle[at] == oracle[from])
        at++;
    return at - from;
}

static void check_runs(uint64_t base, uint64_t first, uint64_t count, uint32_t max)
{
    struct mmc_run runs[64];
    const uint64_t origin = base * 8;
    uint64_t at = first;
    int n = mmc_view_bit_runs(view, base, first, count, runs, max);
    int i;

    CHECK(n >= 0 && n <= (int)max);
    for (i = 0; i < n; i++) {
        CHECK_EQUAL(runs[i].start, at);
        CHECK_EQUAL(runs[i].value, oracle[origin + at]);
        CHECK_EQUAL(runs[i].count, oracle_run(origin + at, origin + first + count));
        at += runs[i].count;
    }
    if (n < (int)max)
        CHECK_EQUAL(at, first + count);
}

static void check_count(uint64_t base, uint64_t first, uint64_t count)
{
    uint64_t expected = 0;
    uint64_t i;

    for (i = 0; i < count; i++)
        expected += oracle[base * 8 + first + i];
    CHECK_EQUAL(mmc_view_bits_count(view, base, first, count), expected);
}

static void check_dirty(uint64_t offset, uint64_t length)
{
    uint64_t expected = 0;
    uint64_t unit;

    for (unit = offset / UNIT; unit * UNIT < offset + length && length; unit++)
        expected += dirty_oracle[unit];
    CHECK_EQUAL(mmc_view_dirty(view, offset, length), expected);
}

static void write_bits(uint64_t base, uint64_t first, uint64_t count, int value)
{
    uint64_t i;

    CHECK_EQUAL(mmc_view_bits_write(view, base, first, count, value), 0);
    for (i = base * 8 + first; i < base * 8 + first + count; i++) {
        oracle[i] = (unsigned char)value;
        dirty_oracle[i / 8 / UNIT] = 1;
    }
}

/* Clears what it takes from both, and checks that it took just that. */
static void take_snapshot(uint64_t offset, uint64_t length, uint32_t max, uint64_t room)
{
    static unsigned char copy[BYTES];
    static unsigned char content[BYTES];
    struct mmc_run runs[16];
    uint64_t at = 0;
    uint64_t unit;
    int n = mmc_view_snapshot(view, offset, length, runs, max, copy, room);
    int i;

    CHECK(n >= 0 && n <= (int)max);
    CHECK_EQUAL(mmc_view_load(view, 0, content, BYTES), 0);
    for (i = 0; i < n; i++) {
        CHECK_EQUAL(runs[i].value, at);
        CHECK_EQUAL(runs[i].start % UNIT, 0);
        CHECK(memcmp(copy + at, content + runs[i].start, runs[i].count) == 0);
        for (unit = runs[i].start / UNIT; unit * UNIT < runs[i].start + runs[i].count; unit++) {
            CHECK(dirty_oracle[unit]);
            dirty_oracle[unit] = 0;
        }
        at += runs[i].count;
    }
    CHECK(at <= room);
    if (n < (int)max && room >= BYTES)
        CHECK_EQUAL(mmc_view_dirty(view, offset, length), 0);
}

static void random_step(void)
{
    const uint64_t base = random_below(40);
    const uint64_t limit = (BYTES - base) * 8;
    const uint64_t first = random_below(limit + 1);
    const uint64_t most = limit - first;
    const uint64_t count = random_below((random_below(2) && most > 70 ? 70 : most) + 1);

    switch (random_below(5)) {
    case 0:
        take_snapshot(base, random_below(BYTES - base + 1), 1 + (uint32_t)random_below(15),
                      random_below(BYTES + 1));
        break;
    case 1:
        check_runs(base, first, count, 1 + (uint32_t)random_below(64));
        break;
    default:
        write_bits(base, first, count, (int)random_below(2));
    }
    check_count(base, first, count);
    check_dirty(base, random_below(BYTES - base + 1));
}

static void test_random_steps(void)
{
    int error;
    int i;

    view = mmc_view_memory(BYTES, 0, UNIT, &error);
    CHECK(view);
    for (i = 0; i < 200000; i++)
        random_step();
    take_snapshot(0, BYTES, 16, BYTES);
    CHECK_EQUAL(mmc_view_dirty(view, 0, BYTES), 0);
    mmc_view_close(view);
}

static void test_range_is_checked(void)
{
    struct mmc_run run;
    int error;

    view = mmc_view_memory(100, 0, 512, &error);
    CHECK_EQUAL(mmc_view_bit_runs(view, 0, 0, 800, &run, 1), 1);
    CHECK_EQUAL(mmc_view_bit_runs(view, 0, 0, 801, &run, 1), -ERANGE);
    CHECK_EQUAL(mmc_view_bit_runs(view, 0, 0, 0, &run, 1), 0);
    CHECK_EQUAL(mmc_view_bits_write(view, 1, 792, 1, 1), -ERANGE);
    CHECK_EQUAL(mmc_view_bits_write(view, 1, UINT64_MAX, 2, 1), -ERANGE);
    CHECK_EQUAL(mmc_view_bits_count(view, 101, 0, 0), -ERANGE);
    CHECK_EQUAL(mmc_view_bits_count(view, UINT64_MAX, 8, 1), -ERANGE);
    CHECK_EQUAL(mmc_view_bits_count(view, 0, 5, UINT64_MAX), -ERANGE);
    mmc_view_close(view);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_random_steps());
    RUN(test_range_is_checked());
    return 0;
}
