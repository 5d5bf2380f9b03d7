#!/bin/sh
# SPDX-License-Identifier: MIT
# Fetches the kernel that the guest tests boot, and unpacks it, without installing it:
#
#   kernel.sh [--optional] DIRECTORY
#
# Afterwards DIRECTORY/boot and DIRECTORY/lib/modules are Debian's cloud kernel's. What is there
# stays (remove DIRECTORY for a newer one). With --optional it fails only under CI=true.
set -eu

optional=
if [ "$1" = --optional ]; then
    optional=yes
    shift
fi
directory=$1

give_up() {
    echo "no guest kernel: $*" >&2
    [ -n "$optional" ] && [ "${CI:-}" != true ] && exit 0
    exit 1
}

[ -e "$directory/complete" ] && exit 0
for program in apt-get apt-cache dpkg-deb; do
    command -v "$program" >/dev/null || give_up "needs $program (Debian)"
done

# The metapackage names the current kernel's package.
current() {
    apt-cache depends linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p' | head -n 1
}

fetch() {
    package=$(current)
    # As root, apt would rather download as a user who may not write here.
    [ -n "$package" ] && (cd "$work" && apt-get -o APT::Sandbox::User=root download "$package")
}

mkdir -p "$directory"
work=$(mktemp -d "$directory/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "fetching the guest kernel"
if ! fetch >"$work/log" 2>&1; then
    { [ "$(id -u)" = 0 ] && apt-get update && fetch; } >>"$work/log" 2>&1 || {
        cat "$work/log" >&2
        give_up "apt-get download"
    }
fi
dpkg-deb -x "$work"/linux-image-*.deb "$work/tree"
rm -rf "$directory/boot" "$directory/lib"
mv "$work/tree/boot" "$directory/boot"
mv "$work/tree/lib" "$directory/lib"
: >"$directory/complete"
