// The guard's decisions: detectors that survive whatever they are given, limits, which rank deviates.
#include "llmc/guard.h" // defines: detector_add, detector_limit, guard_limits, guard_judge ...

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { WINDOW = 128 };
static const double SIGMA = 6;

static RunConfig run; // zeros but for the guard

static int set_up(void** state) {
    (void)state;
    memset(&run, 0, sizeof run);
    run.guard.sigma = SIGMA, run.guard.window = WINDOW, run.guard.policy = GUARD_SKIP;
    run.batch.global_batch_size = 8;
    run.layout.size = run.layout.dp_size = run.layout.tp_size = run.layout.pp_size = 1;
    return 0;
}

// Around `mean`, evenly spread over [-1, 1]: a deviation of 0.577.
static double noisy(double mean, uint64_t i) {
    uint64_t bits = random_bits(1, RANDOM_DATA, 0, i).x[0];
    return mean + 2 * (double)(uint32_t)bits / 4294967295.0 - 1;
}

// A step as a program would compute it, with these numbers: was it applied?
static bool step(TrainState* s, double loss, double grad_norm) {
    StepGuard orders = guard_orders(s, &run);
    StepResult r = {.loss = loss, .grad_norm = grad_norm};
    r.applied = guard_accepts(&orders, loss, grad_norm);
    guard_count(s, &run, &r);
    s->step++;
    return r.applied;
}

static void clean_steps(TrainState* s, int count) {
    for (int i = 0; i < count; i++) assert_true(step(s, noisy(5, 2 * s->step), noisy(2, 2 * s->step + 1)));
}

// With n values the mean and variance are those of all; later they forget.
static void detectors_know_the_mean(void** state) {
    (void)state;
    Detector d = {0, 0, 0};
    double sum = 0, squares = 0;
    for (uint64_t i = 0; i < WINDOW - 1; i++) {
        double x = noisy(3, i);
        detector_add(&d, x, 0, WINDOW);
        sum += x, squares += x * x;
        double mean = sum / (double)(i + 1), variance = squares / (double)(i + 1) - mean * mean;
        assert_true(fabs(d.mean - mean) < 1e-12 && fabs(d.variance - variance) < 1e-12);
    }
    for (uint64_t i = 0; i < 20 * WINDOW; i++) detector_add(&d, noisy(30, i), 0, WINDOW);
    assert_true(fabs(d.mean - 30) < 0.3 && fabs(sqrt(d.variance) - 0.577) < 0.1);
}

// NaN or Inf, in loss or norm, first of all or in the middle: not applied, and 5000 clean steps later the detector is
// as good as one that never saw it.
static void detectors_survive_what_is_not_finite(void** state) {
    (void)state;
    const double bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 16; i++) {
        TrainState s = {0}, clean = {0};
        int before = i & 8 ? 500 : 0;
        bool in_loss = i & 4;
        clean_steps(&s, before);
        assert_false(step(&s, in_loss ? bad[i % 4] : 5, in_loss ? 2 : bad[i % 4]));
        assert_true(s.skipped_steps == 1 && s.consecutive_skipped == 1);
        assert_true((in_loss ? s.loss.count : s.grad_norm.count) == (uint64_t)before); // it has not entered
        for (int k = 0; k < 5000; k++) assert_true(step(&s, noisy(5, 2 * s.step), noisy(2, 2 * s.step + 1)));
        assert_true(s.consecutive_skipped == 0);
        clean_steps(&clean, 5000);
        StepGuard limits = guard_limits(&s, &run), expected = guard_limits(&clean, &run);
        assert_true(fabs(limits.max_loss - expected.max_loss) < 0.5 && limits.max_loss < 9);
        assert_true(fabs(limits.max_grad_norm - expected.max_grad_norm) < 0.5 && limits.max_grad_norm < 6);
        assert_false(step(&s, 12, 2)); // alive
        assert_false(step(&s, 5, 9));
    }
}

// From k deviations on, in either number; not below; and not before a window is full.
static void spikes_are_above_k_sigma(void** state) {
    (void)state;
    for (int number = 0; number < 2; number++) {
        TrainState s = {0};
        clean_steps(&s, WINDOW - 1);
        TrainState early = s;
        assert_true(step(&early, 1000, 1000));
        clean_steps(&s, 500);
        Detector* d = number == 0 ? &s.loss : &s.grad_norm;
        double deviation = sqrt(d->variance);
        assert_true(fabs(deviation - 0.577) < 0.1);
        for (double k = 5.9; k < 6.11; k += 0.2) {
            TrainState copy = s;
            double x = d->mean + k * deviation;
            bool applied = number == 0 ? step(&copy, x, 2) : step(&copy, 5, x);
            assert_int_equal(applied, k < 6);
        }
        run.guard.policy = GUARD_WARN;
        assert_true(step(&s, 1000, 1000));
        assert_false(step(&s, NAN, 2));
        run.guard.policy = GUARD_SKIP, run.guard.sigma = 0;
        assert_true(step(&s, 1e30, 1e30));
        run.guard.sigma = SIGMA;
    }
}

