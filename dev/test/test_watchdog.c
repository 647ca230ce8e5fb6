// Who hangs? The watchdog's conclusion from what ranks report, in layouts made here; and how long a phase may take.
#include "llmc/watchdog.h" // defines: watch_culprit, watch_self, watch_look

#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

static uint8_t device[FLIGHT_RECORDS];
void gpt_look(GPT* g, uint8_t progress[FLIGHT_RECORDS]) {
    (void)g;
    memcpy(progress, device, sizeof device);
}

enum { RANKS = 8 };
static WatchReport reports[RANKS];
static Layout layout;

static void ranks(int tp, int dp, int pp) {
    memset(reports, 0, sizeof reports);
    layout = layout_single();
    layout.tp_size = tp, layout.dp_size = dp, layout.pp_size = pp, layout.size = tp * dp * pp;
    for (int r = 0; r < layout.size; r++) reports[r].age = 60, reports[r].phase = PHASE_STEP;
}

// A rank's device is in the number-th operation of an axis, and got that far; peer -1: a collective.
static void in(int rank, int axis, uint64_t number, int peer) {
    WatchReport* r = &reports[rank];
    WatchOperation op = {number, 1024, axis, 3, peer, "all-gather"};
    r->open[r->num_open++] = op;
    r->begun[axis] = number;
}

static void expect(int culprit, int by) {
    int who, op;
    assert_int_equal(watch_culprit(reports, &layout, 1, &who, &op), culprit);
    assert_int_equal(who, by);
}

static void test_a_collective_that_one_rank_does_not_reach(void** state) {
    (void)state;
    for (int late = 0; late < 4; late++) {
        ranks(1, 4, 1);
        for (int r = 0; r < 4; r++)
            if (r != late) in(r, AXIS_DP, 17, -1);
        reports[late].begun[AXIS_DP] = 16;
        expect(late, late == 0 ? 1 : 0);
    }
}

// Rank 3 = (tp 1, dp 1): its tensor-parallel neighbour waits for it, and the data-parallel ranks wait for these two.
static void test_ranks_that_wait_for_ranks_that_wait(void** state) {
    (void)state;
    ranks(2, 2, 1);
    reports[3].begun[AXIS_TP] = 8, reports[3].begun[AXIS_DP] = 4;
    in(2, AXIS_TP, 9, -1), reports[2].begun[AXIS_DP] = 4;
    in(0, AXIS_DP, 5, -1), reports[0].begun[AXIS_TP] = 20;
    in(1, AXIS_DP, 5, -1), reports[1].begun[AXIS_TP] = 20;
    expect(3, 1);
}

// Messages name their partner: of the ranks of a column only that one is waited for.
static void test_a_pipeline(void** state) {
    (void)state;
    ranks(1, 1, 4);
    in(0, AXIS_BACKWARD, 3, 1); // from stage 1, which waits for stage 2
    in(1, AXIS_BACKWARD + 1, 5, 2);
    in(3, AXIS_FORWARD, 7, 2);
    reports[2].begun[AXIS_BACKWARD + 1] = 4, reports[2].begun[AXIS_FORWARD] = 6,
                                     reports[1].begun[AXIS_BACKWARD] = 2;
    expect(2, 1);
}

// A rank that writes a file while the others wait for what it says is in no operation.
static void test_what_is_waited_for_outside_of_the_device(void** state) {
    (void)state;
    ranks(1, 3, 1);
    reports[0].waits = reports[2].waits = 1;
    expect(1, -1);
}

// Of two that wait for nobody, somebody must wait for the culprit; if that is so of both, it is who stood still first.
static void test_several_who_wait_for_nobody(void** state) {
    (void)state;
    ranks(1, 4, 1);
    in(0, AXIS_DP, 17, -1), in(1, AXIS_DP, 17, -1);
    reports[2].begun[AXIS_DP] = 17, reports[3].begun[AXIS_DP] = 16;
    expect(3, 0);
    reports[2].begun[AXIS_DP] = 16, reports[3].age = 70;
    expect(3, 0);
    reports[2].age = 80;
    expect(2, 0);
}

// All have begun the same operation: the network. All wait for each other: an operation is named all the same.
static void test_nobody(void** state) {
    (void)state;
    int who, op;
    ranks(1, 2, 1);
    in(0, AXIS_DP, 17, -1), in(1, AXIS_DP, 17, -1);
    expect(-1, 0);
    ranks(1, 2, 1);
    in(0, AXIS_DP, 17, -1), in(1, AXIS_WORLD, 3, -1);
    reports[0].begun[AXIS_WORLD] = 2, reports[1].begun[AXIS_DP] = 16;
    assert_int_equal(watch_culprit(reports, &layout, 1, &who, &op), -1);
    assert_true(who == 0 || who == 1);
}

static Watchdog watchdog;
static RunConfig run;
static Control channels[2];
// A beat, and the device's answer behind it.
static void beat(double awake, bool look) {
    watch_self(&watchdog, awake, look);
    if (watchdog.look != LOOK_WANTED) return;
    memcpy(watchdog.progress, device, sizeof device);
    watchdog.look = LOOK_DONE;
}
static void start_watching(void) {
    memset(&watchdog, 0, sizeof watchdog), memset(&run, 0, sizeof run), memset(flight(), 0, sizeof(Flight));
    run.parallel.hang_seconds_min = 60, run.parallel.hang_seconds_max = 1800;
    watchdog.run = &run, watchdog.main = &channels[0], watchdog.joined = &channels[1],
    watchdog.control.size = 1;
}

