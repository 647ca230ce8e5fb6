# `make quickstart` trains a first model, `make test` checks everything, `make help` lists the rest.
#
# A program is one translation unit, built by one compiler call. All else that is made goes into build/ and quickstart/.

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
EMULATOR := $(wildcard $(addprefix dev/emu/,* include/*.h include/*/*.h)) llmc/bf16.h llmc/tile_cpu.h
SOURCES  := $(wildcard *.c *.cu llmc/*.h llmc/*.cuh $(addprefix dev/*/*.,c h cu cuh) dev/test/emu/*) \
            $(filter dev/emu/%.h dev/emu/%.cc,$(EMULATOR))

# One short line for each compiler call; V=1 shows the whole.
Q = $(if $(V),,@echo '  $(1) $@' &&)
COMPILE = $(call Q,$(CC)) $(CC) $(CPPFLAGS) $(CFLAGS) $(WARNINGS) -MMD -MP -MF $(BUILD)/$(@F).d -MT $@
# A sub-make with one job per core, unless the user said how many.
SUBMAKE = $(MAKE) --no-print-directory $(if $(findstring -j,$(MAKEFLAGS)),,-j$(JOBS))

.DEFAULT_GOAL := all
MAKEFLAGS += --no-builtin-rules
.SECONDEXPANSION:
.PHONY: all gpu no-gpu tests fuzzers benches test run-tests test-gpu quickstart fuzz bench format check-format \
        cppcheck check-headers check-asan check-races mutations fixtures check-hf clean help FORCE

all: $(PROGRAMS) ## build ./train_gpt_cpu, ./corpus (CC=clang, DNNL=0 for no oneDNN) and, with nvcc, ./train_gpt

$(BIN)/train_gpt_cpu: train_gpt.c
$(BIN)/corpus: dev/data/corpus.c
$(PROGRAMS): $(BUILD)/flags $(BUILD)/version
	$(COMPILE) -DVERSION='"$(VERSION)"' -o $@ $(firstword $(filter %.c,$^)) $(LDFLAGS) $(LDLIBS)

# ----------------------------------------------------------------------------
# the GPU programs, with nvcc: $CUDA_HOME's, PATH's, the toolkit's or a wheel's (NVCC=... says which, NVCC= none)

# A toolkit is one folder, {bin,include,lib64}. Python's wheels are several, nvidia/cu13/{bin,include,lib} and
# nvidia/nccl/{include,lib}, and have libraries under their full names only: libcublasLt.so.13.
WHEELS := $(wildcard $(addsuffix /*,$(shell python3 -c 'import nvidia; print(*nvidia.__path__)' 2>/dev/null)))
ifeq ($(origin NVCC),undefined)
NVCC := $(firstword $(wildcard $(CUDA_HOME:%=%/bin/nvcc)) $(shell command -v nvcc) \
            $(wildcard /usr/local/cuda/bin/nvcc $(WHEELS:%=%/bin/nvcc)))
endif
TOOLKIT := $(patsubst %/bin/nvcc,%,$(realpath $(shell command -v $(or $(NVCC),none))))
# Headers and libraries are those of the first folder that has them.
CUDA_DIRS := $(NCCL_HOME) $(TOOLKIT) $(wildcard $(addsuffix *,$(filter %/nvidia/,$(dir $(TOOLKIT))))) /usr $(WHEELS)
include_of = $(patsubst %/$(1),%,$(firstword $(wildcard $(CUDA_DIRS:%=%/include/$(1)))))
library_of = $(firstword $(wildcard $(foreach d,$(CUDA_DIRS:%=%/lib),$(foreach e,so so.*,\
                 $d64/lib$(1).$e $d/lib$(1).$e $d/*-linux-gnu/lib$(1).$e))))
NCCL      := $(and $(call include_of,nccl.h),$(call library_of,nccl))
INCLUDES  := $(sort $(foreach h,cuda_runtime.h cublasLt.h nvtx3/nvToolsExt.h nccl.h,$(call include_of,$h)))
LIBRARIES := $(foreach l,cudart cublasLt,$(call library_of,$l)) $(NCCL)
NO_GPU    := $(if $(NVCC),$(if $(word 2,$(LIBRARIES)),,no libcudart or libcublasLt for $(NVCC)),no nvcc was found)

# Machine code for A100s, H100s and B200s, and PTX for what comes after. GPU_ARCH=90a: for that one only, faster.
GPU_ARCH ?= 80 90a 100
GENCODE  := $(foreach a,$(GPU_ARCH),-gencode arch=compute_$a,code=sm_$a)
ifeq ($(origin GPU_ARCH),file)
GENCODE  += -gencode arch=compute_100,code=compute_100
endif
# No -march=native: it is built on one machine of a cluster and runs on others.
NVCCFLAGS := -std=c++17 -O3 -lineinfo --threads 0 -cudart none $(GENCODE) -Werror all-warnings \
    -Xcompiler -fopenmp,-Wall,-Wextra,-Werror -I. $(if $(NCCL),-DUSE_NCCL) \
    $(patsubst %,-isystem %,$(filter-out /usr/include $(TOOLKIT)/include,$(INCLUDES)))
GPU_LIBS  := $(foreach d,$(sort $(dir $(LIBRARIES))),-L$d -Xlinker -rpath=$(d:%/=%)) \
             $(addprefix -l:,$(notdir $(LIBRARIES))) -Xlinker --as-needed $(LDLIBS)
FP32      = $(if $(findstring _fp32,$(@F)),-DPRECISION_FP32)

GPU_PROGRAMS := $(addprefix $(BIN)/,train_gpt train_gpt_fp32)
GPU_TESTS    := $(addprefix $(BIN)/,test_gpt2 test_gpt2_fp32)
GPU_BENCH    := $(BUILD)/bench/bench_gpu
GPU          := $(GPU_PROGRAMS) $(GPU_TESTS) $(GPU_BENCH)
gpu: $(if $(NO_GPU),no-gpu,$(GPU)) ## build all that runs on a GPU, tests and benchmarks too (GPU_ARCH=90a: faster)
all: $(if $(NO_GPU),no-gpu,$(GPU_PROGRAMS))
no-gpu:
	@echo '  not built: train_gpt, train_gpt_fp32: $(NO_GPU)'
$(GPU_PROGRAMS) $(GPU_TESTS): $(BIN)/%: $$(subst _fp32,,$$*).cu
$(GPU_BENCH): dev/bench/bench_gpu.cu | $(BUILD)/bench
$(GPU): $(BUILD)/gpu_flags
	$(if $(NO_GPU),@echo '$@ cannot be built: $(NO_GPU)' >&2; exit 69)
	$(if $(NCCL),,@echo '  $@ is built without NCCL: no nccl.h was found, or no libnccl (NCCL_HOME=... says where)')
	$(call Q,nvcc) $(NVCC) $(NVCCFLAGS) $(FP32) -DVERSION='"$(VERSION)"' -MMD -MP -MF $(BUILD)/$(@F).d -MT $@ \
	    -o $@ $(firstword $(filter %.cu,$^)) $(filter %.o,$^) $(GPU_LIBS)

# What test_gpt2 is held against: the CPU reference in fp64 and in fp32.
REFERENCES := $(BUILD)/reference.o $(BUILD)/reference32.o
$(REFERENCES): dev/test/reference.c $(BUILD)/flags
	$(COMPILE) $(if $(findstring 32,$@),,-DREAL=double) -c -o $@ $<
	@objcopy --wildcard -G 'reference*' $@ # both are the same program

# The same programs on the CPU, by dev/emu: fast, under ASan and UBSan, or with every access of a kernel followed.
EMU_fast  := -O2 -march=native
EMU_asan  := -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -Wno-format-truncation
EMU_races := -O1
EMU_FLAGS := -g -fopenmp $(WARNINGS) -DUSE_NCCL
kind      = $(notdir $(@D))
EMULATED  := $(foreach k,fast asan races,$(patsubst $(BIN)/%,$(BUILD)/$k/%_emu,$(GPU_PROGRAMS) $(GPU_TESTS)))
$(EMULATED): $(BUILD)/%_emu: $$(subst _fp32,,$$(*F)).cu $(EMULATOR) $(BUILD)/flags | $$(@D)
	$(call Q,emu) CXX=$(CXX) EMU_CHECK=$(filter races,$(kind)) dev/emu/compile $@ $< $(EMU_$(kind)) $(EMU_FLAGS) \
	    $(FP32) -DVERSION='"$(VERSION)"' $(filter %.o,$^) $(LDFLAGS) $(LDLIBS)
	@sed 's|.*|$@: &\n&:|' $@.emu/files >$(BUILD)/$(kind)_$(@F).d
$(filter %/test_gpt2_emu %/test_gpt2_fp32_emu,$(EMULATED)) $(GPU_TESTS): $(REFERENCES)
$(filter %/train_gpt_emu %/train_gpt_fp32_emu,$(EMULATED)) $(GPU_PROGRAMS): $(BUILD)/version
$(BIN)/train_gpt_emu: $(BUILD)/fast/train_gpt_emu
	@cp $< $@

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

$(addprefix $(BUILD)/,test bench fuzz fast asan races):
	@mkdir -p $@

# These files change only when their text does, and take with them what was built from the old text.
stamp = @mkdir -p $(BUILD); echo '$(1)' | cmp -s - $@ || echo '$(1)' >$@
$(BUILD)/flags: FORCE
	$(call stamp,$(CC) $(CPPFLAGS) $(CFLAGS) $(WARNINGS) $(LDLIBS) $(CXX) $(EMU_FLAGS) $(EMU_fast) $(EMU_asan) $(EMU_races))
$(BUILD)/gpu_flags: FORCE
	$(call stamp,$(NVCC) $(NVCCFLAGS) $(GPU_LIBS))
$(BUILD)/version: FORCE
	$(call stamp,$(VERSION))

-include $(wildcard $(BUILD)/*.d)

# ----------------------------------------------------------------------------
# the two commands of the README: install what is missing, then start make again, which now finds it

test: ## install what tests need, build, run every test; the last line counts them
	@scripts/setup.sh test
	@$(SUBMAKE) run-tests

EMU_TESTS := $(addprefix $(BUILD)/fast/,test_gpt2_emu test_gpt2_fp32_emu)
run-tests: $(PROGRAMS) tests $(BIN)/train_gpt_emu $(EMU_TESTS) ## the same without setup.sh (TESTS="..." for a few)
	@dev/test/run.sh $(or $(TESTS),$(EMU_TESTS) $(E2E) $(UNIT))

test-gpu: $(PROGRAMS) $(GPU_PROGRAMS) $(GPU_TESTS) ## on a GPU: the tests that make test runs on the CPU in its place
	@TEST_JOBS=1 TRAIN_GPT=$(BIN)/train_gpt dev/test/run.sh $(GPU_TESTS) dev/test/e2e_gpu.sh

quickstart: ## text to trained model in a few minutes (TEXT=/your/file/or/folder, QUICK=1 for a short form)
	@scripts/setup.sh build
	@$(SUBMAKE) $(PROGRAMS)
	@scripts/quickstart.sh

# ----------------------------------------------------------------------------
# other checks

FUZZ_SECONDS ?= 30
fuzz: $(FUZZ) ## run every fuzzer for FUZZ_SECONDS=30, two at a time
	@dev/fuzz/run.sh $(FUZZ_SECONDS) $(FUZZ)

bench: $(PROGRAMS) $(BENCH) ## run the benchmarks, one after the other
	@for b in $(BENCH); do $$b || exit 1; done

check-asan check-races: check-%: $(BUILD)/%/test_gpt2_emu $(BUILD)/%/test_gpt2_fp32_emu ## test_gpt2 under every check
	@TEST_SECONDS=3000 dev/test/run.sh $^

mutations: ## do the tests bite? breaks the GPU program in one way after another (dev/test/mutations.txt)
	@dev/test/mutations.sh

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
	rm -rf $(BUILD) $(PROGRAMS) $(GPU_PROGRAMS) $(GPU_TESTS) $(BIN)/train_gpt_emu

help: ## this list
	@grep -hE '^[a-z-]+:.* ## ' $(firstword $(MAKEFILE_LIST)) | \
	    sed -E 's/^([a-z-]+):.* ## (.*)/\1\t\2/' | awk -F'\t' '{ printf "  %-14s %s\n", $$1, $$2 }'
