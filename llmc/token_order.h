// The positions of a micro-batch in the order of their tokens, by which the embedding's gradient is summed
// without atomics: all rows of one token lie together, in the order in which they stand in the batch; those of
// tokens that another rank has (negative) come last.
#pragma once
#include <string.h>

// order (N) = a permutation of 0 .. N-1, stable; tokens (N) in [0, V) or -1; counts: V + 2 ints of scratch
static inline void token_order(int* order, const int* tokens, int N, int V, int* counts) {
    memset(counts, 0, ((size_t)V + 2) * sizeof *counts);
    for (int n = 0; n < N; n++) counts[(tokens[n] < 0 ? V : tokens[n]) + 1]++;
    for (int v = 0; v <= V; v++) counts[v + 1] += counts[v]; // counts[v] is where v begins
    for (int n = 0; n < N; n++) order[counts[tokens[n] < 0 ? V : tokens[n]]++] = n;
}
