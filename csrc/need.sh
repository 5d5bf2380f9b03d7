#!/bin/sh
# SPDX-License-Identifier: MIT
# Makes sure that programs and headers are there, by Debian's package names:
#
#   need.sh [--optional] PACKAGE...
#
# Installs what is missing where it may (root on a system with apt), else says what to
# install and fails; with --optional it fails only under CI=true.
set -eu

optional=
if [ "$1" = --optional ]; then
    optional=yes
    shift
fi

is_there() {
    # A compiler or a Python from elsewhere will do.
    case $1 in
    gcc) command -v cc >/dev/null ;;
    python3-dev) "${PYTHON:-python3}" -c 'import sysconfig, os, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ;;
    python3-venv) "${PYTHON:-python3}" -c 'import venv, ensurepip' 2>/dev/null ;;
    liburing-dev) [ -e /usr/include/liburing.h ] ;;
    qemu-utils) command -v qemu-img >/dev/null && command -v qemu-io >/dev/null ;;
    qemu-system-x86) command -v qemu-system-x86_64 >/dev/null ;;
    busybox-static) command -v busybox >/dev/null ;;
    libnbd-bin) command -v nbdinfo >/dev/null && command -v nbdcopy >/dev/null ;;
    nbdkit | nbdfuse | openssl) command -v "$1" >/dev/null ;;
    fio) command -v fio >/dev/null ;;
    xfsprogs) command -v mkfs.xfs >/dev/null || [ -x /sbin/mkfs.xfs ] ;;
    e2fsprogs) command -v mkfs.ext4 >/dev/null || [ -x /sbin/mkfs.ext4 ] ;;
    btrfs-progs) command -v mkfs.btrfs >/dev/null || [ -x /sbin/mkfs.btrfs ] ;;
    *) dpkg -s "$1" >/dev/null 2>&1 ;;
    esac
}

missing=
for package in "$@"; do
    is_there "$package" || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing:$missing"
    # shellcheck disable=SC2086
    apt-get install -y --no-install-recommends $missing >/dev/null ||
        { apt-get update >/dev/null && apt-get install -y --no-install-recommends $missing >/dev/null; }
    exit 0
fi

echo "missing, by their Debian names:$missing" >&2
echo "install them:  sudo apt-get install$missing" >&2
if [ "$missing" = " liburing-dev" ]; then
    echo "(going on without: the I/O queue will be a thread pool)" >&2
    exit 0
fi
[ -n "$optional" ] && [ "${CI:-}" != true ]
