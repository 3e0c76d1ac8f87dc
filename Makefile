# make demo   the main job, end to end, on a real VM
# make test   all tests, those that boot a guest included
# make check  format, lint, types and the fast tests
# make view-test SEEDS=n   the view of n random guests against what they say when they wake up
# make kernel-test         every kernel that Debian has, from 5.10 to the newest backport
# make staging-test        real packages whose scripts need the live guest: a database that runs
# make powercut-test CUTS=20   power cuts in the middle of a reflection, each followed by a boot
# make libvirt-test        domains of both machines, every compression that libvirt saves with, a user's own daemon
# make cgroup-test         control groups of version 2, in a guest that has them
# make selinux-test        a guest with an SELinux policy: its labels beside those of its own dpkg
# make arm64-test          the applier for arm64, its whole host tier under QEMU's user mode
# make fuzz SECONDS=600    damaged save files, types, symbols and kernel memory, from a fresh seed
# make fidelity PACKAGES="a b" [UPGRADE=1] [INSTALLED="c"] [HELD="d"] [GUEST=trixie]   an update asleep against the same awake
# make bench  time and memory of inspect, beside volatility3 on the same guests; an update asleep, and its resume
#             beside the same in a plain chroot; and the sleeper-bench
# make sleeper-bench       a Debian 11 server with all of its security archive pending: asleep against awake
# make case-test           one twin test for each thing that packages do to a system, and escapes
#
# Each installs what it needs: Debian's packages (as root, or through sudo) and a virtual
# environment in .venv with the versions and hashes of requirements/.
SHELL := /bin/bash
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# The demo and the tests that build a guest work as root.
ROOT := $(if $(SUDO),sudo --preserve-env=CI,)

DEBIAN := qemu-system-x86 qemu-system-common qemu-utils mmdebstrap libfuse3-dev libext2fs-dev fuse3 e2fsprogs fdisk \
          xfsprogs btrfs-progs uidmap mtools dosfstools apt-utils attr acl libcap2-bin util-linux \
          python3-venv gcc libc6-dev musl-tools make binutils zstd lzop liblzo2-2 libsnappy1v5 \
          libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients python3-libvirt openssh-client
PYTHON := python3
BIN := .venv/bin
APPLIER := src/ouassister/reflect/bin/applier-x86_64
EXT4_VIEW := src/ouassister/disk/bin/ext4-view-x86_64
BUILT := $(APPLIER) $(EXT4_VIEW)

# Tests run so many files side by side: a guest takes a processor and a half.
SIDE := 2

demo: .venv/ready $(BUILT)
	$(ROOT) $(BIN)/ouassister demo

test: .venv/ready $(BUILT) guest-tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(ROOT) $(BIN)/python -m pytest -p no:cacheprovider -m "" -n $(SIDE) --dist loadfile --durations=25 \
	    $(PYTEST)

check: .venv/ready $(BUILT)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

SEEDS := 20
RELEASES := bookworm bullseye trixie
view-test: .venv/ready
	$(ROOT) env VIEW_SEEDS=$(SEEDS) VIEW_RELEASES="$(RELEASES)" \
	    $(BIN)/python -m pytest -p no:cacheprovider -m "" -v --durations=0 tests/view $(PYTEST)

kernel-test: .venv/ready
	$(ROOT) env OUASSISTER_KERNELS=all \
	    $(BIN)/python -m pytest -p no:cacheprovider -m "" -v tests/vm/test_kernels.py $(PYTEST)

staging-test: .venv/ready $(BUILT)
	$(ROOT) env OUASSISTER_STAGING=1 \
	    $(BIN)/python -m pytest -p no:cacheprovider -m "" -v -s tests/vm/test_staging_real.py $(PYTEST)

CUTS := 20
powercut-test: .venv/ready $(BUILT)
	$(ROOT) env OUASSISTER_CUTS=$(CUTS) \
	    $(BIN)/python -m pytest -p no:cacheprovider -m "" -v --durations=0 tests/vm/test_powercut.py $(PYTEST)

libvirt-test: .venv/ready $(BUILT)
	$(ROOT) env OUASSISTER_LIBVIRT=all \
	    $(BIN)/python -m pytest -p no:cacheprovider -m "" -v tests/vm/test_libvirt.py $(PYTEST)

cgroup-test: .venv/ready
	$(ROOT) env OUASSISTER_CGROUP_TEST=1 \
	    $(BIN)/python -m pytest -p no:cacheprovider -m "" -v tests/vm/test_cgroup_version_2.py $(PYTEST)

selinux-test: .venv/ready $(BUILT)
	$(ROOT) env OUASSISTER_SELINUX=1 \
	    $(BIN)/python -m pytest -p no:cacheprovider -m "" -v tests/vm/test_selinux.py $(PYTEST)

