// A hash of memory on the device, to compare what replicas hold (guard.check_every). Each 8 bytes are mixed with their
// place by a bijection, and what comes out is added up: so the order does not matter, and two memories that differ in
// any bits of one word never have the same hash. It is not for adversaries.
//
// Bytes read: those that are hashed, once; weights in bf16 are 2 of the 32 bytes that the update moves a parameter
// (adamw.cuh), and with ZeRO 0 the rest of the master and the moments are 10 more.
#pragma once
#include "llmc/cuda_common.cuh" // defines: LAUNCH_CHECK, block_sum, ceil_div

enum { HASH_THREADS = 256, HASH_BLOCKS = 1024 };

// Shifted copies and odd factors: each can be undone. Kind of function: Appleby's MurmurHash3, its last step.
static __device__ inline unsigned long long mix64(unsigned long long x) {
    x ^= x >> 33, x *= 0xC2B2AE3D27D4EB4Full;
    x ^= x >> 29, x *= 0x9E3779B185EBCA87ull;
    return x ^ x >> 32;
}

static __global__ void __launch_bounds__(HASH_THREADS)
    hash_kernel(unsigned long long* hash, const unsigned long long* words, size_t n,
                unsigned long long salt) {
    unsigned long long mine = 0;
    size_t step = (size_t)gridDim.x * HASH_THREADS;
    for (size_t i = (size_t)blockIdx.x * HASH_THREADS + threadIdx.x; i < n; i += step)
        mine += mix64(words[i] ^ mix64(salt + i));
    mine = block_sum<HASH_THREADS>(mine);
    if (threadIdx.x == 0) atomicAdd(hash, mine);
}

// *hash += that of memory (a multiple of 8 bytes). salt: another one for another array.
static inline void hash_add(unsigned long long* hash, const void* memory, size_t bytes,
                            unsigned long long salt, cudaStream_t stream) {
    size_t words = bytes / sizeof *hash, blocks = ceil_div(words, (size_t)HASH_THREADS);
    if (words == 0) return;
    hash_kernel<<<(unsigned)(blocks < HASH_BLOCKS ? blocks : (size_t)HASH_BLOCKS), HASH_THREADS, 0, stream>>>(
        hash, (const unsigned long long*)memory, words, salt << 56);
    LAUNCH_CHECK();
}