// One spike of any size leaves the limit about where it was; a level that stays is accepted soon.
static void spikes_do_not_blind(void** state) {
    (void)state;
    TrainState s = {0};
    clean_steps(&s, 1000);
    double before = guard_limits(&s, &run).max_loss;
    assert_false(step(&s, 3e38, 2));
    double after = guard_limits(&s, &run).max_loss;
    assert_true(after > before && after < before + 1);
    assert_false(step(&s, 2 * before, 2));
    int rejected = 0;
    while (rejected < 1000 && !step(&s, noisy(20, s.step), 2)) rejected++;
    assert_in_range(rejected, 2, 30);
}

// What a checkpoint stores is all there is: the same limits to the bit, and the same ones ever after.
static void state_survives_a_checkpoint(void** state) {
    (void)state;
    TrainState s = {0}, read;
    Error err = {0, {0}};
    String text = {NULL, 0, 0};
    clean_steps(&s, 333);
    train_state_write(s, &text);
    if (!train_state_parse(&read, text.data, "state", &err)) fail_msg("%s", err.text);
    free(text.data);
    assert_memory_equal(&s, &read, sizeof s);
    for (int i = 0; i < 500; i++) {
        StepGuard a = guard_limits(&s, &run), b = guard_limits(&read, &run);
        assert_true(a.max_loss == b.max_loss && a.max_grad_norm == b.max_grad_norm);
        double loss = i % 50 == 0 ? 100 : noisy(5, 2 * s.step);
        assert_int_equal(step(&s, loss, 2), step(&read, loss, 2));
    }
    assert_true(s.skipped_steps == 10);
}

