// Which positions of a sequence are a rank's, where ranks share sequences (context parallelism).
//
// A sequence is cut into 2 * cp_size chunks, and rank r has two of them, r and 2 * cp_size - 1 - r. A query
// sees the keys before it, so late chunks are more work than early ones; an early and a late one together
// are the same work for every rank. With 3 ranks, the first and the second run of each:
//
//     position 0 ..     half ..   2 half ..   3 half ..   4 half ..   5 half ..
//     rank 0   first                                                  second
//     rank 1            first                             second
//     rank 2                      first       second
//
// A rank keeps its rows in this order, so that a later row has a later position.
#pragma once
#include "llmc/rand.h" // defines: HOST_DEVICE

// Of the rows that a rank has of a sequence: two runs, each of `half` neighbouring positions from `first` on.
typedef struct {
    int half, first[2];
} Positions;

// Those of rank cp, where a whole sequence has T, a multiple of 2 * cp_size. One rank alone has one run of T
// rows.
static HOST_DEVICE inline Positions positions_of(int T, int cp, int cp_size) {
    int half = cp_size > 1 ? T / (2 * cp_size) : T;
    Positions at = {half, {cp * half, cp_size > 1 ? (2 * cp_size - 1 - cp) * half : T}};
    return at;
}

// The position of a rank's row.
static HOST_DEVICE inline int position_at(Positions at, int row) {
    return row < at.half ? at.first[0] + row : at.first[1] + row - at.half;
}

// Rows of a run before `position`.
static HOST_DEVICE inline int run_rows_before(int first, int half, int position) {
    int rows = position - first;
    return rows < 0 ? 0 : rows < half ? rows : half;
}

// The first row whose position is `position` or later, which as many rows come before; all rows do where
// there is none.
static HOST_DEVICE inline int first_row_at(Positions at, int position) {
    return run_rows_before(at.first[0], at.half, position) + run_rows_before(at.first[1], at.half, position);
}
