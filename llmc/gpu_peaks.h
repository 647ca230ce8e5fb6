// How fast a GPU could be at most: dense matrix products, no sparsity, from the vendor's data sheets. What is
// not in the table has no peak, and utilisation is then not printed rather than wrong.
#pragma once
#include <string.h>

#include "llmc/config.h" // defines: ComputePrecision

typedef struct {
    const char* name;        // a part of what the driver calls it; the first that fits counts
    double bf16, tf32, fp32; // TFLOP/s
} GpuPeak;

static const GpuPeak gpu_peaks[] = {
    {"GB200", 2500, 1250, 80},       {"B200", 2250, 1125, 75},     {"GH200", 989.4, 494.7, 66.9},
    {"H200", 989.4, 494.7, 66.9},    {"H100 PCIe", 756, 378, 51},  {"H100 NVL", 835, 417, 60},
    {"H100", 989.4, 494.7, 66.9},    {"H800", 989.4, 494.7, 66.9}, {"H20", 148, 74, 44},
    {"A100", 312, 156, 19.5},        {"A800", 312, 156, 19.5},     {"A30", 165, 82, 10.3},
    {"A40", 149.7, 74.8, 37.4},      {"A6000", 154.8, 77.4, 38.7}, {"A10", 125, 62.5, 31.2},
    {"L40S", 362, 183, 91.6},        {"L40", 181, 90.5, 90.5},     {"L4", 121, 60, 30.3},
    {"RTX 4090", 165.2, 82.6, 82.6}, {"RTX 3090", 71, 35.6, 35.6},
};

// FLOP/s of a device for a ComputePrecision; 0: not known
static inline double gpu_peak_flops(const char* device, int compute) {
    for (size_t i = 0; i < sizeof gpu_peaks / sizeof gpu_peaks[0]; i++) {
        const GpuPeak* p = &gpu_peaks[i];
        if (strstr(device, p->name) == NULL) continue;
        return 1e12 * (compute == COMPUTE_BF16 ? p->bf16 : compute == COMPUTE_TF32 ? p->tf32 : p->fp32);
    }
    return 0;
}
