// How large each layer's gradient, weights, update and activations are, in the steps where it is asked for
// (log.layers_every). The whole model's layers have an entry each, what lies before them (the embedding) and
// behind (the last norm, the head) one more: (L + 2), entry 1 + l is layer l's, as buckets are numbered.
#pragma once

enum LayerNorm {
    LAYER_GRAD_NORM,   // before clipping: the squares add up to that of the step's gradient norm
    LAYER_WEIGHT_NORM, // behind the update
    LAYER_UPDATE_NORM, // of the new weights less the old ones; 0 in a step that is skipped
    // root mean square, over the step's tokens, of the residual stream that leaves the layer; of the first
    // entry, of what enters layer 0; of the last one, of what the head reads
    LAYER_ACTIVATION_RMS,
    NUM_LAYER_NORMS
};

static const char* const layer_norm_keys[NUM_LAYER_NORMS] = {"grad_norm", "weight_norm", "update_norm",
                                                             "activation_rms"};

typedef struct {
    double of[NUM_LAYER_NORMS];
} LayerNorms;
