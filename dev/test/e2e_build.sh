#!/usr/bin/env bash
# The Makefile's GPU part, on a program of a few lines in a tree of its own: which nvcc, which libraries in which
# layout, for which GPUs, what is said where something is missing, and what a change rebuilds. Stand-ins for nvcc
# write down how they were called; where there is a real one, it compiles and links, too.
set -u
. "$(dirname "$0")/tap.sh"
tree=$work/tree
mkdir -p "$tree/dev" "$tree/llmc" "$tree/scripts"
cp Makefile "$tree" && cp llmc/*.h "$tree/llmc" && cp -r dev/emu "$tree/dev"
real_nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
[ -x "$real_nvcc" ] || real_nvcc=$(command -v nvcc || true)
unset CUDA_HOME NCCL_HOME NVCC GPU_ARCH PYTHONPATH MAKEFLAGS MAKEOVERRIDES MFLAGS

echo 'static const int answer = 41;' >"$tree/llmc/answer.cuh"
cat >"$tree/train_gpt.cu" <<'CUDA'
#include <cublasLt.h>
#include <stdio.h>

#include "llmc/answer.cuh"

#ifdef USE_NCCL
#include <nccl.h>
#endif

static __global__ void add(int* sum, int a) {
    __shared__ int tile[32];
    tile[threadIdx.x] = a;
    __syncthreads();
    if (threadIdx.x == 0) *sum = tile[31] + 1;
}

int main() {
    int *sum, result = 0, libraries = cublasLtGetVersion() > 0;
#ifdef USE_NCCL
    int nccl = 0;
    libraries += ncclGetVersion(&nccl) == ncclSuccess;
#endif
    if (cudaMalloc(&sum, sizeof *sum) == cudaSuccess) {
        add<<<1, 32>>>(sum, answer);
        cudaMemcpy(&result, sum, sizeof result, cudaMemcpyDeviceToHost);
        cudaFree(sum);
    }
    printf("%s: %zu bytes a number, %d libraries, answer %d\n", VERSION, sizeof(REAL), libraries, result);
    return 0;
}
CUDA
sed -i '1i #ifdef PRECISION_FP32\n#define REAL float\n#else\n#define REAL short\n#endif' "$tree/train_gpt.cu"

# install ROOT LIB FILE...: a CUDA of empty files, and an nvcc that says where it is and how it was called
install() {
    local root=$1
    mkdir -p "$root/bin" "$root/include/nvtx3" "$root/$2"
    touch "$root"/include/{cuda_runtime.h,cublasLt.h,nvtx3/nvToolsExt.h} "${@:3}"
    cat >"$root/bin/nvcc" <<'NVCC'
#!/usr/bin/env bash
echo "$0 $*" >>"$NVCC_LOG"
while [ $# -gt 0 ]; do
    [ "$1" != -o ] || touch "$2"
    [ "$1" != -MF ] || echo 'train_gpt: llmc/answer.cuh' >"$2"
    shift
done
NVCC
    chmod +x "$root/bin/nvcc"
}
export NVCC_LOG=$work/calls
toolkit=$work/cuda wheels=$work/site/nvidia
install "$toolkit" lib64 "$toolkit"/lib64/lib{cudart,cublasLt}.so{,.13}
install "$wheels/cu13" lib "$wheels"/cu13/lib/lib{cudart,cublasLt}.so.13
mkdir -p "$wheels"/nccl/{include,lib}
touch "$wheels/nccl/include/nccl.h" "$wheels/nccl/lib/libnccl.so.2"

makes() {
    (cd "$tree" && make -s "$@") >"$work/out" 2>&1 && return
    cat "$work/out"
    return 1
}
built() { # make's arguments: builds anew; then the stand-in's command line is in $work/calls
    rm -rf "$tree/build" "$tree/train_gpt" "$NVCC_LOG"
    makes "$@" && [ -s "$NVCC_LOG" ]
}
called() { # TEXT...: each was on nvcc's command line
    local text
    for text in "$@"; do
        grep -qF -- "$text" "$NVCC_LOG" || { echo "nvcc's command line lacks: $text" && cat "$NVCC_LOG" && return 1; }
    done
}
not_called() { ! grep -F -- "$1" "$NVCC_LOG"; }
says() { grep -F -- "$1" "$work/out" || { cat "$work/out" && return 1; }; }
fails_with() { # 'TEXT' make's arguments
    makes "${@:2}" && echo "make succeeded" && return 1
    says "$1"
}

touch "$toolkit/lib64/libnccl.so" # no header: not to be used
check "a toolkit: CUDA_HOME's nvcc is called" built CUDA_HOME="$toolkit" train_gpt
check "and its libraries, with a path to them in the program" called "$toolkit/bin/nvcc" "-L$toolkit/lib64/" \
    "-rpath=$toolkit/lib64 " -l:libcudart.so -l:libcublasLt.so
check "machine code for three generations, and PTX" called arch=compute_80,code=sm_80 arch=compute_90a,code=sm_90a \
    arch=compute_100,code=sm_100 arch=compute_100,code=compute_100
check "no fast-math, and every warning an error" called "-Werror all-warnings" "-Wall,-Wextra,-Werror"
check "really none" not_called fast
check "nothing is compiled twice" eval 'rm "$NVCC_LOG"; makes CUDA_HOME="$toolkit" train_gpt; [ ! -e "$NVCC_LOG" ]'
check "until a header changes" eval 'touch "$tree/llmc/answer.cuh"; makes CUDA_HOME="$toolkit" train_gpt; [ -e "$NVCC_LOG" ]'
check "GPU_ARCH=90a" built CUDA_HOME="$toolkit" GPU_ARCH=90a train_gpt
check "is that one only" eval 'called sm_90a && not_called compute_100'
if [ -e /usr/include/nccl.h ] || python3 -c 'import nvidia' 2>/dev/null; then
    skip_test "without NCCL" "NCCL may be installed for every nvcc"
else
    check "without NCCL, that is said" says "without NCCL"
    check "and it is not asked for" not_called NCCL
fi
rm "$toolkit/lib64/libnccl.so"
check "NCCL_HOME" built CUDA_HOME="$toolkit" NCCL_HOME="$wheels/nccl" train_gpt
check "is where NCCL is found" called -DUSE_NCCL -l:libnccl.so.2 "-isystem $wheels/nccl/include" "-rpath=$wheels/nccl/lib"
PYTHONPATH=$work/site check "a toolkit without NCCL, and a wheel with it" built CUDA_HOME="$toolkit" train_gpt
check "belong together" called "$toolkit/bin/nvcc" -l:libcublasLt.so -l:libnccl.so.2
check "but no other header or library of the wheels" not_called "$wheels/cu13"
check "wheels only" built CUDA_HOME="$wheels/cu13" train_gpt_fp32
check "have their libraries under full names, in two places" called "$wheels/cu13/bin/nvcc" -l:libcudart.so.13 \
    -l:libcublasLt.so.13 -l:libnccl.so.2 "-rpath=$wheels/cu13/lib" "-rpath=$wheels/nccl/lib" -DPRECISION_FP32

check "without nvcc train_gpt is an error that says so" fails_with "train_gpt cannot be built: no nvcc" NVCC= train_gpt
check "and otherwise a line" eval 'makes NVCC= no-gpu && says "not built: train_gpt, train_gpt_fp32: no nvcc"'
rm "$toolkit"/lib64/libcublasLt*
if compgen -G '/usr/lib*/libcublasLt.so*' >/dev/null || compgen -G '/usr/lib/*-linux-gnu/libcublasLt.so*' >/dev/null ||
    python3 -c 'import nvidia' 2>/dev/null; then
    skip_test "nvcc without cuBLASLt" "cuBLASLt is installed for every nvcc"
else
    check "nvcc without cuBLASLt is no error of the compiler's" fails_with "no libcudart or libcublasLt" \
        CUDA_HOME="$toolkit" train_gpt
fi

# the emulator's build, for real
runs() { # PROGRAM 'TEXT'
    (cd "$tree" && "$1") >"$work/out" 2>&1
    grep -qF -- "$2" "$work/out" || { cat "$work/out" && return 1; }
}
rm -rf "$tree/build"
for kind in fast asan races; do
    check "the emulated program, $kind" makes build/$kind/train_gpt_emu
    check "computes, $kind" runs build/$kind/train_gpt_emu "2 bytes a number, 2 libraries, answer 42"
done
check "in fp32, too" makes build/fast/train_gpt_fp32_emu
check "which is another type" runs build/fast/train_gpt_fp32_emu "4 bytes a number"
cp -p "$tree/build/fast/train_gpt_emu" "$work/before"
check "nothing is built twice" eval 'makes build/fast/train_gpt_emu && [ ! "$tree/build/fast/train_gpt_emu" -nt "$work/before" ]'
sed -i 's/41/11/' "$tree/llmc/answer.cuh"
check "a changed header is" makes build/fast/train_gpt_emu
check "seen" runs build/fast/train_gpt_emu "answer 12"
echo 'static void f() { int unused; }' >>"$tree/train_gpt.cu"
check "a warning is an error" fails_with unused build/fast/train_gpt_emu
sed -i '$d' "$tree/train_gpt.cu"

# the compiler that is here, for real
if [ -x "$real_nvcc" ]; then
    root=$(dirname "$(dirname "$real_nvcc")")
    check "nvcc builds train_gpt" makes CUDA_HOME="$root" train_gpt
    check "which finds its libraries" env -u LD_LIBRARY_PATH "$tree/train_gpt"
    check "and train_gpt_fp32, for one GPU" makes CUDA_HOME="$root" GPU_ARCH=80 train_gpt_fp32
    check "which computes in fp32" runs ./train_gpt_fp32 "4 bytes a number"
    echo 'static void f() { int unused; }' >>"$tree/train_gpt.cu"
    check "a warning is an error of nvcc, too" fails_with unused CUDA_HOME="$root" train_gpt
else
    skip_test "nvcc builds train_gpt" "there is no nvcc here"
fi
finish
