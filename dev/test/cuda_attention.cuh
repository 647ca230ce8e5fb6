// Attention against the CPU reference: the tensor-core kernels, the general ones, and decoding. The yardstick
// is the unfused formula, each of its arrays (S, P, out; dP, dS, dqkv) rounded to floatX once it is computed.
#pragma once
#include "dev/test/cuda_harness.cuh" // defines: cpu, judge, tap_check, random_values, to_device, to_host ...
#include "llmc/attention.cuh"        // defines: attention_forward, attention_backward, attention_decode

enum Documents { ONE_DOCUMENT, ON_TILE_EDGES, OFF_TILE_EDGES, A_TOKEN_EACH };

struct AttentionCase {
    int B, T, NH, NKV, HS;
    Documents documents;
    double q_scale; // of the queries: 1, or so large that one key takes all
};

static const AttentionCase attention_cases[] = {
    // head sizes with tensor-core kernels; T around the tiles' edges
    {2, 1, 2, 1, 64, ONE_DOCUMENT, 1},
    {1, 15, 7, 1, 64, ONE_DOCUMENT, 1},
    {1, 64, 2, 2, 64, ON_TILE_EDGES, 1},
    {1, 65, 4, 2, 64, ONE_DOCUMENT, 1},
    {2, 127, 2, 1, 64, OFF_TILE_EDGES, 1},
    {1, 200, 4, 1, 64, ONE_DOCUMENT, 1},
    {1, 200, 1, 1, 64, A_TOKEN_EACH, 1},
    {1, 257, 2, 2, 64, ON_TILE_EDGES, 1},
    {1, 257, 2, 1, 64, OFF_TILE_EDGES, 1},
    {1, 200, 1, 1, 64, OFF_TILE_EDGES, 40},
    {1, 1, 1, 1, 128, ONE_DOCUMENT, 1},
    {1, 15, 4, 4, 128, OFF_TILE_EDGES, 1},
    {1, 64, 7, 7, 128, ONE_DOCUMENT, 1},
    {2, 65, 2, 1, 128, ON_TILE_EDGES, 1},
    {1, 127, 2, 2, 128, ONE_DOCUMENT, 1},
    {1, 200, 2, 1, 128, ON_TILE_EDGES, 1},
    {1, 257, 2, 1, 128, ONE_DOCUMENT, 1},
    {1, 257, 1, 1, 128, OFF_TILE_EDGES, 1},
    {1, 65, 1, 1, 128, A_TOKEN_EACH, 1},
    {1, 127, 1, 1, 128, ONE_DOCUMENT, 40},
    // every other head size
    {2, 1, 1, 1, 8, ONE_DOCUMENT, 1},
    {2, 65, 4, 2, 8, OFF_TILE_EDGES, 1},
    {1, 200, 1, 1, 8, ONE_DOCUMENT, 40},
    {1, 64, 7, 1, 40, ON_TILE_EDGES, 1},
    {1, 127, 2, 1, 80, ONE_DOCUMENT, 1},
    {1, 15, 2, 2, 80, A_TOKEN_EACH, 1},
    {2, 65, 2, 1, 256, OFF_TILE_EDGES, 1},
    {1, 127, 1, 1, 256, ONE_DOCUMENT, 1},
};

// doc_start (B, T), or NULL. Off the edges, sequences differ, so that one read for another is noticed;
// documents are short or longer than a tile, and end among the 16 rows of a warp.
static int* document_starts(const AttentionCase& c) {
    if (c.documents == ONE_DOCUMENT) return NULL;
    int* starts = own_host<int>((size_t)c.B * (size_t)c.T);
    for (int b = 0; b < c.B; b++)
        for (int t = 0, start = 0; t < c.T; t++) {
            int at = (t + 9 * b) % 130;
            bool begins = c.documents == A_TOKEN_EACH;
            if (c.documents == ON_TILE_EDGES) begins = t % 64 == 0;
            if (c.documents == OFF_TILE_EDGES) begins = at == 4 || at == 37 || at == 44;
            if (begins) start = t;
            starts[b * c.T + t] = start;
        }
    return starts;
}

// What a forward and backward pass leave: qkv and dqkv (B, T, (NH + 2 NKV) * HS), out (B, T, NH*HS),
// lse (B, NH, T).
struct AttentionArrays {
    double *out, *lse, *dqkv;
};

