#!/bin/bash
# SPDX-License-Identifier: MIT
#
# What mmcow does, step by step: a base with a file system, a private layer over it, changes,
# and every way of putting the two together again. Needs no root; works in a temporary
# directory, which it removes. `make demo` builds mmcow first.

set -euo pipefail

project=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$project/.venv/bin:$PATH:/usr/sbin:/sbin" LC_ALL=C.UTF-8
unset MMCOW_DEBUG

need() {
    for program in "$@"; do
        command -v "$program" >/dev/null && continue
        echo "demo: $program is missing; on Debian: apt-get install e2fsprogs" >&2
        exit 1
    done
}

# On a terminal commands stand out.
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$(printf '\033[1m') plain=$(printf '\033[0m')
else
    bold='' plain=''
fi

title() {
    printf '\n%s== %s ==%s\n' "$bold" "$*" "$plain"
}

# Shows a command, then runs it. Pipes and redirections are written as one string.
run() {
    printf '\n%s$ %s%s\n' "$bold" "$*" "$plain"
    bash -o pipefail -c "$*"
}

# The same for a command that is meant to fail: its status is shown.
run_failing() {
    printf '\n%s$ %s%s\n' "$bold" "$*" "$plain"
    local status=0
    bash -o pipefail -c "$*" || status=$?
    echo "(exit status $status)"
    [ "$status" -ne 0 ]
}

if [ ! -x "$project/.venv/bin/mmcow" ]; then
    echo "demo: mmcow is not built; run: make demo" >&2
    exit 1
fi
need mke2fs e2fsck debugfs sha256sum

work=$(mktemp -d "${TMPDIR:-/tmp}/mmcow-demo.XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"

title "A base image: a real ext4 file system with files in it"
mkdir files
cp "$project/README.md" "$project/LICENSE" files/ 2>/dev/null || cp "$project/LICENSE" files/
cp -r "$project/mmcow" files/
rm -rf files/mmcow/__pycache__ files/mmcow/*/__pycache__
run mmcow --version
run mmcow create base.raw 64M
run 'mke2fs -q -t ext4 -O ^metadata_csum -L demo -d files base.raw && e2fsck -fn base.raw 2>/dev/null | tail -1'
run 'sha256sum base.raw | tee base.sha256'
chmod a-w base.raw

title "A private layer over it: an image file (one bit per cluster) and a raw data file"
run mmcow create -b base.raw -F raw vm.acow
run 'ls -ls --block-size=1 vm.acow vm.acow.raw'
run mmcow info vm.acow

title "Changes go to the layer: some by commands, some by a program"
run "mmcow io -c 'write -P 0xab 40M 300k' -c 'write -z 50M 1M' -c 'read -v 40M 32' vm.acow"
run "mmcow io -c 'read -P 0xab 40M 300k' -c flush vm.acow"
run_failing "mmcow io -c 'read -P 0xcd 40M 4k' vm.acow"
cat >edit.py <<'EOF'
# Rename the volume inside the layer: the label is at byte 120 of ext4's superblock.
import mmcow

with mmcow.open("vm.acow", write=True) as disk:
    disk.write(1024 + 120, b"private".ljust(16, b"\0"))
    disk.flush()
EOF
run "cat edit.py && $(printf %q "$project/.venv/bin/python") edit.py"

title "What each layer holds"
run mmcow map vm.acow
run 'mmcow map --output=json vm.acow | sed -n 1,3p'
run mmcow check vm.acow

title "The base is untouched, and both disks can be told apart"
run sha256sum -c base.sha256
run_failing mmcow compare -f add-cow -F raw vm.acow base.raw

title "Flatten: one plain disk of all layers"
run mmcow convert -p vm.acow flat.raw
run mmcow compare -F raw vm.acow flat.raw
run 'e2fsck -fn flat.raw 2>/dev/null | tail -1; debugfs -R "stats -h" flat.raw 2>/dev/null | grep "volume name"'
run 'debugfs -R "ls -p /" flat.raw 2>/dev/null | cut -d/ -f6 | grep . | tail -3'
run 'debugfs -R "cat /LICENSE" flat.raw 2>/dev/null | sed -n 1p'

title "Grow the layer; the base stays as small as it is"
run mmcow resize vm.acow +16M
run 'mmcow info --output=json vm.acow | grep virtual-size'

title "Commit: move a layer into (a copy of) its base"
run 'cp --sparse=always base.raw copy.raw && chmod u+w copy.raw'
run mmcow create -q -b copy.raw -F raw second.acow
run "mmcow io -c 'write -q -P 7 45M 1M' second.acow"
run mmcow commit second.acow
run "mmcow io -r -f raw -c 'read -P 7 45M 1M' copy.raw"

title "Stream: pull the rest of the base in, then detach: what is left is a raw disk"
run_failing mmcow detach vm.acow
run mmcow stream --progress=json vm.acow
run mmcow map --no-picture vm.acow
run mmcow detach vm.acow
run 'ls -ls --block-size=1 vm.acow*'
run mmcow compare -q -f raw -F raw vm.acow.raw flat.raw

title "The base, still"
run sha256sum -c base.sha256
echo
echo "demo: done"
