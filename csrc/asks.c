/* SPDX-License-Identifier: MIT
 *
 * What the pump keeps of a request from its first byte to the reply, and the lists in which
 * requests and clients wait for their turn.
 */
#define _GNU_SOURCE
#include "strict.h"

#include <stdlib.h>

#include "pages.h"
#include "pump.h"

#define SPARE_MAX 1024

/* ---- lists -------------------------------------------------------------- */

void mmc_asks_push(struct mmc_asks *list, struct mmc_ask *ask)
{
    ask->next = NULL;
    if (list->last)
        list->last->next = ask;
    else
        list->first = ask;
    list->last = ask;
}

struct mmc_ask *mmc_asks_pop(struct mmc_asks *list)
{
    struct mmc_ask *ask = list->first;

    if (!ask)
        return NULL;
    list->first = ask->next;
    if (!list->first)
        list->last = NULL;
    return ask;
}

void mmc_pump_enlist(struct mmc_client *client, int number)
{
    struct mmc_clients *list = &client->pump->lists[number];

    if (client->is_in[number])
        return;
    client->is_in[number] = true;
    client->next[number] = NULL;
    if (list->last)
        list->last->next[number] = client;
    else
        list->first = client;
    list->last = client;
    client->pump->state.waiting += number == LIST_ROOM;
    client->pump->must_return |= number == LIST_ROOM;
}

void mmc_pump_unlist(struct mmc_client *client, int number)
{
    struct mmc_clients *list = &client->pump->lists[number];
    struct mmc_client *before = NULL;
    struct mmc_client *at;

    if (!client->is_in[number])
        return;
    for (at = list->first; at != client; at = at->next[number])
        before = at;
    if (before)
        before->next[number] = client->next[number];
    else
        list->first = client->next[number];
    if (list->last == client)
        list->last = before;
    client->is_in[number] = false;
    client->pump->state.waiting -= number == LIST_ROOM;
}

struct mmc_client *mmc_pump_next(struct mmc_pump *pump, int number)
{
    struct mmc_client *client = pump->lists[number].first;

    if (client)
        mmc_pump_unlist(client, number);
    return client;
}

/* ---- requests ----------------------------------------------------------- */

struct mmc_ask *mmc_ask_take(struct mmc_client *client)
{
    struct mmc_pump *pump = client->pump;
    struct mmc_ask *ask = pump->spare;

    if (ask) {
        pump->spare = ask->next;
        pump->spare_count--;
    } else {
        ask = malloc(sizeof(*ask));
        if (!ask)
            return NULL;
    }
    ask->next = NULL;
    ask->client = client;
    ask->buffer = NULL;
    ask->words = NULL;
    ask->charged = 0;
    ask->result = 0;
    ask->is_reserve = false;
    ask->is_answered = false;
    ask->is_leaked = false;
    client->asks++;
    pump->asks++;
    return ask;
}

void mmc_client_free(struct mmc_client *client)
{
    struct mmc_pump *pump = client->pump;

    /* Memory is kept for whoever asks next: for nobody there is no reason to. */
    if (--pump->clients == 0) {
        mmc_room_clear(&pump->room);
        mmc_pages_trim();
    }
    free(client->in);
    free(client);
}

void mmc_ask_give(struct mmc_ask *ask)
{
    struct mmc_client *client = ask->client;
    struct mmc_pump *pump = client->pump;

    if (ask->buffer && !ask->is_leaked)
        mmc_room_give(&pump->room, ask->buffer, ask->request.length);
    free(ask->words);
    client->memory -= ask->charged;
    pump->state.room -= ask->charged;
    client->asks--;
    pump->asks--;
    if (pump->spare_count < SPARE_MAX) {
        ask->next = pump->spare;
        pump->spare = ask;
        pump->spare_count++;
    } else {
        free(ask);
    }
    if (client->is_dropped && client->asks == 0)
        mmc_client_free(client);
}
