// The PTX instructions that kernels use, each in a function of its own; beside it, what it does on a CPU.
// Source: NVIDIA, PTX ISA: cp.async, ldmatrix, mma (m16n8k16, .bf16); sm_80 and newer.
//
// A fragment is the part of a small matrix that one lane of a warp holds. With g = lane / 4 and t = lane % 4,
// lane (g, t) holds of the operands of mma_bf16, two neighbours in k to a register:
//
//       A (16 rows, 16 k)           B (16 k, 8 columns)         C (16 rows, 8 columns), float
//         k 2t,2t+1  2t+8,2t+9            column g                       column 2t, 2t+1
//       +----------+----------+         +----------+                   +----------------+
//     g |   a[0]   |   a[2]   |  k 2t,+1|    b0    |                 g |  c[0]    c[1]  |
//       +----------+----------+         +----------+                   +----------------+
//   g+8 |   a[1]   |   a[3]   |  2t+8,+9|    b1    |               g+8 |  c[2]    c[3]  |
//       +----------+----------+         +----------+                   +----------------+
//
// So two neighbouring C's, rounded to bf16 in pairs, are an A: a product goes into the next one without
// leaving the registers.
#pragma once
#include "llmc/cuda_common.cuh" // defines: WARP

// ----------------------------------------------------------------------------
// what only the emulation needs

#ifndef __CUDACC__
// A copy is late: until the wait that covers it, its target holds NaNs.
typedef struct {
    uint32_t* to;
    const uint32_t* from; // NULL: zeros
    int words, group;     // group: how many commits came before it
} EmuCopy;
enum { EMU_MAX_COPIES = 128, EMU_MAX_THREADS = 1024 };
static EmuCopy emu_copies[EMU_MAX_THREADS][EMU_MAX_COPIES];
static int emu_copy_count[EMU_MAX_THREADS], emu_commits[EMU_MAX_THREADS];

static inline void emu_copy_begin(void* to, const void* from, int bytes) {
    int thread = (int)threadIdx.x, n = emu_copy_count[thread]++;
    CHECK(n < EMU_MAX_COPIES && (uintptr_t)to % (size_t)bytes == 0 && (uintptr_t)from % (size_t)bytes == 0);
    EmuCopy copy = {(uint32_t*)to, (const uint32_t*)from, bytes / 4, emu_commits[thread]};
    emu_copies[thread][n] = copy;
    for (int i = 0; i < copy.words; i++) copy.to[i] = 0xFFFFFFFFu;
}

static inline void emu_copy_finish(int groups_left) {
    int thread = (int)threadIdx.x, kept = 0;
    for (int n = 0; n < emu_copy_count[thread]; n++) {
        EmuCopy copy = emu_copies[thread][n];
        if (copy.group >= emu_commits[thread] - groups_left)
            emu_copies[thread][kept++] = copy;
        else
            for (int i = 0; i < copy.words; i++) copy.to[i] = copy.from != NULL ? copy.from[i] : 0;
    }
    emu_copy_count[thread] = kept;
}

static inline void emu_unpack(float out[2], uint32_t pair) {
    out[0] = __uint_as_float(pair << 16), out[1] = __uint_as_float(pair & 0xFFFF0000u);
}
#else
static __device__ inline uint32_t shared_address(const void* p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}
#endif

// ----------------------------------------------------------------------------
// registers

// Two floats as bf16, the first in the low half, as fragments want them.
static __device__ inline uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

// 2^x within 2 ulp; a result below 2^-126 is 0, and so is 2^-infinity.
static __device__ inline float exp2_approx(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
#endif
}

// ----------------------------------------------------------------------------
// tensor cores

// c += A B, rounded to float. Fragments as in the picture above; the whole warp calls.
static __device__ inline void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    struct Operands {
        uint32_t a[4], b[2];
    };
    const Operands* lanes = emu_warp_all(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    int g = (int)threadIdx.x % WARP / 4, t = (int)threadIdx.x % 4;
    float row[2][16], column[2][16]; // rows g and g + 8 of A, columns 2t and 2t + 1 of B
    for (int k = 0; k < 16; k += 2) {
        const Operands& of_a = lanes[g * 4 + k % 8 / 2];
        for (int i = 0; i < 2; i++) {
            emu_unpack(&row[i][k], of_a.a[i + k / 8 * 2]);
            emu_unpack(&column[i][k], lanes[(2 * t + i) * 4 + k % 8 / 2].b[k / 8]);
        }
    }
    for (int i = 0; i < 4; i++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += row[i / 2][k] * column[i % 2][k];
        c[i] += sum;
    }
#endif
}

// Four 8 x 8 matrices of bf16. Lane l names the 16 bytes of row l % 8 of matrix l / 8; d[i] of lane (g, t) is
// of matrix i
//     row g, columns 2t and 2t + 1            (ldmatrix_x4)
//     column g, rows 2t and 2t + 1            (ldmatrix_x4_trans: the fragment of the transposed matrix)
static __device__ inline void ldmatrix_x4(uint32_t d[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    const void* const* rows = emu_warp_all(row);
    int lane = (int)threadIdx.x % WARP;
    for (int i = 0; i < 4; i++) d[i] = ((const uint32_t*)rows[i * 8 + lane / 4])[lane % 4];
#endif
}

static __device__ inline void ldmatrix_x4_trans(uint32_t d[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
    const void* const* rows = emu_warp_all(row);
    int lane = (int)threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        uint32_t low = ((const uint16_t*)rows[i * 8 + 2 * t])[g];
        d[i] = (uint32_t)((const uint16_t*)rows[i * 8 + 2 * t + 1])[g] << 16 | low;
    }
#endif
}

// ----------------------------------------------------------------------------
// asynchronous copies from global to shared memory. A thread's copies since its last commit are a group;
// after cp_async_wait<N> all but its N newest groups are there, for that thread: the others need a barrier as
// well.

// BYTES (4 or 16, both addresses multiples of it) are copied, or set to zero where `from` is not to be read.
template <int BYTES>
static __device__ inline void cp_async_or_zero(void* to, const void* from, bool readable) {
    static_assert(BYTES == 4 || BYTES == 16, "the sizes in use");
#ifdef __CUDACC__
    int bytes = readable ? BYTES : 0;
    if constexpr (BYTES == 16) // past the first-level cache: nothing is read twice by one block
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :
                     : "r"(shared_address(to)), "l"(from), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                     :
                     : "r"(shared_address(to)), "l"(from), "r"(bytes)
                     : "memory");
#else
    emu_copy_begin(to, readable ? from : NULL, BYTES);
#endif
}

static __device__ inline void cp_async_commit(void) {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emu_commits[threadIdx.x]++;
#endif
}

template <int N> static __device__ inline void cp_async_wait(void) {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
    emu_copy_finish(N);
#endif
}
