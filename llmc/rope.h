// Rotary position embedding: the table of angles, shared by the CPU and the CUDA layers. Pair i of a head
// (elements i and i + HS/2, Hugging Face's rotate_half layout) turns by position * f_i with f_i = theta^(-2 i
// / HS), slowed down for long contexts by one of the scalings below. Source: Su et al., RoFormer, 2021;
// scalings as in transformers' modeling_rope_utils (_compute_linear_scaling, _compute_llama3_parameters). As
// there, frequencies and angles are rounded to fp32: at position 8000 an unrounded frequency would turn by
// 5e-4 more or less, and the weights were trained with the rounded ones.
#pragma once
#include <math.h>
#include <stddef.h>

enum RopeScaling { ROPE_SCALING_NONE, ROPE_SCALING_LINEAR, ROPE_SCALING_LLAMA3 };

// The "rope_scaling" object of a Hugging Face config, with rope_theta.
typedef struct {
    double theta;
    int scaling;                              // a RopeScaling
    double factor;                            // linear and llama3
    double low_freq_factor, high_freq_factor; // llama3
    int original_max_position_embeddings;     // llama3
} RopeConfig;

// Radians by which pair i turns from one position to the next.
static inline float rope_frequency(const RopeConfig* config, int i, int HS) {
    float frequency = 1.0f / (float)pow(config->theta, (double)(2 * i) / HS);
    if (config->scaling == ROPE_SCALING_LINEAR) return frequency / (float)config->factor;
    if (config->scaling != ROPE_SCALING_LLAMA3) return frequency;
    // Llama 3: waves that turn high_freq_factor times or more in the original context stay, those that turn
    // less than low_freq_factor times are stretched, in between both are blended.
    double turns = config->original_max_position_embeddings * frequency / (2 * 3.14159265358979323846);
    if (turns > config->high_freq_factor) return frequency;
    if (turns < config->low_freq_factor) return frequency / (float)config->factor;
    double keep = (turns - config->low_freq_factor) / (config->high_freq_factor - config->low_freq_factor);
    return (float)((1 - keep) * frequency / config->factor + keep * frequency);
}

// cos_table, sin_table (T, HS/2): position t, pair i
static inline void rope_table(float* cos_table, float* sin_table, const RopeConfig* config, int T, int HS) {
    int half = HS / 2;
    for (int i = 0; i < half; i++) {
        float frequency = rope_frequency(config, i, HS);
        for (int t = 0; t < T; t++) {
            float angle = (float)t * frequency;
            cos_table[(size_t)t * (size_t)half + (size_t)i] = (float)cos((double)angle);
            sin_table[(size_t)t * (size_t)half + (size_t)i] = (float)sin((double)angle);
        }
    }
}
