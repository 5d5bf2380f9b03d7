/* SPDX-License-Identifier: MIT
 *
 * What the parts of the pump share.
 *
 *     pump.c      turns: who is ready; queues; the caller's events
 *     asks.c      requests from their first byte to the reply; lists of who waits
 *     client.c    bytes received become requests: hits are begun, the rest are events
 *     replies.c   requests that are over become bytes sent
 *     ahead.c     space for writes to come
 *     room.c      buffers      nbd.c  the wire      path.c, queue.c  the transfers
 *
 * A request (struct mmc_ask) is in one place at a time: its client's `incoming` while its payload
 * comes, in flight, in the caller's hands, in `settled` when either of these two is over, among its
 * client's replies, and free.
 *
 * One thread does everything, but for mmc_pump_settle: a transfer may be collected, and a request
 * answered, by any thread. It only appends to `settled` and wakes the pump.
 */
#ifndef MMC_PUMP_H
#define MMC_PUMP_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "mmc.h"
#include "nbd.h"
#include "path.h"
#include "room.h"

enum { SOURCE_CLIENT, SOURCE_QUEUE, SOURCE_WAKE, SOURCE_OTHER };

/* What an epoll entry points to. */
struct mmc_source {
    int kind;
    int fd;
};

struct mmc_ask {
    struct mmc_transfer transfer; /* first: how its `finished` finds the rest */
    struct mmc_ask *next;
    struct mmc_client *client;
    struct mmc_nbd_request request;
    uint64_t began; /* in ns */
    int64_t result; /* of the transfer; below 0: the caller answers */
    void *buffer;   /* for request.length bytes, or NULL */
    uint64_t charged;
    bool is_reserve;  /* of space, for nobody: see ahead.c */
    bool is_answered; /* by the caller */
    bool is_leaked;   /* its buffer */
    uint8_t *words;   /* the reply's bytes where `head` is too small */
    uint32_t length;  /* of the reply's bytes */
    uint32_t body;    /* bytes that follow them: of the buffer, or zeros where there is none */
    uint8_t head[NBD_HEAD_MAX];
};

struct mmc_asks {
    struct mmc_ask *first;
    struct mmc_ask *last;
};

/* What is received from a client at once: the size of its `in`. */
#define IN_BYTES (64u << 10)

/* Why a client's next request is not begun. */
#define HELD_FULL 1   /* too much of its own is under way */
#define HELD_ROOM 2   /* no room beside the others */
#define HELD_UNREAD 4 /* it does not read what the caller said */

/* Lists of clients, of which one may be in several. */
enum {
    LIST_BUSY,    /* has requests that could be begun */
    LIST_REPLIES, /* has replies that could be sent */
    LIST_PARTED,  /* the caller must be told */
    LIST_ROOM,    /* wait for room, in order of arrival */
    LISTS
};

/* A client's run of new clusters: see ahead.c. Bytes of the disk. */
struct mmc_ahead {
    uint64_t next; /* where the run goes on */
    uint64_t run;  /* how long it is */
    uint64_t end;  /* of what is set aside for it */
    bool is_busy;
    bool is_useless;
};

struct mmc_client {
    struct mmc_source source; /* first */
    struct mmc_pump *pump;
    struct mmc_client *next[LISTS];
    bool is_in[LISTS];
    struct mmc_path *path;
    struct mmc_pump_queue *queue;
    struct mmc_pump_counts *counts;
    uint64_t number;
    bool is_structured;
    bool is_writer;
    bool is_refusing;
    bool is_leaving; /* receives no more */
    bool is_over;    /* neither receives nor sends */
    bool is_dropped; /* the caller knows it no more */
    bool is_blocked; /* its socket takes no more */
    bool is_bulk;    /* its last WRITE was long: see receive */
    uint32_t held;
    uint32_t watched; /* epoll's events */
    uint32_t asks;    /* begun and not yet answered in full */
    uint64_t memory;  /* of their buffers */
    uint64_t wanted;  /* in LIST_ROOM: by the next request */
    uint64_t unread;  /* bytes of replies from the caller */
    uint64_t moved;
    int64_t result; /* for PARTED */
    uint64_t value;
    struct mmc_ask *incoming; /* a WRITE whose payload is coming */
    uint32_t filled;
    uint32_t skip; /* bytes to come of a payload too long to be taken; then it is begun */
    struct mmc_ahead ahead;
    struct mmc_asks replies;
    uint64_t sent; /* of the first of them */
    uint32_t at;   /* what was received and is not begun is in[at, have) */
    uint32_t have;
    uint8_t *in;
};