struct AttentionSizes {
    size_t T, HS, row, out_row; // row: elements of a position in qkv
    size_t qkv, out, lse;       // elements of the arrays
};

static AttentionSizes sizes_of_case(const AttentionCase& c) {
    AttentionSizes n;
    size_t N = (size_t)c.B * (size_t)c.T;
    n.T = (size_t)c.T, n.HS = (size_t)c.HS, n.row = (size_t)(c.NH + 2 * c.NKV) * n.HS;
    n.out_row = (size_t)c.NH * n.HS;
    n.qkv = N * n.row, n.out = N * n.out_row, n.lse = N * (size_t)c.NH;
    return n;
}

static AttentionArrays empty_arrays(const AttentionSizes& n) {
    AttentionArrays a = {own_host<double>(n.out), own_host<double>(n.lse), own_host<double>(n.qkv)};
    return a;
}

static AttentionArrays attention_truth(const AttentionCase& c, const double* qkv, const double* dout,
                                       const int* starts) {
    AttentionArrays a = empty_arrays(sizes_of_case(c));
    std::vector<char> scratch(cpu::attention_scratch_bytes(c.T, c.HS) + 64);
    cpu::attention_forward(a.out, a.lse, align64(scratch), qkv, starts, c.B, c.T, c.NH, c.NKV, c.HS);
    cpu::attention_backward(a.dqkv, align64(scratch), dout, qkv, a.out, a.lse, starts, c.B, c.T, c.NH, c.NKV,
                            c.HS);
    return a;
}

// ----------------------------------------------------------------------------
// the plain formula

static double plain_dot(const double* a, const double* b, size_t n) {
    float sum = 0;
    for (size_t i = 0; i < n; i++) sum += (float)a[i] * (float)b[i];
    return (double)sum;
}

static void plain_add(float* sum, double weight, const double* x, size_t n) {
    for (size_t i = 0; i < n; i++) sum[i] += (float)weight * (float)x[i];
}

// The rank that has position t, written out: chunk i and chunk 2 * ranks - 1 - i are of rank i.
static int rank_of(const AttentionCase& c, int t, int ranks) {
    if (ranks == 1) return 0;
    int chunk = t / (c.T / (2 * ranks));
    return chunk < ranks ? chunk : 2 * ranks - 1 - chunk;
}

// One query row of one head: all of the forward pass, and the row's part in the backward pass. q, k, v, dout:
// rows, those of keys `row` apart; dq (HS), dk and dv (T, HS) +=
static void plain_row(double* out, double* lse, float* dq, float* dk, float* dv, const double* q,
                      const double* k, const double* v, const double* dout, const AttentionSizes& n,
                      size_t begin, size_t end) {
    const float scale = 1 / sqrtf((float)n.HS);
    float max = -INFINITY, sum = 0, delta = 0;
    std::vector<float> s(end), o(n.HS);
    for (size_t j = begin; j < end; j++) {
        s[j] = (float)rounded(plain_dot(q, k + j * n.row, n.HS) * scale);
        max = fmaxf(max, s[j]);
    }
    for (size_t j = begin; j < end; j++) sum += expf(s[j] - max);
    float log_sum = max + logf(sum);
    for (size_t j = begin; j < end; j++)
        plain_add(o.data(), rounded(expf(s[j] - max) / sum), v + j * n.row, n.HS);
    for (size_t i = 0; i < n.HS; i++) {
        out[i] = rounded((double)o[i]);
        delta += (float)dout[i] * (float)out[i];
    }
    *lse = (double)log_sum;
    for (size_t j = begin; j < end; j++) { // P once more, from lse
        double p = rounded(expf(s[j] - log_sum)), dp = rounded(plain_dot(dout, v + j * n.row, n.HS));
        double ds = rounded((float)p * ((float)dp - delta));
        plain_add(dq, scale * (float)ds, k + j * n.row, n.HS);
        plain_add(dk + j * n.HS, scale * (float)ds, q, n.HS);
        plain_add(dv + j * n.HS, p, dout, n.HS);
    }
}

