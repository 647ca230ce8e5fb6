// `verify RUN.json LAYOUTS`: is every layout the same model? Trains a shrunk copy of the user's own config for a few
// steps in each layout, started as that many processes on this machine, and compares with one process:
//
//     gradients    of the first step: AdamW's first moment after it is (1 - beta1) times the gradient it was given
//     losses       of every step; weights at the end
//
// A layout passes if all of it is equal to the bit, or if the error of every tensor's gradient, against the CPU
// reference in fp32, is at most twice that of one process of the same program (dev/doc/numerics.md), within what so
// few numbers can tell, and if its losses and its first gradient norm are as near.
#pragma once
#include "llmc/checkpoint.h"     // defines: checkpoint_load
#include "llmc/config_print.h"   // defines: config_write_json
#include "llmc/layout_resolve.h" // defines: layout_resolve

#include <sys/wait.h>

enum {
    VERIFY_STEPS = 20, // or schedule.max_steps, if that is less
    VERIFY_RANKS_MAX = 256,
    VERIFY_LAYOUTS_MAX = 64,
    VERIFY_NAME = 64
};

// A layout as it is written: dp2tp2pp2, and what may follow: z0..z3, vp2, afab, zb, det.
typedef struct {
    char name[VERIFY_NAME];
    int dp, cp, tp, pp, vp, zero, schedule;
    bool deterministic;
} VerifyLayout;

static inline bool verify_parse(VerifyLayout* out, const char* text, Error* err) {
    static const char* const keys[] = {"dp", "cp", "tp", "pp", "vp", "z"};
    enum { KEYS = sizeof keys / sizeof keys[0], ZERO_KEY = KEYS - 1 };
    VerifyLayout l = {{0}, 1, 1, 1, 1, 1, 1, PIPELINE_1F1B, false};
    int* fields[KEYS] = {&l.dp, &l.cp, &l.tp, &l.pp, &l.vp, &l.zero};
    snprintf(l.name, sizeof l.name, "%.60s", text);
    for (const char* at = text; *at != '\0';) {
        bool known = false;
        for (int k = 0; k < KEYS && !known; k++) {
            size_t n = strlen(keys[k]), digits = strspn(at + n, "0123456789");
            known = strncmp(at, keys[k], n) == 0 && digits > 0 && digits < 5;
            if (known) *fields[k] = atoi(at + n), at += n + digits;
        }
        if (!known && strncmp(at, "afab", 4) == 0) known = true, at += 4, l.schedule = PIPELINE_AFAB;
        if (!known && strncmp(at, "zb", 2) == 0) known = true, at += 2, l.schedule = PIPELINE_ZERO_BUBBLE;
        if (!known && strncmp(at, "det", 3) == 0) known = true, at += 3, l.deterministic = true;
        if (!known)
            return fail(
                err, EXIT_USAGE,
                "layout %s: at \"%s\" one of dp, cp, tp, pp, vp, z with a number, afab, zb or det is wanted, as in "
                "dp2tp4 or tp2pp2vp2",
                text, at);
    }
    if (l.vp > 1) l.schedule = PIPELINE_INTERLEAVED;
    *out = l;
    for (int k = 0; k < KEYS; k++)
        if ((*fields[k] < 1 && k != ZERO_KEY) || (*fields[k] > ZERO_PARAMETERS && k == ZERO_KEY))
            return fail(err, EXIT_USAGE, "layout %s: %s%d is not possible: %s is wanted", text, keys[k],
                        *fields[k], k == ZERO_KEY ? "z0 to z3" : "1 or more");
    int64_t ranks = (int64_t)l.dp * l.cp * l.tp * l.pp;
    return ranks <= VERIFY_RANKS_MAX ||
           fail(err, EXIT_USAGE, "layout %s has %lld processes, and verify starts at most %d on a machine",
                text, (long long)ranks, VERIFY_RANKS_MAX);
}

