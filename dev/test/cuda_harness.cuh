// What the CUDA tests share: TAP, arrays on the device, and the one rule by which numbers are judged. The
// reference layers, in fp64, are in namespace cpu: they have the names of the CUDA ones.
#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <string>
#include <vector>

#include "llmc/bf16.h"   // defines: bf16_from_float, float_from_bf16
#include "llmc/config.h" // defines: RunConfig; what the reference layers include, outside the namespace
#include "llmc/cuda_common.cuh" // defines: floatX, CUDA_CHECK
#include "llmc/positions.h"     // defines: Positions, position_at
#include "llmc/rand.h"          // defines: random_uniform
#include "llmc/rope.h"          // defines: rope_table
#include <omp.h>

typedef std::vector<double> Array;
static const cudaStream_t test_stream = 0;

#define REAL double
namespace cpu {
#include "llmc/layers_cpu.h"    // defines: every layer
#include "llmc/optimizer_cpu.h" // defines: adamw_update, global_norm_squared
} // namespace cpu

// ----------------------------------------------------------------------------
// TAP

static int tap_count, tap_failed;

__attribute__((format(printf, 2, 3))) static bool tap_check(bool ok, const char* format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s %d - ", ok ? "ok" : "not ok", ++tap_count);
    vprintf(format, args);
    printf("\n");
    fflush(stdout);
    va_end(args);
    tap_failed += !ok;
    return ok;
}

static int tap_finish(void) {
    printf("1..%d\n", tap_count);
    return tap_failed > 0;
}

// ----------------------------------------------------------------------------
// arrays: exactly as long as the kernel is told, so that AddressSanitizer sees every step beyond; all are freed
// together

static std::vector<void*> owned_host, owned_device;

static void release_all(void) {
    CUDA_CHECK(cudaDeviceSynchronize());
    for (void* p : owned_host) free(p);
    for (void* p : owned_device) CUDA_CHECK(cudaFree(p));
    owned_host.clear(), owned_device.clear();
}

template <typename X> static X* own_host(size_t n) {
    owned_host.push_back(calloc_check(n != 0 ? n : 1, sizeof(X)));
    return (X*)owned_host.back();
}

template <typename X> static X* own_device(size_t n) {
    void* p;
    CUDA_CHECK(cudaMalloc(&p, n * sizeof(X)));
    owned_device.push_back(p);
    return (X*)p;
}

template <typename X> static X rounded_to(double x) { return from_float<X>((float)x); }

static double rounded(double x) { return (double)to_float(rounded_to<floatX>(x)); }

// The nearest floatX: what a plain kernel leaves in memory after an operation.
static void round_to_floatX(double* x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = (double)to_float(rounded_to<floatX>(x[i]));
}

// Uniform in (-scale, scale), exact in floatX, so that every side sees the same inputs.
static double* random_values(size_t n, double scale) {
    static uint64_t arrays = 1000;
    double* x = own_host<double>(n);
    for (size_t i = 0; i < n; i++) x[i] = scale * (2 * random_uniform(1, RANDOM_INIT, arrays, i) - 1);
    arrays++;
    round_to_floatX(x, n);
    return x;
}

static double* copy_of(const double* x, size_t n) {
    return (double*)memcpy(own_host<double>(n), x, n * sizeof *x);
}

template <typename X> static X* to_device(const double* x, size_t n) {
    X* device = own_device<X>(n);
    std::vector<X> host(n);
    for (size_t i = 0; i < n; i++) host[i] = rounded_to<X>(x[i]);
    CUDA_CHECK(cudaMemcpy(device, host.data(), n * sizeof(X), cudaMemcpyHostToDevice));
    return device;
}

static int* ints_to_device(const int* x, size_t n) {
    int* device = own_device<int>(n);
    CUDA_CHECK(cudaMemcpy(device, x, n * sizeof *x, cudaMemcpyHostToDevice));
    return device;
}

// NaNs, so that an element that a kernel leaves out is found.
template <typename X> static X* poisoned_device(size_t n) {
    X* device = own_device<X>(n);
    CUDA_CHECK(cudaMemset(device, 0xFF, n * sizeof(X)));
    return device;
}

template <typename X> static double* to_host(const X* device, size_t n) {
    double* out = own_host<double>(n);
    std::vector<X> host(n);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(host.data(), device, n * sizeof(X), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) {
        if constexpr (std::is_same_v<X, double>)
            out[i] = host[i];
        else
            out[i] = (double)to_float(host[i]);
    }
    return out;
}

// Equal to the bit; NaNs are equal to themselves.
template <typename X> static bool same_bits(const X* a, const X* b, size_t n) {
    std::vector<X> x(n), y(n);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(x.data(), a, n * sizeof(X), cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(y.data(), b, n * sizeof(X), cudaMemcpyDeviceToHost));
    return memcmp(x.data(), y.data(), n * sizeof(X)) == 0;
}

// Of an array with so many blocks of T rows of n elements, the rows of the rank with these positions.
template <typename X>
static std::vector<X> rows_of_rank(const X* whole, Positions at, int blocks, int T, int ranks, size_t n) {
    std::vector<X> rows;
    for (int b = 0; b < blocks; b++)
        for (int t = 0; t < T / ranks; t++) {
            const X* row = whole + ((size_t)b * (size_t)T + (size_t)position_at(at, t)) * n;
            rows.insert(rows.end(), row, row + n);
        }
    return rows;
}

static char* align64(std::vector<char>& memory) {
    return memory.data() + (64 - (uintptr_t)memory.data() % 64) % 64;
}

// ----------------------------------------------------------------------------
// the rule: at most twice as far from the truth as the plain formula in the same precision, in the worst
// element and in the root of the mean square. Four fp32 roundings of the largest value come on top, which is what
// expf and logf may be off by where the plain formula happens to have no error at all.

static bool judge(const char* what, const double* ours, const double* plain, const double* truth, size_t n) {
    double our_max = 0, our_square = 0, plain_max = 0, plain_square = 0, largest = 0;
    bool finite = true;
    for (size_t i = 0; i < n; i++) {
        double e = fabs(ours[i] - truth[i]), p = fabs(plain[i] - truth[i]);
        finite = finite && isfinite(ours[i]);
        our_max = fmax(our_max, e), our_square += e * e;
        plain_max = fmax(plain_max, p), plain_square += p * p;
        largest = fmax(largest, fabs(truth[i]));
    }
    double our_rms = sqrt(our_square / (double)n), plain_rms = sqrt(plain_square / (double)n);
    double rounding = largest * 0x1p-21;
    bool ok = finite && our_max <= 2 * plain_max + rounding && our_rms <= 2 * plain_rms + rounding;
    return tap_check(ok, "%s: error %.2e (rms %.2e), plain %.2e (%.2e), of %.2e", what, our_max, our_rms,
                     plain_max, plain_rms, largest);
}
