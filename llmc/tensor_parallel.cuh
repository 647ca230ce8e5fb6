// Tensor parallelism with sequence parallelism: matmuls are divided by their outputs (columns) or their inputs
// (rows), and what lies between them (norms, the residual stream) by its rows.
//
//     shard (N / tp, C) -- all-gather --> (N, C) -- column-parallel: heads, FF / tp -- row-parallel --> a part of the
//     sum (N, C) -- reduce-scatter --> shard (N / tp, C)
//
// To overlap, rows go in K pieces: while one is computed the next is under way. A rank's shard has its share of
// every piece, so that a gathered piece is rows [k N / K, (k + 1) N / K) of the batch:
//
//     batch  | piece 0: rank 0 | rank 1 | piece 1: rank 0 | rank 1 |        shard of rank 0  | piece 0 | piece 1 |
//
// Sources: Megatron-LM, arXiv 1909.08053, section 3; sequence parallelism, arXiv 2205.05198, section 4.2.
#pragma once
#include "llmc/comm.cuh"   // defines: Comm, comm_all_gather, comm_reduce_scatter, comm_wait
#include "llmc/matmul.cuh" // defines: Matmul, matmul_forward, matmul_backward ...

enum { TP_PIECES = 2 };

typedef struct {
    Comm* comm;
    int size;
    cudaStream_t stream, comm_stream; // of matmuls and kernels, of collectives
    cudaEvent_t ready, arrived[TP_PIECES];
    floatX* buffer[2]; // (N, C) each: what was gathered; sums to be scattered. Not there in one rank
} TensorParallel;

static inline int tp_pieces(const TensorParallel* tp, int N) {
    return N % (TP_PIECES * tp->size) == 0 ? TP_PIECES : 1;
}

// The other stream may go on from here.
static inline void tp_hand_over(TensorParallel* tp, cudaStream_t from, cudaStream_t to, cudaEvent_t event) {
    CUDA_CHECK(cudaEventRecord(event, from));
    comm_wait(tp->comm, to, event);
}

// all (N, C) = the rows of all ranks; piece k may be read once `arrived[k]` has been waited for
static inline void tp_begin_gather(TensorParallel* tp, floatX* all, const floatX* shard, int N, int C) {
    int pieces = tp_pieces(tp, N);
    size_t piece = (size_t)N * (size_t)C / (size_t)pieces, part = piece / (size_t)tp->size;
    tp_hand_over(tp, tp->stream, tp->comm_stream, tp->ready);
    for (int k = 0; k < pieces; k++) {
        comm_all_gather(tp->comm, AXIS_TP, all + (size_t)k * piece, shard + (size_t)k * part, part,
                        tp->comm_stream);
        CUDA_CHECK(cudaEventRecord(tp->arrived[k], tp->comm_stream));
    }
}

// f(row, rows, x): rows [row, row + rows) of the gathered shard are x (rows, C). Returns all of them (N, C).
template <typename F>
static inline const floatX* tp_gather(TensorParallel* tp, floatX* all, const floatX* shard, int N, int C,
                                      F f) {
    if (tp->size == 1) {
        f(0, N, shard);
        return shard;
    }
    int pieces = tp_pieces(tp, N), rows = N / pieces;
    tp_begin_gather(tp, all, shard, N, C);
    for (int k = 0; k < pieces; k++) {
        comm_wait(tp->comm, tp->stream, tp->arrived[k]);
        f(k * rows, rows, all + (size_t)(k * rows) * (size_t)C);
    }
    return all;
}

// f(row, rows, x): makes x (rows, C), rows [row, row + rows) of what is then summed over ranks: shard (N / tp, C) =
template <typename F>
static inline void tp_scatter(TensorParallel* tp, floatX* shard, floatX* all, int N, int C, F f) {
    if (tp->size == 1) {
        f(0, N, shard);
        return;
    }
    int pieces = tp_pieces(tp, N), rows = N / pieces;
    size_t piece = (size_t)rows * (size_t)C, part = piece / (size_t)tp->size;
    for (int k = 0; k < pieces; k++) {
        f(k * rows, rows, all + (size_t)k * piece);
        tp_hand_over(tp, tp->stream, tp->comm_stream, tp->arrived[k]);
        comm_reduce_scatter(tp->comm, AXIS_TP, shard + (size_t)k * part, all + (size_t)k * piece, part,
                            tp->comm_stream);
    }
    tp_hand_over(tp, tp->comm_stream, tp->stream, tp->ready);
}

// ----------------------------------------------------------------------------
// the two kinds of a linear layer; at size 1 they are matmul_forward and matmul_backward

// out (N, OC) =; inp: shard (N / tp, C), weight (OC, C), bias (OC) or NULL: this rank's rows of both
static inline void column_parallel_forward(floatX* out, const floatX* inp, const floatX* weight,
                                           const floatX* bias, int N, int C, int OC, Matmul* mm,
                                           TensorParallel* tp) {
    tp_gather(tp, tp->buffer[0], inp, N, C, [&](int row, int rows, const floatX* x) {
        matmul_forward(out + (size_t)row * (size_t)OC, x, weight, bias, rows, C, OC, mm);
    });
}

