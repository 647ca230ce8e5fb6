// Matrix products by cuBLASLt. Everything here is row-major; cuBLASLt is column-major, and a row-major matrix is
// its own transpose there, so that operands change places:
//
//     forward   out (N, OC)   = inp weight^T       D = out^T      A = weight, transposed   B = inp
//     dinp      (N, C)        = dout weight        D = dinp^T     A = weight               B = dout
//     dweight   (OC, C)      += dout^T inp         D = dweight^T  A = inp                  B = dout, transposed
//
// What can be done while the result is still in registers is: adding a bias, GELU and its gradient, and (while
// dout passes by) the bias gradient. Sums are fp32; gradients accumulate through beta = 1.
// A plan (descriptors and the algorithm) is made once for each shape and kept. Source: cuBLASLt's
// documentation, CUDA 13.
#pragma once
#include <cublasLt.h>

#include "llmc/column_sums.cuh" // defines: add_column_sums, add_parts
#include "llmc/config.h"        // defines: ComputePrecision
#include "llmc/cuda_common.cuh" // defines: floatX, CUDA_CHECK

#define CUBLAS_CHECK(call)                                                                                   \
    do {                                                                                                     \
        cublasStatus_t cublas_status = (call);                                                               \
        if (cublas_status != CUBLAS_STATUS_SUCCESS)                                                          \
            internal_error(__FILE__, __LINE__, "%s: %s", #call, cublasLtGetStatusString(cublas_status));     \
    } while (0)

// Hopper wants 32 MiB; more brings nothing, less excludes algorithms.
static const size_t MATMUL_WORKSPACE = (size_t)32 << 20;
static inline size_t matmul_workspace_bytes(void) { return MATMUL_WORKSPACE; }

// One product in cuBLASLt's terms: D (m, n) = epilogue(op(A) op(B)), or +=; sums over k.
typedef struct {
    int m, n, k;
    bool transpose_a, transpose_b, accumulate;
    int epilogue; // a cublasLtEpilogue_t
    int d_type;   // a cudaDataType_t
} MatmulShape;

typedef struct {
    MatmulShape shape;
    bool possible; // cuBLASLt has an algorithm for it
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algorithm;
} MatmulPlan;

enum { MATMUL_PLANS = 128, MATMUL_CANDIDATES = 16 };

typedef struct {
    cublasLtHandle_t handle;
    cudaStream_t stream;
    cublasComputeType_t compute;
    void* workspace;
    float* bias_scratch; // matmul_bias_scratch of the widest OC; NULL without a backward pass
    MatmulPlan plans[MATMUL_PLANS];
    int num_plans;
    char choices[PATH_MAX]; // file of autotuned algorithms; "": take the heuristic's first
    MatmulPlan* stored;     // what the file had: shape and algorithm
    int num_stored;
} Matmul;

// Floats: room for a bias gradient before it is added, or for the column sums that replace it.
static inline size_t matmul_bias_scratch(int OC) { return column_sums_scratch(OC); }

// ----------------------------------------------------------------------------
// plans

static inline bool same_shape(const MatmulShape* a, const MatmulShape* b) {
    return a->m == b->m && a->n == b->n && a->k == b->k && a->transpose_a == b->transpose_a &&
           a->transpose_b == b->transpose_b && a->accumulate == b->accumulate && a->epilogue == b->epilogue &&
           a->d_type == b->d_type;
}

static const cudaDataType_t MATMUL_TYPE = sizeof(floatX) == sizeof(float) ? CUDA_R_32F : CUDA_R_16BF;

template <typename Value>
static inline void set_attribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t which, Value value) {
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(d, which, &value, sizeof value));
}

static inline cublasLtMatrixLayout_t matmul_layout(cudaDataType_t type, int rows, int columns) {
    cublasLtMatrixLayout_t layout;
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, type, (uint64_t)rows, (uint64_t)columns, rows));
    return layout;
}

