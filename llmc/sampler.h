// From logits to the next token: temperature, top-k, top-p (nucleus, arXiv 1904.09751), in this order.
#pragma once
#include <math.h>
#include <stdlib.h>

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
// u in (0, 1] is the random number; candidates (V) is scratch. A logit that is NaN is never taken, unless all
// are.
static inline int sample_token(const float* logits, int V, double temperature, int top_k, double top_p,
                               double u, Candidate* candidates) {
    int best = 0;
    for (int i = 1; i < V; i++)
        if (logits[i] > logits[best] || isnan(logits[best])) best = i;
    if (temperature <= 0 || isnan(logits[best])) return isnan(logits[best]) ? 0 : best;
    for (int i = 0; i < V; i++) {
        // infinities: the largest logit has 0 even where inf - inf would be NaN
        double x = logits[i] == logits[best] ? 0.0 : ((double)logits[i] - logits[best]) / temperature;
        candidates[i].probability = isnan(x) ? 0.0f : expf((float)x);
        candidates[i].token = i;
    }
    qsort(candidates, (size_t)V, sizeof *candidates, compare_candidates);
    int n = top_k > 0 && top_k < V ? top_k : V;
    double total = 0;
    for (int i = 0; i < n; i++) total += candidates[i].probability;
    // the nucleus: the smallest set of the most probable tokens that holds top_p of the mass
    double kept = candidates[0].probability;
    int size = 1;
    while (size < n && kept < top_p * total) kept += candidates[size++].probability;
    double seen = 0;
    for (int i = 0; i < size; i++) {
        seen += candidates[i].probability;
        if (seen >= u * kept) return candidates[i].token;
    }
    return candidates[size - 1].token;
}
