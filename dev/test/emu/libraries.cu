// What the stand-ins of cuBLASLt, NCCL and NVTX refuse. Without an argument: every call that is answered with an
// error. `libraries NAME`: a mistake that must stop the program.
#include <cublasLt.h>
#include <nccl.h>
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <string.h>

static int wrong;

static void expect(const char* what, int got, int wanted) {
    if (got == wanted) return;
    printf("%s: %d instead of %d\n", what, got, wanted);
    wrong++;
}

// ----------------------------------------------------------------------------
// cuBLASLt: D (M, N) = A (M, K) B (K, N)

enum { M = 16, N = 8, K = 24, BYTES = 1 << 20, WORKSPACE = 1 << 18 };

struct Product {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t result;
};

static Product make(cudaDataType_t type, cudaDataType_t d_type, cublasComputeType_t compute) {
    Product p;
    size_t workspace = WORKSPACE;
    cublasLtCreate(&p.handle);
    cublasLtMatmulDescCreate(&p.desc, compute, CUDA_R_32F);
    cublasLtMatrixLayoutCreate(&p.a, type, M, K, M);
    cublasLtMatrixLayoutCreate(&p.b, type, K, N, K);
    cublasLtMatrixLayoutCreate(&p.d, d_type, M, N, M);
    cublasLtMatmulPreferenceCreate(&p.preference);
    cublasLtMatmulPreferenceSetAttribute(p.preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                         sizeof workspace);
    return p;
}

static void destroy(Product* p) {
    cublasLtMatmulPreferenceDestroy(p->preference);
    for (cublasLtMatrixLayout_t layout : {p->a, p->b, p->d}) cublasLtMatrixLayoutDestroy(layout);
    cublasLtMatmulDescDestroy(p->desc);
    cublasLtDestroy(p->handle);
}

template <typename Value>
static cublasStatus_t set(Product* p, cublasLtMatmulDescAttributes_t which, Value value) {
    return cublasLtMatmulDescSetAttribute(p->desc, which, &value, sizeof value);
}

static cublasStatus_t ask(Product* p) {
    int found;
    return cublasLtMatmulAlgoGetHeuristic(p->handle, p->desc, p->a, p->b, p->d, p->d, p->preference, 1,
                                          &p->result, &found);
}

static cublasStatus_t multiply(const Product* p, const void* a, const void* b, void* d, void* workspace,
                               size_t workspace_bytes) {
    const float one = 1, zero = 0;
    return cublasLtMatmul(p->handle, p->desc, &one, a, p->a, b, p->b, &zero, d, p->d, d, p->d,
                          &p->result.algo, workspace, workspace_bytes, 0);
}

static void expect_of_types(const char* what, cudaDataType_t type, cudaDataType_t d_type,
                            cublasComputeType_t compute) {
    Product p = make(type, d_type, compute);
    expect(what, ask(&p), CUBLAS_STATUS_NOT_SUPPORTED);
    destroy(&p);
}

static void refusals_of_pointers(Product* p, char* memory) {
    char *a = memory, *b = memory + 4096, *d = memory + 8192, *w = memory + 16384;
    expect("a product", ask(p), CUBLAS_STATUS_SUCCESS);
    expect("a product runs", multiply(p, a, b, d, w, WORKSPACE), CUBLAS_STATUS_SUCCESS);
    expect("little workspace", multiply(p, a, b, d, w, p->result.workspaceSize - 1),
           CUBLAS_STATUS_INVALID_VALUE);
    expect("workspace on 2 bytes", multiply(p, a, b, d, w + 2, WORKSPACE), CUBLAS_STATUS_INVALID_VALUE);
    expect("no operand", multiply(p, NULL, b, d, w, WORKSPACE), CUBLAS_STATUS_INVALID_VALUE);
    expect("less aligned than promised", multiply(p, a + 16, b, d, w, WORKSPACE),
           CUBLAS_STATUS_NOT_SUPPORTED);
    set(p, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    expect("a bias", ask(p), CUBLAS_STATUS_SUCCESS);
    expect("no bias pointer", multiply(p, a, b, d, w, WORKSPACE), CUBLAS_STATUS_INVALID_VALUE);
    set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, (void*)(memory + 12290));
    expect("less aligned bias than asked for", multiply(p, a, b, d, w, WORKSPACE),
           CUBLAS_STATUS_NOT_SUPPORTED);
    memset(&p->result.algo, 1, sizeof p->result.algo);
    expect("an algorithm that is none", multiply(p, a, b, d, w, WORKSPACE), CUBLAS_STATUS_NOT_SUPPORTED);
}

