// Sums that do not depend on their order.
#include "llmc/exact_sum.h" // defines: ExactSum, exact_add, exact_value
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

static double sum_of(const double* x, int n, int step) {
    ExactSum parts[3];
    memset(parts, 0, sizeof parts);
    for (int i = 0, at = 0; i < n; i++, at = (at + step) % n) exact_add(&parts[i % 3], x[at]);
    for (int b = 0; b < EXACT_BINS; b++) parts[0].bin[b] += parts[1].bin[b] + parts[2].bin[b];
    return exact_value(&parts[0]);
}

static void any_order_gives_the_same_bits(void** state) {
    enum { N = 1009 }; // a prime: every step visits all
    static double x[N];
    long double truth = 0;
    (void)state;
    for (int i = 0; i < N; i++) {
        Philox bits = random_bits(1, RANDOM_DATA, 0, (uint64_t)i);
        x[i] = ldexp((double)bits.x[0] + 0.1, (int)(bits.x[1] % 60) - 30);
        truth += x[i];
    }
    double first = sum_of(x, N, 1);
    assert_true(fabsl((long double)first / truth - 1) < 1e-15);
    for (int step = 2; step < N; step += 37) {
        double other = sum_of(x, N, step);
        assert_memory_equal(&first, &other, sizeof first);
    }
}

static void nothing_is_lost_or_overflows(void** state) {
    const struct {
        double x[5], sum;
    } cases[] = {
        {{0, 0, 0, 0, 0}, 0},
        {{-0.0, 0, 0, 0, 0}, 0},
        {{1e300, 1, -1e300, 0, 0}, 1},
        {{1e16, 1, 1, -1e16, 0}, 2},
        {{-3, -4, 0x1p-1074, 0, 0}, -7},
        {{0x1p-1074, 0x1p-1074, 0, 0, 0}, 0x1p-1073},
        {{0x1p1022, 0x1p1022, 0, -0x1p1022, 0}, 0x1p1022},
        {{1.7976931348623157e308, -1, 0, 0, 0}, 1.7976931348623157e308},
        {{-0x1p32, 0x1p-32, 0, 0, 0}, -0x1p32 + 0x1p-32},
        {{4294967295.0, 1, 0, 0, 0}, 4294967296.0},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (int step = 1; step < 5; step++) {
            double sum = sum_of(cases[i].x, 5, step);
            if (sum != cases[i].sum) fail_msg("case %zu: %.17g, not %.17g", i, sum, cases[i].sum);
        }
}

static void what_is_not_finite_stays_seen(void** state) {
    const double bad[] = {NAN, INFINITY, -INFINITY};
    (void)state;
    for (int i = 0; i < 3; i++) {
        double x[4] = {1, bad[i], -bad[i], 2};
        assert_true(isnan(sum_of(x, 4, 1)));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_order_gives_the_same_bits),
        cmocka_unit_test(nothing_is_lost_or_overflows),
        cmocka_unit_test(what_is_not_finite_stays_seen),
    };
    return cmocka_run_group_tests_name("exact_sum", tests, NULL, NULL);
}
