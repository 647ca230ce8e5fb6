// Autotuning of matmuls (part of matmul.cuh): every algorithm that cuBLASLt proposes for a shape is timed once,
// and the choice is kept beside the run, so that a resume computes with the same algorithms, to the bit.
//
//     matmul_algorithms.txt
//     pretrain.c matmul algorithms | NVIDIA H200 | cuBLASLt 130100
//     m n k transpose_a transpose_b accumulate epilogue d_type  16 hexadecimal digits, eight times
//
// The eight words are cublasLtMatmulAlgo_t, which may be stored and used again with the same library version. A
// file of another GPU or version is set aside with a note; a line that is not understood is an error.
#pragma once

enum { MATMUL_TIMINGS = 5 };

static inline void choices_header(char out[512]) {
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
    snprintf(out, 512, "pretrain.c matmul algorithms | %s | cuBLASLt %zu", properties.name,
             cublasLtGetVersion());
}

static inline bool choices_parse_line(MatmulPlan* plan, const char* line) {
    MatmulShape* s = &plan->shape;
    int ta, tb, accumulate, end = 0;
    unsigned long long w[8];
    if (sscanf(line, "%d %d %d %d %d %d %d %d %llx %llx %llx %llx %llx %llx %llx %llx%n", &s->m, &s->n, &s->k,
               &ta, &tb, &accumulate, &s->epilogue, &s->d_type, &w[0], &w[1], &w[2], &w[3], &w[4], &w[5],
               &w[6], &w[7], &end) != 16 ||
        line[end] != '\0')
        return false;
    s->transpose_a = ta != 0, s->transpose_b = tb != 0, s->accumulate = accumulate != 0;
    for (int i = 0; i < 8; i++) plan->algorithm.data[i] = w[i];
    return true;
}

// Reads the choices of earlier runs, or begins a new file.
static inline bool choices_load(Matmul* mm, Error* err) {
    char header[512];
    size_t size, capacity = 0;
    Error none = {0, {0}};
    choices_header(header);
    char* text = read_file(mm->choices, (size_t)1 << 20, &size, &none);
    char *rest = text, *line = text != NULL ? strsep(&rest, "\n") : NULL;
    if (line == NULL || strcmp(line, header) != 0) {
        if (line != NULL)
            fprintf(stderr, "note: %s is of another GPU or cuBLASLt; tuning anew\n", mm->choices);
        free(text);
        String begin = {NULL, 0, 0};
        string_append(&begin, "%s\n", header);
        bool ok = replace_file(mm->choices, begin.data, begin.size, err);
        free(begin.data);
        return ok;
    }
    for (int number = 2; (line = strsep(&rest, "\n")) != NULL && line[0] != '\0'; number++) {
        if ((size_t)mm->num_stored == capacity) {
            capacity = 2 * capacity + 16;
            mm->stored = (MatmulPlan*)realloc_check(mm->stored, capacity * sizeof *mm->stored);
        }
        if (!choices_parse_line(&mm->stored[mm->num_stored], line)) {
            fail(err, EXIT_BAD_DATA, "%s, line %d is damaged: remove the file, and the run tunes anew",
                 mm->choices, number);
            break;
        }
        mm->num_stored++;
    }
    free(text);
    return err->code == 0;
}

// Takes a plan's algorithm from the file, if it is there and cuBLASLt still accepts it.
static inline bool choices_find(const Matmul* mm, MatmulPlan* plan) {
    cublasLtMatmulHeuristicResult_t result;
    for (int i = 0; i < mm->num_stored; i++) {
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

static inline void choices_append(const Matmul* mm, const MatmulPlan* plan) {
    const MatmulShape* s = &plan->shape;
    FILE* out = fopen(mm->choices, "a");
    if (out == NULL) { // a run goes on without; a resume will tune again
        fprintf(stderr, "warning: cannot write %s: %s\n", mm->choices, strerror(errno));
        return;
    }
    fprintf(out, "%d %d %d %d %d %d %d %d", s->m, s->n, s->k, s->transpose_a, s->transpose_b, s->accumulate,
            s->epilogue, s->d_type);
    for (int i = 0; i < 8; i++) fprintf(out, " %016llx", (unsigned long long)plan->algorithm.data[i]);
    fprintf(out, "\n");
    fclose(out);
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