static void alarms_name_what_is_wrong(void** state) {
    (void)state;
    StepGuard limits = {6, 3, false, false, false};
    static const struct {
        double loss, norm;
        const char *what, *says;
    } cases[] = {{6, 3, NULL, NULL},
                 {NAN, 1, "loss", "loss is not finite"},
                 {5, INFINITY, "grad_norm", "grad_norm is not finite"},
                 {NAN, NAN, "loss", "loss is not finite"},
                 {6.5, 3.5, "loss", "loss 6.5 is above its limit, 6"},
                 {5, 3.5, "grad_norm", "grad_norm 3.5 is above its limit, 3"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        StepResult r = {.loss = cases[i].loss, .grad_norm = cases[i].norm};
        Alarm a = guard_judge(&limits, &run.layout, &r);
        char text[512];
        assert_int_equal(a.what == NULL, cases[i].what == NULL);
        if (a.what == NULL) continue;
        assert_string_equal(a.what, cases[i].what);
        guard_describe(&a, text);
        assert_string_equal(text, cases[i].says);
    }
}

// Ranks are tp + 2 (dp + dp_size pp); only those with the same tp and pp have the same weights.
static void deviating_ranks_are_named(void** state) {
    (void)state;
    static const struct {
        int dp, pp;
        uint64_t hashes[16];
        const char* names;
    } cases[] = {
        {1, 1, {1, 2}, ""},
        {2, 1, {1, 2, 1, 2}, ""},
        {2, 1, {1, 2, 1, 3}, "1, 3"}, // of two nobody knows which
        {3, 1, {1, 2, 1, 2, 9, 2}, "4"},
        {3, 1, {9, 2, 1, 2, 1, 2}, "0"},
        {3, 1, {1, 2, 3, 2, 4, 2}, "0, 2, 4"},
        {4, 1, {1, 2, 1, 2, 3, 2, 3, 2}, "0, 2, 4, 6"},
        {2, 2, {1, 2, 1, 2, 3, 4, 3, 4}, ""},
        {2, 2, {1, 2, 1, 2, 3, 4, 5, 4}, "4, 6"},
        {4, 2, {1, 2, 1, 2, 1, 2, 1, 7, 3, 4, 3, 4, 3, 4, 3, 4}, "7"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char names[256];
        Layout l;
        memset(&l, 0, sizeof l);
        l.tp_size = 2, l.dp_size = cases[i].dp, l.pp_size = cases[i].pp;
        l.size = l.tp_size * l.dp_size * l.pp_size;
        assert_int_equal(guard_deviating(&l, cases[i].hashes, names), cases[i].names[0] != '\0');
        assert_string_equal(names, cases[i].names);
    }
}

// Who deviates first has made the fault; the others have it from there.
static void the_first_to_deviate_is_named(void** state) {
    (void)state;
    const uint64_t S = REPLAY_SAME;
    const struct {
        uint64_t first[4];
        const char* names;
    } cases[] = {{{S, S, S, S}, ""},     {{S, S, 7, S}, "2"},     {{9, 8, S, 10}, "1"}, {{0, 5, 5, 5}, "0"},
                 {{6, 5, S, 5}, "1, 3"}, {{S, S - 1, S, S}, "1"}, {{3, 3, 3, 3}, "0-3"}};
    StepGuard limits = {6, 3, false, true, false};
    Layout l = layout_single();
    l.size = 4;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[512];
        StepResult r = {.loss = NAN, .grad_norm = 1, .replay = cases[i].first}; // the fault is the cause
        Alarm a = guard_judge(&limits, &l, &r);
        assert_string_equal(a.what, cases[i].names[0] != '\0' ? "replay" : "loss");
        assert_string_equal(a.ranks, cases[i].names);
        guard_describe(&a, text);
        assert_int_equal(strstr(text, "computed twice") != NULL, a.fault != NULL);
    }
    const uint64_t hashes[] = {1, 1, 1, 2}, first[] = {S, 4, S, S};
    StepResult both = {.loss = 1, .grad_norm = 1, .hashes = hashes, .replay = first};
    l.dp_size = 4;
    Alarm a = guard_judge(&limits, &l, &both);
    assert_string_equal(a.what, "weights"); // what skipping does not heal
    assert_true(a.fault->stays && !replay_fault.stays);
    assert_string_equal(a.ranks, "3");
}

static void rewinds_go_behind_the_bad_batch(void** state) {
    (void)state;
    assert_int_equal(guard_rows_after_rewind(80, 128, &run), 128);
    run.guard.rewind_skip = 6; // 6 * 8 rows: to where it was
    assert_int_equal(guard_rows_after_rewind(80, 128, &run), 128);
    run.guard.rewind_skip = 200;
    assert_int_equal(guard_rows_after_rewind(80, 128, &run), 80 + 1600);
}

static void checks_come_every_so_many_steps(void** state) {
    (void)state;
    TrainState s = {0};
    run.guard.check_every = 3;
    for (s.step = 0; s.step < 12; s.step++) // s.step: of steps done
        assert_int_equal(guard_orders(&s, &run).hash_weights, s.step % 3 == 2);
    run.checkpoint.every = 4;
    for (s.step = 0; s.step < 12; s.step++)
        assert_int_equal(guard_orders(&s, &run).hash_weights, (s.step + 1) % 3 == 0 || (s.step + 1) % 4 == 0);
    run.checkpoint.fast_every = 5;
    for (s.step = 0; s.step < 12; s.step++) {
        uint64_t next = s.step + 1;
        assert_int_equal(guard_orders(&s, &run).hash_weights,
                         next % 3 == 0 || next % 4 == 0 || next % 5 == 0);
    }
    run.guard.check_every = 0;
    for (s.step = 0; s.step < 12; s.step++) assert_false(guard_orders(&s, &run).hash_weights);
    for (s.step = 0; s.step < 12; s.step++) assert_false(guard_orders(&s, &run).replay);
    run.guard.replay_every = 5;
    for (s.step = 0; s.step < 12; s.step++)
        assert_int_equal(guard_orders(&s, &run).replay, s.step == 4 || s.step == 9);
    for (s.step = 0; s.step < 12; s.step++) assert_false(guard_orders(&s, &run).measure_layers);
    run.log.layers_every = 5;
    for (s.step = 0; s.step < 12; s.step++)
        assert_int_equal(guard_orders(&s, &run).measure_layers, s.step == 4 || s.step == 9);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup(name, set_up)
    const struct CMUnitTest tests[] = {
        TEST(detectors_know_the_mean),         TEST(detectors_survive_what_is_not_finite),
        TEST(spikes_are_above_k_sigma),        TEST(spikes_do_not_blind),
        TEST(state_survives_a_checkpoint),     TEST(alarms_name_what_is_wrong),
        TEST(deviating_ranks_are_named),       TEST(the_first_to_deviate_is_named),
        TEST(rewinds_go_behind_the_bad_batch), TEST(checks_come_every_so_many_steps),
    };
    return cmocka_run_group_tests_name("guard", tests, NULL, NULL);
}
