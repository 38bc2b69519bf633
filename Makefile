# The way in. `make` lists what there is; each goal first makes sure of libtorch (scripts/setup-libtorch: nothing to do
# from the second time on). Everything is built in the release profile into one target directory, so `make lint`,
# `make test` and `make demo` share what they compile.

CARGO ?= cargo
# Greedy decoding of a small model repeats itself; a little chance with a fixed seed tells a better story.
DEMO_ARGS ?= --temperature 0.7 --top-p 0.95 --seed 4 --max-tokens 240
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
ARCH := $(shell uname -m)
DIST := $(TARGET_DIR)/dist

# Kills of the lab's first scenario, and rows of the fault matrix (all if empty).
KILLS ?= 50
ROWS ?=

# How long each fuzz target runs, and which (all if empty).
SECONDS ?= 600
TARGET ?=

.PHONY: help setup demo test sim bench lint doc dist deploy-check lab fuzz

help:
	@echo "make setup   fetch or find libtorch 2.11 (LIBTORCH=/path uses yours, TORCH=cuda keeps the CUDA libraries)"
	@echo "make demo    one router and three expert nodes on this machine tell a story"
	@echo "make test    all tests"
	@echo "make sim     SEEDS=N seeds of the simulation (SEED=K replays one and prints its trace)"
	@echo "make lint    formatting, clippy, documentation, licences"
	@echo "make lab     the fault matrix on a LAN of network namespaces, $(KILLS) kills (KILLS=1000: the record; ROWS=1,7: only these rows; needs Linux and root)"
	@echo "make fuzz    every fuzz target for SECONDS=$(SECONDS) (TARGET=x: only this one; needs cargo-fuzz and a nightly compiler)"
	@echo "make bench   kernels, link and decoding of this machine, as JSON"
	@echo "make doc     API documentation in $(TARGET_DIR)/doc"
	@echo "make dist    moemesh-$(ARCH).tar with libtorch beside the program, and one file without it"
	@echo "make deploy-check  units, container and alerts in deploy/, with the tools that are installed"

setup:
	@scripts/setup-libtorch

demo: setup
	@echo "==> building moemesh (the first time takes minutes)"
	@$(CARGO) build --release -p moemesh
	@$(CARGO) run --quiet --release -p moemesh -- demo $(DEMO_ARGS)

test: setup
	@echo "==> tests (the first time compiles for minutes)"
	$(CARGO) test --release --workspace

# Needs no libtorch. The seeds of `make test` are the first 1500 of these.
SEEDS ?= 20000
sim:
	@MOEMESH_SIM_SEEDS=$(SEEDS) MOEMESH_SIM_SEED=$(SEED) $(CARGO) test --release -p moemesh-tests --no-default-features \
		--test sim -- --nocapture

bench: setup
	@echo "==> building moemesh"
	@$(CARGO) build --release -p moemesh
	$(CARGO) run --quiet --release -p moemesh -- bench kernel --json
	$(CARGO) run --quiet --release -p moemesh -- bench link --json
	$(CARGO) run --quiet --release -p moemesh -- bench decode --json

lint: setup
	@echo "==> formatting"
	@$(CARGO) fmt --all --check
	@echo "==> clippy"
	@$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	@echo "==> clippy without libtorch"
	@$(CARGO) clippy --release -p moemesh --no-default-features -- -D warnings
	@echo "==> documentation"
	@RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --workspace --no-deps
	@echo "==> deliberate mistakes (tests/breakage)"
	@if command -v python3 >/dev/null; then tests/breakage --check; else echo "    skipped: there is no python3"; fi
	@echo "==> licences, sources and advisories (deny.toml)"
	@if ! $(CARGO) deny --version >/dev/null 2>&1; then \
		echo "    skipped: cargo-deny is not installed (cargo install cargo-deny --locked)"; \
	else \
		$(CARGO) deny --log-level error --all-features check bans licenses sources || exit 1; \
		if $(CARGO) deny --log-level off fetch db >/dev/null 2>&1; then \
			$(CARGO) deny --log-level error --all-features check advisories; \
		else echo "    advisories skipped: the advisory database cannot be reached"; fi; \
	fi

# Not part of `make test`: it needs root and takes up to 25 minutes. What it lacks it says before anything is built.
# `make lab SUDO=sudo` builds as you and runs the lab as root; MOEMESH=/path tests that program and builds nothing. It takes
# the program without libtorch, which is what most machines run and starts 0.2 s sooner: loading libtorch takes that long.
lab:
	@$(SUDO) tests/lab/lab --requirements
ifndef MOEMESH
	@echo "==> building moemesh without libtorch"
	@$(CARGO) build --release -p moemesh -p moemesh-tests --no-default-features --bin moemesh --bin liar --bin thief --bin nuisance
endif
	@mkdir -p $(TARGET_DIR)
	@$(SUDO) env MOEMESH=$(or $(MOEMESH),$(TARGET_DIR)/release/moemesh) MOEMESH_ROGUES=$(or $(MOEMESH_ROGUES),$(if $(MOEMESH),,$(TARGET_DIR)/release)) MOEMESH_CACHE=$(MOEMESH_CACHE) \
		tests/lab/lab --kills $(KILLS) $(if $(ROWS),--only $(ROWS)) --json $(TARGET_DIR)/lab.json

# Not part of `make test`, which runs the corpora as plain tests. Builds for minutes the first time: another compiler, and
# everything with sanitizer and coverage.
fuzz:
	@tests/fuzz/run $(SECONDS) $(TARGET)

doc: setup
	$(CARGO) doc --release --workspace --no-deps

# bin/ finds lib/ by the rpath $ORIGIN/../lib that .cargo/config.toml links in. The linker script libtorch.so is for
# linking only. The program without libtorch comes first, so that target/release/moemesh ends as `make demo` has it.
dist: setup
	@rm -rf $(DIST) && mkdir -p $(DIST)/moemesh/bin $(DIST)/moemesh/lib
	@echo "==> building moemesh without libtorch"
	@$(CARGO) build --release -p moemesh --no-default-features
	@cp $(TARGET_DIR)/release/moemesh $(DIST)/moemesh-native-$(ARCH)
	@echo "==> building moemesh"
	@$(CARGO) build --release -p moemesh
	@cp $(TARGET_DIR)/release/moemesh $(DIST)/moemesh/bin/
	@echo "==> packing"
	@for lib in .libtorch/lib/*.so* .libtorch/lib/*.dylib; do \
		case $$lib in *'*'*|*/libtorch_python*|*/libshm*) continue;; esac; \
		if head -c 5 "$$lib" | grep -q INPUT; then continue; fi; \
		cp -L "$$lib" $(DIST)/moemesh/lib/ || exit 1; \
	done
	@cp LICENSE LICENSE-APACHE LICENSE-MIT README.md $(DIST)/moemesh/
	@cp -r deploy docs $(DIST)/moemesh/
	@tar -C $(DIST) -cf $(DIST)/moemesh-$(ARCH).tar moemesh
	@ls -l $(DIST)/moemesh-$(ARCH).tar $(DIST)/moemesh-native-$(ARCH)

deploy-check:
	@deploy/check