struct mmc_pump_queue {
    struct mmc_source source; /* first */
    struct mmc_pump_queue *next;
    struct mmc_queue *queue;
    uint64_t number;
    struct mmc_requests batch; /* begun, to be pushed */
};

struct mmc_clients {
    struct mmc_client *first;
    struct mmc_client *last;
};

struct mmc_pump {
    struct mmc_pump_state state;
    struct mmc_pump_limits limits;
    uint32_t process;
    int epoll;
    struct mmc_source wake; /* an eventfd */
    struct mmc_source other;
    struct mmc_pump_queue *queues;
    struct mmc_clients lists[LISTS];
    struct mmc_room room;
    uint64_t clients;
    struct mmc_ask *spare;
    uint32_t spare_count;
    uint64_t asks;          /* that exist and are not spare */
    struct mmc_asks untold; /* for the caller, when it has room */
    uint64_t now;           /* in ns, as of the last look */
    uint64_t interrupted;   /* when a wait was, first in this turn; 0: not yet */
    uint32_t unspun;        /* waits to come that are not worth spinning for */
    bool is_brisk;          /* the last wait was short */
    bool must_return;
    bool has_ended; /* something that is awaited */
    struct mmc_pump_event *events;
    uint32_t count;
    uint32_t max;

    pthread_mutex_t lock; /* guards the rest; innermost */
    struct mmc_asks settled;
    pthread_t thread; /* that is in a turn */
    bool is_turning;
    bool is_woken; /* the eventfd was or will be written to */
};

/* pump.c */
void mmc_pump_settle(struct mmc_ask *ask);
/* NULL where the caller has no room for one more. */
struct mmc_pump_event *mmc_pump_tell(struct mmc_pump *pump, int kind, uint64_t number);
/* Hands a request to the caller: at once, or when it has room. */
void mmc_pump_tell_ask(struct mmc_ask *ask);

/* asks.c */
void mmc_client_free(struct mmc_client *client);
void mmc_pump_enlist(struct mmc_client *client, int list);
void mmc_pump_unlist(struct mmc_client *client, int list);
struct mmc_client *mmc_pump_next(struct mmc_pump *pump, int list);
struct mmc_ask *mmc_ask_take(struct mmc_client *client);
/* Frees the ask and its buffer, and its client where that was the last trace of it. */
void mmc_ask_give(struct mmc_ask *ask);
void mmc_asks_push(struct mmc_asks *list, struct mmc_ask *ask);
struct mmc_ask *mmc_asks_pop(struct mmc_asks *list);

/* client.c */
/* Receives and begins what can be. */
void mmc_client_receive(struct mmc_client *client);
/* Begins requests that were received before. */
void mmc_client_continue(struct mmc_client *client);
/* Asks epoll for what the client waits for now. */
void mmc_client_rewatch(struct mmc_client *client);
/* The end of a client that the caller does not know of yet. */
void mmc_client_part(struct mmc_client *client, int64_t result, uint64_t value);
/* Some of what it had under way is over. */
void mmc_client_ease(struct mmc_client *client);

/* ahead.c */
/* New clusters are being written. */
void mmc_ahead_follow(struct mmc_client *client, uint64_t offset, uint64_t length);
void mmc_ahead_end(struct mmc_ask *ask);

/* replies.c */
/* A request that the pump did itself is over. */
void mmc_ask_succeed(struct mmc_ask *ask);
void mmc_ask_zeros(struct mmc_ask *ask);
/* Appends what the caller said. */
void mmc_ask_answer(struct mmc_ask *ask);
void mmc_client_send(struct mmc_client *client);
/* Forgets replies that nobody will get. */
void mmc_client_forget(struct mmc_client *client);

#endif
