// A run in one process: its config, model, data and log, and how each of them is opened. The commands
// (commands.h) and the loop of training (train_loop.h) share it. What computes is behind program.h.
#pragma once
#include "llmc/checkpoint.h"      // defines: CheckpointData, TrainState, checkpoint_load_newest
#include "llmc/config_print.h"    // defines: config_write_json
#include "llmc/dataloader.h"      // defines: DataLoader, dataloader_open
#include "llmc/guard.h"           // defines: Alarm
#include "llmc/metrics.h"         // defines: Metrics, metrics_close
#include "llmc/program.h"         // defines: Program, StepResult, gpt_create, gpt_host_state ...
#include "llmc/saver.h"           // defines: Saver, saver_finish
#include "llmc/telemetry.h"       // defines: Telemetry, telemetry_stop
#include "llmc/tokenizer.h"       // defines: Tokenizer
#include "llmc/tokenizer_files.h" // defines: tokenizer_load, tokenizer_save_json
#include "llmc/watchdog.h"        // defines: Watchdog, watchdog_start, watchdog_stop, watchdog_joins

#include <sys/file.h>

typedef struct {
    RunConfig run;
    const Program* program;
    GPT* gpt; // the program's
    Tokenizer tokenizer;
    char tokenizer_json[PATH_MAX];      // what checkpoints take along; "": no tokenizer
    int run_dir_fd;                     // locked while training
    Control control;                    // the other processes
    Control save_control, copy_control; // those of the threads that write checkpoints
    Watchdog watchdog;
    int local_rank; // of this process among those of its node
    bool agreed;    // on the error that ends the run: the first process says it
    DataLoader train, validation;
    int eot_id; // begins every document in the shards; -1: not known
    TrainState state;
    Alarm alarm; // of the last step
    RunIdentity identity;
    FastTier tier;
    Saver saver, copier;             // copier: from the fast tier to the run's directory
    uint64_t saved_step, tried_step; // of the newest durable checkpoint, and of the last attempt at one
    uint64_t fast_step;              // of the fast tier's newest that is of this past; NO_STEP: there is none
    double save_started;             // when; at first, when training was started
    Error lost; // why saves have failed for good: a connection of those who save broke; code 0: they have not
    double stall;     // seconds that the last save kept training from going on; 0: none is known
    bool stall_grows; // it goes on in the step that is now computed
    Metrics metrics;
    Telemetry telemetry;
    String config_json;      // as resolved, on one line
    double peak_flops;       // of the device, 0 where it is not known; asked for once
    double seconds_per_step; // a mean at first, then an exponential average over about 20 steps
    double bits_per_byte;    // of the last evaluation; NaN before the first
} Trainer;

static const uint64_t NO_STEP = (uint64_t)-1;

static inline void trainer_init(Trainer* t, const Program* program) {
    memset(t, 0, sizeof *t);
    t->program = program, t->gpt = program->gpt;
    t->control.size = t->save_control.size = t->copy_control.size = t->watchdog.control.size = 1;
    t->bits_per_byte = NAN, t->run_dir_fd = -1;
    metrics_init(&t->metrics);
    t->telemetry.style = console_style(stdout);
}

// False on all processes if something failed (err) on any. That another process is gone they do not know together.
static inline bool agree(Trainer* t, Error* err) {
    bool ok = control_agree(&t->control, err);
    t->agreed = !ok && err->code != EXIT_LOST;
    return ok;
}

// The result of a thread, which is waited for: as long as it takes, not as long as a step.
static inline bool join_saver(Trainer* t, Saver* saver, Error* err) {
    watchdog_joins(&t->watchdog, saver->data.control);
    flight_phase(PHASE_SAVE, saver->data.state.step);
    return saver_finish(saver, err);
}

// Waits for a checkpoint that is still being written.
static inline void trainer_close(Trainer* t) {
    Error reported = {0, {0}};
    const Error none = {0, {0}};
    if (t->saver.busy) join_saver(t, &t->saver, &reported);
    if (t->copier.busy) join_saver(t, &t->copier, &reported);
    watchdog_stop(&t->watchdog, &none);
    dataloader_close(&t->train);
    dataloader_close(&t->validation);
    tokenizer_free(&t->tokenizer);
    gpt_free(t->gpt);
    telemetry_stop(&t->telemetry);
    metrics_close(&t->metrics);
    if (t->run_dir_fd >= 0) close(t->run_dir_fd);
    control_close(&t->control), control_close(&t->save_control), control_close(&t->copy_control);
    free(t->config_json.data);
}