static inline void verify_apply(RunConfig* run, const VerifyLayout* l) {
    run->parallel.automatic = false;
    run->parallel.data_parallel_size = l->dp, run->parallel.tensor_parallel_size = l->tp;
    run->parallel.context_parallel_size = l->cp;
    run->parallel.pipeline_parallel_size = l->pp, run->parallel.virtual_pipeline_size = l->vp;
    run->parallel.pipeline_schedule = l->schedule, run->parallel.zero_stage = l->zero;
    run->parallel.deterministic = l->deterministic;
}

// The shortest from 16 on that all layouts divide, but not more than `most`.
static inline int verify_sequence_length(int most, const VerifyLayout* layouts, int count) {
    int T = most < 16 ? most : 16;
    for (int i = 0; i < count && T < most; i++)
        if (T % (2 * layouts[i].cp) != 0 || T / layouts[i].cp % layouts[i].tp != 0) T++, i = -1;
    return T;
}

// Where that is too much to be of use, the smaller one: the layout that does not divide is then refused.
static inline int common_multiple(int a, int b) {
    int n = a;
    while (n % b != 0 && n < 4096) n += a;
    return n % b == 0 ? n : a;
}

// The user's config with everything made small that only costs time. What shape a tensor has, which there are and how
// they are divided stays.
static inline void verify_shrink(RunConfig* run, const VerifyLayout* layouts, int count) {
    ModelConfig* c = &run->model;
    int ranks = 1, layers = 2, group = c->num_attention_heads / c->num_key_value_heads;
    int heads = 1, rows = 1; // multiples of every tp; of every dp, and of interleaved stages
    for (int i = 0; i < count; i++) {
        const VerifyLayout* l = &layouts[i];
        layers = l->pp * l->vp > layers ? l->pp * l->vp : layers;
        ranks = l->dp * l->pp > ranks ? l->dp * l->pp : ranks;
        heads = common_multiple(heads, l->tp);
        rows = common_multiple(rows, l->dp * (l->vp > 1 ? l->pp : 1));
    }
    int kv = heads > group && heads % group == 0 ? heads / group
             : c->num_key_value_heads > 2        ? 2
                                                 : c->num_key_value_heads;
    for (int i = 0; i < count; i++)
        if (kv * group % layouts[i].tp != 0 || (kv % layouts[i].tp != 0 && layouts[i].tp % kv != 0))
            kv = heads;
    c->num_hidden_layers = layers + 1 < c->num_hidden_layers ? layers + 1 : c->num_hidden_layers;
    c->num_key_value_heads = kv, c->num_attention_heads = kv * group;
    c->head_dim = c->head_dim > 16 ? 16 : c->head_dim;
    c->hidden_size = c->num_attention_heads * c->head_dim;
    for (c->intermediate_size = 16 * heads; c->intermediate_size < 64;) c->intermediate_size *= 2;
    run->batch.sequence_length = verify_sequence_length(run->batch.sequence_length, layouts, count);
    run->batch.micro_batch_size = 1;
    run->batch.global_batch_size = (2 * ranks + rows - 1) / rows * rows;
    if (run->schedule.max_steps > VERIFY_STEPS) run->schedule.max_steps = VERIFY_STEPS;
    run->schedule.warmup_steps = 0;
    run->schedule.decay_fraction = 0;
    // Small steps, or training enlarges rounding until layouts cannot be told from mistakes; rounding noise in a
    // gradient of zero must not become a whole step either.
    run->optimizer.learning_rate = fmin(run->optimizer.learning_rate, 2e-4), run->optimizer.eps = 1e-4;
    run->checkpoint.every = 1, run->checkpoint.keep_last = VERIFY_STEPS + 1,
    run->checkpoint.permanent_every = 0;
    run->checkpoint.load_from[0] = run->checkpoint.fast_dir[0] = '\0', run->checkpoint.fast_every = 0;
    run->log.every = 1, run->eval.every = 0, run->sample.every = 0;
    run->data.validation[0] = run->data.tokenizer[0] = '\0';
    run->parallel.autotune = run->parallel.cuda_graph = false, run->parallel.threads = 1;
    verify_apply(run, &layouts[0]);
}

// ----------------------------------------------------------------------------
// running