GUEST := bookworm
fidelity: .venv/ready $(BUILT)
	$(ROOT) $(BIN)/python -m tests.fidelity --guest $(GUEST) $(if $(UPGRADE),--upgrade) \
	    $(if $(INSTALLED),--installed "$(INSTALLED)") $(if $(HELD),--held "$(HELD)") $(PACKAGES)

case-test: .venv/ready $(BUILT)
	$(ROOT) env OUASSISTER_CASES=all \
	    $(BIN)/python -m pytest -p no:cacheprovider -m "" -v --durations=0 tests/cases $(PYTEST)

SECONDS := 60
fuzz: .venv/ready
	$(ROOT) env FUZZ_SECONDS=$(SECONDS) FUZZ_SEED=$${FUZZ_SEED:-$$(date +%s)} \
	    $(BIN)/python -m pytest -p no:cacheprovider -m "" -s tests/fuzz $(PYTEST)

# volatility3 has a licence of its own: a virtual environment of the bench alone.
bench: .venv/ready $(BUILT) build/bench-venv/ready
	missed=0; for bench in inspect offline online sleeper; do \
	    $(ROOT) $(BIN)/python -m bench.$${bench}_bench build/bench.json || missed=1; \
	done; exit $$missed

sleeper-bench: .venv/ready $(BUILT)
	$(ROOT) $(BIN)/python -m bench.sleeper_bench build/bench.json $(SLEEPER)

build/bench-venv/ready: build/deps bench/requirements.txt
	$(PYTHON) -m venv build/bench-venv
	build/bench-venv/bin/python -m pip install -q --require-hashes -r bench/requirements.txt
	@touch $@

applier: $(BUILT)

$(APPLIER): build/deps $(wildcard guest/*.c guest/*.h guest/Makefile)
	$(MAKE) -C guest all
	install -D -m 755 build/guest/stub-x86_64 $(@D)/stub-x86_64
	install -D -m 755 build/guest/port-x86_64 $(@D)/port-x86_64
	install -D -m 755 build/guest/applier-x86_64 $@

$(EXT4_VIEW): build/deps $(wildcard ext4/*.c ext4/*.h ext4/Makefile)
	$(MAKE) -C ext4 all
	install -D -m 755 build/ext4/ext4-view $@

# For guests of arm64, which nothing reads yet: built and tested where a cross compiler is. QEMU's user
# mode has no RNDADDENTROPY, and a script stands before each program: two tests are for x86-64 alone.
applier-arm64: $(BUILT) build/deps-arm64
	$(MAKE) -C guest arm64
	install -D -m 755 build/guest/stub-aarch64 $(dir $(APPLIER))/stub-aarch64
	install -D -m 755 build/guest/applier-aarch64 $(dir $(APPLIER))/applier-aarch64

arm64-test: .venv/ready applier-arm64
	$(ROOT) env OUASSISTER_ARCH=aarch64 $(BIN)/python -m pytest -q -p no:cacheprovider -m "" \
	    tests/host/test_applier*.py -k "not random_numbers_are_seeded and not has_no_faults" $(PYTEST)

guest-tests: build/deps
	$(MAKE) -C guest tests
	$(MAKE) -C ext4 tests

deps: build/deps

build/deps-arm64: WANTED = gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static
build/deps: WANTED = $(DEBIAN)
build/deps build/deps-arm64: Makefile
	@missing=; for package in $(WANTED); do \
	    dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q ' installed$$' \
	        || missing="$$missing $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
	    $(SUDO) apt-get update -q && \
	    DEBIAN_FRONTEND=noninteractive \
	    $(SUDO) apt-get install -y -q --no-install-recommends $$missing; \
	fi
	@mkdir -p build && touch $@

.venv/ready: build/deps pyproject.toml requirements/dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	# As pip does for what it copies: else the first update compiles our modules while it is timed.
	$(BIN)/python -m compileall -q src
	@touch $@

# New versions: edit pyproject.toml, then this; the files carry hashes and no index.
lock:
	$(PYTHON) -m venv build/lock && build/lock/bin/pip install -q pip-tools
	build/lock/bin/pip-compile -q --strip-extras --generate-hashes --allow-unsafe \
	    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header \
	    --extra dev -o requirements/dev.txt pyproject.toml
	build/lock/bin/pip-compile -q --strip-extras --generate-hashes --no-emit-index-url \
	    --no-emit-find-links --no-emit-trusted-host --no-header \
	    -o requirements/runtime.txt pyproject.toml

clean:
	rm -rf --one-file-system build .venv $(BUILT)

.PHONY: demo test check view-test kernel-test staging-test selinux-test powercut-test libvirt-test case-test cgroup-test fidelity fuzz bench sleeper-bench applier guest-tests applier-arm64 arm64-test \
        deps lock clean
