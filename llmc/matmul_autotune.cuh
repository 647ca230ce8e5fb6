// Autotuning of matmuls (part of matmul.cuh): every algorithm that cuBLASLt proposes for a shape is timed once,
// and the choice is kept beside the run, so that a resume computes with the same algorithms, to the bit.
//
//     matmul_algorithms.txt
//     pretrain.c matmul algorithms | NVIDIA H200 | cuBLASLt 130100 | bf16
//     m n k transpose_a transpose_b accumulate epilogue d_type  16 hexadecimal digits, eight times
//
// The eight words are cublasLtMatmulAlgo_t, which may be stored and used again with the same library version. Of
// two lines for one product the later counts. A file of another GPU, version or precision is begun anew with a
// note; a line that is not understood is an error, but for the start of a last one that a kill cut short, which
// is dropped.
#pragma once

enum { MATMUL_TIMINGS = 5 };

static inline void choices_header(const Matmul* mm, char out[512]) {
    const char* fp32 = mm->compute == CUBLAS_COMPUTE_32F_FAST_TF32 ? "tf32" : "fp32";
    cudaDeviceProp properties;
    int device;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    snprintf(out, 512, "pretrain.c matmul algorithms | %s | cuBLASLt %zu | %s", properties.name,
             cublasLtGetVersion(), MATMUL_TYPE == CUDA_R_16BF ? "bf16" : fp32);
}

enum { CHOICES_LINE = 256 };
static inline void choices_line(char out[CHOICES_LINE], const MatmulPlan* plan) {
    const MatmulShape* s = &plan->shape;
    int n = snprintf(out, CHOICES_LINE, "%d %d %d %d %d %d %d %d", s->m, s->n, s->k, s->transpose_a,
                     s->transpose_b, s->accumulate, s->epilogue, s->d_type);
    for (int i = 0; i < 8; i++)
        n += snprintf(out + n, (size_t)(CHOICES_LINE - n), " %016llx",
                      (unsigned long long)plan->algorithm.data[i]);
}

// A line that would not be written as it is read (cut short, a number too large) is damaged.
static inline bool choices_parse_line(MatmulPlan* plan, const char* line) {
    MatmulShape* s = &plan->shape;
    int ta, tb, accumulate;
    unsigned long long w[8];
    char written[CHOICES_LINE];
    if (sscanf(line, "%d %d %d %d %d %d %d %d %llx %llx %llx %llx %llx %llx %llx %llx", &s->m, &s->n, &s->k,
               &ta, &tb, &accumulate, &s->epilogue, &s->d_type, &w[0], &w[1], &w[2], &w[3], &w[4], &w[5],
               &w[6], &w[7]) != 16)
        return false;
    s->transpose_a = ta != 0, s->transpose_b = tb != 0, s->accumulate = accumulate != 0;
    for (int i = 0; i < 8; i++) plan->algorithm.data[i] = w[i];
    choices_line(written, plan);
    return strcmp(written, line) == 0;
}

// Begins a file of choices.
static inline bool choices_begin(const Matmul* mm, const char* header, Error* err) {
    String text = {NULL, 0, 0};
    string_append(&text, "%s\n", header);
    bool ok = replace_file(mm->choices, text.data, text.size, err);
    free(text.data);
    return ok;
}

// The lines behind the header.
static inline bool choices_parse(Matmul* mm, char* rest, Error* err) {
    size_t capacity = 0;
    char* line;
    for (int number = 2; (line = strsep(&rest, "\n")) != NULL && line[0] != '\0'; number++) {
        if ((size_t)mm->num_stored == capacity) {
            capacity = 2 * capacity + 16;
            mm->stored = (MatmulPlan*)realloc_check(mm->stored, capacity * sizeof *mm->stored);
        }
        if (!choices_parse_line(&mm->stored[mm->num_stored++], line))
            return fail(err, EXIT_BAD_DATA, "%s, line %d is damaged: remove the file, and the run tunes anew",
                        mm->choices, number);
    }
    return true;
}