// dk and dv are the sums of what `ranks` that share the sequences leave, each of them rounded.
static AttentionArrays attention_plain(const AttentionCase& c, const double* qkv, const double* dout,
                                       const int* starts, int ranks = 1) {
    AttentionSizes n = sizes_of_case(c);
    AttentionArrays a = empty_arrays(n);
    int group = c.NH / c.NKV;
    for (int b = 0; b < c.B; b++)
        for (int kv = 0; kv < c.NKV; kv++) {
            size_t sequence = (size_t)b * n.T, k_part = (size_t)(c.NH + kv) * n.HS,
                   v_part = k_part + (size_t)c.NKV * n.HS;
            for (int r = 0; r < ranks; r++) {
                std::vector<float> dk(n.T * n.HS), dv(n.T * n.HS);
                for (int h = kv * group; h < (kv + 1) * group; h++)
                    for (size_t t = 0; t < n.T; t++) {
                        size_t at = (sequence + t) * n.row + (size_t)h * n.HS,
                               in_out = (sequence + t) * n.out_row + (size_t)h * n.HS;
                        size_t begin = starts != NULL ? (size_t)starts[sequence + t] : 0;
                        std::vector<float> dq(n.HS);
                        if (rank_of(c, (int)t, ranks) != r) continue;
                        plain_row(a.out + in_out, a.lse + ((size_t)b * (size_t)c.NH + (size_t)h) * n.T + t,
                                  dq.data(), dk.data(), dv.data(), qkv + at, qkv + sequence * n.row + k_part,
                                  qkv + sequence * n.row + v_part, dout + in_out, n, begin, t + 1);
                        for (size_t i = 0; i < n.HS; i++) a.dqkv[at + i] = rounded((double)dq[i]);
                    }
                for (size_t i = 0; i < n.T * n.HS; i++) {
                    size_t row = (sequence + i / n.HS) * n.row + i % n.HS;
                    a.dqkv[row + k_part] += rounded((double)dk[i]);
                    a.dqkv[row + v_part] += rounded((double)dv[i]);
                }
            }
        }
    return a;
}

// ----------------------------------------------------------------------------
// ours

static AttentionShape shape_of(const AttentionCase& c) {
    AttentionShape shape = {c.B, c.T, c.T, c.NH, c.NKV, c.HS, positions_of(c.T, 0, 1)};
    return shape;
}

// Arrays on the device, poisoned before the kernels write them.
struct DeviceAttention {
    floatX *out, *dqkv;
    float *lse, *scratch;
};

static DeviceAttention poisoned_attention(const AttentionCase& c) {
    AttentionSizes n = sizes_of_case(c);
    size_t scratch = attention_scratch_bytes(shape_of(c)) / sizeof(float);
    DeviceAttention a = {poisoned_device<floatX>(n.out), poisoned_device<floatX>(n.qkv),
                         poisoned_device<float>(n.lse), poisoned_device<float>(scratch)};
    return a;
}

static DeviceAttention run_attention(const AttentionCase& c, const floatX* qkv, const floatX* dout,
                                     const int* starts) {
    DeviceAttention a = poisoned_attention(c);
    attention_forward(a.out, a.lse, qkv, NULL, starts, shape_of(c), 0);
    attention_backward(a.dqkv, NULL, a.scratch, dout, qkv, NULL, a.out, a.lse, starts, shape_of(c), 0);
    return a;
}

static DeviceAttention run_general_attention(const AttentionCase& c, const floatX* qkv, const floatX* dout,
                                             const int* starts) {
    DeviceAttention a = poisoned_attention(c);
    AttentionShape shape = shape_of(c);
    KeyValues<const floatX> kv = key_values(qkv, (const floatX*)NULL, shape);
    KeyValues<floatX> dkv = key_values(a.dqkv, (floatX*)NULL, shape);
    attention_general_forward(a.out, a.lse, qkv, kv, starts, shape, 0);
    attention_delta(a.scratch, dout, a.out, shape, 0);
    attention_general_backward(a.dqkv, dkv, dout, qkv, kv, a.lse, a.scratch, starts, shape, 0);
    return a;
}

