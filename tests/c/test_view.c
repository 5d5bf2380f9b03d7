/* SPDX-License-Identifier: MIT
 *
 * Views: mapped files that shrink, a stolen SIGBUS handler, sizes, forks.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "test.h"

#define PAGE 4096
#define UNIT 512

static struct mmc_view *map_scratch(uint64_t size, uint64_t reserve, int *fd)
{
    struct mmc_view *view;
    int error;

    *fd = scratch_file(size);
    view = mmc_view_map(*fd, size, reserve, UNIT, &error);
    CHECK_EQUAL(error, 0);
    CHECK(view);
    return view;
}

static void close_scratch(struct mmc_view *view, int fd)
{
    mmc_view_close(view);
    close(fd);
}

static void test_open_bad_arguments(void)
{
    int error = 0;

    CHECK(!mmc_view_memory(10, 10, 0, &error) && error == -EINVAL);
    CHECK(!mmc_view_memory(10, 10, 500, &error) && error == -EINVAL);
    CHECK(!mmc_view_memory(10, UINT64_MAX, 512, &error) && error == -EINVAL);
    CHECK(!mmc_view_map(-1, 10, 10, 512, &error) && error == -EBADF);
    mmc_view_close(NULL);
}

static void test_store_stays_out_of_the_file(void)
{
    char data[1000];
    char back[1000];
    int fd;
    struct mmc_view *view = map_scratch(4 * PAGE, 1 << 20, &fd);

    random_fill(data, sizeof(data));
    CHECK_EQUAL(mmc_view_store(view, 3001, data, sizeof(data)), 0);
    CHECK_EQUAL(mmc_view_load(view, 3001, back, sizeof(back)), 0);
    CHECK(memcmp(data, back, sizeof(data)) == 0);
    CHECK_EQUAL(mmc_view_dirty(view, 0, 4 * PAGE), 3); /* 3001..4001 touches units 5, 6, 7 */
    CHECK_EQUAL(pread(fd, back, sizeof(back), 3001), sizeof(back));
    CHECK_EQUAL(mmc_is_zero(back, sizeof(back)), 1);
    CHECK_EQUAL(mmc_is_zero((char *)(uintptr_t)mmc_view_shared(view) + 3001, 1000), 1);
    close_scratch(view, fd);
}

static void test_fill_marks_nothing(void)
{
    int error;
    struct mmc_view *view = mmc_view_memory(4 * PAGE, 0, UNIT, &error);

    CHECK_EQUAL(mmc_view_fill(view, 100, "abc", 3), 0);
    CHECK_EQUAL(mmc_view_dirty(view, 0, UINT64_MAX), 0);
    CHECK_EQUAL(mmc_view_shared(view), 0);
    mmc_view_mark(view, 511, 2);
    CHECK_EQUAL(mmc_view_dirty(view, 0, UINT64_MAX), 2);
    CHECK_EQUAL(mmc_view_release(view), 0);
    mmc_view_close(view);
}

static void test_access_beyond_the_size(void)
{
    char byte = 0;
    int error;
    struct mmc_view *view = mmc_view_memory(1000, 1 << 20, UNIT, &error);

    CHECK_EQUAL(mmc_view_load(view, 999, &byte, 1), 0);
    CHECK_EQUAL(mmc_view_load(view, 1000, &byte, 1), -ERANGE);
    CHECK_EQUAL(mmc_view_load(view, 1000, &byte, 0), 0);
    CHECK_EQUAL(mmc_view_store(view, UINT64_MAX, &byte, 2), -ERANGE);
    CHECK_EQUAL(mmc_view_store(view, 5, &byte, UINT64_MAX), -ERANGE);
    mmc_view_mark(view, 5000, 10);
    CHECK_EQUAL(mmc_view_dirty(view, 0, UINT64_MAX), 0);
    mmc_view_close(view);
}

