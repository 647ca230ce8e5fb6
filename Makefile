# `make quickstart` trains a first model, `make test` checks everything, `make help` lists the rest.
#
# Each program is one translation unit, so a build is one compiler call; there are no object files.
# Everything made goes into build/, except the two programs themselves and quickstart/.

ifeq ($(origin CC),default)
CC := gcc
endif
BIN   ?= .
BUILD ?= build
JOBS  ?= $(shell nproc 2>/dev/null || echo 2)

# -O3 -march=native      the reference is vectorised by the compiler alone: build it where it runs
# -fopenmp               threads; the order of every reduction is ours, never the runtime's
# -fno-math-errno        sqrtf and friends need not set errno, which nobody reads
# -fno-trapping-math     no one looks at floating-point exception flags, so branches may become selects
# -mprefer-vector-width  512 bits where the machine has them; compilers default to 256, at which everything
#                        but matmul took 1.16 of the time (bench_layers, Zen 5, gcc 12.2, 2026-11-21)
# No fast-math: a sum keeps the order in which it is written.
CFLAGS   := -std=gnu11 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -g
WARNINGS := -Wall -Wextra -Werror
CPPFLAGS := -I.
LDLIBS   := -lcjson -lxxhash -lpcre2-8 -lz -lzstd -lpthread -lm
# Only the libraries that a program really uses are loaded when it starts.
LDFLAGS  := -Wl,--as-needed

# What this machine has. `make test` and `make quickstart` ask again after setup.sh has installed things.
has_header = $(shell $(CC) -E -include $(1) -x c /dev/null >/dev/null 2>&1 && echo 1 || echo 0)
has_macro  = $(shell $(CC) -march=native -dM -E -x c /dev/null 2>/dev/null | grep -c '$(1) ')
ifneq ($(call has_macro,__AVX512F__),0)
CFLAGS += -mprefer-vector-width=512
endif
# oneDNN's matmul where it is installed, else plain C, the same within rounding; DNNL=0 forces that.
DNNL ?= $(call has_header,dnnl.h)
ifeq ($(DNNL),1)
CPPFLAGS += -DUSE_DNNL
LDLIBS   += -ldnnl
endif

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

