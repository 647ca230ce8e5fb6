// The layers that are bound by memory, forward and backward, in every option, against the reference layers in
// fp64. The yardstick is the plain formula in the same precision: fp32 arithmetic with sums from left to
// right, what is stored rounded to floatX. Outputs that are set (=) start poisoned, those added to (+=)
// random.
#pragma once
#include "dev/test/cuda_harness.cuh" // defines: cpu, judge, tap_check, random_values, to_device, to_host ...
#include "llmc/activation.cuh"       // defines: activation_forward, activation_backward
#include "llmc/classifier.cuh"       // defines: classifier
#include "llmc/column_sums.cuh"      // defines: add_column_sums
#include "llmc/embedding.cuh"        // defines: embedding_forward, embedding_backward
#include "llmc/norm.cuh"             // defines: norm_forward, residual_norm_forward, norm_backward
#include "llmc/rope.cuh"             // defines: rope_forward, rope_backward
#include "llmc/token_order.h"        // defines: token_order

static const char* const norm_names[] = {"LayerNorm", "RMSNorm"};
static const char* const activation_names[] = {"GELU", "SwiGLU"};

// ----------------------------------------------------------------------------
// norms

struct NormCase {
    int N, C, kind;
    bool bias;
    double mean; // of the inputs: far from zero, where a careless variance loses its digits
};
static const NormCase norm_cases[] = {
    {1, 8, NORM_LAYERNORM, true, 0},
    {7, 64, NORM_LAYERNORM, false, 0},
    {5, 264, NORM_LAYERNORM, true, 3},
    {33, 768, NORM_LAYERNORM, true, 0},
    {3, 1600, NORM_LAYERNORM, true, 0},
    {600, 64, NORM_LAYERNORM, true, 0},
    {2, 4104, NORM_LAYERNORM, true, 0},
    {1, 8, NORM_RMSNORM, false, 0},
    {13, 72, NORM_RMSNORM, false, 1},
    {9, 2048, NORM_RMSNORM, false, 0},
    {2, 8200, NORM_RMSNORM, false, 0},
    {2, 12296, NORM_LAYERNORM, true, 0},
    // more threads than the kernel for common sizes has; more rows than parts
    {1, 16392, NORM_LAYERNORM, true, 0},
    {300, 2056, NORM_LAYERNORM, true, 0},
    {300, 2056, NORM_RMSNORM, false, 0},
};

// In fp32, one number after the other.
static void plain_norm(double* out, double* mean, double* rstd, const double* x, const double* w,
                       const double* b, const NormCase& c, float eps) {
    for (int n = 0; n < c.N; n++) {
        const double* row = x + (size_t)n * (size_t)c.C;
        float m = 0, v = 0;
        for (int i = 0; i < c.C && c.kind == NORM_LAYERNORM; i++) m += (float)row[i];
        m /= (float)c.C;
        for (int i = 0; i < c.C; i++) v += ((float)row[i] - m) * ((float)row[i] - m);
        float r = 1 / sqrtf(v / (float)c.C + eps);
        for (int i = 0; i < c.C; i++)
            out[(size_t)n * (size_t)c.C + (size_t)i] =
                rounded(((float)row[i] - m) * r * (float)w[i] + (b != NULL ? (float)b[i] : 0));
        mean[n] = (double)m, rstd[n] = (double)r;
    }
}

