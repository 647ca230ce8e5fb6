// What does it cost to say what a step was?
// usage: bench_telemetry [STEPS]     default 2,000 step lines a measurement
//
// Everything that report_step does: the console line (into /dev/null), log.jsonl, metrics.prom, and TensorBoard's file
// where a run asks for it, in TMPDIR or /tmp. The baseline is a step of 100 ms, short for a GPU: the share of it that
// telemetry takes, if nothing hides it. (It runs beside the GPU's work, so that a step does not wait for it at all.)
// The target is 0.5 %. Best of several rounds.
#include "llmc/utils.h"      // defines: seconds_now
#include "llmc/train_loop.h" // defines: Trainer, report_step

enum { ROUNDS = 5 };
#define STEP_SECONDS 0.1

static double line_seconds(Trainer* t, int steps) {
    StepResult r = {.loss = 3.25, .grad_norm = 0.5, .lr = 6e-4, .seconds = STEP_SECONDS, .applied = true};
    double best = INFINITY;
    for (int round = 0; round < ROUNDS; round++) {
        double start = seconds_now();
        for (int i = 0; i < steps; i++) {
            t->state.step++;
            r.loss += 1e-6;
            telemetry_step(&t->telemetry, &r, 0);
            report_step(t, &r);
        }
        best = fmin(best, (seconds_now() - start) / steps);
    }
    return best;
}

int main(int argc, char** argv) {
    static Trainer t;
    char directory[PATH_MAX];
    const char* parent = getenv("TMPDIR");
    int steps = argc > 1 ? atoi(argv[1]) : 2000;
    Error err = {0};
    Program program = {.name = "bench"};
    if (!config_load(&t.run, "configs/gpt2_124M.json", 0, NULL, &err)) exit_with(&err);
    snprintf(directory, sizeof directory, "%s/bench_telemetry.XXXXXX", parent != NULL ? parent : "/tmp");
    if (steps < 1 || mkdtemp(directory) == NULL || freopen("/dev/null", "w", stdout) == NULL)
        return EXIT_USAGE;
    fprintf(stderr, "%d step lines, best of %d rounds; a step of %g ms\n", steps, ROUNDS, 1e3 * STEP_SECONDS);
    for (int tensorboard = 0; tensorboard <= 1; tensorboard++) {
        RunConfig run = t.run;
        trainer_init(&t, &program);
        t.run = run, t.run.layout = layout_single(), t.seconds_per_step = STEP_SECONDS,
        t.peak_flops = 989.4e12;
        if (!metrics_open(&t.metrics, directory, &err)) exit_with(&err);
        telemetry_resume(&t.telemetry, t.metrics.log.path, 0);
        if (tensorboard) tensorboard_open(&t.metrics.tensorboard, directory, 0);
        double seconds = line_seconds(&t, steps);
        fprintf(stderr, "log and metrics.prom%-17s %6.1f us  %.3f %% of a step\n",
                tensorboard ? ", and TensorBoard" : "", 1e6 * seconds, 100 * seconds / STEP_SECONDS);
        unlink(t.metrics.log.path), unlink(t.metrics.textfile.path), unlink(t.metrics.tensorboard.path);
        t.metrics.textfile.path[0] = '\0';
        metrics_close(&t.metrics);
    }
    CHECK(path_join(t.metrics.log.path, directory, "tensorboard", &err));
    return rmdir(t.metrics.log.path) == 0 && rmdir(directory) == 0 ? 0 : EXIT_IO;
}