// Reads the choices of earlier runs, or begins a new file.
static inline bool choices_load(Matmul* mm, Error* err) {
    char header[512];
    struct stat status;
    size_t size;
    choices_header(mm, header);
    if (stat(mm->choices, &status) != 0 && errno == ENOENT) return choices_begin(mm, header, err);
    char* text = read_file(mm->choices, (size_t)1 << 20, &size, err);
    if (text == NULL) return false;
    while (size > 0 && text[size - 1] != '\n') size--;
    text[size] = '\0';
    if (truncate(mm->choices, (off_t)size) != 0)
        fprintf(stderr, "warning: cannot write %s: %s\n", mm->choices, strerror(errno));
    char *rest = text, *line = strsep(&rest, "\n");
    bool ours = strcmp(line, header) == 0;
    if (!ours && size > 0)
        fprintf(stderr, "note: %s is of another GPU, cuBLASLt or precision; tuning anew\n", mm->choices);
    bool ok = ours ? choices_parse(mm, rest, err) : choices_begin(mm, header, err);
    free(text);
    return ok;
}

// Takes a plan's algorithm from the file, if it is there and cuBLASLt still accepts it.
static inline bool choices_find(const Matmul* mm, MatmulPlan* plan) {
    cublasLtMatmulHeuristicResult_t result;
    for (int i = mm->num_stored - 1; i >= 0; i--) {
        if (!same_shape(&mm->stored[i].shape, &plan->shape)) continue;
        if (cublasLtMatmulAlgoCheck(mm->handle, plan->operation, plan->a, plan->b, plan->d, plan->d,
                                    &mm->stored[i].algorithm, &result) != CUBLAS_STATUS_SUCCESS ||
            result.workspaceSize > MATMUL_WORKSPACE)
            return false;
        plan->algorithm = mm->stored[i].algorithm;
        return true;
    }
    return false;
}

// Adds a line. A run goes on where it cannot; only, a resume will tune again.
static inline void choices_append(const Matmul* mm, const MatmulPlan* plan) {
    char line[CHOICES_LINE];
    FILE* out = fopen(mm->choices, "a");
    choices_line(line, plan);
    bool ok = out != NULL && fprintf(out, "%s\n", line) > 0;
    ok = out != NULL && fclose(out) == 0 && ok;
    if (!ok) fprintf(stderr, "warning: cannot write %s: %s\n", mm->choices, strerror(errno));
}

// Milliseconds of one run into `out`; negative if the algorithm does not run.
static inline float time_algorithm(const MatmulPlan* plan, const Matmul* mm,
                                   const cublasLtMatmulAlgo_t* algorithm, void* out, const void* a,
                                   const void* b, cudaEvent_t begin, cudaEvent_t end) {
    float best = INFINITY;
    for (int i = 0; i < MATMUL_TIMINGS; i++) {
        float now;
        CUDA_CHECK(cudaEventRecord(begin, mm->stream));
        if (plan_run(plan, mm, out, a, b, algorithm) != CUBLAS_STATUS_SUCCESS) return -1;
        CUDA_CHECK(cudaEventRecord(end, mm->stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        CUDA_CHECK(cudaEventElapsedTime(&now, begin, end));
        best = fminf(best, now);
    }
    return best;
}

// Chooses the fastest of the candidates on the operands of the first use. The result goes to memory of its own,
// since a gradient that accumulates must not do so once for every try; what an epilogue writes besides (a bias
// gradient, what GELU keeps) comes out the same every time.
static inline void plan_autotune(MatmulPlan* plan, Matmul* mm, const cublasLtMatmulHeuristicResult_t* results,
                                 int found, const void* a, const void* b) {
    size_t element = plan->shape.d_type == CUDA_R_32F ? 4 : 2;
    size_t bytes = (size_t)plan->shape.m * (size_t)plan->shape.n * element;
    void* out = NULL;
    cudaEvent_t begin, end;
    if (cudaMalloc(&out, bytes) != cudaSuccess) {
        cudaGetLastError();
        fprintf(stderr,
                "note: no %zu bytes of GPU memory to tune a matmul in; taking cuBLASLt's first choice\n",
                bytes);
        return;
    }
    CUDA_CHECK(cudaMemsetAsync(out, 0, bytes, mm->stream));
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    float best = INFINITY;
    for (int i = 0; i < found; i++) {
        float ms = time_algorithm(plan, mm, &results[i].algo, out, a, b, begin, end);
        if (ms < 0 || ms >= best) continue;
        best = ms, plan->algorithm = results[i].algo;
    }
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    CUDA_CHECK(cudaFree(out));
}
