/* SPDX-License-Identifier: MIT */
#include "strict.h"

#include <endian.h>
#include <string.h>

#include "nbd.h"

#define REQUEST_MAGIC 0x25609513u
#define SIMPLE_REPLY_MAGIC 0x67446698u
#define STRUCTURED_REPLY_MAGIC 0x668e33efu

#define FLAG_DONE 1
#define TYPE_NONE 0
#define TYPE_OFFSET_DATA 1
#define TYPE_OFFSET_HOLE 2

/* Everything on the wire is big-endian and nothing of it is aligned. */

static uint16_t get_16(const uint8_t *from)
{
    uint16_t value;

    memcpy(&value, from, sizeof(value));
    return be16toh(value);
}

static uint32_t get_32(const uint8_t *from)
{
    uint32_t value;

    memcpy(&value, from, sizeof(value));
    return be32toh(value);
}

static uint64_t get_64(const uint8_t *from)
{
    uint64_t value;

    memcpy(&value, from, sizeof(value));
    return be64toh(value);
}

static uint8_t *put_16(uint8_t *into, uint16_t value)
{
    value = htobe16(value);
    memcpy(into, &value, sizeof(value));
    return into + sizeof(value);
}

static uint8_t *put_32(uint8_t *into, uint32_t value)
{
    value = htobe32(value);
    memcpy(into, &value, sizeof(value));
    return into + sizeof(value);
}

static uint8_t *put_64(uint8_t *into, uint64_t value)
{
    value = htobe64(value);
    memcpy(into, &value, sizeof(value));
    return into + sizeof(value);
}

/*  0      4      6        8       16       24       28
 *  magic  flags  command  cookie  offset   length                                           */
bool mmc_nbd_parse(const uint8_t *head, struct mmc_nbd_request *request)
{
    request->magic = get_32(head);
    request->flags = get_16(head + 4);
    request->command = get_16(head + 6);
    request->cookie = get_64(head + 8);
    request->offset = get_64(head + 16);
    request->length = get_32(head + 24);
    return request->magic == REQUEST_MAGIC;
}

/* magic 4, error 4, cookie 8 */
static uint8_t *put_simple(uint8_t *into, const struct mmc_nbd_request *request)
{
    into = put_32(into, SIMPLE_REPLY_MAGIC);
    into = put_32(into, 0);
    return put_64(into, request->cookie);
}

/* magic 4, flags 2, type 2, cookie 8, length of what follows 4 */
static uint8_t *put_chunk(uint8_t *into, const struct mmc_nbd_request *request, uint16_t type,
                          uint32_t length)
{
    into = put_32(into, STRUCTURED_REPLY_MAGIC);
    into = put_16(into, FLAG_DONE);
    into = put_16(into, type);
    into = put_64(into, request->cookie);
    return put_32(into, length);
}

uint32_t mmc_nbd_data(uint8_t *head, const struct mmc_nbd_request *request, bool is_structured)
{
    uint8_t *at;

    if (!is_structured)
        return (uint32_t)(put_simple(head, request) - head);
    at = put_chunk(head, request, TYPE_OFFSET_DATA, 8 + request->length);
    at = put_64(at, request->offset);
    return (uint32_t)(at - head);
}

uint32_t mmc_nbd_done(uint8_t *head, const struct mmc_nbd_request *request, bool is_structured)
{
    if (!is_structured)
        return (uint32_t)(put_simple(head, request) - head);
    return (uint32_t)(put_chunk(head, request, TYPE_NONE, 0) - head);
}

uint32_t mmc_nbd_hole(uint8_t *head, const struct mmc_nbd_request *request)
{
    uint8_t *at = put_chunk(head, request, TYPE_OFFSET_HOLE, 12);

    at = put_64(at, request->offset);
    at = put_32(at, request->length);
    return (uint32_t)(at - head);
}
