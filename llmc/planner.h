// Says what a run would take before it runs: parameters, FLOPs, memory to the byte, time. Plain C; the
// program that would allocate the memory hands in the sizes, from the same functions that lay it out.
#pragma once
#include "llmc/config.h"  // defines: RunConfig
#include "llmc/flops.h"   // defines: flops_per_token, matmul_parameters
#include "llmc/metrics.h" // defines: format_duration

typedef struct {
    const char* name;
    uint64_t bytes;
} MemoryLine;

typedef struct {
    const RunConfig* run;
    int num_memory;
    const MemoryLine* memory;
    uint64_t memory_limit;     // bytes; 0: not known
    const char* memory_advice; // what would make it fit; NULL: it fits, or nothing would
    double peak_flops;         // the device's, from its data sheet; 0: not known
    double matmul_rate;        // FLOP/s, measured; 0: not known
    double copy_rate;          // bytes/s read and written, measured
    uint64_t train_tokens;     // 0: no data yet
} Plan;

// Bytes of memory in this machine.
static inline uint64_t physical_memory(void) {
    return (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
}

// 12345678 -> "12,345,678"
static inline const char* with_commas(char out[32], uint64_t n) {
    char digits[24];
    int length = snprintf(digits, sizeof digits, "%llu", (unsigned long long)n), at = 0;
    for (int i = 0; i < length; i++) {
        if (i > 0 && (length - i) % 3 == 0) out[at++] = ',';
        out[at++] = digits[i];
    }
    out[at] = '\0';
    return out;
}

static inline void plan_print_model(const RunConfig* run, FILE* out) {
    const ModelConfig* c = &run->model;
    char n[32], matmul[32];
    fprintf(out,
            "model        %s: %d layers, hidden %d, %d query and %d key/value heads of %d, feed-forward %d, "
            "vocabulary %d (%d in memory), %s head\n",
            c->family->model_type, c->num_hidden_layers, c->hidden_size, c->num_attention_heads,
            c->num_key_value_heads, c->head_dim, c->intermediate_size, c->vocab_size,
            padded_vocab_size(c->vocab_size), c->tie_word_embeddings ? "tied" : "untied");
    fprintf(out, "parameters   %s, of which %s take part in matmuls (N)\n",
            with_commas(n, model_num_parameters(c)), with_commas(matmul, (uint64_t)matmul_parameters(c)));
}

static inline void plan_print_memory(const Plan* plan, FILE* out) {
    char n[32];
    uint64_t total = 0, there = plan->memory_limit;
    double parameters = (double)model_num_parameters(&plan->run->model);
    fprintf(out, "memory       every array that training keeps, in bytes\n");
    for (int i = 0; i < plan->num_memory; i++) {
        uint64_t bytes = plan->memory[i].bytes;
        fprintf(out, "  %-18s %20s   %.2f a parameter\n", plan->memory[i].name, with_commas(n, bytes),
                (double)bytes / parameters);
        total += bytes;
    }
    fprintf(out, "  %-18s %20s   %.2f a parameter, %.2f GB; ", "total", with_commas(n, total),
            (double)total / parameters, (double)total / 1e9);
    if (there == 0)
        fprintf(out, "what there is for it is not known here\n");
    else
        fprintf(out, "there are %.2f GB: %s\n", (double)there / 1e9,
                total <= there ? "it fits" : "IT DOES NOT FIT");
    if (there != 0 && total > there)
        fprintf(out, "               %s%s\n",
                plan->memory_advice != NULL ? "it would with " : "take a smaller model",
                plan->memory_advice != NULL ? plan->memory_advice : "");
}

// Matmuls and attention at the measured matmul rate; the optimizer's 36 bytes a parameter (weight, gradient
// and two moments read and written, and the gradient read once more for its norm) at the measured copy rate.
// What is left out (norms, activations, the softmax) is small beside them.
static inline double plan_step_seconds(const Plan* plan) {
    const RunConfig* run = plan->run;
    double tokens = (double)run->batch.global_batch_size * run->batch.sequence_length;
    double flops = tokens * flops_per_token(&run->model, run->batch.sequence_length, FLOPS_CAUSAL);
    return flops / plan->matmul_rate + 36.0 * (double)model_num_parameters(&run->model) / plan->copy_rate;
}

static inline void plan_print_time(const Plan* plan, FILE* out) {
    double seconds = plan_step_seconds(plan);
    double tokens = (double)plan->run->batch.global_batch_size * plan->run->batch.sequence_length;
    char step[16], whole[24];
    format_duration(whole, seconds * plan->run->schedule.max_steps);
    snprintf(step, sizeof step, seconds < 1 ? "%.0f ms" : "%.2f s", seconds < 1 ? 1000 * seconds : seconds);
    fprintf(
        out,
        "time         about %s a step, %.0f tokens/s, %s in all: an estimate from a matmul at %.0f GFLOP/s\n"
        "             and a copy at %.1f GB/s, measured now\n",
        step, tokens / seconds, whole, plan->matmul_rate / 1e9, plan->copy_rate / 1e9);
    if (plan->peak_flops <= 0) return;
    int T = plan->run->batch.sequence_length;
    fprintf(out,
            "             utilisation of the data sheet's %.1f TFLOP/s: %.1f %% counting causal attention, "
            "%.1f %% by PaLM's\n             convention\n",
            plan->peak_flops / 1e12,
            100 * tokens / seconds * flops_per_token(&plan->run->model, T, FLOPS_CAUSAL) / plan->peak_flops,
            100 * tokens / seconds * flops_per_token(&plan->run->model, T, FLOPS_PALM) / plan->peak_flops);
}

static inline void plan_print(const Plan* plan, FILE* out) {
    const RunConfig* run = plan->run;
    int T = run->batch.sequence_length, B = run->batch.micro_batch_size, G = run->batch.global_batch_size;
    uint64_t tokens = (uint64_t)G * (uint64_t)T, all = tokens * (uint64_t)run->schedule.max_steps;
    double causal = flops_per_token(&run->model, T, FLOPS_CAUSAL),
           palm = flops_per_token(&run->model, T, FLOPS_PALM);
    char a[32], b[32];
    plan_print_model(run, out);
    fprintf(out,
            "batch        %d sequences of %d = %s tokens a step, in %d micro-batches of %d; "
            "%s tokens in %d steps\n",
            G, T, with_commas(a, tokens), G / B, B, with_commas(b, all), run->schedule.max_steps);
    if (plan->train_tokens != 0)
        fprintf(out, "data         %s tokens: %.2f epochs\n", with_commas(a, plan->train_tokens),
                (double)all / (double)plan->train_tokens);
    fprintf(out,
            "compute      %.4g FLOP a token counting causal attention (6 N + 6 L T Q), "
            "%.4g by PaLM's convention\n"
            "             (6 N + 12 L T Q); %.3g FLOP in all (causal)\n",
            causal, palm, causal * (double)all);
    plan_print_memory(plan, out);
    if (run->layout.size == 1 && plan->matmul_rate > 0 && plan->copy_rate > 0)
        plan_print_time(plan, out);
    else if (run->layout.size == 1)
        fprintf(out, "time         not known: there is no device here to measure\n");
    // fp32 weights and two moments
    fprintf(out, "checkpoint   %s bytes each, plus the tokenizer; %d kept\n",
            with_commas(a, 12 * model_num_parameters(&run->model)), run->checkpoint.keep_last);
}
