// cuBLASLt on the CPU: D = epilogue(op(A) op(B) + beta C), column-major, with fp32 sums that are rounded once.
//
// Several algorithms differ in how they cut the sum over k, so that a change of algorithm shows in the bits. One
// of them adds its parts in whatever order they come, as split-K with atomics does: no two runs agree.
// What cuBLASLt refuses is refused, with its status: the library's documentation, CUDA 13, says what. Where it is
// silent about a combination of types, this says no.
//
//     EMU_CUBLASLT_REFUSE=BGRADB,DGELU    there is no algorithm for these epilogues
#include "cublasLt.h" // defines: cublasLtMatmul ...

#include <string>

#include "emu.h"           // defines: emu_find_allocation, emu_report
#include "llmc/bf16.h"     // defines: bf16_from_float, float_from_bf16
#include "llmc/tile_cpu.h" // defines: tile_multiply

struct EmuLtHandle {
    int unused;
};
struct EmuLtDesc {
    cublasComputeType_t compute;
    cublasOperation_t transpose_a, transpose_b;
    cublasLtEpilogue_t epilogue;
    void *bias, *aux;
    int64_t aux_ld;
    int32_t bias_type; // -1: as D
};
struct EmuLtLayout {
    cudaDataType_t type;
    uint64_t rows, columns;
    int64_t ld;
};
struct EmuLtPreference {
    uint64_t workspace;
    uint32_t reductions;   // a mask of cublasLtReductionScheme_t
    uint32_t alignment[4]; // of A, B, C, D: what the caller promises
};

// ----------------------------------------------------------------------------
// handles and descriptions

size_t cublasLtGetVersion(void) { return 130100; }

static const struct {
    cublasStatus_t status;
    const char *name, *text;
} statuses[] = {
    {CUBLAS_STATUS_SUCCESS, "CUBLAS_STATUS_SUCCESS", "success"},
    {CUBLAS_STATUS_NOT_INITIALIZED, "CUBLAS_STATUS_NOT_INITIALIZED", "the library was not initialized"},
    {CUBLAS_STATUS_ALLOC_FAILED, "CUBLAS_STATUS_ALLOC_FAILED", "the resource allocation failed"},
    {CUBLAS_STATUS_INVALID_VALUE, "CUBLAS_STATUS_INVALID_VALUE",
     "an unsupported value or parameter was passed to the function"},
    {CUBLAS_STATUS_ARCH_MISMATCH, "CUBLAS_STATUS_ARCH_MISMATCH",
     "the function requires an architectural feature absent from the device"},
    {CUBLAS_STATUS_EXECUTION_FAILED, "CUBLAS_STATUS_EXECUTION_FAILED", "the GPU program failed to execute"},
    {CUBLAS_STATUS_INTERNAL_ERROR, "CUBLAS_STATUS_INTERNAL_ERROR", "an internal operation failed"},
    {CUBLAS_STATUS_NOT_SUPPORTED, "CUBLAS_STATUS_NOT_SUPPORTED",
     "the functionality requested is not supported"}};

const char* cublasLtGetStatusName(cublasStatus_t status) {
    for (const auto& s : statuses)
        if (s.status == status) return s.name;
    return "unknown status";
}
const char* cublasLtGetStatusString(cublasStatus_t status) {
    for (const auto& s : statuses)
        if (s.status == status) return s.text;
    return "unknown status";
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    if (emu_need_device() != cudaSuccess) return CUBLAS_STATUS_NOT_INITIALIZED;
    *handle = new EmuLtHandle{0};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute,
                                        cudaDataType_t scale_type) {
    if (scale_type != CUDA_R_32F) return CUBLAS_STATUS_INVALID_VALUE;
    *desc = new EmuLtDesc{compute, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, NULL, NULL, 0, -1};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t ld) {
    *layout = new EmuLtLayout{type, rows, columns, ld};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    *preference = new EmuLtPreference{0, CUBLASLT_REDUCTION_SCHEME_MASK, {256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}

template <typename Handle> static cublasStatus_t destroy(Handle* handle) {
    if (handle == NULL) return CUBLAS_STATUS_INVALID_VALUE;
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return destroy(handle); }
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return destroy(desc); }
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return destroy(layout); }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { return destroy(p); }