static void test_snapshot_of_the_odd_end(void)
{
    struct mmc_run run;
    char copy[UNIT];
    int error;
    struct mmc_view *view = mmc_view_memory(1000, 0, UNIT, &error);

    CHECK_EQUAL(mmc_view_store(view, 999, "x", 1), 0);
    CHECK_EQUAL(mmc_view_snapshot(view, 0, 1000, &run, 1, copy, 487), 0); /* one too few */
    CHECK_EQUAL(mmc_view_dirty(view, 0, 1000), 1);
    CHECK_EQUAL(mmc_view_snapshot(view, 0, 1000, &run, 1, copy, 488), 1);
    CHECK_EQUAL(run.start, 512);
    CHECK_EQUAL(run.count, 488);
    CHECK_EQUAL(copy[487], 'x');
    CHECK_EQUAL(mmc_view_dirty(view, 0, 1000), 0);
    mmc_view_close(view);
}

static void check_sizes(struct mmc_view *view)
{
    char bytes[3 * PAGE];

    memset(bytes, 0xaa, sizeof(bytes));
    CHECK_EQUAL(mmc_view_store(view, 0, bytes, sizeof(bytes)), 0);
    CHECK_EQUAL(mmc_view_set_size(view, 1000), 0);
    CHECK_EQUAL(mmc_view_size(view), 1000);
    CHECK_EQUAL(mmc_view_dirty(view, 0, UINT64_MAX), 2); /* the unit at the end stays */
    CHECK_EQUAL(mmc_view_set_size(view, 3 * PAGE), 0);
    CHECK_EQUAL(mmc_view_dirty(view, 0, UINT64_MAX), 2);
    CHECK_EQUAL(mmc_view_load(view, 0, bytes, sizeof(bytes)), 0);
    CHECK_EQUAL(bytes[999], (char)0xaa);
    CHECK_EQUAL(mmc_is_zero(bytes + 1000, sizeof(bytes) - 1000), 1);
    CHECK_EQUAL(mmc_view_set_size(view, 1 << 21), -ENOSPC);
}

static void test_sizes_of_both_kinds(void)
{
    int error;
    int fd;
    struct mmc_view *mapped = map_scratch(3 * PAGE, 1 << 20, &fd);
    struct mmc_view *memory = mmc_view_memory(3 * PAGE, 1 << 20, UNIT, &error);

    check_sizes(mapped);
    check_sizes(memory);
    close_scratch(mapped, fd);
    mmc_view_close(memory);
}

static void test_grow_without_remapping(void)
{
    char byte = 1;
    int fd;
    struct mmc_view *view = map_scratch(0, 1 << 20, &fd);

    CHECK_EQUAL(mmc_view_load(view, 0, &byte, 1), -ERANGE);
    CHECK_EQUAL(ftruncate(fd, PAGE), 0);
    CHECK_EQUAL(mmc_view_set_size(view, PAGE), 0);
    CHECK_EQUAL(mmc_view_load(view, PAGE - 1, &byte, 1), 0);
    CHECK_EQUAL(byte, 0);
    close_scratch(view, fd);
}

static void test_release_keeps_dirty_pages(void)
{
    char byte;
    int fd;
    struct mmc_view *view = map_scratch(4 * PAGE, 0, &fd);

    CHECK_EQUAL(mmc_view_fill(view, 0, "a", 1), 0);
    CHECK_EQUAL(mmc_view_store(view, PAGE + 5, "b", 1), 0);
    CHECK_EQUAL(mmc_view_fill(view, 3 * PAGE, "c", 1), 0);
    CHECK_EQUAL(pwrite(fd, "XYZ", 3, 0), 3);
    CHECK_EQUAL(mmc_view_release(view), 0);
    CHECK_EQUAL(mmc_view_load(view, 0, &byte, 1), 0);
    CHECK_EQUAL(byte, 'X'); /* follows the file again */
    CHECK_EQUAL(mmc_view_load(view, PAGE + 5, &byte, 1), 0);
    CHECK_EQUAL(byte, 'b');
    CHECK_EQUAL(mmc_view_load(view, 3 * PAGE, &byte, 1), 0);
    CHECK_EQUAL(byte, 0);
    close_scratch(view, fd);
}

/* ---- SIGBUS ------------------------------------------------------------- */