static void test_how_long_a_phase_may_take(void** state) {
    (void)state;
    WatchReport* r = &watchdog.mine.report;
    start_watching();
    flight_phase(PHASE_STEP, 1);
    flight_phase(PHASE_STEP, 1); // it was enqueued at once: that says nothing
    beat(1, false);
    assert_true(r->age == 0 && r->limit == 1800); // never seen
    beat(1800, false);
    assert_true(r->age == 1800 && !r->late);
    beat(1, false);
    assert_true(r->late && !r->looked);
    beat(1, false);
    assert_true(r->late && r->looked);
    flight()->since -= 30; // the step took 30 s
    flight()->steps = 1;
    flight_phase(PHASE_STEP, 2);
    beat(1, false);
    assert_true(r->age == 0 && !r->late && r->limit > 149 && r->limit < 151);
    flight_phase(PHASE_STEP, 3); // a short one
    beat(1, false);
    assert_true(r->limit > 134 && r->limit < 136);
    for (int i = 0; i < 100; i++) flight_phase(PHASE_STEP, 3); // the long one is forgotten
    beat(1, false);
    assert_true(r->limit == 60);
    flight()->since -= 4000;
    flight_phase(PHASE_STEP, 4);
    beat(1, false);
    assert_true(r->limit == 1800);
    for (int i = 0; i < 3; i++) flight_phase(PHASE_SAVE, 4); // there was nothing to wait for
    beat(1, false);
    assert_true(r->limit == 1800);
}

// The device's place among the operations of the flight recorder.
static void test_what_the_device_is_at(void** state) {
    (void)state;
    WatchReport* r = &watchdog.mine.report;
    start_watching();
    flight_phase(PHASE_STEP, 1);
    memset(device, OPERATION_ISSUED, sizeof device);
    device[flight_record(AXIS_DP, "all-gather", 8, -1)] = OPERATION_ENDED;
    device[flight_record(AXIS_FORWARD, "receive", 8, 2)] = OPERATION_BEGUN;
    int compute = flight_record(AXIS_COMPUTE, "forward", 0, -1);
    device[flight_record(AXIS_DP, "all-gather", 16, -1)] = OPERATION_BEGUN;
    flight_record(AXIS_DP, "all-gather", 8, -1);
    flight_record(AXIS_TP, "all-gather", 8, -1);
    beat(1, true), beat(1, true);
    assert_int_equal(r->begun[AXIS_DP], 2);
    assert_int_equal(r->begun[AXIS_TP], 0);
    assert_int_equal(r->begun[AXIS_WORLD], 0);
    assert_int_equal(r->num_open, 2);
    assert_true(r->open[0].axis == AXIS_FORWARD && r->open[0].peer == 2 && r->open[1].bytes == 16);
    device[compute] = OPERATION_BEGUN; // it computes: the message is ahead of its time
    beat(1, true), beat(1, true);
    assert_int_equal(r->num_open, 1);
    assert_int_equal(r->open[0].axis, AXIS_DP);
}

// Who was held up by others is not late when they come.
static void test_a_device_that_gets_on(void** state) {
    (void)state;
    WatchReport* r = &watchdog.mine.report;
    start_watching();
    flight_phase(PHASE_STEP, 1);
    memset(device, OPERATION_ISSUED, sizeof device);
    int first = flight_record(AXIS_DP, "all-gather", 8, -1);
    device[first] = OPERATION_BEGUN;
    beat(1, true), beat(2000, true), beat(1, true);
    assert_true(r->late && r->looked && r->age == 2001);
    device[flight_record(AXIS_DP, "all-gather", 8, -1)] = OPERATION_BEGUN;
    beat(1, true), beat(1, true);
    assert_true(!r->late && r->looked && r->age == 0);
    beat(1, true);
    assert_true(r->age == 1);
}

// Thousands of operations later the recorder holds the last ones, and still knows how many there were.
static void test_a_recorder_that_is_full(void** state) {
    (void)state;
    WatchReport* r = &watchdog.mine.report;
    start_watching();
    memset(device, OPERATION_ENDED, sizeof device);
    flight_record(AXIS_TIED, "all-reduce", 8, -1);
    for (int i = 0; i < 3 * FLIGHT_RECORDS; i++) flight_record(AXIS_TP, "all-gather", 8, -1);
    device[flight_record(AXIS_TP, "all-gather", 8, -1)] = OPERATION_ISSUED;
    beat(1, true), beat(1, true);
    assert_int_equal(r->begun[AXIS_TIED], 1);
    assert_int_equal(r->begun[AXIS_TP], 3 * FLIGHT_RECORDS);
    assert_int_equal(r->num_open, 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_collective_that_one_rank_does_not_reach),
        cmocka_unit_test(test_ranks_that_wait_for_ranks_that_wait),
        cmocka_unit_test(test_a_pipeline),
        cmocka_unit_test(test_what_is_waited_for_outside_of_the_device),
        cmocka_unit_test(test_several_who_wait_for_nobody),
        cmocka_unit_test(test_nobody),
        cmocka_unit_test(test_how_long_a_phase_may_take),
        cmocka_unit_test(test_what_the_device_is_at),
        cmocka_unit_test(test_a_device_that_gets_on),
        cmocka_unit_test(test_a_recorder_that_is_full),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