static void judge_attention(const char* name, const AttentionCase& c, const DeviceAttention& ours,
                            const AttentionArrays& plain, const AttentionArrays& truth) {
    static const char* const documents[] = {"", ", documents on tile edges", ", documents off tile edges",
                                            ", a document a token"};
    AttentionSizes n = sizes_of_case(c);
    char what[160];
    size_t used =
        (size_t)snprintf(what, sizeof what, "%s B %d T %d NH %d/%d HS %d%s%s: ", name, c.B, c.T, c.NH, c.NKV,
                         c.HS, documents[c.documents], c.q_scale > 1 ? ", far maximum" : "");
    snprintf(what + used, sizeof what - used, "out");
    judge(what, to_host(ours.out, n.out), plain.out, truth.out, n.out);
    snprintf(what + used, sizeof what - used, "lse");
    judge(what, to_host(ours.lse, n.lse), plain.lse, truth.lse, n.lse);

    // the parts of dqkv apart, dv being much larger than dq and dk; those are 0 where a row sees only itself,
    // and what is left of their terms is small beside dv
    bool alone = c.T == 1 || c.documents == A_TOKEN_EACH;
    const char* const parts[] = {alone ? "dq, dk, dv" : "dq", "dk", "dv"};
    size_t ends[] = {0, n.out_row, n.out_row + (size_t)c.NKV * n.HS, n.row};
    if (alone) ends[1] = n.row;
    double* dqkv = to_host(ours.dqkv, n.qkv);
    for (int p = 0; p < (alone ? 1 : 3); p++) {
        std::vector<double> part[3];
        const double* whole[] = {dqkv, plain.dqkv, truth.dqkv};
        for (int s = 0; s < 3; s++)
            for (size_t i = 0; i < n.qkv; i++)
                if (i % n.row >= ends[p] && i % n.row < ends[p + 1]) part[s].push_back(whole[s][i]);
        snprintf(what + used, sizeof what - used, "%s", parts[p]);
        judge(what, part[0].data(), part[1].data(), part[2].data(), part[0].size());
    }
}

static void test_attention_case(const AttentionCase& c) {
    AttentionSizes n = sizes_of_case(c);
    double *qkv = random_values(n.qkv, 1), *dout = random_values(n.out, 1);
    for (size_t i = 0; i < n.qkv; i++)
        if (i % n.row < n.out_row) qkv[i] *= c.q_scale;
    round_to_floatX(qkv, n.qkv);
    int* starts = document_starts(c);
    const int* device_starts = starts != NULL ? ints_to_device(starts, (size_t)c.B * n.T) : NULL;
    AttentionArrays truth = attention_truth(c, qkv, dout, starts),
                    plain = attention_plain(c, qkv, dout, starts);
    const floatX *device_qkv = to_device<floatX>(qkv, n.qkv), *device_dout = to_device<floatX>(dout, n.out);

    DeviceAttention ours = run_attention(c, device_qkv, device_dout, device_starts);
    judge_attention("attention", c, ours, plain, truth);
    DeviceAttention again = run_attention(c, device_qkv, device_dout, device_starts);
    tap_check(same_bits(ours.out, again.out, n.out) && same_bits(ours.lse, again.lse, n.lse) &&
                  same_bits(ours.dqkv, again.dqkv, n.qkv),
              "attention T %d HS %d: two runs give the same bits", c.T, c.HS);
    if ((c.HS == 64 || c.HS == 128) && sizeof(floatX) == 2 && c.T < 128) {
        DeviceAttention general = run_general_attention(c, device_qkv, device_dout, device_starts);
        judge_attention("general attention", c, general, plain, truth);
    }
    release_all();
}

// ----------------------------------------------------------------------------
// ranks that share sequences: one after the other on this device, each with its rows alone, held against one
// rank with all of them

struct SharedCase {
    int ranks;
    AttentionCase whole;
};

static const SharedCase shared_cases[] = {
    // runs of 64, 37, 5, 40 and 96 rows; tiles of 128, 64 and 32
    {2, {1, 256, 2, 1, 64, ONE_DOCUMENT, 1}},    {3, {2, 222, 4, 2, 64, OFF_TILE_EDGES, 1}},
    {4, {2, 40, 1, 1, 64, ONE_DOCUMENT, 1}},     {2, {1, 160, 2, 2, 64, OFF_TILE_EDGES, 40}},
    {3, {1, 240, 1, 1, 64, ONE_DOCUMENT, 40}},   {2, {1, 384, 1, 1, 64, ON_TILE_EDGES, 1}},
    {3, {1, 222, 2, 1, 64, A_TOKEN_EACH, 1}},    {2, {1, 256, 1, 1, 128, ON_TILE_EDGES, 1}},
    {3, {2, 222, 2, 1, 128, OFF_TILE_EDGES, 1}}, {4, {1, 128, 1, 1, 128, ONE_DOCUMENT, 1}},
    {2, {1, 160, 1, 1, 128, ONE_DOCUMENT, 40}},  {2, {2, 128, 2, 1, 40, OFF_TILE_EDGES, 1}},
    {3, {1, 222, 4, 2, 40, ONE_DOCUMENT, 1}},
};