static void check_faults(struct mmc_view *view)
{
    static char copy[4 * PAGE];
    struct mmc_run runs[4];
    char byte;

    CHECK_EQUAL(mmc_view_load(view, 0, &byte, 1), 0);
    CHECK_EQUAL(mmc_view_load(view, 2 * PAGE, &byte, 1), -EFAULT);
    CHECK_EQUAL(mmc_view_store(view, 2 * PAGE, "x", 1), -EFAULT);
    CHECK_EQUAL(mmc_view_bit_runs(view, 0, 0, 4 * PAGE * 8, runs, 4), -EFAULT);
    CHECK_EQUAL(mmc_view_bits_write(view, PAGE, 0, PAGE * 8, 1), -EFAULT);
    CHECK_EQUAL(mmc_view_bits_count(view, 0, 0, 4 * PAGE * 8), -EFAULT);
    mmc_view_mark(view, PAGE, UNIT);
    CHECK_EQUAL(mmc_view_dirty(view, 0, 4 * PAGE), 2);
    CHECK_EQUAL(mmc_view_snapshot(view, 0, 4 * PAGE, runs, 4, copy, sizeof(copy)), -EFAULT);
    CHECK_EQUAL(mmc_view_dirty(view, 0, 4 * PAGE), 2); /* marked again */
}

static struct mmc_view *truncated_view(int *fd)
{
    struct mmc_view *view = map_scratch(4 * PAGE, 0, fd);

    CHECK_EQUAL(mmc_view_store(view, 0, "a", 1), 0);
    CHECK_EQUAL(ftruncate(*fd, PAGE), 0);
    return view;
}

static void test_truncated_file_is_efault(void)
{
    int fd;
    struct mmc_view *view = truncated_view(&fd);

    check_faults(view);
    close_scratch(view, fd);
}

static void thief(int number)
{
    (void)number;
    _exit(3);
}

static void test_stolen_handler_is_taken_back(void)
{
    struct sigaction stolen = {.sa_handler = thief};
    int fd;
    struct mmc_view *view = truncated_view(&fd);
    char byte;

    CHECK_EQUAL(sigaction(SIGBUS, &stolen, NULL), 0);
    check_faults(view);
    signal(SIGBUS, SIG_DFL);
    CHECK_EQUAL(mmc_view_load(view, 2 * PAGE, &byte, 1), -EFAULT);
    close_scratch(view, fd);
}

static void *fault_often(void *argument)
{
    struct mmc_view *view = argument;
    char byte;
    int i;

    for (i = 0; i < 2000; i++) {
        CHECK_EQUAL(mmc_view_load(view, 0, &byte, 1), 0);
        CHECK_EQUAL(mmc_view_load(view, 2 * PAGE, &byte, 1), -EFAULT);
    }
    return NULL;
}

static void test_faults_in_many_threads(void)
{
    pthread_t threads[8];
    int fd;
    struct mmc_view *view = truncated_view(&fd);
    int i;

    for (i = 0; i < 8; i++)
        CHECK_EQUAL(pthread_create(&threads[i], NULL, fault_often, view), 0);
    for (i = 0; i < 8; i++)
        pthread_join(threads[i], NULL);
    close_scratch(view, fd);
}

/* Runs `body` in a child; returns how that ended, as waitpid says it. */
static int in_child(void (*body)(void *), void *argument)
{
    pid_t child = fork();
    int status;

    CHECK(child >= 0);
    if (child == 0) {
        body(argument);
        _exit(0);
    }
    CHECK_EQUAL(waitpid(child, &status, 0), child);
    return status;
}

/* A page of a truncated file, outside any view: a fault that is not ours. */
static volatile char *foreign_hole(void)
{
    const int fd = scratch_file(PAGE);
    char *map = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);

    CHECK(map != MAP_FAILED);
    CHECK_EQUAL(ftruncate(fd, 0), 0);
    return map;
}

static void install_guard(void)
{
    char byte;
    int fd;
    struct mmc_view *view = map_scratch(PAGE, 0, &fd);

    CHECK_EQUAL(mmc_view_load(view, 0, &byte, 1), 0);
    close_scratch(view, fd);
}

static void fault_by_default(void *argument)
{
    (void)argument;
    signal(SIGBUS, SIG_DFL);
    install_guard();
    (void)*foreign_hole();
}

static void fault_chained(void *argument)
{
    (void)argument;
    signal(SIGBUS, thief);
    install_guard();
    (void)*foreign_hole();
}

static void do_nothing(int number)
{
    (void)number;
}