PROGRAMS := $(BIN)/train_gpt_cpu $(BIN)/corpus
UNIT     := $(patsubst dev/test/%.c,$(BUILD)/test/%,$(wildcard dev/test/test_*.c))
# Programs that the end-to-end tests run.
DRIVERS  := $(patsubst dev/test/%.c,$(BUILD)/test/%,$(filter-out dev/test/test_% dev/test/reference.c,$(wildcard dev/test/*.c)))
E2E      := $(wildcard dev/test/e2e_*.sh)
BENCH    := $(patsubst dev/bench/%.c,$(BUILD)/bench/%,$(wildcard dev/bench/bench_*.c))
FUZZ     := $(patsubst dev/fuzz/%.c,$(BUILD)/fuzz/%,$(wildcard dev/fuzz/fuzz_*.c))
HEADERS  := $(wildcard llmc/*.h)
SOURCES  := $(wildcard *.c llmc/*.h dev/*/*.c dev/*/*.h)

# One short line for each compiler call; V=1 shows the whole.
Q = $(if $(V),,@echo '  $(1) $@' &&)
COMPILE = $(call Q,$(CC)) $(CC) $(CPPFLAGS) $(CFLAGS) $(WARNINGS) -MMD -MP -MF $(BUILD)/$(@F).d -MT $@
# A sub-make with one job per core, unless the user said how many.
SUBMAKE = $(MAKE) --no-print-directory $(if $(findstring -j,$(MAKEFLAGS)),,-j$(JOBS))

.DEFAULT_GOAL := all
.PHONY: all tests fuzzers benches test run-tests quickstart fuzz bench format check-format cppcheck \
        check-headers fixtures check-hf clean help FORCE

all: $(PROGRAMS) ## build ./train_gpt_cpu and ./corpus (CC=gcc or clang, DNNL=0 for no oneDNN)

# ----------------------------------------------------------------------------
# programs

$(BIN)/train_gpt_cpu: train_gpt.c $(BUILD)/flags $(BUILD)/version
	$(COMPILE) -DVERSION='"$(VERSION)"' -o $@ $< $(LDFLAGS) $(LDLIBS)

$(BIN)/corpus: dev/data/corpus.c $(BUILD)/flags $(BUILD)/version
	$(COMPILE) -DVERSION='"$(VERSION)"' -o $@ $< $(LDFLAGS) $(LDLIBS)

tests: $(UNIT) $(DRIVERS) ## build the unit tests
$(BUILD)/test/%: dev/test/%.c $(BUILD)/flags | $(BUILD)/test
	$(COMPILE) -o $@ $< $(LDFLAGS) -lcmocka $(LDLIBS)

benches: $(BENCH) ## build the benchmarks
$(BUILD)/bench/%: dev/bench/%.c $(BUILD)/flags | $(BUILD)/bench
	$(COMPILE) -o $@ $< $(LDFLAGS) $(LDLIBS)

# Fuzzers are always clang's, with every check on and plain code, whatever builds the rest.
FUZZ_FLAGS := -std=gnu11 -O1 -g -fopenmp -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined
fuzzers: $(FUZZ) ## build the fuzzers (needs clang)
$(BUILD)/fuzz/%: dev/fuzz/%.c | $(BUILD)/fuzz
	$(call Q,clang) clang -I. $(FUZZ_FLAGS) $(WARNINGS) -MMD -MP -MF $(BUILD)/$(@F).d -MT $@ -o $@ $< \
	    $(LDFLAGS) $(filter-out -ldnnl,$(LDLIBS))

$(BUILD) $(BUILD)/test $(BUILD)/bench $(BUILD)/fuzz:
	@mkdir -p $@

# These two files change only when their text does, and take with them what was built from the old text.
stamp = @mkdir -p $(BUILD); echo '$(1)' | cmp -s - $@ || echo '$(1)' >$@
$(BUILD)/flags: FORCE
	$(call stamp,$(CC) $(CPPFLAGS) $(CFLAGS) $(WARNINGS) $(LDLIBS))
$(BUILD)/version: FORCE
	$(call stamp,$(VERSION))

-include $(wildcard $(BUILD)/*.d)

# ----------------------------------------------------------------------------
# the two commands of the README: install what is missing, then start make again, which now finds it

test: ## install what tests need, build, run every test; the last line counts them
	@scripts/setup.sh test
	@$(SUBMAKE) run-tests

run-tests: $(PROGRAMS) tests ## the same without looking at what is installed (TESTS="..." for a few)
	@dev/test/run.sh $(or $(TESTS),$(UNIT) $(E2E))

quickstart: ## text to trained model in a few minutes (TEXT=/your/file/or/folder, QUICK=1 for a short form)
	@scripts/setup.sh build
	@$(SUBMAKE) all
	@scripts/quickstart.sh

# ----------------------------------------------------------------------------
# other checks

FUZZ_SECONDS ?= 30
fuzz: $(FUZZ) ## run every fuzzer for FUZZ_SECONDS=30, two at a time
	@dev/fuzz/run.sh $(FUZZ_SECONDS) $(FUZZ)

bench: $(PROGRAMS) $(BENCH) ## run the benchmarks, one after the other
	@for b in $(BENCH); do $$b || exit 1; done

format: ## clang-format every C file in place
	clang-format -i $(SOURCES)

check-format: ## fail if clang-format would change a file
	@clang-format --dry-run -Werror $(SOURCES)

# Without -U and -D it would check every combination of macros. The field tables cast bytes on purpose.
cppcheck: ## static analysis of the two programs and all headers they include
	@cppcheck --quiet --std=c11 --language=c --enable=warning,performance,portability --inline-suppr \
	    --suppress=missingIncludeSystem --suppress=invalidPointerCast --error-exitcode=1 -j $(JOBS) -I. \
	    -UTESTING -DUSE_DNNL '-DVERSION=""' train_gpt.c dev/data/corpus.c

check-headers: $(HEADERS:%=$(BUILD)/check/%) ## each header compiles alone, as C11 and as C++17
$(BUILD)/check/%: % FORCE
	$(call Q,$(CC)) $(CC) $(CPPFLAGS) -std=gnu11 $(WARNINGS) -fopenmp -fsyntax-only -include $< -x c /dev/null
	@$(CXX) $(CPPFLAGS) -std=gnu++17 $(WARNINGS) -fopenmp -fsyntax-only -include $< -x c++ /dev/null

# ----------------------------------------------------------------------------
# the independent implementation: PyTorch and numpy from Debian, the rest from dev/test/requirements.txt

PYTHON := $(BUILD)/venv/bin/python
$(PYTHON): dev/test/requirements.txt
	@scripts/setup.sh hf
	/usr/bin/python3 -m venv --clear --system-site-packages $(BUILD)/venv
	$(PYTHON) -m pip install --quiet -r $< || { rm -rf $(BUILD)/venv; exit 1; }
	@touch $@

fixtures: $(PYTHON) ## make dev/test/fixtures again with PyTorch and transformers
	$(PYTHON) dev/test/make_fixtures.py

check-hf: $(PROGRAMS) $(BUILD)/test/write_logits $(PYTHON) ## train tiny models, open them with transformers
	@PYTHON=$(PYTHON) dev/test/check_hf.sh

# ----------------------------------------------------------------------------

clean: ## remove what was built (quickstart/ stays)
	rm -rf $(BUILD) $(PROGRAMS)

help: ## this list
	@grep -hE '^[a-z-]+:.* ## ' $(firstword $(MAKEFILE_LIST)) | \
	    sed -E 's/^([a-z-]+):.* ## (.*)/\1\t\2/' | awk -F'\t' '{ printf "  %-14s %s\n", $$1, $$2 }'