static void plain_norm_backward(double* dx, double* dw, double* db, const double* dy, const double* x,
                                const double* w, const double* mean, const double* rstd, const NormCase& c) {
    std::vector<float> sum_w(dw, dw + c.C), sum_b(db, db + c.C);
    for (int n = 0; n < c.N; n++) {
        size_t row = (size_t)n * (size_t)c.C;
        float m = c.kind == NORM_LAYERNORM ? (float)mean[n] : 0, r = (float)rstd[n], sum = 0, dot = 0;
        auto normal = [&](int i) { return ((float)x[row + (size_t)i] - m) * r; };
        auto gradient = [&](int i) { return (float)dy[row + (size_t)i] * (float)w[i]; };
        for (int i = 0; i < c.C; i++) sum += gradient(i), dot += gradient(i) * normal(i);
        sum = c.kind == NORM_LAYERNORM ? sum / (float)c.C : 0, dot /= (float)c.C;
        for (int i = 0; i < c.C; i++) {
            size_t at = row + (size_t)i;
            sum_w[(size_t)i] += (float)dy[at] * normal(i), sum_b[(size_t)i] += (float)dy[at];
            dx[at] = rounded((float)dx[at] + r * (gradient(i) - sum - normal(i) * dot));
        }
    }
    std::copy(sum_w.begin(), sum_w.end(), dw), std::copy(sum_b.begin(), sum_b.end(), db);
}

template <typename Grad>
static void test_norm_backward(const NormCase& c, const char* name, const double* x, const double* w,
                               const double* mean, const double* rstd) {
    size_t C = (size_t)c.C, n = (size_t)c.N * C;
    double *dy = random_values(n, 1), *dx = random_values(n, 1), *dw = random_values(C, 1),
           *db = random_values(C, 1);
    double *true_dx = copy_of(dx, n), *true_dw = copy_of(dw, C), *true_db = copy_of(db, C);
    double *plain_dx = copy_of(dx, n), *plain_dw = copy_of(dw, C), *plain_db = copy_of(db, C);
    // statistics as the device has them: fp32
    double *mean32 = to_host(to_device<float>(mean, (size_t)c.N), (size_t)c.N),
           *rstd32 = to_host(to_device<float>(rstd, (size_t)c.N), (size_t)c.N);
    cpu::norm_backward(true_dx, true_dw, true_db, dy, x, w, mean32, rstd32, c.N, c.C, c.kind);
    plain_norm_backward(plain_dx, plain_dw, plain_db, dy, x, w, mean32, rstd32, c);
    for (size_t i = 0; i < C && sizeof(Grad) == 2; i++)
        plain_dw[i] = rounded(plain_dw[i]), plain_db[i] = rounded(plain_db[i]);
    floatX *dev_dy = to_device<floatX>(dy, n), *dev_x = to_device<floatX>(x, n),
           *dev_w = to_device<floatX>(w, C);
    float *dev_mean = to_device<float>(mean, (size_t)c.N), *dev_rstd = to_device<float>(rstd, (size_t)c.N);
    if (c.kind == NORM_RMSNORM) dev_mean = NULL;
    float* scratch = poisoned_device<float>(norm_backward_scratch(c.C));
    floatX* dev_dx[2];
    Grad *dev_dw[2], *dev_db[2];
    for (int run = 0; run < 2; run++) {
        dev_dx[run] = to_device<floatX>(dx, n), dev_dw[run] = to_device<Grad>(dw, C),
        dev_db[run] = to_device<Grad>(db, C);
        norm_backward(dev_dx[run], dev_dw[run], c.bias ? dev_db[run] : (Grad*)NULL, scratch, dev_dy, dev_x,
                      dev_w, dev_mean, dev_rstd, c.N, c.C, c.kind, test_stream);
    }
    std::string text = std::string(name) + (sizeof(Grad) == 2 ? ", bf16 gradients" : "");
    judge((text + ": dinp").c_str(), to_host(dev_dx[0], n), plain_dx, true_dx, n);
    judge((text + ": dweight").c_str(), to_host(dev_dw[0], C), plain_dw, true_dw, C);
    if (c.bias) judge((text + ": dbias").c_str(), to_host(dev_db[0], C), plain_db, true_db, C);
    tap_check(same_bits(dev_dx[0], dev_dx[1], n) && same_bits(dev_dw[0], dev_dw[1], C) &&
                  same_bits(dev_db[0], dev_db[1], C),
              "%s: backward twice, the same bits", text.c_str());
}

