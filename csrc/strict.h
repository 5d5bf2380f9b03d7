/* SPDX-License-Identifier: MIT
 *
 * Makes the helper's own files strict, and only them: cffi compiles its generated
 * wrapper with the same command line, and what a future compiler thinks of that
 * file must not break an installation. Included first by every .c file here.
 */
#ifndef MMC_STRICT_H
#define MMC_STRICT_H

#pragma GCC diagnostic error "-Wall"
#pragma GCC diagnostic error "-Wextra"
#pragma GCC diagnostic error "-Wconversion"

#endif