// Starts one rank; its output goes to a file of its own.
static inline pid_t verify_spawn(const char* program, const char* config, const char* log, int rank, int size,
                                 int port) {
    fflush(stdout); // or it would be written twice
    pid_t pid = fork();
    if (pid != 0) return pid;
    char number[6][32];
    const char* names[] = {"RANK",        "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
                           "MASTER_PORT", "EMU_DEVICES"};
    int values[] = {rank, size, rank, size, port, size};
    for (int i = 0; i < 6; i++) {
        snprintf(number[i], sizeof number[i], "%d", values[i]);
        if (size > 1) setenv(names[i], number[i], 1);
    }
    for (int i = 0; size == 1 && i < 5; i++) unsetenv(names[i]);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    setenv("OMP_NUM_THREADS", "1", 1);
    if (freopen(log, "a", stdout) == NULL || dup2(STDOUT_FILENO, STDERR_FILENO) < 0) _exit(EXIT_OS);
    execl(program, program, "train", config, (char*)NULL);
    _exit(EXIT_OS);
}

// All ranks, until the last has ended; after the first failure, or `patience` seconds, the others are ended. Returns
// the exit code of the first that failed, 124 where time was up.
static inline int verify_run(const char* program, const char* config, const char* log, int size,
                             double patience) {
    pid_t* ranks = (pid_t*)calloc_check((size_t)size, sizeof *ranks);
    static int number = 0;
    int code = 0, port = 20000 + (getpid() * 37 + 61 * number++) % 30000;
    for (int r = 0; r < size; r++) ranks[r] = verify_spawn(program, config, log, r, size, port);
    double deadline = seconds_now() + patience;
    for (int left = size; left > 0;) {
        int status = 0;
        pid_t ended = waitpid(-1, &status, WNOHANG);
        bool late = ended == 0 && seconds_now() > deadline && code == 0;
        if (ended == 0) usleep(10000);
        if (ended == 0 && !late) continue;
        left -= !late;
        int with = late ? 124 : WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        for (int r = 0; r < size; r++) {
            if (ranks[r] == ended) ranks[r] = 0;
            if (with != 0 && ranks[r] > 0) kill(ranks[r], SIGKILL);
        }
        if (with != 0 && code == 0) code = with;
    }
    free(ranks);
    return code;
}

// What a run left behind.
typedef struct {
    float* gradients; // of the first step, times what they were clipped by and 1 - beta1
    float* weights;   // behind the last
    double losses[VERIFY_STEPS], grad_norm; // of every step; of the first
} VerifyResult;

static inline bool verify_read_log(VerifyResult* out, const RunConfig* run, Error* err) {
    char path[PATH_MAX];
    int steps = run->schedule.max_steps;
    size_t size;
    if (!path_join(path, run->log.run_dir, "log.jsonl", err)) return false;
    char* text = read_file(path, (size_t)1 << 24, &size, err);
    char *rest = text, *line;
    int found = 0;
    while (rest != NULL && (line = strsep(&rest, "\n")) != NULL) {
        cJSON* json = cJSON_Parse(line);
        const cJSON* event = cJSON_GetObjectItem(json, "event");
        if (cJSON_IsString(event) && strcmp(event->valuestring, "step") == 0 && found < steps) {
            out->losses[found] = cJSON_GetNumberValue(cJSON_GetObjectItem(json, "loss"));
            if (found++ == 0) out->grad_norm = cJSON_GetNumberValue(cJSON_GetObjectItem(json, "grad_norm"));
        }
        cJSON_Delete(json);
    }
    free(text);
    return text != NULL &&
           (found == steps || fail(err, EXIT_BAD_DATA, "%s holds %d steps of %d", path, found, steps));
}

