#!/usr/bin/env bash
# Tests of the instrument: the emulator must find one planted bug of every kind, must not report kernels that
# are right, and must behave as CUDA's runtime does (dev/doc/emu.md).
set -u
. "$(dirname "$0")/tap.sh"
export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=halt_on_error=1
warnings=(-O1 -g -fopenmp -Wall -Wextra -Werror)

# build KIND PROGRAM: plain; asan: AddressSanitizer; check: every load and store is followed
build() {
    local flags=("${warnings[@]}") check=
    if [ "$1" = asan ]; then flags+=(-fsanitize=address,undefined); fi
    if [ "$1" = check ]; then check=1; fi
    EMU_CHECK=$check dev/emu/compile "$work/$2.$1" "dev/test/emu/$2.cu" "${flags[@]}"
}
for kind in plain asan check; do
    check "the planted bugs compile ($kind)" build $kind planted
    check "the kernels without bugs compile ($kind)" build $kind clean
done
if command -v clang++ >/dev/null; then
    check "clang++ compiles them, too" env CXX=clang++ dev/emu/compile "$work/clean.clang" dev/test/emu/clean.cu "${warnings[@]}"
    check "clang++'s program is right" "$work/clean.clang"
else
    skip_test "clang++ compiles them, too" "no clang++"
fi

# found KIND BUG 'regular expression': is stopped and says why, or gives a wrong result that a test would see;
# the repaired twin runs through, in drawn orders as well
found() {
    local program=$work/planted.$1 bug=$2 text=$3 seed
    if "$program" "$bug" >"$work/out" 2>&1; then
        echo "$bug was not found"
        return 1
    fi
    grep -qE -- "$text" "$work/out" || { cat "$work/out" && return 1; }
    for seed in 0 1 2 3; do
        EMU_SEED=$seed "$program" "$bug" fixed || return 1
    done
}
expect() { check "$1 build: $2 ($3)" found "$1" "$2" "$3"; }

for kind in plain check; do
    expect $kind barrier_exit 'divergent barrier.*planted.cu:16'
    expect $kind barrier_branch 'divergent barriers: at .*planted.cu:24.*planted.cu:22'
    expect $kind barrier_count 'divergent barrier'
    expect $kind barrier_and_warp 'wait for ever'
    expect $kind shuffle_mask 'mask 0xffffffff .* with mask 0x55555557'
    expect $kind shuffle_outside 'lacks the calling lane 16'
    expect $kind shuffle_branch 'lanes 0x0000ffff of the warp are at __shfl_down_sync'
    expect $kind no_event_wait 'wrong result'
    expect $kind pinned_too_early 'wrong result'
    expect $kind shared_too_large 'the limit is 49152'
done
expect plain stale_shared 'wrong result'
expect asan global_beyond heap-buffer-overflow
expect asan shared_beyond 'out of bounds|use-after-poison'
expect asan dynamic_beyond use-after-poison
expect asan use_after_free heap-use-after-free
expect check global_beyond 'thread \(63, 0, 0\): writes 4 bytes'
expect check shared_beyond 'outside of the block.s arrays'
expect check dynamic_beyond 'outside of the block.s arrays'
expect check use_after_free 'no live allocation'
expect check unwritten 'no thread of the block has written'
expect check unwritten_by_block 'block \(1, 0, 0\).*no thread of the block has written'
expect check no_barrier 'race|no thread of the block has written'
expect check no_second_barrier 'race.*shared'
expect check no_syncwarp 'race|no thread of the block has written'
expect check half_syncwarp 'race|no thread of the block has written'
expect check shuffle_no_fence 'race: reads shared memory'
expect check two_writers 'race: writes shared memory .* that thread 0 has written'
expect check write_after_reads 'race: writes shared memory .* has read'
expect check last_reader_writes 'race: writes shared memory .* has read'
expect check two_blocks 'race: writes global memory .* that block 0 has written'
expect check block_reads_block 'race: reads global memory .* that block 0 has written'
expect check threads_in_global 'race: .* global memory'
expect check unatomic 'race: .* global memory'
expect check host_reads_device 'the host reads memory of the device'
expect check kernel_reads_host 'reads 4 bytes .* no live allocation'
names_line() { "$work/planted.check" two_writers 2>&1 | grep -qE 'here: .*planted.cu:[0-9]+'; }
check "check build: the report names file and line" names_line

# races are found in whatever order threads run
in_any_order() {
    local bug seed
    for bug in no_barrier no_second_barrier no_syncwarp half_syncwarp two_writers write_after_reads threads_in_global; do
        for seed in 1 2 3 4 5; do
            if EMU_SEED=$seed "$work/planted.check" $bug >/dev/null 2>&1; then
                echo "$bug is not found with EMU_SEED=$seed"
                return 1
            fi
        done
    done
}
check "check build: races are found in drawn orders" in_any_order
stray_stream() { # with a drawn order of streams a missing wait shows for some seed at least
    local seed
    for seed in 1 2 3 4 5 6 7 8; do
        EMU_SEED=$seed "$work/planted.plain" no_event_wait >/dev/null 2>&1 || return 0
    done
    return 1
}
check "a missing event wait is found in drawn orders" stray_stream

for kind in plain asan check; do
    for seed in 0 1 2 3; do
        check "kernels and programs without bugs, $kind build, EMU_SEED=$seed" env EMU_SEED=$seed "$work/clean.$kind"
    done
done

build plain device >/dev/null
machine() { # 'line' SETTING...
    local line=$1
    shift
    env "$@" "$work/device.plain" | tee "$work/out" | grep -qxF -- "$line" || { cat "$work/out" && return 1; }
}
check "the default machine" machine "architecture: 90"
check "EMU_MEMORY: what is free" machine "1 devices, driver 13000, memory 1500000 of 1500000" EMU_MEMORY=1500000
check "EMU_MEMORY: what fits" machine "1 MiB: cudaSuccess" EMU_MEMORY=1500000
check "EMU_MEMORY: what does not" machine "another: cudaErrorMemoryAllocation" EMU_MEMORY=1500000
check "EMU_NO_DRIVER: there is none" machine "count: cudaErrorInsufficientDriver" EMU_NO_DRIVER=1
check "EMU_NO_DRIVER=device: nothing behind the driver" machine "count: cudaErrorNoDevice" EMU_NO_DRIVER=device
check "EMU_ARCH: an old GPU" machine "architecture: 70" EMU_ARCH=70
check "EMU_ARCH: runs no kernels" machine "launch: cudaErrorNoKernelImageForDevice" EMU_ARCH=70

check "cuBLASLt, NCCL and NVTX compile" build asan libraries
check "they refuse what the real ones refuse" "$work/libraries.asan"
stopped() { # BUG: ends with the code of a finding
    "$work/libraries.asan" "$1"
    [ $? -eq 97 ]
}
for bug in beyond host in_place nccl_beyond range_open range_closed; do
    check "misuse of a library is stopped: $bug" stopped $bug
done

build plain conversions >/dev/null
check "bf16, fp16 and fp8 by their definition" "$work/conversions.plain"
nvidias_own() {
    nvcc -std=c++17 -I. -o "$work/conversions.nvcc" dev/test/emu/conversions.cu || return 1
    diff <("$work/conversions.plain") <("$work/conversions.nvcc")
}
if command -v nvcc >/dev/null; then
    check "bf16, fp16 and fp8 as nvcc's headers have them" nvidias_own
else
    skip_test "bf16, fp16 and fp8 as nvcc's headers have them" "no nvcc"
fi
finish