static void refusals_of_descriptions(Product* p) {
    set(p, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUDA_R_32F);
    expect("fp32 bias of a bf16 product", ask(p), CUBLAS_STATUS_NOT_SUPPORTED);
    set(p, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_GELU_AUX);
    set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)(M + 4));
    expect("auxiliary rows not in eights", ask(p), CUBLAS_STATUS_INVALID_VALUE);
    set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)(M - 8));
    expect("auxiliary rows too short", ask(p), CUBLAS_STATUS_INVALID_VALUE);
    set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)M);
    expect("auxiliary rows", ask(p), CUBLAS_STATUS_SUCCESS);
    expect("an attribute of the wrong size", set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int)M),
           CUBLAS_STATUS_INVALID_VALUE);
    set(p, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    expect("dimensions that do not meet", ask(p), CUBLAS_STATUS_INVALID_VALUE);
    expect_of_types("fp32 into bf16", CUDA_R_32F, CUDA_R_16BF, CUBLAS_COMPUTE_32F);
    expect_of_types("TF32 of bf16", CUDA_R_16BF, CUDA_R_16BF, CUBLAS_COMPUTE_32F_FAST_TF32);
}

// ----------------------------------------------------------------------------
// NCCL

static void refusals_of_nccl(float* x) {
    ncclUniqueId id;
    ncclComm_t comm;
    ncclConfig_t config;
    memset(&config, 0, sizeof config);
    ncclGetUniqueId(&id);
    expect("too many ranks", ncclCommInitRank(&comm, 257, id, 0), ncclInvalidUsage);
    expect("and why", strstr(ncclGetLastError(NULL), "257 ranks") != NULL, true);
    expect("a config of zeros", ncclCommInitRankConfig(&comm, 1, id, 0, &config), ncclInvalidArgument);
    expect("one rank", ncclCommInitRank(&comm, 1, id, 0), ncclSuccess);
    expect("a send that nobody receives", ncclSend(x, 4, ncclFloat, 0, comm, 0), ncclInvalidUsage);
    ncclGroupStart();
    ncclAllReduce(x, NULL, 4, ncclFloat, ncclSum, comm, 0);
    expect("an error within a group", ncclGroupEnd(), ncclInvalidArgument);
    ncclCommFinalize(comm);
    expect("after the end", ncclAllReduce(x, x, 4, ncclFloat, ncclSum, comm, 0), ncclInvalidUsage);
    ncclCommDestroy(comm);
    expect("a communicator twice destroyed", ncclCommDestroy(comm), ncclInvalidArgument);
}

// ----------------------------------------------------------------------------
// mistakes

static void mistake(const char* name, Product* p, char* memory) {
    static char host[8192];
    char *inside = memory + BYTES - 256, *aligned_host = host + (256 - (size_t)host % 256);
    char *b = memory + 4096, *d = memory + 8192, *w = memory + 16384;
    ask(p);
    if (strcmp(name, "beyond") == 0) multiply(p, inside, b, d, w, WORKSPACE);
    if (strcmp(name, "host") == 0) multiply(p, aligned_host, b, d, w, WORKSPACE);
    if (strcmp(name, "in_place") == 0) multiply(p, d, b, d, w, WORKSPACE);
    if (strcmp(name, "nccl_beyond") == 0) {
        ncclUniqueId id = {};
        ncclComm_t comm;
        ncclCommInitRank(&comm, 1, id, 0);
        ncclAllReduce(memory, inside, 65, ncclFloat, ncclSum, comm, 0);
    }
    cudaDeviceSynchronize();
    if (strcmp(name, "range_open") == 0) nvtxRangePushA("never closed");
    if (strcmp(name, "range_closed") == 0) nvtxRangePop();
}

int main(int argc, char** argv) {
    char* memory;
    if (cudaMalloc(&memory, BYTES) != cudaSuccess || cudaMemset(memory, 0, BYTES) != cudaSuccess) return 1;
    Product p = make(CUDA_R_16BF, CUDA_R_16BF, CUBLAS_COMPUTE_32F);
    nvtxRangePushA("outer");
    nvtxRangePushA("inner");
    nvtxRangePop();
    nvtxRangePop();
    if (argc > 1) {
        mistake(argv[1], &p, memory);
    } else {
        refusals_of_pointers(&p, memory);
        refusals_of_descriptions(&p);
        refusals_of_nccl((float*)(void*)memory);
    }
    destroy(&p);
    cudaDeviceSynchronize();
    cudaFree(memory);
    return wrong > 0;
}