// act = GELU(pre), pre = the same with inp
static inline void column_parallel_gelu_forward(floatX* act, floatX* pre, const floatX* inp,
                                                const floatX* weight, const floatX* bias, int N, int C,
                                                int OC, Matmul* mm, TensorParallel* tp) {
    tp_gather(tp, tp->buffer[0], inp, N, C, [&](int row, int rows, const floatX* x) {
        size_t at = (size_t)row * (size_t)OC;
        matmul_gelu_forward(act + at, pre + at, x, weight, bias, rows, C, OC, mm);
    });
}

// out: shard (N / tp, OC) =; inp (N, C), weight (OC, C): this rank's columns; bias (OC) or NULL
static inline void row_parallel_forward(floatX* out, const floatX* inp, const floatX* weight,
                                        const floatX* bias, int N, int C, int OC, Matmul* mm,
                                        TensorParallel* tp) {
    tp_scatter(tp, out, tp->buffer[1], N, OC, [&](int row, int rows, floatX* y) {
        matmul_forward(y, inp + (size_t)row * (size_t)C, weight, bias, rows, C, OC, mm);
    });
}

// dinp: shard (N / tp, C) =; dweight, dbias +=; dout (N, OC), inp: shard. The input is gathered while the matmul for
// its gradient runs, and that is scattered while the weight's gradient is computed. dweight NULL: not now, see
// column_parallel_weight_gradient.
template <typename Grad>
static inline void column_parallel_backward(floatX* dinp, Grad* dweight, Grad* dbias, const floatX* dout,
                                            const floatX* inp, const floatX* weight, int N, int C, int OC,
                                            Matmul* mm, TensorParallel* tp) {
    if (tp->size == 1) {
        matmul_backward(dinp, dweight, dbias, dout, inp, weight, N, C, OC, mm);
        return;
    }
    int pieces = tp_pieces(tp, N);
    if (dweight != NULL) tp_begin_gather(tp, tp->buffer[0], inp, N, C);
    matmul_input_gradient(tp->buffer[1], dout, weight, N, C, OC, mm);
    for (int k = 0; k < pieces && dweight != NULL; k++) comm_wait(tp->comm, tp->stream, tp->arrived[k]);
    tp_hand_over(tp, tp->stream, tp->comm_stream, tp->ready);
    size_t piece = (size_t)N * (size_t)C / (size_t)pieces, part = piece / (size_t)tp->size;
    for (int k = 0; k < pieces; k++)
        comm_reduce_scatter(tp->comm, AXIS_TP, dinp + (size_t)k * part, tp->buffer[1] + (size_t)k * piece,
                            part, tp->comm_stream);
    if (dweight != NULL) matmul_weight_gradient(dweight, dbias, dout, tp->buffer[0], N, C, OC, mm);
    tp_hand_over(tp, tp->comm_stream, tp->stream, tp->ready);
}

// What column_parallel_backward left out: dweight, dbias +=; dout (N, OC), inp: shard (N / tp, C)
template <typename Grad>
static inline void column_parallel_weight_gradient(Grad* dweight, Grad* dbias, const floatX* dout,
                                                   const floatX* inp, int N, int C, int OC, Matmul* mm,
                                                   TensorParallel* tp) {
    const floatX* all = tp_gather(tp, tp->buffer[0], inp, N, C, [](int, int, const floatX*) {});
    matmul_weight_gradient(dweight, dbias, dout, all, N, C, OC, mm);
}

// dinp (N, C) =; dweight, dbias +=, or NULL: not now, see row_parallel_weight_gradient; dout: shard (N / tp, OC)
template <typename Grad>
static inline void row_parallel_backward(floatX* dinp, Grad* dweight, Grad* dbias, const floatX* dout,
                                         const floatX* inp, const floatX* weight, int N, int C, int OC,
                                         Matmul* mm, TensorParallel* tp) {
    const floatX* all = tp_gather(tp, tp->buffer[0], dout, N, OC, [&](int row, int rows, const floatX* x) {
        matmul_input_gradient(dinp + (size_t)row * (size_t)C, x, weight, rows, C, OC, mm);
    });
    if (dweight != NULL) matmul_weight_gradient(dweight, dbias, all, inp, N, C, OC, mm);
}

// What row_parallel_backward left out: dweight, dbias +=; dout: shard (N / tp, OC), inp (N, C)
template <typename Grad>
static inline void row_parallel_weight_gradient(Grad* dweight, Grad* dbias, const floatX* dout,
                                                const floatX* inp, int N, int C, int OC, Matmul* mm,
                                                TensorParallel* tp) {
    const floatX* all = tp_gather(tp, tp->buffer[0], dout, N, OC, [](int, int, const floatX*) {});
    matmul_weight_gradient(dweight, dbias, all, inp, N, C, OC, mm);
}

// The same with inp = GELU(pre): dpre (N, C) =
template <typename Grad>
static inline void row_parallel_gelu_backward(floatX* dpre, Grad* dweight, Grad* dbias, const floatX* dout,
                                              const floatX* inp, const floatX* weight, const floatX* pre,
                                              int N, int C, int OC, Matmul* mm, TensorParallel* tp) {
    const floatX* all = tp_gather(tp, tp->buffer[0], dout, N, OC, [](int, int, const floatX*) {});
    matmul_gelu_backward(dpre, dweight, dbias, all, inp, weight, pre, N, C, OC, mm);
}