// Copies an attribute into its field, if the caller's type has the field's size.
struct Attribute {
    int which;
    void* field;
    size_t bytes;
};
template <size_t N>
static cublasStatus_t set_attribute(const Attribute (&attributes)[N], int which, const void* value,
                                    size_t bytes) {
    for (const Attribute& a : attributes) {
        if (a.which != which) continue;
        if (a.bytes != bytes || value == NULL) return CUBLAS_STATUS_INVALID_VALUE;
        memcpy(a.field, value, bytes);
        return CUBLAS_STATUS_SUCCESS;
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t which,
                                              const void* value, size_t bytes) {
    const Attribute attributes[] = {
        {CUBLASLT_MATMUL_DESC_TRANSA, &d->transpose_a, sizeof d->transpose_a},
        {CUBLASLT_MATMUL_DESC_TRANSB, &d->transpose_b, sizeof d->transpose_b},
        {CUBLASLT_MATMUL_DESC_EPILOGUE, &d->epilogue, sizeof d->epilogue},
        {CUBLASLT_MATMUL_DESC_BIAS_POINTER, &d->bias, sizeof d->bias},
        {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &d->aux, sizeof d->aux},
        {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &d->aux_ld, sizeof d->aux_ld},
        {CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &d->bias_type, sizeof d->bias_type}};
    return set_attribute(attributes, which, value, bytes);
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                    cublasLtMatmulPreferenceAttributes_t which,
                                                    const void* value, size_t bytes) {
    const Attribute attributes[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &p->workspace, sizeof p->workspace},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &p->reductions, sizeof p->reductions},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &p->alignment[0], sizeof p->alignment[0]},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &p->alignment[1], sizeof p->alignment[1]},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &p->alignment[2], sizeof p->alignment[2]},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &p->alignment[3], sizeof p->alignment[3]}};
    return set_attribute(attributes, which, value, bytes);
}

// ----------------------------------------------------------------------------
// what can be computed

static const struct Epilogue {
    cublasLtEpilogue_t epilogue;
    const char* name;
    bool bias, gelu, aux;
} epilogues[] = {{CUBLASLT_EPILOGUE_DEFAULT, "DEFAULT", false, false, false},
                 {CUBLASLT_EPILOGUE_BIAS, "BIAS", true, false, false},
                 {CUBLASLT_EPILOGUE_GELU, "GELU", false, true, false},
                 {CUBLASLT_EPILOGUE_GELU_BIAS, "GELU_BIAS", true, true, false},
                 {CUBLASLT_EPILOGUE_GELU_AUX, "GELU_AUX", false, true, true},
                 {CUBLASLT_EPILOGUE_GELU_AUX_BIAS, "GELU_AUX_BIAS", true, true, true},
                 {CUBLASLT_EPILOGUE_DGELU, "DGELU", false, false, true},
                 {CUBLASLT_EPILOGUE_BGRADB, "BGRADB", true, false, false}}; // there, the bias is a result

static const Epilogue* find_epilogue(cublasLtEpilogue_t which) {
    for (const Epilogue& e : epilogues)
        if (e.epilogue == which) return &e;
    return NULL;
}

// Everything about one call but its pointers.
struct Problem {
    EmuLtDesc desc;
    EmuLtLayout a, b, d;
    const Epilogue* epilogue;
    cudaDataType_t bias_type;
    size_t m, n, k;
};

