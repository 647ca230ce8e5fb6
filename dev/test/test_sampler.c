// From logits to a token: the distribution by counting, the sets that top-k and top-p leave, ties, and logits that
// are not numbers.
#include "llmc/rand.h"    // defines: random_uniform, RANDOM_SAMPLE
#include "llmc/sampler.h" // defines: sample_token, Candidate
#include "llmc/utils.h"   // defines: malloc_check
// cmocka's macro fail() would hide ours, so its header comes last
#include <setjmp.h>
#include <cmocka.h>

enum { MAX_V = 5000 };
static Candidate scratch[MAX_V];

static int sample(const float* logits, int V, double temperature, int top_k, double top_p, double u) {
    int token = sample_token(logits, V, temperature, top_k, top_p, u, scratch);
    assert_in_range(token, 0, V - 1);
    return token;
}

// How often each token comes for evenly spread u, which is its probability to within 1/n.
static void shares(double* share, const float* logits, int V, double temperature, int top_k, double top_p) {
    const int n = 20000;
    memset(share, 0, (size_t)V * sizeof *share);
    for (int i = 0; i < n; i++) share[sample(logits, V, temperature, top_k, top_p, (i + 0.5) / n)] += 1.0 / n;
}

#define assert_near(a, b, tolerance)                                                                         \
    do {                                                                                                     \
        if (!(fabs((a) - (b)) <= (tolerance)))                                                               \
            fail_msg("%g is not %g +- %g", (double)(a), (double)(b), tolerance);                             \
    } while (0)

// Probabilities 0.4 0.3 0.2 0.1 in an order of their own, plus a constant that must not matter.
static const double probabilities[] = {0.2, 0.4, 0.1, 0.3};
static void four_logits(float logits[4], float constant) {
    for (int i = 0; i < 4; i++) logits[i] = logf((float)probabilities[i]) + constant;
}

static void test_greedy(void** state) {
    (void)state;
    float logits[MAX_V];
    for (int i = 0; i < MAX_V; i++) logits[i] = sinf((float)i * 1.7f);
    logits[4321] = 1.5f;
    for (int i = 1; i <= 10; i++) {
        assert_int_equal(sample(logits, MAX_V, 0, 0, 1, i / 10.0), 4321);
        assert_int_equal(sample(logits, MAX_V, 1, 1, 1, i / 10.0), 4321);    // top-k 1
        assert_int_equal(sample(logits, MAX_V, 1, 0, 0, i / 10.0), 4321);    // top-p 0
        assert_int_equal(sample(logits, MAX_V, 1e-9, 0, 1, i / 10.0), 4321); // next to no temperature
        assert_int_equal(sample(logits + 4321, 1, 1, 0, 1, i / 10.0), 0);    // a vocabulary of one
    }
}

static void test_distribution(void** state) {
    (void)state;
    float logits[4];
    double share[4];
    for (int constant = -1000; constant <= 1000; constant += 1000) {
        four_logits(logits, (float)constant);
        shares(share, logits, 4, 1, 0, 1);
        for (int i = 0; i < 4; i++) assert_near(share[i], probabilities[i], 2e-4);
    }
    // temperature 2 takes square roots, 0.5 squares
    for (int half = 0; half < 2; half++) {
        double power = half ? 2 : 0.5, total = 0;
        four_logits(logits, 0);
        shares(share, logits, 4, half ? 0.5 : 2, 0, 1);
        for (int i = 0; i < 4; i++) total += pow(probabilities[i], power);
        for (int i = 0; i < 4; i++) assert_near(share[i], pow(probabilities[i], power) / total, 2e-4);
    }
}

// With the generator that training uses: 20,000 draws, each count within five standard deviations.
static void test_draws(void** state) {
    (void)state;
    enum { V = 50, DRAWS = 20000 };
    float logits[V];
    double total = 0, count[V] = {0};
    for (int i = 0; i < V; i++) logits[i] = 2 * sinf((float)i), total += exp(logits[i]);
    for (int i = 0; i < DRAWS; i++)
        count[sample(logits, V, 1, 0, 1, random_uniform(7, RANDOM_SAMPLE, 0, (uint64_t)i))]++;
    for (int i = 0; i < V; i++) {
        double p = exp(logits[i]) / total;
        assert_near(count[i], p * DRAWS, 5 * sqrt(DRAWS * p * (1 - p)));
    }
}

static void test_top_k(void** state) {
    (void)state;
    float logits[4];
    double share[4];
    four_logits(logits, 3);
    shares(share, logits, 4, 1, 2, 1);
    const double two[] = {0, 4.0 / 7, 0, 3.0 / 7};
    for (int i = 0; i < 4; i++) assert_near(share[i], two[i], 2e-4);
    for (int k = 4; k < 1000; k += 331) { // as many as there are, and more: no restriction
        shares(share, logits, 4, 1, k, 1);
        for (int i = 0; i < 4; i++) assert_near(share[i], probabilities[i], 2e-4);
    }
}