static inline bool verify_read(VerifyResult* out, const RunConfig* run, Error* err) {
    size_t n = parameter_layout(&run->model).num_parameters;
    char checkpoints[PATH_MAX], path[PATH_MAX];
    float* scratch = (float*)calloc_check(3 * n, sizeof *scratch);
    out->gradients = (float*)calloc_check(n, sizeof(float));
    out->weights = (float*)calloc_check(n, sizeof(float));
    bool ok = path_join(checkpoints, run->log.run_dir, "checkpoints", err);
    for (int last = 0; ok && last < 2; last++) {
        CheckpointData data;
        memset(&data, 0, sizeof data);
        data.model = &run->model;
        data.params = last ? out->weights : scratch + 2 * n, data.m = last ? scratch : out->gradients;
        data.v = scratch + n;
        ok = step_path(path, checkpoints, last ? run->schedule.max_steps : 1, "", err) &&
             checkpoint_load(path, &data, err);
    }
    free(scratch);
    return ok && verify_read_log(out, run, err);
}

static inline void verify_free(VerifyResult* r) { free(r->gradients), free(r->weights); }

// Trains in one layout, in an empty directory, or a run that an earlier verify left would go on, and reads what came out.
static inline bool verify_train(VerifyResult* out, const RunConfig* shrunk, const VerifyLayout* l,
                                const char* work, const char* program, Error* err) {
    static RunConfig run;
    char config[PATH_MAX], log[PATH_MAX], directory[PATH_MAX];
    String json = {NULL, 0, 0};
    run = *shrunk;
    verify_apply(&run, l);
    if (!path_join(directory, work, l->name, err) || !remove_tree(directory, err) ||
        !make_directories(directory, err) || !path_join(config, directory, "run.json", err) ||
        !path_join(log, directory, "output", err))
        return false;
    if (strlen(directory) >= sizeof run.log.run_dir)
        return fail(err, EXIT_CONFIG, "log.run_dir is too long for the runs of verify: %.200s", directory);
    memcpy(run.log.run_dir, directory, strlen(directory) + 1);
    config_write_json(&run, &json);
    bool ok = replace_file(config, json.data, json.size, err);
    free(json.data);
    int size = l->dp * l->cp * l->tp * l->pp,
        code = ok ? verify_run(program, config, log, size, run.parallel.start_timeout) : 0;
    if (code != 0) {
        size_t bytes;
        Error none = {0, {0}};
        char* said = read_file(log, (size_t)1 << 24, &bytes, &none);
        const char* error = said != NULL ? strstr(said, "error: ") : NULL;
        if (error == NULL) error = "error: no message";
        fail(err, EXIT_INTERNAL, "exit code %d%s: %.*s", code, code == 124 ? " (it hangs)" : "",
             (int)strcspn(error + 7, "\n"), error + 7);
        free(said);
    }
    return ok && code == 0 && verify_read(out, &run, err);
}

// ----------------------------------------------------------------------------
// comparing

// One tensor's gradient against the truth: root of the mean square of the difference, and of the truth.
static inline void verify_error(const float* x, const float* truth, size_t n, double* error, double* size) {
    *error = *size = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)x[i] - (double)truth[i];
        *error += d * d, *size += (double)truth[i] * (double)truth[i];
    }
    *error = sqrt(*error / (double)n), *size = sqrt(*size / (double)n);
}

typedef struct {
    double ratio;    // the largest of error / allowed error
    char worst[40];  // of what
    char first[160]; // tensor, in the model's order, that differs by more, and where most
    bool bitwise;
} VerifyVerdict;

// One tensor (rows, cols) of ours against the truth: twice the error of one process, and `more`, are allowed. A tensor
// of n numbers has an error that is known to about 1 / sqrt(2 n) of itself, of which four are granted.
static inline void verify_tensor(VerifyVerdict* verdict, const char* name, const float* ours,
                                 const float* plain, const float* truth, size_t n, size_t cols, double more) {
    double error, allowed, size, noise = 4 / sqrt(2.0 * (double)n);
    verify_error(ours, truth, n, &error, &size);
    verify_error(plain, truth, n, &allowed, &size);
    allowed = (2 + 2 * noise) * allowed + more;
    double ratio = !isfinite(error) || (allowed <= 0 && error > 0) ? INFINITY
                   : error > 0                                     ? error / allowed
                                                                   : 0;
    verdict->bitwise = verdict->bitwise && memcmp(ours, plain, n * sizeof *ours) == 0;
    if (ratio > 1 && verdict->first[0] == '\0') {
        size_t at = 0; // where they are furthest apart, or not numbers
        for (size_t i = 1; i < n && isfinite(ours[at]); i++)
            if (!(fabsf(ours[i] - plain[i]) <= fabsf(ours[at] - plain[at]))) at = i;
        snprintf(verdict->first, sizeof verdict->first, "%s[%zu,%zu] is %.6g, in one process %.6g", name,
                 at / cols, at % cols, (double)ours[at], (double)plain[at]);
    }
    if (ratio <= verdict->ratio) return;
    verdict->ratio = ratio;
    snprintf(verdict->worst, sizeof verdict->worst, "%s", name);
}

