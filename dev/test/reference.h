// The CPU reference from other translation units: train_gpt.c as it is, once in fp64 (reference_...), which is
// the truth, and once in fp32 (reference32_...), which is the yardstick of fp32 builds.
#pragma once
#include "llmc/config.h" // defines: RunConfig

#ifdef __cplusplus
extern "C" {
#endif

typedef struct Reference Reference;

// What reference_get copies out: weights and gradients are laid out by parameter_layout; logits (B T, Vp) and
// losses (B T) are those of the last reference_losses.
enum ReferenceArray { REFERENCE_WEIGHTS, REFERENCE_GRADS, REFERENCE_LOGITS, REFERENCE_LOSSES };

#define REFERENCE_FUNCTIONS(name)                                                                            \
    Reference* name##_create(const RunConfig* run);                                                          \
    void name##_free(Reference* r);                                                                          \
    void name##_set_weights(Reference* r, const double* weights);                                            \
    void name##_get(const Reference* r, int array, double* out);                                             \
    /* logits and losses of rows (B, T + 1); token 0 begins a document where mask is true */                 \
    void name##_losses(Reference* r, const int32_t* rows, bool mask);                                        \
    /* adds the gradients of the mean loss of rows (B, T + 1) */                                             \
    void name##_gradients(Reference* r, const int32_t* rows, bool mask);                                     \
    /* an optimizer step on rows (global_batch_size, T + 1); returns the mean loss */                        \
    double name##_step(Reference* r, const RunConfig* run, const int32_t* rows, double lr,                   \
                       uint64_t applied_steps, double* grad_norm);                                           \
    /* such a step, measured, if run->log.layers_every asks for it: norms (L + 2, NUM_LAYER_NORMS) */        \
    void name##_layer_norms(Reference* r, const RunConfig* run, const int32_t* rows, double lr,              \
                            uint64_t applied_steps, double* norms);

REFERENCE_FUNCTIONS(reference)
REFERENCE_FUNCTIONS(reference32)

#ifdef __cplusplus
}
#endif
