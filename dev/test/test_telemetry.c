// Where time went, what a log says of a run's earlier launches, and what a terminal is shown. That programs write all
// of it is dev/test/e2e_telemetry.sh.
#include "llmc/utils.h"     // defines: Error
#include "llmc/telemetry.h" // defines: Telemetry, telemetry_resume, event_rates, event_times, console_style ...

#include "dev/test/shard_fixtures.h" // defines: make_temp_dir, temp_path

#include <sys/wait.h>

#include <setjmp.h>
#include <cmocka.h>

static double number_in(const String* line, const char* key) {
    char quoted[64];
    double value = NAN;
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    if (!line_number(line->data, quoted, &value)) fail_msg("no %s in %s", key, line->data);
    return value;
}

// ----------------------------------------------------------------------------
// goodput

static const char* log_of(const char* text) {
    const char* path = temp_path("log.jsonl");
    write_file(path, text, strlen(text));
    return path;
}

// A run that was killed at step 4, again at 3, and now goes on from step 2 or 3: what counts is the last that was
// logged at that step or before.
static void lost_steps_do_not_count(void** state) {
    (void)state;
    static const char text[] = "{\"event\":\"start\",\"time\":1000.5,\"step\":0,\"productive_seconds\":0}\n"
                               "{\"event\":\"step\",\"time\":1,\"step\":1,\"productive_seconds\":1}\n"
                               "{\"event\":\"step\",\"time\":1,\"step\":2,\"productive_seconds\":2}\n"
                               "{\"event\":\"step\",\"time\":1,\"step\":3,\"productive_seconds\":3}\n"
                               "{\"event\":\"step\",\"time\":1,\"step\":4,\"productive_seconds\":4}\n"
                               "{\"event\":\"resume\",\"time\":1,\"step\":2,\"productive_seconds\":2}\n"
                               "{\"event\":\"step\",\"time\":1,\"step\":3,\"productive_seconds\":33}\n"
                               "{\"event\":\"eval\",\"time\":1,\"step\":3,\"loss\":1}\n"
                               "{\"event\":\"sample\",\"time\":1,\"step\":3,\"text\":\"\\\"step\\\":1,"
                               "\\\"productive_seconds\\\":77\"}\n"
                               "{\"event\":\"step\",\"time\":1,\"ste";
    const struct {
        uint64_t step;
        double productive;
    } cases[] = {{4, 33}, {3, 33}, {2, 2}, {1, 1}, {0, 0}};
    Telemetry y;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        memset(&y, 1, sizeof y);
        telemetry_resume(&y, log_of(text), cases[i].step);
        assert_true(y.productive == cases[i].productive);
        assert_true(y.first_start == 1000.5);
        assert_true(y.spent[SPENT_EVAL] == 0);
    }
}

static void logs_that_say_nothing(void** state) {
    (void)state;
    static const char* const texts[] = {"", "\n\n", "rubbish", "{\"event\":\"step\"}\n",
                                        "\"productive_seconds\":5\n"};
    Telemetry y;
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        telemetry_resume(&y, log_of(texts[i]), 7);
        assert_true(y.productive == 0 && fabs(y.first_start - unix_time()) < 60);
    }
    telemetry_resume(&y, "/nowhere", 7);
    assert_true(y.productive == 0 && fabs(y.first_start - unix_time()) < 60);
}

static void productive_time_is_a_share_of_all(void** state) {
    (void)state;
    Telemetry y;
    telemetry_resume(&y, "/nowhere", 0);
    const StepResult applied = {.seconds = 30, .applied = true}, skipped = {.seconds = 100};
    telemetry_step(&y, &applied, 10); // ten of them only because a checkpoint was copied
    telemetry_step(&y, &skipped, 0);
    y.first_start = unix_time() - 80;
    assert_true(y.productive == 20);
    assert_true(goodput(&y) > 0.2 && goodput(&y) <= 0.25);
    y.first_start = unix_time() + 100; // a clock that was set back
    assert_true(goodput(&y) == 0);
}

