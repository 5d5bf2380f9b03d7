/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "strict.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "guard.h"

struct guard {
    sigjmp_buf jump;
    uintptr_t start;
    uintptr_t end;
};

/* initial-exec: the handler reads these on threads that may never have touched them,
 * and the default model of a shared library would allocate there, inside a signal. */
#define THREAD_LOCAL static _Thread_local __attribute__((tls_model("initial-exec")))

THREAD_LOCAL struct guard *volatile current;

/* The last fault that was not ours and went to the old handler. */
THREAD_LOCAL const void *volatile chained_address;
THREAD_LOCAL volatile bool has_chained;

static pthread_mutex_t installing = PTHREAD_MUTEX_INITIALIZER; /* guards `previous` */
static struct sigaction previous;

/* ---- faults that are not ours ------------------------------------------- */

static void die_by_default(int number, const siginfo_t *info)
{
    signal(number, SIG_DFL);
    /* A fault repeats by itself when the handler returns, and then dumps core at the
     * right place; a signal that was sent has to be sent again. */
    if (info->si_code <= 0)
        raise(number);
}

/* A fault that comes back was not cured by the old handler: Python's only notes the
 * signal, and faulthandler, enabled after us, hands it back to us by raise(). */
static bool is_second_time(const siginfo_t *info)
{
    if (!has_chained)
        return false;
    return info->si_code <= 0 || info->si_addr == chained_address;
}

static void pass_on(int number, siginfo_t *info, void *context)
{
    const bool is_handler = previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN;

    if (previous.sa_handler == SIG_IGN && info->si_code <= 0)
        return; /* a sent signal can be ignored, a fault cannot */
    if (!is_handler || is_second_time(info)) {
        die_by_default(number, info);
        return;
    }
    has_chained = true;
    chained_address = info->si_addr;
    if (previous.sa_flags & SA_SIGINFO)
        previous.sa_sigaction(number, info, context);
    else
        previous.sa_handler(number);
}

/* ---- the handler -------------------------------------------------------- */

static void handle(int number, siginfo_t *info, void *context)
{
    struct guard *guard = current;
    const uintptr_t address = (uintptr_t)info->si_addr;

    if (guard && info->si_code > 0 && address >= guard->start && address < guard->end)
        siglongjmp(guard->jump, 1);
    pass_on(number, info, context);
}

static bool is_ours(const struct sigaction *action)
{
    return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == handle;
}

/* SA_NODEFER because the handler is left by siglongjmp without a mask: saving and
 * restoring the mask would be a system call on each side of every access. */
static int install(void)
{
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
    struct sigaction found;
    int rc = 0;

    pthread_mutex_lock(&installing);
    if (sigaction(SIGBUS, NULL, &found) < 0) {
        rc = -errno;
    } else if (!is_ours(&found)) {
        previous = found; /* before our handler can need it */
        if (sigaction(SIGBUS, &action, NULL) < 0)
            rc = -errno;
    }
    pthread_mutex_unlock(&installing);
    return rc;
}

/* Asks every time: faulthandler.enable(), which pytest does, replaces the handler, and
 * disable() removes it. Costs 0.14 us. */
static int ensure_installed(void)
{
    struct sigaction found;

    if (sigaction(SIGBUS, NULL, &found) < 0)
        return -errno;
    return is_ours(&found) ? 0 : install();
}

int64_t mmc_guard_run(const void *start, uint64_t length, int64_t (*body)(void *context),
                      void *context)
{
    struct guard guard = {.start = (uintptr_t)start, .end = (uintptr_t)start + length};
    int64_t result;
    int rc = ensure_installed();

    if (rc < 0)
        return rc;
    if (sigsetjmp(guard.jump, 0) != 0) {
        current = NULL;
        return -EFAULT;
    }
    current = &guard;
    atomic_signal_fence(memory_order_seq_cst);
    result = body(context);
    atomic_signal_fence(memory_order_seq_cst);
    current = NULL;
    return result;
}