static inline bool epilogue_has_bias(int e) {
    return e == CUBLASLT_EPILOGUE_BIAS || e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS ||
           e == CUBLASLT_EPILOGUE_BGRADB;
}
static inline bool epilogue_has_aux(int e) {
    return e == CUBLASLT_EPILOGUE_GELU_AUX || e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS ||
           e == CUBLASLT_EPILOGUE_DGELU;
}

// Where the epilogue finds its vector and its matrix. How they are aligned is part of what a heuristic is asked.
static inline void set_pointers(MatmulPlan* plan, const void* bias, const void* aux) {
    if (epilogue_has_bias(plan->shape.epilogue))
        set_attribute(plan->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    if (epilogue_has_aux(plan->shape.epilogue))
        set_attribute(plan->operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
}

static inline void plan_describe(MatmulPlan* plan, const Matmul* mm) {
    const MatmulShape* s = &plan->shape;
    cublasOperation_t op_a = s->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t op_b = s->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&plan->operation, mm->compute, CUDA_R_32F));
    set_attribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA, op_a);
    set_attribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSB, op_b);
    set_attribute(plan->operation, CUBLASLT_MATMUL_DESC_EPILOGUE, (cublasLtEpilogue_t)s->epilogue);
    if (epilogue_has_aux(s->epilogue))
        set_attribute(plan->operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)s->m);
    // a gradient that is not rounded before it is added; where D is bf16, cuBLASLt may have no algorithm for it
    if (s->epilogue == CUBLASLT_EPILOGUE_BGRADB)
        set_attribute(plan->operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUDA_R_32F);
    plan->a = matmul_layout(MATMUL_TYPE, s->transpose_a ? s->k : s->m, s->transpose_a ? s->m : s->k);
    plan->b = matmul_layout(MATMUL_TYPE, s->transpose_b ? s->n : s->k, s->transpose_b ? s->k : s->n);
    plan->d = matmul_layout((cudaDataType_t)s->d_type, s->m, s->n);
}

// Algorithms that cuBLASLt proposes, best first. Split-K sums that are added in whatever order blocks finish
// are excluded: the same step must give the same bits.
static inline int plan_candidates(const MatmulPlan* plan, const Matmul* mm,
                                  cublasLtMatmulHeuristicResult_t* results, int wanted) {
    cublasLtMatmulPreference_t preference;
    uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, alignment = 16;
    size_t workspace = MATMUL_WORKSPACE;
    int found = 0;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    const struct {
        cublasLtMatmulPreferenceAttributes_t which;
        const void* value;
        size_t size;
    } settings[] = {{CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace},
                    {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction},
                    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignment, sizeof alignment},
                    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignment, sizeof alignment},
                    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignment, sizeof alignment},
                    {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment, sizeof alignment}};
    for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++)
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, settings[i].which, settings[i].value,
                                                          settings[i].size));
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        mm->handle, plan->operation, plan->a, plan->b, plan->d, plan->d, preference, wanted, results, &found);
    CUBLAS_CHECK(cublasLtMatmulPreferenceDestroy(preference));
    // a combination that it does not know is one or the other
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) return 0;
    CUBLAS_CHECK(status);
    return found;
}

static inline cublasStatus_t plan_run(const MatmulPlan* plan, const Matmul* mm, void* d, const void* a,
                                      const void* b, const cublasLtMatmulAlgo_t* algorithm) {
    const float one = 1, beta = plan->shape.accumulate ? 1 : 0;
    return cublasLtMatmul(mm->handle, plan->operation, &one, a, plan->a, b, plan->b, &beta, d, plan->d, d,
                          plan->d, algorithm, mm->workspace, MATMUL_WORKSPACE, mm->stream);
}

#include "llmc/matmul_autotune.cuh" // defines: plan_autotune, choices_load, choices_find