static void test_norm(const NormCase& c) {
    const float eps = 1e-5f;
    size_t N = (size_t)c.N, C = (size_t)c.C, n = N * C;
    char name[100];
    snprintf(name, sizeof name, "%s N=%d C=%d%s", norm_names[c.kind], c.N, c.C, c.bias ? ", bias" : "");
    double *a = random_values(n, 1), *b = random_values(n, 1), *w = random_values(C, 1),
           *bias = random_values(C, 1);
    for (size_t i = 0; i < n; i++) a[i] = rounded(a[i] + c.mean);
    double *residual = own_host<double>(n), *out = own_host<double>(n), *plain_out = own_host<double>(n);
    double *mean = own_host<double>(N), *rstd = own_host<double>(N), *plain_mean = own_host<double>(N),
           *plain_rstd = own_host<double>(N);
    for (size_t i = 0; i < n; i++) residual[i] = rounded(a[i] + b[i]); // what the norm is taken of
    cpu::norm_forward(out, mean, rstd, residual, w, c.bias ? bias : NULL, c.N, c.C, (double)eps, c.kind);
    plain_norm(plain_out, plain_mean, plain_rstd, residual, w, c.bias ? bias : NULL, c, eps);

    floatX *dev_a = to_device<floatX>(a, n), *dev_b = to_device<floatX>(b, n),
           *dev_w = to_device<floatX>(w, C), *dev_bias = c.bias ? to_device<floatX>(bias, C) : NULL,
           *dev_residual = poisoned_device<floatX>(n), *dev_out = poisoned_device<floatX>(n),
           *again = poisoned_device<floatX>(n), *sum = poisoned_device<floatX>(n);
    float *dev_mean = poisoned_device<float>(N), *dev_rstd = poisoned_device<float>(N),
          *mean2 = poisoned_device<float>(N), *rstd2 = poisoned_device<float>(N);
    residual_norm_forward(dev_residual, dev_out, dev_mean, dev_rstd, dev_a, dev_b, dev_w, dev_bias, c.N, c.C,
                          eps, c.kind, test_stream);
    norm_forward(again, mean2, rstd2, dev_residual, dev_w, dev_bias, c.N, c.C, eps, c.kind, test_stream);
    residual_forward(sum, dev_a, dev_b, n, test_stream);
    double* stored = to_host(dev_residual, n);
    tap_check(memcmp(stored, residual, n * sizeof *stored) == 0 && same_bits(sum, dev_residual, n),
              "%s: the residual is the rounded sum", name);
    judge((std::string(name) + ": out").c_str(), to_host(dev_out, n), plain_out, out, n);
    judge((std::string(name) + ": rstd").c_str(), to_host(dev_rstd, N), plain_rstd, rstd, N);
    if (c.kind == NORM_LAYERNORM)
        judge((std::string(name) + ": mean").c_str(), to_host(dev_mean, N), plain_mean, mean, N);
    tap_check(same_bits(again, dev_out, n) && same_bits(rstd2, dev_rstd, N) && same_bits(mean2, dev_mean, N),
              "%s: the norm of the stored residual has the same bits", name);
    residual_norm_forward(dev_a, dev_out, dev_mean, dev_rstd, dev_a, dev_b, dev_w, dev_bias, c.N, c.C, eps,
                          c.kind, test_stream);
    tap_check(same_bits(dev_a, dev_residual, n) && same_bits(again, dev_out, n), "%s: in place", name);
    test_norm_backward<float>(c, name, residual, w, mean, rstd);
    if (sizeof(floatX) == 2) test_norm_backward<floatX>(c, name, residual, w, mean, rstd);
    release_all();
}

// ----------------------------------------------------------------------------
// column sums