// One trainer at a time: two in one run directory would take turns in overwriting each other's checkpoints.
static inline bool lock_run_directory(Trainer* t, Error* err) {
    const char* run_dir = t->run.log.run_dir;
    if (!make_directories(run_dir, err)) return false;
    t->run_dir_fd = open(run_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (t->run_dir_fd < 0)
        return fail(err, EXIT_CANNOT_WRITE, "cannot open %s: %s", run_dir, strerror(errno));
    if (flock(t->run_dir_fd, LOCK_EX | LOCK_NB) == 0) return true;
    if (errno != EWOULDBLOCK) {
        fprintf(stderr, "note: %s cannot be locked (%s): see to it that nobody else trains in it\n", run_dir,
                strerror(errno));
        return true;
    }
    return fail(err, EXIT_CANNOT_WRITE,
                "another process is training in %s: wait for it, stop it, or name another "
                "log.run_dir",
                run_dir);
}

// ----------------------------------------------------------------------------
// weights

static inline const char* checkpoints_directory(const Trainer* t, char out[PATH_MAX], Error* err) {
    return path_join(out, t->run.log.run_dir, "checkpoints", err) ? out : NULL;
}

static inline CheckpointData checkpoint_data(Trainer* t) {
    HostState host = gpt_host_state(t->gpt);
    CheckpointData data = {
        &t->run.model,     host.params, host.m,   host.v,      t->state, t->config_json.data,
        t->tokenizer_json, host.begin,  host.end, &t->control, NULL};
    return data;
}

enum WeightsFrom { WEIGHTS_NOWHERE, WEIGHTS_RUN, WEIGHTS_ELSEWHERE };

// The newest checkpoint of the run (training: of both tiers); where there is none, checkpoint.load_from. Moments
// are read where there is memory for them, and start at zero with weights from elsewhere. t->state is what the
// checkpoint says, zeros for a foreign model.
static inline bool load_weights(Trainer* t, enum WeightsFrom* from, Error* err) {
    char directory[PATH_MAX];
    const char* load_from = t->run.checkpoint.load_from;
    bool found = false;
    *from = WEIGHTS_NOWHERE;
    if (checkpoints_directory(t, directory, err) == NULL) return false;
    CheckpointData data = checkpoint_data(t);
    bool fast = t->tier.directory[0] != '\0';
    if (!(fast ? fast_load_newest(&t->tier, directory, &data, &found, err)
               : checkpoint_load_newest(directory, &data, &found, err))) {
        t->agreed = err->code != EXIT_LOST; // all load together
        return false;
    }
    *from = found ? WEIGHTS_RUN : load_from[0] != '\0' ? WEIGHTS_ELSEWHERE : WEIGHTS_NOWHERE;
    if (*from == WEIGHTS_NOWHERE) return true;
    if (*from == WEIGHTS_ELSEWHERE) {
        size_t bytes = (data.end - data.begin) * sizeof(float);
        if (data.m != NULL) memset(data.m, 0, bytes), memset(data.v, 0, bytes);
        data.m = data.v = NULL;
        bool ok = checkpoint_load(load_from, &data, err);
        if (!agree(t, err) || !ok) return false;
    }
    gpt_from_host(t->gpt);
    t->state = data.state;
    if (t->control.rank == 0)
        fprintf(stderr, "weights from %s, step %llu\n",
                !found           ? load_from
                : t->tier.loaded ? t->tier.directory
                                 : directory,
                (unsigned long long)t->state.step);
    return true;
}

// Every process has opened the shards by itself: they must be those that the newest checkpoint was trained on, at the
// first start those of the first process.
static inline bool same_data(Trainer* t, bool resumed, Error* err) {
    uint64_t ours = t->train.fingerprint, *wanted = &t->state.data_fingerprint;
    if (!resumed) {
        *wanted = ours;
        if (!control_broadcast(&t->control, wanted, sizeof *wanted, err)) return false;
    }
    if (ours != *wanted && resumed)
        fail(
            err, EXIT_CONFIG,
            "the training data are not those that the newest checkpoint in %s was trained on (fingerprint "
            "%016llx, now %016llx): restore data.train, batch.sequence_length and seed, or start another run "
            "with checkpoint.load_from and a new log.run_dir",
            t->run.log.run_dir, (unsigned long long)*wanted, (unsigned long long)ours);
    else if (ours != *wanted)
        fail(err, EXIT_CONFIG,
             "the training data are not those of rank 0 (fingerprint %016llx, here %016llx): the shards of "
             "data.train must be the same on all nodes",
             (unsigned long long)*wanted, (unsigned long long)ours);
    return agree(t, err);
}

// The weights a training run starts with: its own newest checkpoint, else checkpoint.load_from, else random.
static inline bool load_or_init(Trainer* t, bool* resumed, Error* err) {
    enum WeightsFrom from;
    if (!load_weights(t, &from, err)) return false;
    *resumed = from == WEIGHTS_RUN;
    if (from == WEIGHTS_NOWHERE) init_weights(t->gpt, &t->run.model, t->run.seed);
    if (!*resumed) memset(&t->state, 0, sizeof t->state);
    t->saved_step = t->tier.to_copy ? NO_STEP : t->state.step;
    t->fast_step = t->tier.loaded ? t->state.step : NO_STEP;
    return same_data(t, *resumed, err);
}

// Training goes on from what was loaded: what the fast tier has is of another past, unless that was from there.
static inline bool leave_past(Trainer* t, Error* err) {
    if (t->tier.loaded || fast_give_up(&t->tier, &t->identity, &t->control, err)) return true;
    t->agreed = err->code != EXIT_LOST;
    return false;
}

// ----------------------------------------------------------------------------
// data and tokenizer

static inline bool open_train(Trainer* t, Error* err) {
    const RunConfig* run = &t->run;
    DataSource sources[MAX_DATA_SOURCES];
    for (int i = 0; i < run->data.num_sources; i++) {
        const DataSourceConfig* s = &run->data.sources[i];
        DataSource source = {s->name, s->path, s->weight};
        sources[i] = source;
    }
    return dataloader_open(&t->train, sources, run->data.num_sources, run->batch.sequence_length,
                           (uint32_t)run->model.vocab_size, run->seed, true, err);
}

// Two loaders, or a loader and the tokenizer, must speak the same tokens: hashes are compared where both are
// known.
static inline bool same_tokenizer(const uint64_t a[2], const uint64_t b[2], const char* what, Error* err) {
    if ((a[0] | a[1]) == 0 || (b[0] | b[1]) == 0 || (a[0] == b[0] && a[1] == b[1])) return true;
    return fail(err, EXIT_CONFIG,
                "%s: another tokenizer (hash %016llx%016llx) than the data were encoded with "
                "(%016llx%016llx); encode the data anew or name their tokenizer.json",
                what, (unsigned long long)a[1], (unsigned long long)a[0], (unsigned long long)b[1],
                (unsigned long long)b[0]);
}

// Checkpoints hold a tokenizer.json: the one that was named, or the same tokenizer written anew into the run
// directory when it came from another format.
static inline bool choose_tokenizer_json(Trainer* t, Error* err) {
    const char* path = t->run.data.tokenizer;
    size_t n = strlen(path);
    if (n == 0) return true;
    const char* slash = strrchr(path, '/');
    bool is_json = n > 5 && strcmp(path + n - 5, ".json") == 0;
    if (is_json && strcmp(slash != NULL ? slash + 1 : path, "encoder.json") != 0) {
        snprintf(t->tokenizer_json, sizeof t->tokenizer_json, "%s", path);
        return true;
    }
    if (path_join(t->tokenizer_json, path, "tokenizer.json", err) && access(t->tokenizer_json, R_OK) == 0)
        return true;
    return make_directories(t->run.log.run_dir, err) &&
           path_join(t->tokenizer_json, t->run.log.run_dir, "tokenizer.json", err) &&
           tokenizer_save_json(&t->tokenizer, t->tokenizer_json, err);
}

static inline bool open_tokenizer(Trainer* t, Error* err) {
    if (!tokenizer_load(&t->tokenizer, t->run.data.tokenizer, err)) return false;
    if (t->tokenizer.vocab_size <= (uint32_t)t->run.model.vocab_size) return true;
    return fail(err, EXIT_CONFIG,
                "%s has %u tokens, more than model.vocab_size, %d: it is not this model's tokenizer",
                t->run.data.tokenizer, t->tokenizer.vocab_size, t->run.model.vocab_size);
}

static inline bool open_data(Trainer* t, bool training, Error* err) {
    const RunConfig* run = &t->run;
    uint32_t vocab_size = (uint32_t)run->model.vocab_size;
    int T = run->batch.sequence_length;
    DataSource validation = {"validation", run->data.validation, 1.0};
    if (training && !open_train(t, err)) return false;
    if (run->data.validation[0] != '\0' &&
        !dataloader_open(&t->validation, &validation, 1, T, vocab_size, 0, false, err))
        return false;
    const DataLoader* loader = training ? &t->train : &t->validation;
    if (!same_tokenizer(t->validation.tokenizer_hash, loader->tokenizer_hash, "data.validation", err))
        return false;
    t->eot_id = loader->eot_id;
    if (run->data.document_mask && t->eot_id < 0)
        return fail(err, EXIT_CONFIG,
                    "data.document_mask is true but the shards do not say which token begins a "
                    "document: encode them with `corpus encode`, or set it to false");
    if (run->data.tokenizer[0] == '\0') return true;
    if (!open_tokenizer(t, err)) return false;
    TokenizerHash hash = tokenizer_hash(&t->tokenizer);
    uint64_t words[2] = {hash.low, hash.high};
    return same_tokenizer(words, loader->tokenizer_hash, run->data.tokenizer, err);
}