// The plan for a shape, made at its first use; a and b: the operands of that use.
static inline MatmulPlan* matmul_plan(Matmul* mm, const MatmulShape* shape, const void* a, const void* b,
                                      const void* bias, const void* aux) {
    for (int i = 0; i < mm->num_plans; i++) {
        if (!same_shape(&mm->plans[i].shape, shape)) continue;
        set_pointers(&mm->plans[i], bias, aux);
        return &mm->plans[i];
    }
    CHECK(mm->num_plans < MATMUL_PLANS);
    MatmulPlan* plan = &mm->plans[mm->num_plans++];
    cublasLtMatmulHeuristicResult_t results[MATMUL_CANDIDATES];
    plan->shape = *shape;
    plan_describe(plan, mm);
    // One layer's bias may lie on 256 bytes and the next one's on 16: an algorithm for all of them is wanted.
    const char* on_16_bytes = (const char*)mm->workspace + 16;
    set_pointers(plan, on_16_bytes, on_16_bytes);
    bool tune = mm->choices[0] != '\0';
    int found = plan_candidates(plan, mm, results, tune ? MATMUL_CANDIDATES : 1);
    set_pointers(plan, bias, aux);
    plan->possible = found > 0;
    if (!plan->possible) return plan;
    plan->algorithm = results[0].algo;
    if (tune && !choices_find(mm, plan)) {
        plan_autotune(plan, mm, results, found, a, b);
        choices_append(mm, plan);
    }
    return plan;
}

// ----------------------------------------------------------------------------
// a context

// compute: a ComputePrecision of this build. workspace: matmul_workspace_bytes(). bias_scratch: only for
// backward passes. choices: a file where autotuned algorithms are kept, or NULL.
static inline bool matmul_init(Matmul* mm, int compute, void* workspace, float* bias_scratch,
                               const char* choices, cudaStream_t stream, Error* err) {
    memset(mm, 0, sizeof *mm);
    cublasStatus_t status = cublasLtCreate(&mm->handle);
    if (status != CUBLAS_STATUS_SUCCESS)
        return fail(err, EXIT_NO_DEVICE, "cuBLASLt does not start: %s", cublasLtGetStatusString(status));
    mm->compute = compute == COMPUTE_TF32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    mm->workspace = workspace, mm->bias_scratch = bias_scratch, mm->stream = stream;
    if (choices == NULL) return true;
    snprintf(mm->choices, sizeof mm->choices, "%s", choices);
    return choices_load(mm, err);
}

static inline void matmul_free(Matmul* mm) {
    for (int i = 0; i < mm->num_plans; i++) {
        cublasLtMatrixLayoutDestroy(mm->plans[i].a);
        cublasLtMatrixLayoutDestroy(mm->plans[i].b);
        cublasLtMatrixLayoutDestroy(mm->plans[i].d);
        cublasLtMatmulDescDestroy(mm->plans[i].operation);
    }
    if (mm->handle != NULL) cublasLtDestroy(mm->handle);
    free(mm->stored);
    memset(mm, 0, sizeof *mm);
}

// Runs a product; false if cuBLASLt has no algorithm for it.
static inline bool matmul_run(Matmul* mm, MatmulShape shape, void* d, const void* a, const void* b,
                              const void* bias, const void* aux) {
    MatmulPlan* plan = matmul_plan(mm, &shape, a, b, bias, aux);
    if (!plan->possible) return false;
    CUBLAS_CHECK(plan_run(plan, mm, d, a, b, &plan->algorithm));
    return true;
}

static inline void matmul_must(bool ran, const MatmulShape* s) {
    if (ran) return;
    bool gelu = epilogue_has_aux(s->epilogue);
    internal_error(__FILE__, __LINE__, "cuBLASLt has no algorithm for %d x %d x %d with epilogue %d%s", s->m,
                   s->n, s->k, s->epilogue, gelu ? ": set precision.fused_gelu=false" : "");
}

// ----------------------------------------------------------------------------
// products

template <typename X> static inline cudaDataType_t matmul_type_of(const X*) {
    return sizeof(X) == sizeof(float) ? CUDA_R_32F : CUDA_R_16BF;
}