// Whether the first `columns` of each row, `stride` elements long, are the same; and the others are NaN.
static bool same_columns(const double* ours, const std::vector<double>& whole, size_t stride,
                         size_t columns) {
    bool same = true;
    for (size_t i = 0; i < whole.size(); i++) {
        bool written = i % stride < columns;
        same = same && (written ? memcmp(&ours[i], &whole[i], sizeof ours[i]) == 0 : isnan(ours[i]));
    }
    return same;
}

// What one rank's kernels leave, against the rows of the whole; adds its dkv to those of the other ranks.
static bool run_rank(const SharedCase& shared, int rank, const double* qkv, const double* kv,
                     const double* dout, const int* starts, const AttentionArrays& whole, double* dkv_sum) {
    const AttentionCase& c = shared.whole;
    AttentionSizes n = sizes_of_case(c);
    int ranks = shared.ranks;
    size_t size = (size_t)ranks, kv_size = (size_t)c.B * n.T * (n.row - n.out_row);
    AttentionShape shape = {c.B, c.T / ranks, c.T, c.NH, c.NKV, c.HS, positions_of(c.T, rank, ranks)};
    std::vector<double> my_qkv = rows_of_rank(qkv, shape.at, c.B, c.T, ranks, n.row),
                        my_dout = rows_of_rank(dout, shape.at, c.B, c.T, ranks, n.out_row);
    for (size_t i = 0; i < my_qkv.size(); i++)
        if (i % n.row >= n.out_row) my_qkv[i] = NAN; // not to be read
    const int* my_starts = NULL;
    if (starts != NULL) {
        std::vector<int> rows = rows_of_rank(starts, shape.at, c.B, c.T, ranks, 1);
        my_starts = ints_to_device(rows.data(), rows.size());
    }
    const floatX *device_qkv = to_device<floatX>(my_qkv.data(), my_qkv.size()),
                 *device_dout = to_device<floatX>(my_dout.data(), my_dout.size()),
                 *device_kv = to_device<floatX>(kv, kv_size);
    floatX *out = poisoned_device<floatX>(n.out / size), *dqkv = poisoned_device<floatX>(n.qkv / size),
           *dkv = poisoned_device<floatX>(kv_size);
    float* lse = poisoned_device<float>(n.lse / size);
    void* scratch = poisoned_device<float>(attention_scratch_bytes(shape) / sizeof(float));
    attention_forward(out, lse, device_qkv, device_kv, my_starts, shape, 0);
    attention_backward(dqkv, dkv, scratch, device_dout, device_qkv, device_kv, out, lse, my_starts, shape, 0);

    const double* host_dkv = to_host(dkv, kv_size);
    for (size_t i = 0; i < kv_size; i++) dkv_sum[i] += host_dkv[i];
    return same_columns(to_host(out, n.out / size),
                        rows_of_rank(whole.out, shape.at, c.B, c.T, ranks, n.out_row), n.out_row,
                        n.out_row) &&
           same_columns(to_host(lse, n.lse / size),
                        rows_of_rank(whole.lse, shape.at, c.B * c.NH, c.T, ranks, 1), 1, 1) &&
           same_columns(to_host(dqkv, n.qkv / size),
                        rows_of_rank(whole.dqkv, shape.at, c.B, c.T, ranks, n.row), n.row, n.out_row);
}

// Columns `first` to `end` of rows of n elements.
static std::vector<double> columns_of(const double* x, size_t rows, size_t n, size_t first, size_t end) {
    std::vector<double> columns;
    for (size_t i = 0; i < rows; i++) columns.insert(columns.end(), x + i * n + first, x + i * n + end);
    return columns;
}