static void times_are_since_the_line_before(void** state) {
    (void)state;
    Telemetry y = {0};
    telemetry_resume(&y, "/nowhere", 0);
    const StepResult step = {.seconds = 5, .applied = true};
    y.line -= 100;
    double now = telemetry_spend(&y, SPENT_DATA, seconds_now() - 7);
    telemetry_spend(&y, SPENT_EVAL, now - 20);
    telemetry_step(&y, &step, 3);
    for (int again = 0; again < 2; again++) {
        String line = {0};
        event_times(&line, &y);
        const double wanted[][2] = {
            {number_in(&line, "interval_seconds"), 100}, {number_in(&line, "data_seconds"), 7},
            {number_in(&line, "eval_seconds"), 20},      {number_in(&line, "checkpoint_stall_seconds"), 3},
            {number_in(&line, "compute_seconds"), 2},    {number_in(&line, "exposed_comm_seconds"), 0},
            {number_in(&line, "sample_seconds"), 0}};
        for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++)
            assert_true(fabs(wanted[i][0] - (again ? 0 : wanted[i][1])) < 5);
        assert_true(number_in(&line, "productive_seconds") == 2);
        free(line.data);
    }
}

// Whatever it was, the parts are no more than the step.
static void a_step_is_divided(void** state) {
    (void)state;
    const struct {
        double seconds, device, share, waited, stall; // a step; the wait for data; a checkpoint beside it
        double compute, exposed, data, checkpoint;
    } cases[] = {
        {10, 9, 0, 0, 0, 9, 0, 0, 0},                                        // one second of the host's
        {10, 9, 0.25, 0, 0, 6.75, 2.25, 0, 0}, {10, 9, 0, 8, 0, 9, 0, 1, 0}, // beside the device's work
        {10, 4, 0.5, 5, 0, 2, 2, 5, 0},                                      // the device had long been done
        {10, 0, 0, 3, 0, 7, 0, 3, 0},                                        // the host computes
        {10, 9, 0, 0, 4, 6, 0, 0, 4}, // four of the device's were the checkpoint's
        {10, 10, 1, 10, 10, 0, 0, 0, 10},      {10, 11, 0.5, 1, 0, 5, 5, 0, 0}, // two clocks
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Telemetry y = {0};
        const StepResult step = {
            .seconds = cases[i].seconds, .device_seconds = cases[i].device, .exposed_share = cases[i].share};
        y.waited = cases[i].waited;
        telemetry_step(&y, &step, cases[i].stall);
        assert_true(fabs(y.spent[SPENT_COMPUTE] - cases[i].compute) < 1e-9);
        assert_true(fabs(y.spent[SPENT_EXPOSED] - cases[i].exposed) < 1e-9);
        assert_true(fabs(y.spent[SPENT_DATA] - cases[i].data) < 1e-9);
        assert_true(y.spent[SPENT_CHECKPOINT] == cases[i].checkpoint);
    }
}

// ----------------------------------------------------------------------------
// rates

// As llmc/adamw.cuh counts: fp32 masters in two parts; all in bf16; all in fp32.
static void bytes_of_an_update(void** state) {
    (void)state;
    assert_int_equal(update_bytes(1, 2 + 2, 4, 4), 32);
    assert_int_equal(update_bytes(1, 2, 2, 2), 16);
    assert_int_equal(update_bytes(1000, 4, 4, 4), 32000);
    assert_int_equal(update_bytes(3, 4, 2, 8), 3 * 2 * (4 + 2 + 2 * 8));
}

// C 64, L 2, FF 256, V 512, T 64 (configs/tiny_gpt2.json)
static void rates_are_of_all_gpus(void** state) {
    (void)state;
    static RunConfig run;
    Error err = {0};
    if (!config_load(&run, "configs/tiny_gpt2.json", 0, NULL, &err)) fail_msg("%s", err.text);
    double N = 2 * (4 * 64 * 64 + 2 * 64 * 256) + 512 * 64, flops = 6 * N + 6 * 2 * 64 * 64;
    double block = 2 * (4 * 64 * 64 + 64 * 256) + 2 * 64 * 64;
    for (int recompute = RECOMPUTE_NONE; recompute <= RECOMPUTE_BLOCK; recompute++)
        for (int stages = 1; stages <= 2; stages++) {
            String line = {0};
            run.layout = layout_single();
            run.layout.size = 4, run.layout.pp_size = stages, run.batch.recompute = recompute;
            double again = recompute == RECOMPUTE_BLOCK ? stages * block : 0;
            event_rates(&line, &run, 1000, 1e9);
            assert_true(number_in(&line, "tokens_per_second_per_gpu") == 250);
            assert_true(fabs(number_in(&line, "gflops") / (1000 * flops / 1e9) - 1) < 1e-8);
            assert_true(fabs(number_in(&line, "mfu") / (1000 * flops / 4e9) - 1) < 1e-8);
            assert_true(fabs(number_in(&line, "hfu") / (1000 * (flops + again) / 4e9) - 1) < 1e-8);
            free(line.data);
        }
    String line = {0};
    event_rates(&line, &run, 1000, 0);
    assert_null(strstr(line.data, "fu\":")); // no share of what is not known
    free(line.data);
}

