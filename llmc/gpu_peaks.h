// How fast a GPU could be at most: dense matrix products, no sparsity, fp32 accumulation, from the vendor's data
// sheets and whitepapers. What is not in the table has no peak, and utilisation is then not printed rather than
// wrong.
#pragma once
#include <ctype.h>
#include <string.h>

#include "llmc/config.h" // defines: ComputePrecision

typedef struct {
    const char* name;        // whole words of what the driver calls it; the first row that fits counts
    double bf16, tf32, fp32; // TFLOP/s; 0: not known
} GpuPeak;

static const GpuPeak gpu_peaks[] = {
    // a part of a card, or a slower card under a longer name
    {"MIG", 0, 0, 0},
    {"Laptop", 0, 0, 0},
    {"Max-Q", 0, 0, 0},
    {"RTX 4090 D", 0, 0, 0},
    {"RTX 5090 D", 0, 0, 0},
    // Blackwell
    {"GB300", 2500, 1250, 80},
    {"GB200", 2500, 1250, 80},
    {"B300", 2250, 1125, 75},
    {"B200", 2250, 1125, 75},
    {"RTX 5090", 209.5, 104.8, 104.8},
    // Hopper
    {"GH200", 989.4, 494.7, 66.9},
    {"H200 NVL", 835.5, 417.5, 60},
    {"H200", 989.4, 494.7, 66.9},
    {"H100 PCIe", 756, 378, 51},
    {"H100 NVL", 835.5, 417.5, 60},
    {"H100", 989.4, 494.7, 66.9},
    {"H800 PCIe", 756, 378, 51},
    {"H800", 989.4, 494.7, 66.9},
    {"H20", 148, 74, 44},
    // Ada
    {"L40S", 362, 183, 91.6},
    {"L40", 181, 90.5, 90.5},
    {"L4", 121, 60, 30.3},
    {"RTX 4090", 165.2, 82.6, 82.6},
    // Ampere
    {"A100", 312, 156, 19.5},
    {"A800", 312, 156, 19.5},
    {"A30", 165, 82, 10.3},
    {"A40", 149.7, 74.8, 37.4},
    {"A6000", 154.8, 77.4, 38.7},
    {"A10", 125, 62.5, 31.2},
    {"RTX 3090 Ti", 80, 40, 40},
    {"RTX 3090", 71, 35.6, 35.6},
};

// Is `name` in `device` as a word or words of its own? A100 is in "NVIDIA A100-SXM4-80GB", A10 is not.
static inline bool names_gpu(const char* device, const char* name) {
    size_t size = strlen(name);
    for (const char* at = strstr(device, name); at != NULL; at = strstr(at + 1, name))
        if ((at == device || !isalnum((unsigned char)at[-1])) && !isalnum((unsigned char)at[size]))
            return true;
    return false;
}

// FLOP/s of a device for a ComputePrecision; 0: not known
static inline double gpu_peak_flops(const char* device, int compute) {
    for (size_t i = 0; i < sizeof gpu_peaks / sizeof gpu_peaks[0]; i++) {
        const GpuPeak* p = &gpu_peaks[i];
        if (!names_gpu(device, p->name)) continue;
        return 1e12 * (compute == COMPUTE_BF16 ? p->bf16 : compute == COMPUTE_TF32 ? p->tf32 : p->fp32);
    }
    return 0;
}