// out (N, OC) = inp (N, C) weight^T (C, OC) + bias (OC) or NULL
static inline void matmul_forward(floatX* out, const floatX* inp, const floatX* weight, const floatX* bias,
                                  int N, int C, int OC, Matmul* mm) {
    int epilogue = bias != NULL ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    MatmulShape shape = {OC, N, C, true, false, false, epilogue, MATMUL_TYPE};
    matmul_must(matmul_run(mm, shape, out, weight, inp, bias, NULL), &shape);
}

// pre (N, OC) = inp (N, C) weight^T (C, OC) + bias (OC) or NULL; out (N, OC) = GELU of it, before it is rounded
static inline void matmul_gelu_forward(floatX* out, floatX* pre, const floatX* inp, const floatX* weight,
                                       const floatX* bias, int N, int C, int OC, Matmul* mm) {
    int epilogue = bias != NULL ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    MatmulShape shape = {OC, N, C, true, false, false, epilogue, MATMUL_TYPE};
    matmul_must(matmul_run(mm, shape, out, weight, inp, bias, pre), &shape);
}

// dweight (OC, C) +=; dbias (OC) += or NULL; dout (N, OC), inp (N, C). The bias gradient comes out of the same
// product where cuBLASLt can, else out of a kernel of ours.
template <typename Grad>
static inline void matmul_weight_gradient(Grad* dweight, Grad* dbias, const floatX* dout, const floatX* inp,
                                          int N, int C, int OC, Matmul* mm) {
    MatmulShape shape = {C, OC, N, false, true, true, CUBLASLT_EPILOGUE_DEFAULT, matmul_type_of(dweight)};
    if (dbias != NULL) {
        MatmulShape fused = shape;
        fused.epilogue = CUBLASLT_EPILOGUE_BGRADB;
        if (matmul_run(mm, fused, dweight, inp, dout, mm->bias_scratch, NULL)) {
            add_parts(dbias, mm->bias_scratch, 1, OC, OC, mm->stream);
            return;
        }
        add_column_sums(dbias, mm->bias_scratch, dout, N, OC, mm->stream);
    }
    matmul_must(matmul_run(mm, shape, dweight, inp, dout, NULL, NULL), &shape);
}

// dinp (N, C) =; dout (N, OC), weight (OC, C)
static inline void matmul_input_gradient(floatX* dinp, const floatX* dout, const floatX* weight, int N, int C,
                                         int OC, Matmul* mm) {
    MatmulShape shape = {C, N, OC, false, false, false, CUBLASLT_EPILOGUE_DEFAULT, MATMUL_TYPE};
    matmul_must(matmul_run(mm, shape, dinp, weight, dout, NULL, NULL), &shape);
}

// dinp (N, C) = or NULL; dweight (OC, C) += or NULL; dbias (OC) += or NULL; dout (N, OC), inp (N, C), weight (OC, C)
template <typename Grad>
static inline void matmul_backward(floatX* dinp, Grad* dweight, Grad* dbias, const floatX* dout,
                                   const floatX* inp, const floatX* weight, int N, int C, int OC,
                                   Matmul* mm) {
    if (dinp != NULL) matmul_input_gradient(dinp, dout, weight, N, C, OC, mm);
    if (dweight != NULL) matmul_weight_gradient(dweight, dbias, dout, inp, N, C, OC, mm);
}

// The same for a product whose input was GELU(pre), through the GELU: dpre (N, C) =; pre (N, C)
template <typename Grad>
static inline void matmul_gelu_backward(floatX* dpre, Grad* dweight, Grad* dbias, const floatX* dout,
                                        const floatX* inp, const floatX* weight, const floatX* pre, int N,
                                        int C, int OC, Matmul* mm) {
    MatmulShape shape = {C, N, OC, false, false, false, CUBLASLT_EPILOGUE_DGELU, MATMUL_TYPE};
    matmul_must(matmul_run(mm, shape, dpre, weight, dout, NULL, pre), &shape);
    if (dweight != NULL) matmul_weight_gradient(dweight, dbias, dout, inp, N, C, OC, mm);
}
