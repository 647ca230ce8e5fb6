// Where a run's time goes: into what, since the step line before; and which share of all the time since the
// run was first started went into steps that count (goodput). Steps that a crash lost, and that are done
// again, count once.
#pragma once
#include "llmc/config_print.h" // defines: append_choice
#include "llmc/console.h"      // defines: Style, console_style
#include "llmc/flops.h"        // defines: flops_per_token, flops_recomputed
#include "llmc/nvml.h"         // defines: Nvml, nvml_start, nvml_event, nvml_stop
#include "llmc/program.h"      // defines: gpt_print_device, gpt_bus_id

// What training stands still for. The wait for data is the host's, beside the device's work where there is
// one: an upper bound.
enum Spent { SPENT_DATA, SPENT_CHECKPOINT, SPENT_EVAL, SPENT_SAMPLE, NUM_SPENT };
static const char* const spent_keys[NUM_SPENT] = {"data_seconds", "checkpoint_stall_seconds", "eval_seconds",
                                                  "sample_seconds"};

typedef struct {
    const Style* style;
    Nvml* nvml;              // NULL: there is no GPU to ask
    double first_start;      // of the run, Unix time
    double productive;       // seconds of the steps that count, in all launches
    double line;             // when the step line before was written
    double spent[NUM_SPENT]; // since then
} Telemetry;

static inline double unix_time(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// ----------------------------------------------------------------------------
// goodput

// The number behind "key": in a line of the log; false: it is not there.
static inline bool line_number(const char* line, const char* key, double* value) {
    const char* at = strstr(line, key);
    if (at != NULL) *value = strtod(at + strlen(key), NULL);
    return at != NULL;
}

// The newest line at `step` or before it that says how much was productive by then. Later ones are of steps
// that are lost. lines: changed.
static inline double productive_by(char* lines, size_t size, uint64_t step) {
    double at, productive;
    for (char *end = lines + size, *line = end; end > lines; end = line > lines ? line - 1 : lines) {
        *end = '\0';
        for (line = end; line > lines && line[-1] != '\n';) line--;
        if (line_number(line, "\"step\":", &at) && at <= (double)step &&
            line_number(line, "\"productive_seconds\":", &productive))
            return productive;
    }
    return 0;
}

// Training goes on from `step`: what came before is in the log. In a log of years its end is enough.
static inline void telemetry_resume(Telemetry* y, const char* log_path, uint64_t step) {
    const off_t END_BYTES = 64 << 20;
    char first[256] = {0};
    struct stat st;
    int fd = open(log_path, O_RDONLY | O_CLOEXEC);
    y->first_start = unix_time(), y->productive = 0;
    y->line = seconds_now();
    memset(y->spent, 0, sizeof y->spent);
    if (fd < 0) return;
    if (pread(fd, first, sizeof first - 1, 0) > 0) line_number(first, "\"time\":", &y->first_start);
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size > 0) {
        size_t bytes = (size_t)(st.st_size < END_BYTES ? st.st_size : END_BYTES);
        char* lines = (char*)malloc_check(bytes + 1);
        ssize_t got = pread(fd, lines, bytes, st.st_size - (off_t)bytes);
        y->productive = productive_by(lines, got > 0 ? (size_t)got : 0, step);
        free(lines);
    }
    close(fd);
}

// After each step: how much of its time counts, and how much longer a checkpoint beside it made it.
static inline void telemetry_step(Telemetry* y, bool applied, double seconds, double stall) {
    if (applied) y->productive += seconds - stall;
    y->spent[SPENT_CHECKPOINT] += stall;
}

// Books the time since `since`; returns now.
static inline double telemetry_spend(Telemetry* y, enum Spent what, double since) {
    double now = seconds_now();
    y->spent[what] += now - since;
    return now;
}

static inline double goodput(const Telemetry* y) {
    double wall = unix_time() - y->first_start;
    return wall > 0 ? fmin(1, y->productive / wall) : 0;
}

// ----------------------------------------------------------------------------
// fields of events

// peak: of one GPU, FLOP/s; 0: not known. MFU and HFU are shares of what all of them could do at most.
static inline void event_rates(String* line, const RunConfig* run, double tokens_per_second, double peak) {
    int T = run->batch.sequence_length;
    double flops = tokens_per_second * flops_per_token(&run->model, T, FLOPS_CAUSAL);
    double again = tokens_per_second * flops_recomputed(run);
    event_number(line, "tokens_per_second", tokens_per_second);
    event_number(line, "tokens_per_second_per_gpu", tokens_per_second / run->layout.size);
    event_number(line, "gflops", flops / 1e9);
    if (peak != 0) {
        event_number(line, "mfu", flops / (peak * run->layout.size));
        event_number(line, "hfu", (flops + again) / (peak * run->layout.size));
    }
}

static inline void event_times(String* line, Telemetry* y) {
    double now = seconds_now();
    event_number(line, "interval_seconds", now - y->line);
    for (int i = 0; i < NUM_SPENT; i++) event_number(line, spent_keys[i], round(1e6 * y->spent[i]) / 1e6);
    event_number(line, "productive_seconds", y->productive);
    event_number(line, "goodput", goodput(y));
    nvml_event(y->nvml, line);
    y->line = now;
    memset(y->spent, 0, sizeof y->spent);
}

// Who computes, in which layout, and what utilisation counts: what a reader of figures has to know.
static inline void event_launch(String* line, const RunConfig* run, double peak) {
    const Layout* l = &run->layout;
    char host[256] = "unknown", device[512] = {0};
    String precision = {NULL, 0, 0};
    FILE* out = fmemopen(device, sizeof device - 1, "w");
    if (out != NULL) gpt_print_device(out), fclose(out);
    device[strcspn(device, "\n")] = '\0';
    gethostname(host, sizeof host - 1);
    event_text(line, "host", host);
    event_text(line, "device", device);
    append_choice(&precision, find_knob("precision", "compute")->choices, run->precision.compute);
    event_text(line, "precision", precision.data);
    free(precision.data);
    event_number(line, "processes", l->size);
    event_number(line, "data_parallel_size", num_replicas(l));
    event_number(line, "context_parallel_size", l->cp_size);
    event_number(line, "tensor_parallel_size", l->tp_size);
    event_number(line, "pipeline_parallel_size", l->pp_size);
    event_number(line, "virtual_pipeline_size", l->num_chunks);
    event_number(line, "zero_stage", run->parallel.zero_stage);
    event_number(line, "matmul_parameters", matmul_parameters(&run->model));
    event_number(line, "flops_per_token",
                 flops_per_token(&run->model, run->batch.sequence_length, FLOPS_CAUSAL));
    event_number(line, "recomputed_flops_per_token", flops_recomputed(run));
    event_text(line, "flops_formula", FLOPS_FORMULA);
    if (peak != 0) event_number(line, "peak_flops_per_gpu", peak);
}

// ----------------------------------------------------------------------------

// Training begins, or goes on, in the process that writes the log.
static inline void telemetry_start(Telemetry* y, const char* log_path, uint64_t step) {
    char bus_id[32];
    telemetry_resume(y, log_path, step);
    if (gpt_bus_id(bus_id)) y->nvml = nvml_start(bus_id);
}

static inline void telemetry_stop(Telemetry* y) {
    nvml_stop(y->nvml);
    y->nvml = NULL;
}