// The nucleus is the smallest set that holds top_p: for every size, just below and just above its mass.
static void test_top_p(void** state) {
    (void)state;
    float logits[4];
    double share[4];
    const double mass[] = {0, 0.4, 0.7, 0.9, 1.0}; // of the most probable 0, 1, ... tokens
    four_logits(logits, 0);
    for (int size = 1; size <= 4; size++)
        for (int edge = 0; edge < 2; edge++) {
            double top_p = edge ? mass[size] - 1e-4 : mass[size - 1] + 1e-4;
            shares(share, logits, 4, 1, 0, top_p);
            for (int i = 0; i < 4; i++)
                assert_near(share[i],
                            probabilities[i] >= 0.5 - 0.1 * size ? probabilities[i] / mass[size] : 0, 2e-4);
        }
    // a mass that is top_p exactly is enough
    const float equal[] = {1, 1};
    shares(share, equal, 2, 1, 0, 0.5);
    assert_near(share[0], 1, 1e-9);
    // top-k first: of the best three (mass 0.9), 0.75 is held by two (0.7 / 0.9)
    shares(share, logits, 4, 1, 3, 0.75);
    assert_near(share[1], 4.0 / 7, 2e-4);
    assert_near(share[0] + share[2], 0, 0.0);
}

// Equal logits keep the order of the vocabulary, in whichever way they are restricted.
static void test_ties(void** state) {
    (void)state;
    enum { V = 1000 };
    float logits[V];
    double share[V];
    for (int i = 0; i < V; i++) logits[i] = 0.25f;
    assert_int_equal(sample(logits, V, 0, 0, 1, 0.7), 0);
    assert_int_equal(sample(logits, V, 1, 0, 1, 1.0), V - 1);
    assert_int_equal(sample(logits, V, 1, 0, 1, 1e-12), 0);
    shares(share, logits, V, 1, 5, 1);
    for (int i = 0; i < V; i++) assert_near(share[i], i < 5 ? 0.2 : 0, 2e-4);
    shares(share, logits, V, 1, 0, 0.0101);
    for (int i = 0; i < V; i++) assert_near(share[i], i < 11 ? 1.0 / 11 : 0, 2e-4);
}

// A model that diverged or a masked token: no crash, no endless loop, no token that has no probability.
static void test_not_numbers(void** state) {
    (void)state;
    const float cases[][4] = {
        {NAN, 1, NAN, 2},
        {1, NAN, 2, NAN},
        {NAN, -INFINITY, 3, 3},
        {1, NAN, INFINITY, -INFINITY},
        {NAN, NAN, 0, NAN},
        {-INFINITY, 1e30f, 0, NAN},
        {0, NAN, INFINITY, INFINITY},
    };
    const int best[] = {3, 2, 2, 2, 2, 1, 2};
    const float least[] = {1, 1, 3, INFINITY, 0, 0, INFINITY}; // that has any probability beside the best
    for (int c = 0; c < 7; c++)
        for (int i = 1; i <= 100; i++)
            for (int kind = 0; kind < 4; kind++) {
                int top_k = kind == 1 ? 3 : 0;
                int token = sample(cases[c], 4, kind == 0 ? 0 : 1, top_k, kind == 2 ? 0.9 : 1, i / 100.0);
                if (!(cases[c][token] >= least[c]) || (kind == 0 && token != best[c]))
                    fail_msg("case %d, kind %d: token %d", c, kind, token);
            }
    float none[MAX_V], low[3] = {-INFINITY, -INFINITY, -INFINITY};
    for (int i = 0; i < MAX_V; i++) none[i] = NAN;
    for (int i = 1; i <= 10; i++) {
        assert_int_equal(sample(none, MAX_V, 0, 0, 1, i / 10.0), 0);
        assert_int_equal(sample(none, MAX_V, 1, 40, 0.9, i / 10.0), 0);
        sample(low, 3, 1, 0, 1, i / 10.0);
    }
}

// The same arguments, the same token: nothing is left over in the scratch memory.
static void test_no_state(void** state) {
    (void)state;
    float logits[100];
    for (int i = 0; i < 100; i++) logits[i] = sinf((float)i * 0.3f) * 3;
    for (int i = 1; i <= 1000; i++) {
        memset(scratch, 0xFF, 100 * sizeof *scratch);
        int first = sample(logits, 100, 0.8, 40, 0.95, i / 1000.0);
        assert_int_equal(sample(logits, 100, 0.8, 40, 0.95, i / 1000.0), first);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy),      cmocka_unit_test(test_distribution), cmocka_unit_test(test_draws),
        cmocka_unit_test(test_top_k),       cmocka_unit_test(test_top_p),        cmocka_unit_test(test_ties),
        cmocka_unit_test(test_not_numbers), cmocka_unit_test(test_no_state),
    };
    return cmocka_run_group_tests_name("sampler", tests, NULL, NULL);
}