// One number, which may differ four times as much as one process does from the truth, or by a thousandth.
static inline void verify_number(VerifyVerdict* verdict, const char* what, int step, double ours,
                                 double plain, double truth) {
    double ratio = fabs(ours - plain) / (4 * fabs(plain - truth) + 1e-3 * fabs(truth));
    if (ratio <= verdict->ratio) return;
    verdict->ratio = ratio;
    snprintf(verdict->worst, sizeof verdict->worst, "%s of step %d", what, step);
}

// Gradients may differ besides by what a sum in another order changes in fp32; trained weights by a twentieth of the
// way that training took them, since it enlarges what they began to differ by, and one element may have gone the other
// way, since AdamW's steps are as long where a gradient is next to zero.
static inline VerifyVerdict verify_compare(const RunConfig* run, const VerifyResult* ours,
                                           const VerifyResult* plain, const VerifyResult* truth) {
    const ModelConfig* c = &run->model;
    ParameterLayout p = parameter_layout(c);
    VerifyVerdict verdict = {0, "", "", true};
    float* start = (float*)calloc_check(p.num_parameters, sizeof *start); // as training began
    for (int trained = 0; trained < 2; trained++)
        for (int i = 0; i < NUM_TENSORS; i++)
            for (int l = 0; l < tensor_copies(c, (enum TensorId)i) && p.size[i] != 0; l++) {
                size_t at = tensor_offset(&p, (enum TensorId)i, l), n = p.size[i];
                double size, way;
                char tensor[32], name[40];
                tensor_name(tensor, (enum TensorId)i, l);
                snprintf(name, sizeof name, "%s%s", trained ? "trained " : "", tensor);
                init_tensor(start + at, c, (enum TensorId)i, l, run->seed);
                verify_error(start + at, truth->weights + at, n, &way, &size);
                if (trained)
                    verify_tensor(&verdict, name, ours->weights + at, plain->weights + at,
                                  truth->weights + at, n, p.cols[i], (0.05 + 2 / sqrt((double)n)) * way);
                verify_error(plain->gradients + at, truth->gradients + at, n, &way, &size);
                if (!trained)
                    verify_tensor(&verdict, name, ours->gradients + at, plain->gradients + at,
                                  truth->gradients + at, n, p.cols[i], 1e-6 * size);
            }
    free(start);
    verify_number(&verdict, "norm", 1, ours->grad_norm, plain->grad_norm, truth->grad_norm);
    for (int s = 0; s < run->schedule.max_steps; s++) {
        verdict.bitwise = verdict.bitwise && ours->losses[s] == plain->losses[s];
        verify_number(&verdict, "loss", s + 1, ours->losses[s], plain->losses[s], truth->losses[s]);
    }
    return verdict;
}

// ----------------------------------------------------------------------------
// the command

static inline bool verify_split(VerifyLayout layouts[VERIFY_LAYOUTS_MAX], int* count, const char* list,
                                Error* err) {
    char* copy = strdup_check(list);
    char *rest = copy, *name;
    bool ok = true;
    *count = 0;
    while (ok && (name = strsep(&rest, ",")) != NULL) {
        if (name[0] == '\0') continue;
        ok = *count < VERIFY_LAYOUTS_MAX ||
             fail(err, EXIT_USAGE, "at most %d layouts at a time", VERIFY_LAYOUTS_MAX);
        ok = ok && verify_parse(&layouts[(*count)++], name, err);
    }
    free(copy);
    return ok && (*count > 0 || fail(err, EXIT_USAGE, "no layout: dp2,tp2,dp2tp2pp2, say, is wanted"));
}