static cublasStatus_t check_types(const Problem* p) {
    bool wide = p->a.type == CUDA_R_32F;
    if (p->a.type != p->b.type || (!wide && p->a.type != CUDA_R_16BF)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (p->d.type != CUDA_R_32F && (wide || p->d.type != CUDA_R_16BF)) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (p->desc.compute != CUBLAS_COMPUTE_32F && !(wide && p->desc.compute == CUBLAS_COMPUTE_32F_FAST_TF32))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (p->epilogue->bias && p->bias_type != p->d.type) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (p->epilogue->aux && p->d.type != p->a.type) return CUBLAS_STATUS_NOT_SUPPORTED;
    return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t make_problem(Problem* p, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                   cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                   cublasLtMatrixLayout_t d) {
    if (desc == NULL || a == NULL || b == NULL || c == NULL || d == NULL) return CUBLAS_STATUS_INVALID_VALUE;
    bool ta = desc->transpose_a == CUBLAS_OP_T, tb = desc->transpose_b == CUBLAS_OP_T;
    cudaDataType_t bias_type = desc->bias_type < 0 ? d->type : (cudaDataType_t)desc->bias_type;
    *p = {*desc,
          *a,
          *b,
          *d,
          find_epilogue(desc->epilogue),
          bias_type,
          d->rows,
          d->columns,
          ta ? a->rows : a->columns};
    if (p->epilogue == NULL) return CUBLAS_STATUS_NOT_SUPPORTED;
    if ((ta ? a->columns : a->rows) != p->m || (tb ? b->columns : b->rows) != p->k ||
        (tb ? b->rows : b->columns) != p->n || p->m * p->n * p->k == 0)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (c->type != d->type || c->rows != d->rows || c->columns != d->columns || c->ld != d->ld)
        return CUBLAS_STATUS_INVALID_VALUE;
    for (const EmuLtLayout* l : {a, b, d})
        if (l->ld < (int64_t)l->rows) return CUBLAS_STATUS_INVALID_VALUE;
    if (p->epilogue->aux && (desc->aux_ld % 8 != 0 || desc->aux_ld < (int64_t)p->m))
        return CUBLAS_STATUS_INVALID_VALUE;
    return check_types(p);
}

static bool told_to_refuse(const Epilogue* e) {
    const char* names = getenv("EMU_CUBLASLT_REFUSE");
    std::string list = std::string(",") + (names != NULL ? names : "") + ",";
    return list.find(std::string(",") + e->name + ",") != std::string::npos;
}

// ----------------------------------------------------------------------------
// algorithms

static const struct Algorithm {
    size_t k_block, workspace;
    cublasLtReductionScheme_t reduction;
} algorithms[] = {
    {64, 64 << 20, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE}, // first, for callers that do not rule them out:
    {64, 128 << 10, CUBLASLT_REDUCTION_SCHEME_INPLACE},     // much workspace, and sums in no order
    {128, 256 << 10, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE},
    {256, 0, CUBLASLT_REDUCTION_SCHEME_NONE},
    {32, 0, CUBLASLT_REDUCTION_SCHEME_NONE},
    {96, 64 << 10, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE}};
enum { NUM_ALGORITHMS = sizeof algorithms / sizeof algorithms[0] };

// What cublasLtMatmulAlgo_t holds. alignment: of A, B, C, D as promised, of bias and aux as their pointers were
// when the algorithm was asked for.
struct Choice {
    uint64_t number;
    uint32_t alignment[6];
    uint64_t unused[3];
    uint64_t sum;
};
static_assert(sizeof(Choice) == sizeof(cublasLtMatmulAlgo_t), "a choice is what the caller keeps");

static uint64_t checksum(const Choice* c) {
    uint64_t sum = 0x9E3779B97F4A7C15ull + c->number;
    for (uint32_t alignment : c->alignment) sum = sum * 31 + alignment;
    return sum;
}

static bool read_choice(Choice* c, const cublasLtMatmulAlgo_t* algorithm) {
    memcpy(c, algorithm, sizeof *c);
    return c->number < NUM_ALGORITHMS && c->sum == checksum(c);
}

// What an algorithm may count on, having been asked for with this pointer: 256 at most.
static uint32_t alignment_of(const void* pointer) {
    uintptr_t lowest = (uintptr_t)pointer & -(uintptr_t)pointer;
    return lowest == 0 || lowest > 256 ? 256 : (uint32_t)lowest;
}
static bool aligned(const void* pointer, uint32_t alignment) { return (uintptr_t)pointer % alignment == 0; }

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int* found) {
    Problem p;
    *found = 0;
    if (handle == NULL || preference == NULL || wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
    cublasStatus_t status = make_problem(&p, desc, a, b, c, d);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (told_to_refuse(p.epilogue)) return CUBLAS_STATUS_NOT_SUPPORTED;
    for (size_t i = 0; i < NUM_ALGORITHMS && *found < wanted; i++) {
        const Algorithm& algorithm = algorithms[i];
        if ((algorithm.reduction & ~preference->reductions) != 0 ||
            algorithm.workspace > preference->workspace)
            continue;
        const uint32_t* promised = preference->alignment;
        Choice choice = {i,
                         {promised[0], promised[1], promised[2], promised[3], alignment_of(desc->bias),
                          alignment_of(desc->aux)},
                         {0, 0, 0},
                         0};
        choice.sum = checksum(&choice);
        cublasLtMatmulHeuristicResult_t* result = &results[(*found)++];
        *result = {{{0}}, algorithm.workspace, CUBLAS_STATUS_SUCCESS, 1, {0}};
        memcpy(&result->algo, &choice, sizeof choice);
    }
    return *found > 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t* algorithm,
                                       cublasLtMatmulHeuristicResult_t* result) {
    Problem p;
    Choice choice;
    cublasStatus_t status = handle == NULL ? CUBLAS_STATUS_INVALID_VALUE : make_problem(&p, desc, a, b, c, d);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (told_to_refuse(p.epilogue) || !read_choice(&choice, algorithm)) return CUBLAS_STATUS_NOT_SUPPORTED;
    *result = {*algorithm, algorithms[choice.number].workspace, CUBLAS_STATUS_SUCCESS, 1, {0}};
    return CUBLAS_STATUS_SUCCESS;
}

// ----------------------------------------------------------------------------
// the product

struct Operands {
    const void *a, *b, *c;
    void *d, *workspace;
    float alpha, beta;
};

static size_t bytes_of(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }

static float get(const void* p, cudaDataType_t type, size_t i) {
    return type == CUDA_R_32F ? ((const float*)p)[i] : float_from_bf16(((const uint16_t*)p)[i]);
}
static void put(void* p, cudaDataType_t type, size_t i, float x) {
    if (type == CUDA_R_32F)
        ((float*)p)[i] = x;
    else
        ((uint16_t*)p)[i] = bf16_from_float(x);
}

// As tensor cores read fp32: 10 bits of mantissa, to nearest.
static float to_tf32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7F800000u) != 0x7F800000u) bits = (bits + 0x1000u) & ~0x1FFFu;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float operand(const Problem* p, const void* matrix, size_t i) {
    float x = get(matrix, p->a.type, i);
    return p->desc.compute == CUBLAS_COMPUTE_32F_FAST_TF32 ? to_tf32(x) : x;
}