static void test_shared_sequences(const SharedCase& shared) {
    const AttentionCase& c = shared.whole;
    AttentionSizes n = sizes_of_case(c);
    size_t N = (size_t)c.B * n.T, kv_row = n.row - n.out_row;
    double *qkv = random_values(n.qkv, 1), *dout = random_values(n.out, 1);
    for (size_t i = 0; i < n.qkv; i++)
        if (i % n.row < n.out_row) qkv[i] *= c.q_scale;
    round_to_floatX(qkv, n.qkv);
    int* starts = document_starts(c);
    DeviceAttention device = run_attention(c, to_device<floatX>(qkv, n.qkv), to_device<floatX>(dout, n.out),
                                           starts != NULL ? ints_to_device(starts, N) : NULL);
    AttentionArrays whole = {to_host(device.out, n.out), to_host(device.lse, n.lse),
                             to_host(device.dqkv, n.qkv)};
    AttentionArrays truth = attention_truth(c, qkv, dout, starts),
                    plain = attention_plain(c, qkv, dout, starts, shared.ranks);
    std::vector<double> kv = columns_of(qkv, N, n.row, n.out_row, n.row), dkv(kv.size());
    char what[120];
    for (int rank = 0; rank < shared.ranks; rank++)
        tap_check(run_rank(shared, rank, qkv, kv.data(), dout, starts, whole, dkv.data()),
                  "attention T %d HS %d, rank %d of %d: out, lse and dq have the bits of one rank", c.T, c.HS,
                  rank, shared.ranks);
    bool alone = c.documents == A_TOKEN_EACH; // as in judge_attention
    for (int part = 0; part < (alone ? 1 : 2); part++) {
        size_t first = (size_t)part * kv_row / 2, end = alone ? kv_row : first + kv_row / 2;
        const char* const parts[] = {alone ? "dk, dv" : "dk", "dv"};
        snprintf(what, sizeof what, "attention T %d HS %d, sum of %d ranks: %s", c.T, c.HS, shared.ranks,
                 parts[part]);
        std::vector<double> sum = columns_of(dkv.data(), N, kv_row, first, end);
        first += n.out_row, end += n.out_row;
        judge(what, sum.data(), columns_of(plain.dqkv, N, n.row, first, end).data(),
              columns_of(truth.dqkv, N, n.row, first, end).data(), sum.size());
    }
    release_all();
}

// ----------------------------------------------------------------------------
// decoding: the last row of a sequence, its keys and values from a cache that is longer than the sequence

static void test_attention_decode(int length, int NH, int NKV, int HS) {
    AttentionCase c = {1, length, NH, NKV, HS, ONE_DOCUMENT, 1};
    AttentionSizes n = sizes_of_case(c);
    size_t kv_row = (size_t)(NKV * HS), unused = 3 * kv_row, cached = n.T * kv_row + unused;
    double *qkv = random_values(n.qkv, 1), *dout = random_values(n.out, 1), *k = own_host<double>(cached),
           *v = own_host<double>(cached);
    for (size_t i = 0; i < cached; i++) {
        size_t at = i / kv_row * n.row + n.out_row + i % kv_row;
        k[i] = i < cached - unused ? qkv[at] : NAN, v[i] = i < cached - unused ? qkv[at + kv_row] : NAN;
    }
    AttentionArrays truth = attention_truth(c, qkv, dout, NULL), plain = attention_plain(c, qkv, dout, NULL);
    floatX* out = poisoned_device<floatX>(n.out_row);
    attention_decode(out, to_device<floatX>(qkv + (n.T - 1) * n.row, n.out_row), to_device<floatX>(k, cached),
                     to_device<floatX>(v, cached), length, NH, NKV, HS, 0);
    char what[96];
    snprintf(what, sizeof what, "decoding length %d NH %d/%d HS %d", length, NH, NKV, HS);
    size_t last = (n.T - 1) * n.out_row;
    judge(what, to_host(out, n.out_row), plain.out + last, truth.out + last, n.out_row);
    release_all();
}

static void test_attention(void) {
    for (const AttentionCase& c : attention_cases) test_attention_case(c);
    for (const SharedCase& c : shared_cases) test_shared_sequences(c);
    const int decodes[][4] = {{1, 1, 1, 8},    {31, 4, 2, 64},  {32, 2, 2, 80},
                              {33, 7, 1, 128}, {200, 4, 1, 40}, {77, 2, 1, 256}};
    for (const int* d : decodes) test_attention_decode(d[0], d[1], d[2], d[3]);
}
