/* SPDX-License-Identifier: MIT
 *
 * The interface as C sees it. The declarations stand in mmc_api.h, which cffi reads
 * too and which therefore has neither guard nor includes.
 */
#ifndef MMC_H
#define MMC_H

#include <stdint.h>

#include "mmc_api.h"

#endif
