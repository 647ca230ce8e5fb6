// The layers as their formulas read, in the number type NUM, one loop per sum sign: what the fast ones are
// held against. Included twice, with NUM = real (the error that a plain program of the same precision makes)
// and NUM = long double (the truth). NAIVE(f) is f with a suffix for the type. Outputs, inputs, sizes,
// options.

// out (M, N) = a b; a is (M, K) or, transposed, (K, M); b is (K, N) or (N, K)
static void NAIVE(product)(NUM* out, const NUM* a, const NUM* b, int M, int N, int K, bool a_t, bool b_t) {
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            NUM sum = 0;
            for (int k = 0; k < K; k++)
                sum += a[a_t ? k * M + m : m * K + k] * b[b_t ? n * K + k : k * N + n];
            out[m * N + n] = sum;
        }
}

static void NAIVE(embedding)(NUM* out, const NUM* wte, const NUM* wpe, const int* tokens, int B, int T,
                             int C) {
    for (int n = 0; n < B * T; n++)
        for (int c = 0; c < C; c++)
            out[n * C + c] = wte[tokens[n] * C + c] + (wpe != NULL ? wpe[n % T * C + c] : 0);
}

static void NAIVE(norm)(NUM* out, const NUM* inp, const NUM* weight, const NUM* bias, int N, int C, NUM eps,
                        int kind) {
    for (int n = 0; n < N; n++) {
        const NUM* x = inp + n * C;
        NUM mean = 0, variance = 0;
        for (int c = 0; c < C && kind == NORM_LAYERNORM; c++) mean += x[c] / (NUM)C;
        for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean) / (NUM)C;
        for (int c = 0; c < C; c++)
            out[n * C + c] =
                (x[c] - mean) / (NUM)sqrtl((wide)(variance + eps)) * weight[c] + (bias ? bias[c] : 0);
    }
}

// out = qkv with its q and k heads turned by the angles of position offset + t
static void NAIVE(rope)(NUM* out, const NUM* qkv, const float* cosines, const float* sines, int offset, int B,
                        int T, int NH, int NKV, int HS) {
    int stride = (NH + 2 * NKV) * HS;
    memcpy(out, qkv, (size_t)(B * T * stride) * sizeof(NUM));
    for (int n = 0; n < B * T; n++)
        for (int h = 0; h < NH + NKV; h++)
            for (int i = 0; i < HS / 2; i++) {
                int at = n * stride + h * HS + i, angle = (offset + n % T) * (HS / 2) + i;
                out[at] = qkv[at] * cosines[angle] - qkv[at + HS / 2] * sines[angle];
                out[at + HS / 2] = qkv[at + HS / 2] * cosines[angle] + qkv[at] * sines[angle];
            }
}

static void NAIVE(attention)(NUM* out, NUM* lse, const NUM* qkv, const int* doc_start, int B, int T, int NH,
                             int NKV, int HS) {
    int stride = (NH + 2 * NKV) * HS;
    NUM* p = (NUM*)malloc_check((size_t)T * sizeof(NUM));
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++)
            for (int t = 0; t < T; t++) {
                const NUM* q = qkv + (b * T + t) * stride + h * HS;
                const NUM* k = qkv + b * T * stride + (NH + h / (NH / NKV)) * HS;
                NUM max = -10000, sum = 0;
                int start = doc_start != NULL ? doc_start[b * T + t] : 0;
                for (int s = start; s <= t; s++) {
                    p[s] = 0;
                    for (int c = 0; c < HS; c++) p[s] += q[c] * k[s * stride + c] / (NUM)sqrtl((wide)HS);
                    max = p[s] > max ? p[s] : max;
                }
                for (int s = start; s <= t; s++) sum += p[s] = (NUM)expl((wide)(p[s] - max));
                for (int c = 0; c < HS; c++) {
                    NUM o = 0;
                    for (int s = start; s <= t; s++) o += p[s] / sum * k[s * stride + NKV * HS + c];
                    out[(b * T + t) * NH * HS + h * HS + c] = o;
                }
                lse[(b * NH + h) * T + t] = max + (NUM)logl((wide)sum);
            }
    free(p);
}

// GELU's (1 + tanh u) / 2 as 1 / (1 + e^-2u), the same number, which does not end in 1 - 1 where u is far
// below 0
static void NAIVE(activation)(NUM* out, const NUM* inp, int N, int FF, int kind) {
    const NUM pi = (NUM)3.14159265358979323846264338L;
    for (int n = 0; n < N; n++)
        for (int c = 0; c < FF; c++) {
            bool gated = kind == ACTIVATION_SWIGLU;
            NUM x = inp[gated ? n * 2 * FF + c : n * FF + c];
            NUM u = (NUM)sqrtl(2 / (wide)pi) * (x + (NUM)0.044715L * x * x * x);
            out[n * FF + c] = x / (1 + (NUM)expl((wide)(gated ? -x : -2 * u)));
            if (gated) out[n * FF + c] *= inp[n * 2 * FF + FF + c];
        }
}

static void NAIVE(classifier)(NUM* losses, const NUM* logits, const int* targets, int N, int V, int Vp) {
    for (int n = 0; n < N; n++) {
        NUM sum = 0;
        for (int v = 0; v < V; v++) sum += (NUM)expl((wide)(logits[n * Vp + v]));
        losses[n] = targets[n] < 0 ? 0 : (NUM)logl((wide)sum) - logits[n * Vp + targets[n]];
    }
}