template <typename Grad> static void test_column_sums(int N, int C) {
    size_t n = (size_t)N * (size_t)C;
    double *x = random_values(n, 1), *sums = random_values((size_t)C, 1), *truth = copy_of(sums, (size_t)C),
           *plain = copy_of(sums, (size_t)C);
    cpu::add_column_sums(truth, x, N, C);
    for (int c = 0; c < C; c++) {
        float sum = (float)sums[c];
        for (int i = 0; i < N; i++) sum += (float)x[(size_t)i * (size_t)C + (size_t)c];
        plain[c] = (double)to_float(rounded_to<Grad>((double)sum));
    }
    floatX* dev_x = to_device<floatX>(x, n);
    Grad *one = to_device<Grad>(sums, (size_t)C), *two = to_device<Grad>(sums, (size_t)C);
    float* scratch = poisoned_device<float>(column_sums_scratch(C));
    add_column_sums(one, scratch, dev_x, N, C, test_stream);
    add_column_sums(two, scratch, dev_x, N, C, test_stream);
    char name[80];
    snprintf(name, sizeof name, "column sums N=%d C=%d%s", N, C, sizeof(Grad) == 2 ? ", bf16" : "");
    judge(name, to_host(one, (size_t)C), plain, truth, (size_t)C);
    tap_check(same_bits(one, two, (size_t)C), "%s: twice, the same bits", name);
    release_all();
}

// ----------------------------------------------------------------------------
// embedding

// one_token: every position has the same
template <typename Grad>
static void test_embedding(int B, int T, int C, int V, bool positions, bool one_token) {
    int N = B * T;
    size_t n = (size_t)N * (size_t)C, table = (size_t)V * (size_t)C, places = (size_t)(T + 3) * (size_t)C;
    std::vector<int> tokens((size_t)N), order((size_t)N), counts((size_t)V + 2);
    for (size_t i = 0; i < tokens.size(); i++)
        tokens[i] = one_token ? V - 1 : (int)(random_bits(5, RANDOM_DATA, 0, i).x[0] % (uint32_t)V);
    token_order(order.data(), tokens.data(), N, V, counts.data());
    double *wte = random_values(table, 1), *wpe = random_values(places, 1), *dout = random_values(n, 1),
           *dwte = random_values(table, 1), *dwpe = random_values(places, 1);
    double *out = own_host<double>(n), *plain = own_host<double>(n), *true_dwte = copy_of(dwte, table),
           *true_dwpe = copy_of(dwpe, places);
    cpu::embedding_forward(out, tokens.data(), wte, positions ? wpe : NULL, B, T, C);
    cpu::embedding_backward(true_dwte, positions ? true_dwpe : NULL, dout, tokens.data(), B, T, C);
    std::vector<float> plain_wte(dwte, dwte + table), plain_wpe(dwpe, dwpe + places);
    for (size_t i = 0; i < n; i++) {
        size_t row = i / (size_t)C, c = i % (size_t)C;
        plain[i] = rounded(out[i]);
        plain_wte[(size_t)tokens[row] * (size_t)C + c] += (float)dout[i];
        if (positions) plain_wpe[row % (size_t)T * (size_t)C + c] += (float)dout[i];
    }
    int *dev_tokens = ints_to_device(tokens.data(), (size_t)N),
        *dev_order = ints_to_device(order.data(), (size_t)N);
    floatX *dev_wte = to_device<floatX>(wte, table), *dev_wpe = to_device<floatX>(wpe, places),
           *dev_out = poisoned_device<floatX>(n), *dev_dout = to_device<floatX>(dout, n);
    Grad *dev_dwte = to_device<Grad>(dwte, table), *dev_dwpe = to_device<Grad>(dwpe, places);
    Grad *again_dwte = to_device<Grad>(dwte, table), *again_dwpe = to_device<Grad>(dwpe, places);
    Positions at = positions_of(T, 0, 1);
    embedding_forward(dev_out, dev_tokens, dev_wte, positions ? dev_wpe : NULL, at, B, T, C, test_stream);
    embedding_backward(dev_dwte, positions ? dev_dwpe : (Grad*)NULL, dev_dout, dev_tokens, dev_order, at, B,
                       T, C, test_stream);
    embedding_backward(again_dwte, positions ? again_dwpe : (Grad*)NULL, dev_dout, dev_tokens, dev_order, at,
                       B, T, C, test_stream);
    Array plain_dwte(table), plain_dwpe(places);
    for (size_t i = 0; i < table; i++)
        plain_dwte[i] = (double)to_float(rounded_to<Grad>((double)plain_wte[i]));
    for (size_t i = 0; i < places; i++)
        plain_dwpe[i] = (double)to_float(rounded_to<Grad>((double)plain_wpe[i]));
    char name[120];
    snprintf(name, sizeof name, "embedding B=%d T=%d C=%d%s%s%s", B, T, C, positions ? ", positions" : "",
             one_token ? ", one token" : "", sizeof(Grad) == 2 ? ", bf16 gradients" : "");
    judge((std::string(name) + ": out").c_str(), to_host(dev_out, n), plain, out, n);
    judge((std::string(name) + ": dwte").c_str(), to_host(dev_dwte, table), plain_dwte.data(), true_dwte,
          table);
    judge((std::string(name) + ": dwpe").c_str(), to_host(dev_dwpe, places), plain_dwpe.data(), true_dwpe,
          places);
    tap_check(same_bits(dev_dwte, again_dwte, table) && same_bits(dev_dwpe, again_dwpe, places),
              "%s: backward twice, the same bits", name);
    release_all();
}

