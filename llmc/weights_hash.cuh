// A hash of memory on the device, to compare what replicas hold (guard.check_every) and what was computed twice
// (replay.cuh). Each 8 bytes are mixed with their place by a bijection, and what comes out is added up: so the order does
// not matter, and two memories that differ in any bits of one word never have the same hash. It is not for adversaries.
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

template <typename Word>
static __global__ void __launch_bounds__(HASH_THREADS)
    hash_kernel(unsigned long long* hash, const Word* words, size_t n, unsigned long long salt,
                bool subtract) {
    unsigned long long mine = 0;
    size_t step = (size_t)gridDim.x * HASH_THREADS;
    for (size_t i = (size_t)blockIdx.x * HASH_THREADS + threadIdx.x; i < n; i += step)
        mine += mix64(words[i] ^ mix64(salt + i));
    mine = block_sum<HASH_THREADS>(mine);
    if (threadIdx.x == 0) atomicAdd(hash, subtract ? 0 - mine : mine);
}

template <typename Word>
static inline void hash_words(unsigned long long* hash, const void* memory, size_t bytes,
                              unsigned long long salt, bool subtract, cudaStream_t stream) {
    size_t words = bytes / sizeof(Word), blocks = ceil_div(words, (size_t)HASH_THREADS);
    if (words == 0) return;
    if (blocks > HASH_BLOCKS) blocks = HASH_BLOCKS;
    hash_kernel<<<(unsigned)blocks, HASH_THREADS, 0, stream>>>(hash, (const Word*)memory, words, salt << 56,
                                                               subtract);
    LAUNCH_CHECK();
}

// *hash += that of memory (a multiple of 4 bytes), or -= it. salt: another one for another array.
static inline void hash_add(unsigned long long* hash, const void* memory, size_t bytes,
                            unsigned long long salt, cudaStream_t stream, bool subtract = false) {
    bool eights = ((uintptr_t)memory | bytes) % sizeof *hash == 0;
    CHECK(bytes % sizeof(uint32_t) == 0);
    if (eights)
        hash_words<unsigned long long>(hash, memory, bytes, salt, subtract, stream);
    else
        hash_words<uint32_t>(hash, memory, bytes, salt, subtract, stream);
}
