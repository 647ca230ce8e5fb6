// Does a run fit into the memory there is for it, and what would make it fit: found by planning it again.
#pragma once
#include "llmc/config_print.h"   // defines: append_choice
#include "llmc/layout_resolve.h" // defines: layout_resolve
#include "llmc/program.h"        // defines: gpt_memory, gpt_memory_limit, gpt_resolve

static inline uint64_t memory_needed(const RunConfig* run, bool training) {
    MemoryLine lines[MEMORY_LINES_MAX];
    uint64_t total = 0;
    for (int i = gpt_memory(run, training, lines); i > 0; i--) total += lines[i - 1].bytes;
    return total;
}

// Changes of a training run that save memory, those first that cost the least time, then those that cost
// accuracy: an int field, and the value that it gets.
enum { AS_FITS = -1 }; // the largest divisor that fits
static const struct {
    const char *section, *key;
    int value;
} memory_savers[] = {
    {"batch", "recompute", RECOMPUTE_ACTIVATION}, {"batch", "recompute", RECOMPUTE_NORM},
    {"batch", "micro_batch_size", AS_FITS},       {"batch", "recompute", RECOMPUTE_BLOCK},
    {"precision", "moments", STORE_BF16},         {"precision", "gradients", STORE_BF16},
    {"precision", "master_weights", STORE_BF16},
};
enum { NUM_MEMORY_SAVERS = sizeof memory_savers / sizeof memory_savers[0] };

// 1 where not even that fits.
static inline int micro_batch_that_fits(const RunConfig* run, uint64_t limit) {
    RunConfig trial = *run;
    int B = run->batch.micro_batch_size;
    for (int b = B; b > 1; b--) {
        trial.batch.micro_batch_size = b;
        if (B % b == 0 && memory_needed(&trial, true) <= limit) return b;
    }
    return 1;
}

static inline int* saver_field(const RunConfig* run, int i) {
    const Knob* knob = find_knob(memory_savers[i].section, memory_savers[i].key);
    return (int*)(void*)((char*)run + knob->offset);
}

// Makes change i. False: nothing to change, this program refuses it, or it saves nothing.
static inline bool save_memory(RunConfig* run, int i, uint64_t limit) {
    RunConfig changed = *run;
    Error refused = {0, {0}};
    int *field = saver_field(&changed, i), was = *field;
    bool as_fits = memory_savers[i].value == AS_FITS;
    *field = as_fits ? micro_batch_that_fits(run, limit) : memory_savers[i].value;
    if (as_fits ? *field == was : *field <= was) return false;
    // the rule between the two (config.h)
    bool part = changed.batch.recompute == RECOMPUTE_ACTIVATION || changed.batch.recompute == RECOMPUTE_NORM;
    if (part && changed.model.family->activation == ACTIVATION_GELU_TANH)
        changed.precision.fused_gelu = false;
    if (!layout_resolve(&changed, run->layout.rank, run->layout.size, &refused) ||
        !gpt_resolve(&changed, true, &refused) || memory_needed(&changed, true) >= memory_needed(run, true))
        return false;
    *run = changed;
    return true;
}

// What is different in `changed`, as the command line has it.
static inline void describe_changes(const RunConfig* run, const RunConfig* changed, String* out) {
    const char* space = "";
    for (int i = 0; i < NUM_MEMORY_SAVERS; i++) {
        const Knob* knob = find_knob(memory_savers[i].section, memory_savers[i].key);
        bool seen = false;
        for (int k = 0; k < i; k++) seen = seen || saver_field(run, k) == saver_field(run, i);
        int value = *saver_field(changed, i);
        if (seen || value == *saver_field(run, i)) continue;
        string_append(out, "%s%s.%s=", space, knob->section, knob->key);
        if (knob->type == KNOB_CHOICE)
            append_choice(out, knob->choices, value);
        else
            string_append(out, "%d", value);
        space = " ";
    }
    if (changed->precision.fused_gelu != run->precision.fused_gelu)
        string_append(out, " precision.fused_gelu=false");
}

// The three cheapest changes each of which makes the run fit; where none does alone, as many together as it
// takes. Empty: nothing helps.
static inline void memory_advice(const RunConfig* run, uint64_t limit, String* advice) {
    int found = 0;
    for (int i = 0; i < NUM_MEMORY_SAVERS && found < 3; i++) {
        RunConfig changed = *run;
        if (!save_memory(&changed, i, limit) || memory_needed(&changed, true) > limit) continue;
        string_append(advice, "%s", found++ > 0 ? ", or " : "");
        describe_changes(run, &changed, advice);
    }
    RunConfig all = *run;
    if (found > 0) return;
    for (int i = 0; i < NUM_MEMORY_SAVERS && memory_needed(&all, true) > limit; i++)
        save_memory(&all, i, limit);
    if (memory_needed(&all, true) <= limit) describe_changes(run, &all, advice);
}

// Before anything is allocated. Where the limit is not known, allocating will tell.
static inline bool check_memory(const RunConfig* run, bool training, Error* err) {
    uint64_t needed = memory_needed(run, training), there = gpt_memory_limit();
    if (there == 0 || needed <= there) return true;
    String advice = {NULL, 0, 0};
    if (training) memory_advice(run, there, &advice);
    const char* otherwise = training ? "take a smaller model" : "lower batch.micro_batch_size";
    fail(err, EXIT_OS,
         "this run needs %.2f GB of memory and there are %.2f GB for it: %s%s (`plan` says more)",
         (double)needed / 1e9, (double)there / 1e9, advice.size > 0 ? "set " : otherwise,
         advice.size > 0 ? advice.data : "");
    free(advice.data);
    return false;
}
