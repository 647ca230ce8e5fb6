// Stands in for the CUDA runtime: the language's words as macros, and the parts of the API the product uses.
// What it does differently from a GPU, and what it checks: dev/doc/emu.md.
#pragma once
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// __shared__ is left undefined: rewrite.py turns it into a reference into the block's memory

#include "emu/vector_types.h" // defines: float4, dim3, make_float4 ...
#include "emu/host_api.h"     // defines: cudaError_t, cudaMalloc, cudaStream_t, cudaLaunchKernel's relatives
#include "emu/launch.h"       // defines: emu_launch
#include "emu/device_api.h"   // defines: threadIdx, __syncthreads, __shfl_sync, atomicAdd ...
#include "emu/device_math.h"  // defines: __expf, rsqrtf, min, max, __popc ...
