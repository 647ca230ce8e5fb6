// test_gpt2.cu: the CUDA build held against the CPU reference, layer by layer and as a whole. It runs on a
// GPU, and on the CPU through dev/emu. Output is TAP.
//
//     test_gpt2 [layers|attention|matmul|optimizer|nccl|model ...]     all of them, or those named; without
//                                                                      arguments, TEST_GROUPS may name them
//
// The rule (dev/doc/numerics.md): the error of a kernel is at most twice the error of the plain formula in
// the same precision, both against fp64.
#define TESTING
#include "train_gpt.cu"

#include "dev/test/cuda_attention.cuh" // defines: test_attention
#include "dev/test/cuda_layers.cuh"    // defines: test_layers
#include "dev/test/cuda_matmul.cuh"    // defines: test_matmul
#include "dev/test/cuda_model.cuh"     // defines: test_model
#include "dev/test/cuda_optimizer.cuh" // defines: test_optimizer
#ifdef USE_NCCL
#include "dev/test/cuda_nccl.cuh" // defines: test_nccl
#endif

static const struct {
    const char* name;
    void (*run)(void);
} groups[] = {{"layers", test_layers}, {"attention", test_attention},
              {"matmul", test_matmul}, {"optimizer", test_optimizer},
#ifdef USE_NCCL
              {"nccl", test_nccl},
#endif
              {"model", test_model}};

int main(int argc, char** argv) {
    const char* named = getenv("TEST_GROUPS");
    for (size_t i = 0; i < sizeof groups / sizeof groups[0]; i++) {
        bool wanted = argc < 2 && (named == NULL || strstr(named, groups[i].name) != NULL);
        for (int a = 1; a < argc; a++) wanted = wanted || strcmp(argv[a], groups[i].name) == 0;
        if (wanted) groups[i].run();
    }
    return tap_finish();
}