static void fault_uncured(void *argument)
{
    (void)argument;
    signal(SIGBUS, do_nothing);
    install_guard();
    (void)*foreign_hole();
}

static sigjmp_buf foreign_jump;

static void jump_out(int number)
{
    (void)number;
    siglongjmp(foreign_jump, 1);
}

/* Another library's guard goes on working, at address after address. */
static void fault_cured(void *argument)
{
    volatile int round;

    (void)argument;
    for (round = 0; round < 3; round++) {
        signal(SIGBUS, jump_out);
        install_guard();
        if (sigsetjmp(foreign_jump, 1) == 0) {
            (void)*foreign_hole();
            _exit(1);
        }
    }
}

static void test_foreign_fault_is_passed_on(void)
{
    int status = in_child(fault_by_default, NULL);

    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    status = in_child(fault_chained, NULL);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    status = in_child(fault_uncured, NULL);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    status = in_child(fault_cured, NULL);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* ---- forks -------------------------------------------------------------- */

static void use_in_child(void *argument)
{
    struct mmc_view *view = argument;
    void *address = (void *)(uintptr_t)mmc_view_shared(view);
    struct mmc_run run;
    char byte;
    /* Something else at the view's address: closing must leave it alone. */
    char *other = mmap(address, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    CHECK(other == address);
    CHECK_EQUAL(mmc_view_load(view, 0, &byte, 1), -EBADF);
    CHECK_EQUAL(mmc_view_store(view, 0, &byte, 1), -EBADF);
    CHECK_EQUAL(mmc_view_bit_runs(view, 0, 0, 1, &run, 1), -EBADF);
    CHECK_EQUAL(mmc_view_set_size(view, 1), -EBADF);
    CHECK_EQUAL(mmc_view_release(view), -EBADF);
    CHECK_EQUAL(mmc_view_snapshot(view, 0, 1, &run, 1, &byte, 1), -EBADF);
    mmc_view_mark(view, 0, 1);
    CHECK_EQUAL(mmc_view_dirty(view, 0, 1), 0);
    mmc_view_close(view);
    *other = 1;
}

static void test_forked_child_is_harmless(void)
{
    int fd;
    char byte;
    struct mmc_view *view = map_scratch(PAGE, 0, &fd);

    CHECK_EQUAL(mmc_view_store(view, 0, "z", 1), 0);
    CHECK_EQUAL(in_child(use_in_child, view), 0);
    CHECK_EQUAL(mmc_view_load(view, 0, &byte, 1), 0);
    CHECK_EQUAL(byte, 'z');
    close_scratch(view, fd);
}

/* A child that may install no signal handler: a mapping is refused, memory is not. */
static void map_without_handlers(void *context)
{
    struct sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rt_sigaction, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof(rules) / sizeof(rules[0]), rules};
    int error = 0;
    char byte = 1;

    CHECK_EQUAL(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
    CHECK_EQUAL(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
    CHECK(!mmc_view_map(*(int *)context, PAGE, PAGE, 512, &error));
    CHECK_EQUAL(error, -EPERM);
    struct mmc_view *view = mmc_view_memory(PAGE, PAGE, 512, &error);
    CHECK(view != NULL);
    CHECK_EQUAL(mmc_view_load(view, 0, &byte, 1), 0);
    CHECK_EQUAL(byte, 0);
}

static void test_no_handler_no_mapping(void)
{
    int fd;
    struct mmc_view *view = map_scratch(PAGE, 0, &fd);

    CHECK_EQUAL(in_child(map_without_handlers, &fd), 0);
    close_scratch(view, fd);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(test_open_bad_arguments());
    RUN(test_store_stays_out_of_the_file());
    RUN(test_fill_marks_nothing());
    RUN(test_access_beyond_the_size());
    RUN(test_snapshot_of_the_odd_end());
    RUN(test_sizes_of_both_kinds());
    RUN(test_grow_without_remapping());
    RUN(test_release_keeps_dirty_pages());
    RUN(test_truncated_file_is_efault());
    RUN(test_stolen_handler_is_taken_back());
    RUN(test_faults_in_many_threads());
    RUN(test_foreign_fault_is_passed_on());
    RUN(test_forked_child_is_harmless());
    RUN(test_no_handler_no_mapping());
    return 0;
}
