/* SPDX-License-Identifier: MIT */
#include "strict.h"

#include <pthread.h>

#include "process.h"

static uint32_t generation;
static pthread_once_t watching = PTHREAD_ONCE_INIT;

static void note_fork(void)
{
    generation++;
}

static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, note_fork);
}

/* A counter instead of getpid(): no system call on the hot path (glibc has not
 * cached the pid since 2.25), and pids are reused. */
uint32_t mmc_process(void)
{
    pthread_once(&watching, watch_forks);
    return generation;
}
