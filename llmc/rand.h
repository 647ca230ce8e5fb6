// Randomness as a function, not a state: Philox 4x32-10, a block cipher used as a generator.
// philox(key, counter) depends on nothing else, so that the same weights, the same data order and the same
// samples come out of every layout, thread count and resume.
// Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#pragma once
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__ // kernels draw from the same streams as the host
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// What a stream of numbers is for; part of the key, so that no two uses ever share numbers.
enum RandomStream {
    RANDOM_INIT = 1,     // weights: (tensor, element)
    RANDOM_DATA = 2,     // order of the training rows: (epoch, index)
    RANDOM_SAMPLE = 3,   // text generation: (sample, position)
    RANDOM_ROUNDING = 4, // stochastic rounding: (step, element)
};

typedef struct {
    uint32_t x[4];
} Philox;

HOST_DEVICE static inline Philox philox(uint64_t seed, uint64_t counter_high, uint64_t counter_low) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    Philox c = {{(uint32_t)counter_low, (uint32_t)(counter_low >> 32), (uint32_t)counter_high,
                 (uint32_t)(counter_high >> 32)}};
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c.x[0], p1 = (uint64_t)0xCD9E8D57u * c.x[2];
        Philox next = {{(uint32_t)(p1 >> 32) ^ c.x[1] ^ k0, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c.x[3] ^ k1,
                        (uint32_t)p0}};
        c = next;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c;
}

// The counter of a stream: 8 bits say what for, 56 bits which (tensor, epoch, sample).
HOST_DEVICE static inline Philox random_bits(uint64_t seed, int stream, uint64_t which, uint64_t index) {
    return philox(seed, ((uint64_t)stream << 56) | (which & 0xFFFFFFFFFFFFFFull), index);
}

// (0, 1], 32 bits: never 0, so that its logarithm is finite
HOST_DEVICE static inline double uniform_from_bits(uint32_t bits) {
    return ((double)bits + 1.0) * (1.0 / 4294967296.0);
}

HOST_DEVICE static inline double random_uniform(uint64_t seed, int stream, uint64_t which, uint64_t index) {
    return uniform_from_bits(random_bits(seed, stream, which, index).x[0]);
}

// Four N(0, 1) numbers from one block, by Box-Muller: element i of a tensor is number i % 4 of block i / 4.
HOST_DEVICE static inline void random_normal4(float out[4], uint64_t seed, int stream, uint64_t which,
                                              uint64_t block) {
    Philox b = random_bits(seed, stream, which, block);
    for (int i = 0; i < 4; i += 2) {
        float radius = sqrtf(-2.0f * logf((float)uniform_from_bits(b.x[i])));
        float angle = 6.2831853f * (float)uniform_from_bits(b.x[i + 1]);
        out[i] = radius * cosf(angle);
        out[i + 1] = radius * sinf(angle);
    }
}
