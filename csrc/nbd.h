/* SPDX-License-Identifier: MIT
 *
 * The transmission phase of NBD as bytes: a request's head taken apart, the heads of the
 * replies that need no words. Source: NetworkBlockDevice/nbd, doc/proto.md; its names.
 */
#ifndef MMC_NBD_H
#define MMC_NBD_H

#include <stdbool.h>
#include <stdint.h>

#define NBD_REQUEST_BYTES 28
#define NBD_HEAD_MAX 32 /* of the replies made here */

#define NBD_CMD_READ 0
#define NBD_CMD_WRITE 1
#define NBD_CMD_DISC 2
#define NBD_CMD_BLOCK_STATUS 7

#define NBD_CMD_FLAG_FUA 1
#define NBD_CMD_FLAG_DF 4

struct mmc_nbd_request {
    uint32_t magic;
    uint16_t flags;
    uint16_t command;
    uint64_t cookie;
    uint64_t offset;
    uint32_t length;
};

/* Reads the head of a request. False where it does not begin like one. */
bool mmc_nbd_parse(const uint8_t *head, struct mmc_nbd_request *request);

/* What goes before the payload of a READ, or says that something else is done. Returns the head's
 * length. */
uint32_t mmc_nbd_data(uint8_t *head, const struct mmc_nbd_request *request, bool is_structured);
uint32_t mmc_nbd_done(uint8_t *head, const struct mmc_nbd_request *request, bool is_structured);
/* A whole structured reply: all of the READ is zeros. */
uint32_t mmc_nbd_hole(uint8_t *head, const struct mmc_nbd_request *request);

#endif
