// Says what kind of machine it finds, one line each, for e2e_emu.sh.
#include <cuda_runtime.h>

__global__ void nothing() {}

int main() {
    int count = -1, driver = -1;
    size_t free_bytes = 0, total = 0;
    void* p;
    cudaDeviceProp properties;
    cudaDriverGetVersion(&driver);
    printf("count: %s\n", cudaGetErrorName(cudaGetDeviceCount(&count)));
    if (cudaGetDeviceProperties(&properties, 0) == cudaSuccess)
        printf("architecture: %d%d\n", properties.major, properties.minor);
    cudaMemGetInfo(&free_bytes, &total);
    printf("%d devices, driver %d, memory %zu of %zu\n", count, driver, free_bytes, total);
    printf("1 MiB: %s\n", cudaGetErrorName(cudaMalloc(&p, 1 << 20)));
    printf("another: %s\n", cudaGetErrorName(cudaMalloc(&p, 1 << 20)));
    cudaGetLastError();
    nothing<<<1, 1>>>();
    printf("launch: %s\n", cudaGetErrorName(cudaGetLastError()));
    return 0;
}
