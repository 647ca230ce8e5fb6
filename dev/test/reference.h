// The CPU reference in fp64, from another translation unit: train_gpt.c as it is, with REAL=double.
#pragma once
#include "llmc/config.h" // defines: RunConfig

#ifdef __cplusplus
extern "C" {
#endif

typedef struct Reference Reference;

Reference* reference_create(const RunConfig* run);
void reference_free(Reference* r);
double* reference_weights(Reference* r); // laid out by parameter_layout, as are the gradients
double* reference_grads(Reference* r);

// Adds the gradients of one micro-batch, rows (B, T + 1), of the mean loss; returns the sum of the losses.
// Token 0 begins a document where mask is true.
double reference_gradients(Reference* r, const int32_t* rows, bool mask);

// A whole optimizer step on rows (global_batch_size, T + 1); returns the mean loss.
double reference_step(Reference* r, const RunConfig* run, const int32_t* rows, double lr,
                      uint64_t applied_steps, double* grad_norm);

#ifdef __cplusplus
}
#endif
