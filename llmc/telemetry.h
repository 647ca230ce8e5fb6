// Where a run's time goes: into what, since the step line before; and which share of all the time since the
// run was first started went into steps that count (goodput). Steps that a crash lost, and that are done
// again, count once.
#pragma once
#include "llmc/config_print.h" // defines: append_choice
#include "llmc/console.h"      // defines: Style, console_style
#include "llmc/flops.h"        // defines: flops_per_token, flops_recomputed
#include "llmc/nvml.h"         // defines: Nvml, nvml_start, nvml_event, nvml_stop
#include "llmc/program.h"      // defines: StepResult, gpt_print_device, gpt_bus_id

// No second counts twice. What is not here is the host's: it starts steps, and says what they were.
enum Spent {
    SPENT_COMPUTE,    // on the device, or by the host where there is none
    SPENT_EXPOSED,    // the device waited for other processes
    SPENT_DATA,       // for data, and had nothing else to do
    SPENT_CHECKPOINT, // training stood still for these
    SPENT_EVAL,
    SPENT_SAMPLE,
    NUM_SPENT
};
static const char* const spent_keys[NUM_SPENT] = {"compute_seconds", "exposed_comm_seconds",
                                                  "data_seconds",    "checkpoint_stall_seconds",
                                                  "eval_seconds",    "sample_seconds"};

typedef struct {
    const Style* style;
    Nvml* nvml;              // NULL: there is no GPU to ask
    double first_start;      // of the run, Unix time
    double productive;       // seconds of the steps that count, in all launches
    double line, booked;     // until when the step line before has booked time; until when it is booked now
    double spent[NUM_SPENT]; // since that line
    double waited;           // by the host for rows, since the step before ended
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
    y->first_start = unix_time(), y->productive = y->waited = 0;
    y->line = y->booked = seconds_now();
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

// After each step: what its seconds were, `stall` of them because of a checkpoint beside it.
static inline void telemetry_step(Telemetry* y, const StepResult* r, double stall) {
    double left = r->seconds - stall;
    double device = r->device_seconds > 0 ? r->device_seconds : r->seconds - y->waited;
    double work = fmax(0, fmin(left, device)), idle = fmax(0, left - work);
    if (r->applied) y->productive += left;
    y->spent[SPENT_EXPOSED] += r->exposed_share * work;
    y->spent[SPENT_COMPUTE] += (1 - r->exposed_share) * work;
    y->spent[SPENT_CHECKPOINT] += stall;
    y->spent[SPENT_DATA] += fmin(y->waited, idle); // else it was beside the device's work
    y->booked = seconds_now(), y->waited = 0;
}

// Books the time since `since`; returns now.
static inline double telemetry_spend(Telemetry* y, enum Spent what, double since) {
    y->booked = seconds_now();
    y->spent[what] += y->booked - since;
    return y->booked;
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
    event_number(line, "interval_seconds", y->booked - y->line);
    for (int i = 0; i < NUM_SPENT; i++) event_number(line, spent_keys[i], round(1e6 * y->spent[i]) / 1e6);
    event_number(line, "productive_seconds", y->productive);
    event_number(line, "goodput", goodput(y));
    nvml_event(y->nvml, line);
    y->line = y->booked;
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

// RUN_DIR/metrics_NODE.RANK.prom, by one rank of each node: nodes may have one name. False: the path is too long.
static inline bool node_textfile(char out[PATH_MAX], const char* run_dir, int rank) {
    char node[64], name[128];
    Error none = {0, {0}};
    node_name(node);
    for (char* at = node; *at != '\0'; at++) *at = *at == '/' ? '_' : *at;
    snprintf(name, sizeof name, "metrics_%s.%d.prom", node, rank);
    return path_join(out, run_dir, name, &none);
}

// Training begins, or goes on. log_path: of the process that writes the log, else NULL. of_node: this one writes what
// all GPUs of its node say, too.
static inline void telemetry_start(Telemetry* y, const RunConfig* run, const char* log_path, uint64_t step,
                                   bool of_node) {
    char bus_id[32], textfile[PATH_MAX];
    if (!of_node || !node_textfile(textfile, run->log.run_dir, run->layout.rank)) textfile[0] = '\0';
    if (log_path != NULL) telemetry_resume(y, log_path, step);
    if ((log_path != NULL || textfile[0] != '\0') && gpt_bus_id(bus_id))
        y->nvml = nvml_start(bus_id, textfile);
}

static inline void telemetry_stop(Telemetry* y) {
    nvml_stop(y->nvml);
    y->nvml = NULL;
}
