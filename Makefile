# SPDX-License-Identifier: MIT
#
# Every target has one line of help; `make` alone prints them. What was built is noted
# by stamp files, so a target with nothing to do costs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two at a time: files of tests do not disturb each other.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile
STAMPS := $(VENV)/.stamps
APT_BUILD := liburing-dev gcc python3-dev python3-venv
APT_INTEROP := qemu-utils fio xfsprogs e2fsprogs btrfs-progs qemu-system-x86 busybox-static libnbd-bin python3-libnbd nbdkit openssl
SOURCES := $(wildcard csrc/*.c csrc/*.h csrc/*.py)

.DEFAULT_GOAL := help
.PHONY: help build deps-interop test check fix crash fault fuzz soak sanitize interop storage demo bench bench-quick bench-clusters clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "  %-14s %s\n", $$1, $$2}'

# ---- building ---------------------------------------------------------------

build: $(STAMPS)/built ## make .venv with mmcow in it, the C helper compiled

$(STAMPS)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mmcow needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@PYTHON=$(PYTHON) sh csrc/need.sh $(APT_BUILD)
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# pip also brings the tools of `check`; their versions follow pyproject.toml.
$(STAMPS)/built: $(STAMPS)/python pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
	  --config-settings editable_mode=compat # no finder to import: a third of a short command
	@$(BIN)/python -c 'import mmcow._mmc' && touch $@

# Without them those tests are skipped, but CI=true makes that a failure.
deps-interop: ## install the programs that the interop tests compare with
	@sh csrc/need.sh --optional $(APT_INTEROP)
	@sh tests/guest/kernel.sh --optional .cache/guest

# ---- testing ----------------------------------------------------------------

test: build deps-interop ## everything: lint, types, all test tiers in their short form
	$(BIN)/ruff check .
	$(BIN)/mypy
	tests/c/run
	$(PYTEST)
	MMCOW_QUEUE=threads MMCOW_HITS=off $(PYTEST) --ignore tests/sim --ignore tests/guest

check: build ## quick: lint, types and the tests that need neither root nor programs
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not interop and not crash and not fault and not soak and not root"

fix: build ## let the formatters repair what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@! command -v clang-format >/dev/null || clang-format -i $(filter-out csrc/mmc_api.h,$(wildcard csrc/*.[ch] tests/c/*.[ch]))

crash: build ## power cuts in the simulator, the long form
	$(BIN)/python -m tests.sim.crash

fault: build deps-interop ## every storage call failing, in the simulator; kills, full disks and cuts for real: the long form
	$(BIN)/python -m tests.sim.fault
	MMCOW_KILL_SECONDS=600 $(BIN)/python -m pytest tests/fault --timeout 3600

fuzz: build ## damaged images and hostile clients from a random seed, the long form
	$(BIN)/python -m pytest -m hostile --timeout 3600
	$(BIN)/python -m tests.fuzz.nbd

soak: build ## long random runs
	$(BIN)/python -m pytest -m soak --timeout 3600

interop: build deps-interop ## compare with qemu, fio and file system tools
	$(BIN)/python -m pytest -m interop

storage: build deps-interop ## every format on every file system and sector size, all modes (as root)
	MMCOW_STORAGE=all $(BIN)/python -m pytest tests/interop/test_storage_matrix.py

sanitize: build ## the C helper's own tests under ASan, UBSan and TSan
	@tests/c/run sanitize

demo: build ## show what mmcow does, step by step
	bash docs/demo.sh

bench: build deps-interop ## measure beside qemu, fio and nbdkit: bench/results, bench/report.md (half an hour)
	$(BIN)/python -m bench $(BENCH)

bench-quick: build deps-interop ## a few of these in under three minutes: build/bench/report.md
	$(BIN)/python -m bench --quick $(BENCH)

bench-clusters: build ## measure which cluster size add-cow should have by default
	$(BIN)/python -m bench.cluster_size

clean: ## remove all that was built
	rm -rf $(VENV) build dist *.egg-info mmcow/_mmc.c mmcow/_mmc*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