static void test_token_order(void) {
    const int tokens[] = {3, 0, 3, 2, 0, 3}, expected[] = {1, 4, 3, 0, 2, 5};
    int order[6], counts[7];
    token_order(order, tokens, 6, 5, counts);
    tap_check(memcmp(order, expected, sizeof order) == 0, "token_order sorts, and keeps the order of equals");
}

// ----------------------------------------------------------------------------
// rope

static void test_rope(int B, int T, int NH, int NKV, int HS, int offset) {
    size_t row = (size_t)((NH + 2 * NKV) * HS), n = (size_t)(B * T) * row, half = (size_t)HS / 2;
    std::vector<float> cosines((size_t)(T + offset) * half), sines(cosines.size());
    RopeConfig config = {};
    config.theta = 10000;
    rope_table(cosines.data(), sines.data(), &config, T + offset, HS);
    float *dev_cos = own_device<float>(cosines.size()), *dev_sin = own_device<float>(sines.size());
    CUDA_CHECK(cudaMemcpy(dev_cos, cosines.data(), cosines.size() * sizeof(float), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(dev_sin, sines.data(), sines.size() * sizeof(float), cudaMemcpyHostToDevice));
    double* x = random_values(n, 1);
    for (int back = 0; back < 2; back++) {
        double *truth = copy_of(x, n), *plain = copy_of(x, n);
        (back ? cpu::rope_backward : cpu::rope_forward)(truth, cosines.data(), sines.data(), offset, B, T, NH,
                                                        NKV, HS);
        for (int i = 0; i < B * T; i++)
            for (int h = 0; h < NH + NKV; h++)
                for (size_t k = 0; k < half; k++) {
                    size_t at = (size_t)i * row + (size_t)(h * HS) + k,
                           angle = (size_t)(offset + i % T) * half + k;
                    float u = (float)x[at], v = (float)x[at + half], s = back ? -sines[angle] : sines[angle];
                    plain[at] = rounded(u * cosines[angle] - v * s);
                    plain[at + half] = rounded(v * cosines[angle] + u * s);
                }
        floatX* device = to_device<floatX>(x, n);
        Positions at = {T, {offset, offset + T}};
        (back ? rope_backward : rope_forward)(device, dev_cos, dev_sin, at, B, T, NH, NKV, HS, test_stream);
        char name[100];
        snprintf(name, sizeof name, "rope %s B=%d T=%d NH=%d NKV=%d HS=%d at %d",
                 back ? "backward" : "forward", B, T, NH, NKV, HS, offset);
        judge(name, to_host(device, n), plain, truth, n);
    }
    release_all();
}

// ----------------------------------------------------------------------------
// positions: ranks that share sequences, one after the other, against one rank with all rows

struct EmbeddingTables {
    floatX *wte, *wpe;
    float* dwte;
};

// A rank's rows: out, and what they add to dwpe.
static std::vector<double> embed_rank(float* dwpe, const EmbeddingTables& tables,
                                      const std::vector<int>& tokens, const double* dout, int V, int B, int T,
                                      int C, int rank, int ranks) {
    Positions at = positions_of(T, rank, ranks);
    std::vector<int> mine = rows_of_rank(tokens.data(), at, B, T, ranks, 1), order(mine.size()),
                     counts((size_t)V + 2);
    std::vector<double> my_dout = rows_of_rank(dout, at, B, T, ranks, (size_t)C);
    token_order(order.data(), mine.data(), (int)mine.size(), V, counts.data());
    int *dev_tokens = ints_to_device(mine.data(), mine.size()),
        *dev_order = ints_to_device(order.data(), order.size());
    floatX *out = poisoned_device<floatX>(my_dout.size()),
           *dev_dout = to_device<floatX>(my_dout.data(), my_dout.size());
    embedding_forward(out, dev_tokens, tables.wte, tables.wpe, at, B, T / ranks, C, test_stream);
    embedding_backward(tables.dwte, dwpe, dev_dout, dev_tokens, dev_order, at, B, T / ranks, C, test_stream);
    const double* host = to_host(out, my_dout.size());
    return std::vector<double>(host, host + my_dout.size());
}

static void test_embedding_of_ranks(int B, int T, int C, int ranks) {
    const int V = 13;
    size_t row = (size_t)C, rows = (size_t)(B * T), table = (size_t)V * row, places = (size_t)T * row;
    std::vector<int> tokens(rows);
    for (size_t i = 0; i < rows; i++) tokens[i] = (int)(i * i % (size_t)V);
    double *wte = random_values(table, 1), *wpe = random_values(places, 1), *dwpe = random_values(places, 1),
           *dout = random_values(rows * row, 1);
    EmbeddingTables tables = {to_device<floatX>(wte, table), to_device<floatX>(wpe, places),
                              to_device<float>(wte, table)};
    float *of_one = to_device<float>(dwpe, places), *of_all = to_device<float>(dwpe, places);
    std::vector<double> whole = embed_rank(of_one, tables, tokens, dout, V, B, T, C, 0, 1);
    bool same = true;
    for (int r = 0; r < ranks; r++)
        same = same && rows_of_rank(whole.data(), positions_of(T, r, ranks), B, T, ranks, row) ==
                           embed_rank(of_all, tables, tokens, dout, V, B, T, C, r, ranks);
    tap_check(same, "embedding T=%d C=%d, %d ranks: out has the bits of one rank", T, C, ranks);
    tap_check(same_bits(of_one, of_all, places), "embedding T=%d C=%d, %d ranks: so has dwpe", T, C, ranks);
    release_all();
}

static void test_rope_of_ranks(int B, int T, int NH, int NKV, int HS, int ranks) {
    size_t row = (size_t)((NH + 2 * NKV) * HS), n = (size_t)(B * T) * row, half = (size_t)HS / 2;
    double *x = random_values(n, 1), *cosines = random_values((size_t)T * half, 1),
           *sines = random_values((size_t)T * half, 1);
    float *dev_cos = to_device<float>(cosines, (size_t)T * half),
          *dev_sin = to_device<float>(sines, (size_t)T * half);
    floatX* device = to_device<floatX>(x, n);
    rope_forward(device, dev_cos, dev_sin, positions_of(T, 0, 1), B, T, NH, NKV, HS, test_stream);
    const double* whole = to_host(device, n);
    bool same = true;
    for (int rank = 0; rank < ranks; rank++) {
        Positions at = positions_of(T, rank, ranks);
        std::vector<double> mine = rows_of_rank(x, at, B, T, ranks, row);
        floatX* rows = to_device<floatX>(mine.data(), mine.size());
        rope_forward(rows, dev_cos, dev_sin, at, B, T / ranks, NH, NKV, HS, test_stream);
        const double* ours = to_host(rows, mine.size());
        same = same &&
               rows_of_rank(whole, at, B, T, ranks, row) == std::vector<double>(ours, ours + mine.size());
    }
    tap_check(same, "rope T=%d HS=%d, %d ranks: the bits of one rank", T, HS, ranks);
    release_all();
}

// ----------------------------------------------------------------------------
// activation

static float plain_sigmoid(float x) { return 1 / (1 + expf(-x)); }

static void plain_activation(double* out, double* dx, const double* dy, const double* x, int N, int FF,
                             int kind) {
    const float scale = 1.5957691216057308f, cubic = 0.044715f;
    for (size_t i = 0; i < (size_t)N * (size_t)FF; i++) {
        size_t at = i + (kind == ACTIVATION_SWIGLU ? i / (size_t)FF * (size_t)FF : 0);
        float u = (float)x[at], d = (float)dy[i];
        if (kind == ACTIVATION_GELU_TANH) {
            float s = plain_sigmoid(scale * (u + cubic * u * u * u));
            out[i] = rounded(u * s);
            dx[i] = rounded(d * (s + u * s * (1 - s) * scale * (1 + 3 * cubic * u * u)));
        } else {
            float up = (float)x[at + (size_t)FF], s = plain_sigmoid(u);
            out[i] = rounded(u * s * up);
            dx[at] = rounded(d * up * (s + u * s * (1 - s)));
            dx[at + (size_t)FF] = rounded(d * u * s);
        }
    }
}

static void test_activation(int N, int FF, int kind, double scale) {
    size_t n = (size_t)N * (size_t)FF, in = kind == ACTIVATION_SWIGLU ? 2 * n : n;
    double *x = random_values(in, scale), *dy = random_values(n, 1), *out = own_host<double>(n),
           *dx = own_host<double>(in), *plain_out = own_host<double>(n), *plain_dx = own_host<double>(in);
    cpu::activation_forward(out, x, N, FF, kind);
    cpu::activation_backward(dx, dy, x, N, FF, kind);
    plain_activation(plain_out, plain_dx, dy, x, N, FF, kind);
    floatX *dev_x = to_device<floatX>(x, in), *dev_dy = to_device<floatX>(dy, n),
           *dev_out = poisoned_device<floatX>(n), *dev_dx = poisoned_device<floatX>(in);
    activation_forward(dev_out, dev_x, N, FF, kind, test_stream);
    activation_backward(dev_dx, dev_dy, dev_x, N, FF, kind, test_stream);
    char name[100];
    snprintf(name, sizeof name, "%s N=%d FF=%d, inputs to %g", activation_names[kind], N, FF, scale);
    judge((std::string(name) + ": out").c_str(), to_host(dev_out, n), plain_out, out, n);
    judge((std::string(name) + ": dinp").c_str(), to_host(dev_dx, in), plain_dx, dx, in);
    if (kind == ACTIVATION_GELU_TANH) {
        activation_backward(dev_dy, dev_dy, dev_x, N, FF, kind, test_stream);
        tap_check(same_bits(dev_dy, dev_dx, n), "%s: dinp in the place of dout", name);
    }
    release_all();
}

// ----------------------------------------------------------------------------
// classifier

static void test_classifier(int N, int V, double spread, double scale) {
    int Vp = (V + 127) / 128 * 128;
    size_t n = (size_t)N * (size_t)Vp;
    double *x = random_values(n, spread), *truth = copy_of(x, n), *plain = own_host<double>(n),
           *losses = own_host<double>((size_t)N), *plain_losses = own_host<double>((size_t)N);
    std::vector<int> targets((size_t)N);
    for (size_t i = 0; i < targets.size(); i++)
        targets[i] = i % 5 == 3 ? -1
                     : i == 0   ? V - 1
                                : (int)(random_bits(6, RANDOM_DATA, 0, i).x[0] % (uint32_t)V);
    for (size_t i = 0; i < n; i++) // nobody may read the padding
        if (i % (size_t)Vp >= (size_t)V) x[i] = truth[i] = NAN;
    cpu::classifier(losses, truth, targets.data(), scale, N, V, Vp, true);
    for (int i = 0; i < N; i++) {
        const double* row = x + (size_t)i * (size_t)Vp;
        double* d = plain + (size_t)i * (size_t)Vp;
        int target = targets[(size_t)i];
        if (target < 0) continue; // zeros
        float max = (float)row[0], sum = 0;
        for (int v = 1; v < V; v++) max = fmaxf(max, (float)row[v]);
        for (int v = 0; v < V; v++) sum += expf((float)row[v] - max);
        plain_losses[i] = (double)(logf(sum) - ((float)row[target] - max));
        for (int v = 0; v < V; v++)
            d[v] = rounded((float)scale * (expf((float)row[v] - max) / sum - (v == target ? 1 : 0)));
    }
    int* dev_targets = ints_to_device(targets.data(), (size_t)N);
    floatX *logits = to_device<floatX>(x, n), *untouched = to_device<floatX>(x, n),
           *before = to_device<floatX>(x, n);
    float *dev_losses = poisoned_device<float>((size_t)N), *only_losses = poisoned_device<float>((size_t)N);
    classifier(dev_losses, logits, dev_targets, NULL, 1, 0, (float)scale, N, V, Vp, true, test_stream);
    classifier(only_losses, untouched, dev_targets, NULL, 1, 0, (float)scale, N, V, Vp, false, test_stream);
    char name[100];
    snprintf(name, sizeof name, "classifier N=%d V=%d, logits to %g", N, V, spread);
    judge((std::string(name) + ": losses").c_str(), to_host(dev_losses, (size_t)N), plain_losses, losses,
          (size_t)N);
    judge((std::string(name) + ": dlogits").c_str(), to_host(logits, n), plain, truth, n);
    tap_check(same_bits(untouched, before, n) && same_bits(only_losses, dev_losses, (size_t)N),
              "%s: without a gradient the logits stay, the losses are the same", name);
    release_all();
}

static void test_layers(void) {
    for (const NormCase& c : norm_cases) test_norm(c);
    const int sizes[][2] = {{1, 8}, {37, 264}, {700, 72}, {5, 4104}, {9000, 16}, {2100, 520}};
    for (const int* s : sizes) {
        test_column_sums<float>(s[0], s[1]);
        if (sizeof(floatX) == 2) test_column_sums<floatX>(s[0], s[1]);
    }
    test_token_order();
    test_embedding<float>(2, 9, 64, 11, true, false);
    test_embedding<float>(1, 1, 8, 3, true, false);
    test_embedding<float>(3, 50, 1032, 40, false, false);
    test_embedding<float>(2, 200, 16, 7, true, true);
    if (sizeof(floatX) == 2) test_embedding<floatX>(2, 33, 72, 50, true, false);
    test_rope(2, 5, 4, 2, 64, 0);
    test_rope(1, 3, 1, 1, 8, 7);
    test_rope(1, 33, 7, 1, 40, 0);
    test_rope(1, 3, 24, 8, 80, 2);
    test_rope(2, 2, 3, 3, 128, 1);
    test_embedding_of_ranks(2, 8, 16, 2);
    test_embedding_of_ranks(3, 18, 264, 3);
    test_rope_of_ranks(2, 12, 4, 2, 64, 2);
    test_rope_of_ranks(1, 30, 2, 1, 40, 3);
    for (int kind = ACTIVATION_GELU_TANH; kind <= ACTIVATION_SWIGLU; kind++) {
        test_activation(1, 8, kind, 1);
        test_activation(7, 264, kind, 4);
        test_activation(33, 176, kind, 12);
        test_activation(2, 2056, kind, 100);
    }
    test_classifier(9, 157, 1, 1.0 / 64);
    test_classifier(6, 8, 3, 1);
    test_classifier(5, 128, 30, 0.5);
    test_classifier(6, 9000, 8, 1e-3);
    test_classifier(2, 1, 1, 1);
}