// ----------------------------------------------------------------------------
// terminals

static void only_terminals_have_style(void** state) {
    (void)state;
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    if (master < 0 || grantpt(master) != 0 || unlockpt(master) != 0) skip();
    FILE *terminal = fopen(ptsname(master), "w"), *file = tmpfile();
    assert_non_null(terminal);
    const struct {
        const char *term, *no_color;
        bool styled;
    } cases[] = {{"xterm", NULL, true}, {"xterm", "", true}, {"xterm", "1", false},
                 {"dumb", NULL, false}, {"", NULL, false},   {NULL, NULL, false}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        unsetenv("TERM"), unsetenv("NO_COLOR");
        if (cases[i].term != NULL) setenv("TERM", cases[i].term, 1);
        if (cases[i].no_color != NULL) setenv("NO_COLOR", cases[i].no_color, 1);
        assert_ptr_equal(console_style(terminal), cases[i].styled ? &style_of_terminals : &style_of_files);
        assert_ptr_equal(console_style(file), &style_of_files);
    }
    fclose(file), fclose(terminal);
    close(master);
}

static void a_bar_fits_its_line(void** state) {
    (void)state;
    char text[256] = {0};
    FILE* out = fmemopen(text, sizeof text, "w"); // no terminal: 80 columns
    console_progress(out, &style_of_files, 1, 4, 10);
    console_progress(out, &style_of_terminals, 4, 4, 0);
    fflush(out);
    assert_string_equal(text, "");
    console_progress(out, &style_of_terminals, 1, 4, 3720);
    fclose(out);
    assert_string_equal(strchr(text, ']'), "]  25.0 %  1h02m left\033[K\r");
    size_t full = strspn(text + 1, "#"), empty = strspn(text + 1 + full, ".");
    assert_int_equal(text[1 + full + empty], ']');
    assert_int_equal(full, (full + empty) / 4);
    assert_true(full + empty > 40 && strlen(text) - 4 < 80);
}

static void closed_streams_stay_closed(void** state) {
    (void)state;
    pid_t child = fork();
    if (child == 0) {
        close(0), close(1), close(2);
        hold_standard_streams();
        int next = open("/dev/null", O_WRONLY);
        _exit(next == 3 && write(1, "x", 1) < 0 && write(2, "x", 1) < 0 ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

// ----------------------------------------------------------------------------
// TensorBoard: the framing's checksum; the files are read in dev/test/e2e_telemetry.sh

static void crc_is_castagnolis(void** state) {
    (void)state;
    uint8_t zeros[32] = {0};
    assert_int_equal(crc32c("123456789", 9), 0xE3069283);
    assert_int_equal(crc32c(zeros, 32), 0x8A9136AA); // RFC 3720, B.4
    assert_int_equal(masked_crc32c(zeros, 32), ((0x8A9136AAu >> 15 | 0x8A9136AAu << 17) + 0xA282EAD8u));
}

static void a_file_that_cannot_be_had_is_none(void** state) {
    (void)state;
    Metrics m;
    metrics_init(&m);
    tensorboard_open(&m.tensorboard, "/dev/null", 0);
    assert_int_equal(m.tensorboard.fd, -1);
    metrics_close(&m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(lost_steps_do_not_count, make_temp_dir, remove_temp_dir),
        cmocka_unit_test_setup_teardown(logs_that_say_nothing, make_temp_dir, remove_temp_dir),
        cmocka_unit_test(productive_time_is_a_share_of_all),
        cmocka_unit_test(times_are_since_the_line_before),
        cmocka_unit_test(a_step_is_divided),
        cmocka_unit_test(bytes_of_an_update),
        cmocka_unit_test(rates_are_of_all_gpus),
        cmocka_unit_test(only_terminals_have_style),
        cmocka_unit_test(a_bar_fits_its_line),
        cmocka_unit_test(closed_streams_stay_closed),
        cmocka_unit_test(crc_is_castagnolis),
        cmocka_unit_test(a_file_that_cannot_be_had_is_none),
    };
    return cmocka_run_group_tests_name("telemetry", tests, NULL, NULL);
}