// The CPU reference beside this program.
static inline bool verify_reference(char out[PATH_MAX], const char* program, Error* err) {
    snprintf(out, PATH_MAX, "%s", program);
    char* slash = strrchr(out, '/');
    snprintf(slash != NULL ? slash + 1 : out, 32, "train_gpt_cpu");
    return access(out, X_OK) == 0 ||
           fail(err, EXIT_NO_INPUT, "%s is not there: verify compares with it; build it with `make`", out);
}

// Before anything trains: what the shrunk config cannot have at all.
static inline bool verify_can_run(const RunConfig* run, const VerifyLayout* layouts, int count, Error* err) {
    static RunConfig trial;
    for (int i = 0; i < count; i++) {
        const VerifyLayout* l = &layouts[i];
        Error why = {0, {0}};
        trial = *run;
        verify_apply(&trial, l);
        if (!layout_resolve(&trial, 0, l->dp * l->cp * l->tp * l->pp, &why))
            return fail(err, why.code, "layout %s: %.900s", l->name, why.text);
    }
    return true;
}

static inline bool verify_layouts(RunConfig* run, const char* list, const char* work, Error* err) {
    VerifyLayout layouts[VERIFY_LAYOUTS_MAX];
    const VerifyLayout alone = {"one process", 1, 1, 1, 1, 1, 1, PIPELINE_1F1B, false};
    VerifyLayout reference = alone;
    char program[PATH_MAX] = {0}, cpu[PATH_MAX];
    int count = 0, failed = 0;
    if (readlink("/proc/self/exe", program, sizeof program - 1) < 0 ||
        !verify_split(layouts, &count, list, err) || !verify_reference(cpu, program, err))
        return false;
    VerifyResult truth = {NULL, NULL, {0}, 0}, plain = truth;
    snprintf(reference.name, sizeof reference.name, "cpu");
    verify_shrink(run, layouts, count);
    if (!verify_can_run(run, layouts, count, err)) return false;
    static RunConfig fp32;
    fp32 = *run;
    fp32.precision.compute = COMPUTE_AUTO;
    fp32.precision.gradients = fp32.precision.master_weights = fp32.precision.moments = STORE_FP32;
    bool ok = verify_train(&truth, &fp32, &reference, work, cpu, err) &&
              verify_train(&plain, run, &alone, work, program, err);
    if (ok)
        printf("%-20s %12s %12s  %-18s %-24s\n%-20s %12.6f %12.6f\n%-20s %12.6f %12.6f\n", "layout",
               "last loss", "first norm", "largest error", "of", "cpu reference",
               truth.losses[run->schedule.max_steps - 1], truth.grad_norm, "one process",
               plain.losses[run->schedule.max_steps - 1], plain.grad_norm);
    for (int i = 0; ok && i < count; i++) {
        VerifyResult ours = {NULL, NULL, {0}, 0};
        Error why = {0, {0}};
        bool ran = verify_train(&ours, run, &layouts[i], work, program, &why);
        VerifyVerdict v = {0, "", "", false};
        if (ran) v = verify_compare(run, &ours, &plain, &truth);
        bool passed = ran && (v.bitwise || v.ratio <= 1);
        failed += !passed;
        if (ran)
            printf("%-20s %12.6f %12.6f  %5.2f of allowed   %-24s %s%s\n", layouts[i].name,
                   ours.losses[run->schedule.max_steps - 1], ours.grad_norm, v.ratio, v.worst,
                   passed ? "pass" : "FAIL", v.bitwise ? ", equal to the bit" : "");
        else
            printf("%-20s FAIL: %s\n", layouts[i].name, why.text);
        if (ran && !passed && v.first[0] != '\0') printf("%-20s first: %s\n", "", v.first);
        fflush(stdout);
        verify_free(&ours);
    }
    verify_free(&truth), verify_free(&plain);
    return ok && (failed == 0 || fail(err, EXIT_INTERNAL,
                                      "%d of %d layouts do not compute what one process does; %s "
                                      "has their runs",
                                      failed, count, work));
}
