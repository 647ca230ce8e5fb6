// The learning-rate schedule: where it begins, peaks and ends, that it never turns back, and sizes at the edge.
#include "llmc/schedule.h" // defines: learning_rate
#include <float.h>
// cmocka's macro fail() would hide ours, so its header comes last
#include <setjmp.h>
#include <cmocka.h>

static RunConfig run; // too large for a stack

static void set(int type, int max_steps, int warmup_steps, double final_lr_fraction, double decay_fraction) {
    memset(&run, 0, sizeof run);
    run.optimizer.learning_rate = 3e-4;
    run.schedule.type = type;
    run.schedule.max_steps = max_steps;
    run.schedule.warmup_steps = warmup_steps;
    run.schedule.final_lr_fraction = final_lr_fraction;
    run.schedule.decay_fraction = decay_fraction;
}

// assert_float_equal has a tolerance; these ends must be exact.
#define assert_exactly(a, b)                                                                                 \
    do {                                                                                                     \
        if ((a) != (b)) fail_msg("%.17g is not %.17g (type %d)", a, b, run.schedule.type);                   \
    } while (0)

static const int types[] = {SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_WSD, SCHEDULE_CONSTANT};
enum { NUM_TYPES = sizeof types / sizeof types[0] };

static double final_lr(void) {
    double share = run.schedule.type == SCHEDULE_CONSTANT ? 1.0 : run.schedule.final_lr_fraction;
    return run.optimizer.learning_rate * share;
}

// Rising through the warm-up, falling or flat behind it, with its ends exact.
static void check_shape(uint64_t steps, uint64_t warmup) {
    const double rounding = 4 * DBL_EPSILON;
    double peak = run.optimizer.learning_rate, before = 0;
    assert_exactly(learning_rate(&run, warmup), peak);
    assert_exactly(learning_rate(&run, steps - 1), final_lr());
    assert_exactly(learning_rate(&run, steps + 12345), final_lr()); // a run told to go on
    for (uint64_t s = 0; s < steps; s++) {
        double lr = learning_rate(&run, s), least = s < warmup ? 0 : final_lr() * (1 - rounding);
        bool turned = s <= warmup ? lr <= before : lr > before * (1 + rounding);
        if (turned || lr < least || lr > peak * (1 + rounding))
            fail_msg("type %d, %d steps: %.17g behind %.17g at step %d", run.schedule.type, (int)steps, lr,
                     before, (int)s);
        before = lr;
    }
}

static void test_shape(void** state) {
    (void)state;
    const int sizes[][2] = {{100, 0}, {100, 1}, {100, 10}, {1000, 700},
                            {7, 3},   {2, 0},   {3, 1},    {20000, 2000}};
    const double shares[] = {0, 0.1, 0.3, 1};
    for (int t = 0; t < NUM_TYPES; t++)
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
            for (size_t j = 0; j < sizeof shares / sizeof shares[0]; j++) {
                set(types[t], sizes[i][0], sizes[i][1], shares[j], 0.2);
                check_shape((uint64_t)sizes[i][0], (uint64_t)sizes[i][1]);
            }
}

static void test_warmup_is_a_line(void** state) {
    (void)state;
    set(SCHEDULE_COSINE, 100, 4, 0.1, 0);
    for (uint64_t s = 0; s <= 4; s++)
        assert_true(fabs(learning_rate(&run, s) - 3e-4 * (double)(s + 1) / 5) < 1e-18);
}

// Values worked out by hand, half-way and at a third.
static void test_known_values(void** state) {
    (void)state;
    const double expected[NUM_TYPES][2] = {
        {0.55, 0.775},                                  // cosine: (1 + cos(pi p)) / 2 of the way
        {0.55, 0.7},                                    // linear
        {1 - 0.9 * sqrt(0.5), 1 - 0.9 * sqrt(1.0 / 3)}, // wsd whose decay is the whole run
        {1, 1},
    };
    for (int t = 0; t < NUM_TYPES; t++) {
        set(types[t], 601, 0, 0.1, 1.0);
        assert_true(fabs(learning_rate(&run, 300) / 3e-4 - expected[t][0]) < 1e-12);
        assert_true(fabs(learning_rate(&run, 200) / 3e-4 - expected[t][1]) < 1e-12);
    }
}

// WSD is flat until the last decay_fraction of the run, which warm-up shortens but never overlaps.
static void test_wsd_plateau(void** state) {
    (void)state;
    set(SCHEDULE_WSD, 1000, 50, 0, 0.2);
    for (uint64_t s = 50; s <= 799; s++) assert_exactly(learning_rate(&run, s), 3e-4);
    assert_true(learning_rate(&run, 800) < 3e-4);
    assert_true(fabs(learning_rate(&run, 849) - 3e-4 * (1 - sqrt(0.25))) < 1e-15);
    set(SCHEDULE_WSD, 1000, 900, 0, 0.2);
    assert_exactly(learning_rate(&run, 900), 3e-4);
    assert_true(learning_rate(&run, 901) < 3e-4);
}

// Sizes at which a quotient would be 0 / 0.
static void test_degenerate_sizes(void** state) {
    (void)state;
    for (int t = 0; t < NUM_TYPES; t++) {
        set(types[t], 1, 0, 0.1, 0.2); // one step: the last
        assert_exactly(learning_rate(&run, 0), final_lr());
        set(types[t], 10, 10, 0.1, 0.2); // all warm-up
        for (uint64_t s = 0; s < 10; s++)
            assert_true(fabs(learning_rate(&run, s) - 3e-4 * (double)(s + 1) / 11) < 1e-18);
        set(types[t], 10, 9, 0.1, 0.2); // the step at the peak is the last
        assert_exactly(learning_rate(&run, 9), final_lr());
    }
    // a decay of less than one step: the plateau lasts until the last step
    for (int share = 0; share < 2; share++) {
        set(SCHEDULE_WSD, 4, 0, 0, share * 0.2);
        for (uint64_t s = 0; s < 3; s++) assert_exactly(learning_rate(&run, s), 3e-4);
        assert_exactly(learning_rate(&run, 3), 0.0);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shape),
        cmocka_unit_test(test_warmup_is_a_line),
        cmocka_unit_test(test_known_values),
        cmocka_unit_test(test_wsd_plateau),
        cmocka_unit_test(test_degenerate_sizes),
    };
    return cmocka_run_group_tests_name("schedule", tests, NULL, NULL);
}
