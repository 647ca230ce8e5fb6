// From logits to the next token: temperature, top-k, top-p (nucleus, arXiv 1904.09751), in this order.
#pragma once
#include <math.h>

#include "llmc/utils.h" // defines: malloc_check

typedef struct {
    float probability; // before normalisation
    int token;
} Candidate;

// Most probable first; ties in the order of the vocabulary, so that sorting is a function of the logits.
static inline int compare_candidates(const void* a, const void* b) {
    const Candidate *x = (const Candidate*)a, *y = (const Candidate*)b;
    if (x->probability != y->probability) return x->probability < y->probability ? 1 : -1;
    return x->token - y->token;
}

// One token from logits (V). temperature 0 takes the most probable; top_k 0 and top_p 1 do not restrict.
// u in (0, 1] is the random number; candidates (V) is scratch.
static inline int sample_token(const float* logits, int V, double temperature, int top_k, double top_p,
                               double u, Candidate* candidates) {
    float max = -INFINITY;
    for (int i = 0; i < V; i++) max = logits[i] > max ? logits[i] : max;
    for (int i = 0; i < V; i++) {
        float x = logits[i] - max;
        candidates[i].probability = temperature > 0 ? expf((float)(x / temperature)) : x;
        candidates[i].token = i;
    }
    qsort(candidates, (size_t)V, sizeof *candidates, compare_candidates);
    if (temperature <= 0) return candidates[0].token;
    int n = top_k > 0 && top_k < V ? top_k : V;
    double total = 0;
    for (int i = 0; i < n; i++) total += candidates[i].probability;
    // the nucleus: the smallest set of the most probable tokens that holds top_p of the mass
    double kept = 0;
    int last = 0;
    for (; last < n; last++) {
        kept += candidates[last].probability;
        if (kept >= top_p * total) break;
    }
    n = last < n ? last + 1 : n;
    double point = u * kept, seen = 0;
    for (int i = 0; i < n; i++) {
        seen += candidates[i].probability;
        if (seen >= point) return candidates[i].token;
    }
    return candidates[n - 1].token;
}