static float gelu(float x) { return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x))); }
static float gelu_gradient(float x) {
    float t = tanhf(0.7978845608f * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.7978845608f * (1 + 3 * 0.044715f * x * x);
}

// D (i, j) from its sum
static void finish(const Problem* p, const Operands* o, size_t i, size_t j, float sum) {
    size_t at = i + j * (size_t)p->d.ld, aux_at = i + j * (size_t)p->desc.aux_ld;
    const Epilogue* e = p->epilogue;
    sum *= o->alpha;
    if (o->beta != 0) sum += o->beta * get(o->c, p->d.type, at);
    if (e->bias && e->epilogue != CUBLASLT_EPILOGUE_BGRADB) sum += get(p->desc.bias, p->bias_type, i);
    if (e->gelu && e->aux) put(p->desc.aux, p->d.type, aux_at, sum);
    if (e->gelu) sum = gelu(sum);
    if (e->epilogue == CUBLASLT_EPILOGUE_DGELU) sum *= gelu_gradient(get(p->desc.aux, p->d.type, aux_at));
    put(o->d, p->d.type, at, sum);
}

// Rows of D that are computed together: a few registers wide, as tile_multiply wants it.
static const size_t PANEL = 64;

// Rows first ... of D. b: B in fp32, packed. Blocks of k in order, or backwards.
static void panel_multiply(const Problem* p, const Operands* o, const float* b, size_t first, size_t k_block,
                           bool backwards) {
    size_t width = p->m - first < PANEL ? p->m - first : PANEL;
    size_t blocks = (p->k + k_block - 1) / k_block;
    bool ta = p->desc.transpose_a == CUBLAS_OP_T, tb = p->desc.transpose_b == CUBLAS_OP_T;
    size_t b_row = tb ? 1 : p->b.rows, b_k = tb ? p->b.rows : 1, lda = (size_t)p->a.ld;
    std::vector<float> sum(p->n * PANEL, 0.0f), part(p->n * PANEL), a(k_block * PANEL, 0.0f);
    for (size_t block = 0; block < blocks; block++) {
        size_t k0 = (backwards ? blocks - 1 - block : block) * k_block;
        size_t depth = p->k - k0 < k_block ? p->k - k0 : k_block;
        for (size_t l = 0; l < depth; l++)
            for (size_t i = 0; i < width; i++)
                a[l * PANEL + i] =
                    operand(p, o->a, ta ? k0 + l + (first + i) * lda : first + i + (k0 + l) * lda);
        part.assign(part.size(), 0.0f);
        tile_multiply(part.data(), PANEL, b + k0 * b_k, b_row, b_k, a.data(), PANEL, (int)p->n, PANEL,
                      (int)depth);
        for (size_t i = 0; i < sum.size(); i++) sum[i] += part[i];
    }
    for (size_t j = 0; j < p->n; j++)
        for (size_t i = 0; i < width; i++) finish(p, o, first + i, j, sum[j * PANEL + i]);
}

// bias (n) = the sums of op(B) over k, in blocks
static void sum_columns(const Problem* p, const float* b, size_t k_block) {
    bool tb = p->desc.transpose_b == CUBLAS_OP_T;
    size_t b_column = tb ? 1 : p->b.rows, b_k = tb ? p->b.rows : 1;
    for (size_t j = 0; j < p->n; j++) {
        float sum = 0, part = 0;
        for (size_t l = 0; l < p->k; l++) {
            part += b[j * b_column + l * b_k];
            if ((l + 1) % k_block == 0 || l + 1 == p->k) sum += part, part = 0;
        }
        put(p->desc.bias, p->bias_type, j, sum);
    }
}

// Reports memory that does not hold what the layout says.
static void check_memory(const char* name, const void* pointer, size_t bytes) {
    const EmuAllocation* memory = emu_find_allocation(pointer);
    if (memory == NULL) emu_report("cublasLtMatmul: %s is no memory of the device", name);
    size_t left = (size_t)(memory->begin + memory->bytes - (const char*)pointer);
    if (left < bytes)
        emu_report("cublasLtMatmul: %s takes %zu bytes, and only %zu are there", name, bytes, left);
}
static size_t bytes_of_matrix(const EmuLtLayout* l) {
    return (((size_t)l->columns - 1) * (size_t)l->ld + (size_t)l->rows) * bytes_of(l->type);
}

static void check_all_memory(const Problem* p, const Operands* o, const Algorithm* algorithm) {
    EmuLtLayout aux = {p->d.type, p->d.rows, p->d.columns, p->desc.aux_ld};
    size_t d_bytes = bytes_of_matrix(&p->d);
    bool gradient = p->epilogue->epilogue == CUBLASLT_EPILOGUE_BGRADB;
    check_memory("A", o->a, bytes_of_matrix(&p->a));
    check_memory("B", o->b, bytes_of_matrix(&p->b));
    check_memory("D", o->d, d_bytes);
    if (o->beta != 0) check_memory("C", o->c, d_bytes);
    if (p->epilogue->bias)
        check_memory("the bias", p->desc.bias, (gradient ? p->n : p->m) * bytes_of(p->bias_type));
    if (p->epilogue->aux) check_memory("the auxiliary matrix", p->desc.aux, bytes_of_matrix(&aux));
    if (algorithm->workspace > 0) check_memory("the workspace", o->workspace, algorithm->workspace);
    for (const void* input : {o->a, o->b})
        if (input == o->d) emu_report("cublasLtMatmul: D lies where an operand is read");
}

static void run_problem(const Problem* p, const Operands* o, const Algorithm* algorithm) {
    static unsigned long runs;
    check_all_memory(p, o, algorithm);
    bool backwards = algorithm->reduction == CUBLASLT_REDUCTION_SCHEME_INPLACE && runs++ % 2 == 1;
    if (algorithm->workspace > 0) memset(o->workspace, 0xFF, algorithm->workspace); // it is the library's
    std::vector<float> b(p->b.rows * p->b.columns);
#pragma omp parallel for
    for (size_t column = 0; column < p->b.columns; column++)
        for (size_t row = 0; row < p->b.rows; row++)
            b[row + column * p->b.rows] = operand(p, o->b, row + column * (size_t)p->b.ld);
#pragma omp parallel for
    for (size_t first = 0; first < p->m; first += PANEL)
        panel_multiply(p, o, b.data(), first, algorithm->k_block, backwards);
    if (p->epilogue->epilogue == CUBLASLT_EPILOGUE_BGRADB) sum_columns(p, b.data(), algorithm->k_block);
    emu_take("matmul", 2.0 * (double)p->m * (double)p->n * (double)p->k / emu_clock()->matmul);
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* A, cublasLtMatrixLayout_t a, const void* B,
                              cublasLtMatrixLayout_t b, const void* beta, const void* C,
                              cublasLtMatrixLayout_t c, void* D, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t* algorithm, void* workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
    EmuLock lock;
    Problem p;
    Choice choice;
    if (handle == NULL || alpha == NULL || beta == NULL || A == NULL || B == NULL || D == NULL ||
        algorithm == NULL)
        return CUBLAS_STATUS_INVALID_VALUE;
    cublasStatus_t status = make_problem(&p, desc, a, b, c, d);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    Operands o = {A, B, C, D, workspace, *(const float*)alpha, *(const float*)beta};
    if (o.beta != 0 && C == NULL) return CUBLAS_STATUS_INVALID_VALUE;
    if ((p.epilogue->bias && desc->bias == NULL) || (p.epilogue->aux && desc->aux == NULL))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (!read_choice(&choice, algorithm)) return CUBLAS_STATUS_NOT_SUPPORTED;
    const Algorithm* how = &algorithms[choice.number];
    if (how->workspace > workspace_bytes || !aligned(workspace, 16)) return CUBLAS_STATUS_INVALID_VALUE;
    const void* pointers[] = {A,
                              B,
                              o.beta != 0 ? C : D,
                              D,
                              p.epilogue->bias ? desc->bias : NULL,
                              p.epilogue->aux ? desc->aux : NULL};
    for (int i = 0; i < 6; i++)
        if (!aligned(pointers[i], choice.alignment[i])) return CUBLAS_STATUS_NOT_SUPPORTED;
    static const char* fault =
        getenv("EMU_FAULT"); // =matmul: the last bit of a product's first byte is wrong; =call: it fails
    if (fault != NULL && strcmp(fault, "call") == 0) return CUBLAS_STATUS_EXECUTION_FAILED;
    bool wrong = fault != NULL && strcmp(fault, "matmul") == 0;
    cudaError_t error = emu_enqueue(stream, [p, o, how, wrong] {
        run_problem(&p, &o, how);
        if (wrong) *(char*)o.d ^= 1;
    });
    if (error != cudaSuccess) return CUBLAS_STATUS_EXECUTION_FAILED;
    return CUBLAS_STATUS_SUCCESS;
}
