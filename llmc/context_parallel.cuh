// Context parallelism: ranks share a sequence by positions. All but attention is computed row by row and does not
// notice; attention needs the keys and values of all positions, which ranks gather, and sends their gradients back.
//
//     qkv (B, T, QKV) -- its key and value columns --> part -- all-gather --> parts (cp, B, T, 2 KV)
//     -- in the order of positions --> keys (B, cp T, 2 KV) -- attention of this rank's T queries of each sequence --> out
//     dkeys (B, cp T, 2 KV) -- in the order of ranks --> parts -- reduce-scatter --> part --> columns of dqkv
//
// Causal attention of the last position costs the most, so that a rank has two runs of positions, an early and a late
// one, and all ranks have as much to do (llmc/positions.h). Source: gathered keys and values, Llama 3, arXiv 2407.21783,
// section 3.3.2.
#pragma once
#include "llmc/comm.cuh"    // defines: Comm, comm_all_gather, comm_reduce_scatter, comm_wait
#include "llmc/positions.h" // defines: Positions, positions_of, position_at

typedef struct {
    Comm* comm;
    int rank, size;
    cudaStream_t stream, comm_stream; // of kernels; of gathers
    cudaEvent_t ready, gathered;
    floatX *parts, *keys, *dkeys; // (cp, B, T, 2 KV) (B, cp T, 2 KV) (B, cp T, 2 KV); NULL in one rank
    const floatX* holds;          // whose keys are gathered: the qkv they come from
} ContextParallel;

// parts (size, B, T, columns) <-> keys (B, size * T, columns); a block has a row of the parts.
static __global__ void order_keys_kernel(floatX* parts, floatX* keys, int size, int B, int T, int columns,
                                         bool to_keys) {
    int n = (int)blockIdx.x, r = n / (B * T), b = n / T % B;
    int position = position_at(positions_of(size * T, r, size), n % T);
    floatX* part = parts + (size_t)n * (size_t)columns;
    floatX* key = keys + ((size_t)b * (size_t)(size * T) + (size_t)position) * (size_t)columns;
    for (int c = (int)threadIdx.x * VEC; c < columns; c += (int)blockDim.x * VEC)
        store_vec((to_keys ? key : part) + c, load_vec((to_keys ? part : key) + c));
}

static inline void order_keys(ContextParallel* cp, floatX* keys, int B, int T, int columns, bool to_keys,
                              cudaStream_t stream) {
    order_keys_kernel<<<(unsigned)(cp->size * B * T), 128, 0, stream>>>(cp->parts, keys, cp->size, B, T,
                                                                        columns, to_keys);
    LAUNCH_CHECK();
}

// The last `columns` columns of qkv (rows, width) to `part` (rows, columns), or back.
static inline void copy_columns(floatX* part, floatX* qkv, size_t rows, int width, int columns, bool to_part,
                                cudaStream_t stream) {
    size_t bytes = (size_t)columns * sizeof(floatX), pitch = (size_t)width * sizeof(floatX);
    floatX* from = qkv + (width - columns);
    CUDA_CHECK(cudaMemcpy2DAsync(to_part ? part : from, to_part ? bytes : pitch, to_part ? from : part,
                                 to_part ? pitch : bytes, bytes, rows, cudaMemcpyDeviceToDevice, stream));
}

static inline floatX* part_of_rank(const ContextParallel* cp, size_t n) {
    return cp->parts + (size_t)cp->rank * n;
}

// Begins to gather the keys and values of qkv (B, T, width), its last `columns` columns. again: they are needed once
// more, and may still be there.
static inline void begin_gathering_keys(ContextParallel* cp, floatX* qkv, int B, int T, int width,
                                        int columns, bool again) {
    size_t rows = (size_t)B * (size_t)T, n = rows * (size_t)columns;
    if (cp->size == 1 || (again && cp->holds == qkv)) return;
    CUDA_CHECK(cudaEventRecord(cp->ready, cp->stream)); // qkv is there, and the keys before are done with
    CUDA_CHECK(cudaStreamWaitEvent(cp->comm_stream, cp->ready, 0));
    copy_columns(part_of_rank(cp, n), qkv, rows, width, columns, true, cp->comm_stream);
    comm_all_gather(cp->comm, AXIS_CP, cp->parts, part_of_rank(cp, n), n, cp->comm_stream);
    order_keys(cp, cp->keys, B, T, columns, true, cp->comm_stream);
    CUDA_CHECK(cudaEventRecord(cp->gathered, cp->comm_stream));
    cp->holds = qkv;
}

// (B, cp T, columns), from here on; NULL: they are where they were computed.
static inline const floatX* gathered_keys(ContextParallel* cp) {
    if (cp->size > 1) comm_wait(cp->comm, cp->stream, cp->gathered);
    return cp->keys;
}

// dqkv's last `columns` columns = the sum over ranks of what each has in cp->dkeys
static inline void scatter_key_gradients(ContextParallel* cp, floatX* dqkv, int B, int T, int width,
                                         int columns) {
    size_t rows = (size_t)B * (size_t)T, n = rows * (size_t)columns;
    if (cp->size == 1) return;
    order_keys(cp, cp->dkeys, B, T, columns, false, cp->stream);
    comm_reduce_scatter(cp->comm, AXIS_CP, part_of_rank(cp, n), cp->parts, n, cp->stream);
    copy_columns(part_of_rank(cp, n), dqkv, rows, width, columns, false, cp->stream);
}
