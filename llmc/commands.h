// The commands: train, plan, eval, sample, export, checkpoint, help.
#pragma once
#include "llmc/checkpoint_tool.h" // defines: checkpoint_verify, checkpoint_info, checkpoint_diff
#include "llmc/fit.h"             // defines: check_memory
#include "llmc/layout_search.h"   // defines: layout_search, layout_print, layout_plan_print
#include "llmc/layout_resolve.h"  // defines: layout_resolve
#include "llmc/run_state.h"       // defines: run_state_watch, run_state_begin, run_state_end
#include "llmc/self_test.h"       // defines: self_test_ranks
#include "llmc/train_loop.h"      // defines: Trainer, train_loop, evaluate, generate
#include "llmc/verify.h"          // defines: verify_layouts

#include <omp.h>

// What a run looks like before its first step: enough to see a wrong tokenizer, a wrong shard, a wrong size.
static inline void print_start(const Trainer* t, bool resumed) {
    config_print(&t->run, stdout);
    printf("%-32s ", "device");
    gpt_print_device(stdout);
    dataloader_describe(&t->train, stdout);
    if (t->validation.rows > 0) dataloader_describe(&t->validation, stdout);
    if (resumed)
        printf("resumed at step %llu, after %llu tokens\n", (unsigned long long)t->state.step,
               (unsigned long long)t->state.tokens);
    if (t->state.step >= (uint64_t)t->run.schedule.max_steps)
        printf("nothing to do: schedule.max_steps is %d\n", t->run.schedule.max_steps);
    if (t->run.data.tokenizer[0] == '\0') return;
    int T = t->run.batch.sequence_length;
    int32_t* row = (int32_t*)malloc_check((size_t)(T + 1) * sizeof *row);
    Error ignored = {0, {0}};
    if (dataloader_row(&t->train, t->state.rows, row, &ignored)) {
        printf("---- the data, decoded: row %llu begins\n", (unsigned long long)t->state.rows);
        for (int i = 0; i < T && i < 60; i++) {
            size_t size;
            const char* bytes = token_bytes(&t->tokenizer, (uint32_t)row[i], &size);
            print_escaped(stdout, bytes, size);
        }
        printf("\n----\n");
    }
    free(row);
}

static inline void log_start(Trainer* t, bool resumed) {
    String line = event_begin(resumed ? "resume" : "start", t->state.step);
    event_text(&line, "program", t->program->name);
    event_text(&line, "version", t->program->version);
    event_number(&line, "parameters", (double)model_num_parameters(&t->run.model));
    event_number(&line, "threads", omp_get_max_threads());
    event_launch(&line, &t->run, t->peak_flops);
    event_number(&line, "productive_seconds", t->telemetry.productive);
    string_append(&line, ",\"config\":%s", t->config_json.data);
    event_end(&t->metrics, &line);
}

// `reason` is done, signal or error.
static inline void log_stop(Trainer* t, const char* reason, const Error* err) {
    String line = event_begin("stop", t->state.step);
    event_text(&line, "reason", reason);
    event_number(&line, "productive_seconds", t->telemetry.productive);
    event_number(&line, "goodput", goodput(&t->telemetry));
    if (err->code != 0) event_text(&line, "error", err->text);
    event_end(&t->metrics, &line);
}

// run_config.json in the run directory; when it was there before, says what is different now.
static inline bool write_run_config(Trainer* t, Error* err) {
    char path[PATH_MAX];
    size_t size;
    Error none = {0, {0}};
    if (!path_join(path, t->run.log.run_dir, "run_config.json", err)) return false;
    char* before = read_file(path, JSON_MAX_BYTES, &size, &none);
    if (before != NULL) config_print_changes(before, t->config_json.data, stdout);
    free(before);
    return replace_file(path, t->config_json.data, t->config_json.size, err);
}

// The model's communicators, where there are several processes.
static inline bool connect_model(Trainer* t, Error* err) {
    bool connected = t->control.size == 1 || gpt_connect(t->gpt, &t->control, err);
    return agree(t, err) && connected;
}

// Only training looks into the fast tier: other commands may run on another node.
static inline bool open_tier(Trainer* t, Error* err) {
    const char* fast_dir = t->run.checkpoint.fast_dir;
    bool ok = fast_dir[0] == '\0' || fast_open(&t->tier, fast_dir, &t->identity, &t->control, err);
    return agree(t, err) && ok;
}

// Has every process the same run directory before it? Rank 0's BAD_NODE is the one that who started the run reads.
static inline bool same_run_directory(Trainer* t, Error* err) {
    const RunConfig* run = &t->run;
    double patience = run->parallel.start_timeout < 30 ? run->parallel.start_timeout : 30;
    char bad_node[64] = "";
    bool ok = run_identity_share(&t->identity, run->log.run_dir, &t->control, patience, bad_node, err);
    if (bad_node[0] != '\0') name_bad_node(t, bad_node);
    return agree(t, err) && ok;
}

static inline bool command_train(Trainer* t, const char* argument, Error* err) {
    (void)argument;
    RunConfig* run = &t->run;
    bool resumed = false;
    Tokens prompt = {NULL, 0, 0};
    block_stop_signals();
    bool first = t->control.rank == 0; // who writes what is there once
    bool ready =
        check_memory(run, true, err) && (!first || (lock_run_directory(t, err) && run_state_begin(err) &&
                                                    run_identity_begin(&t->identity, run->log.run_dir, err)));
    if (!agree(t, err) || !ready) return false;
    run_state_ours = true; // on all processes
    if (!same_run_directory(t, err)) return false;
    ready = open_data(t, true, err);
    if (!agree(t, err) || !ready) return false;
    bool prompt_ok =
        run->sample.every == 0 || prompt_tokens(t, &prompt, err); // rather now than after an hour
    free(prompt.data);
    config_write_json(run, &t->config_json);
    if (run->parallel.self_test && !self_test_ranks(t, err)) return false;
    ready = prompt_ok && (!first || choose_tokenizer_json(t, err)) &&
            gpt_create(t->gpt, run, run->batch.micro_batch_size, run->batch.sequence_length, true, err);
    if (!agree(t, err) || !ready) return false;
    if (!connect_model(t, err) || !open_tier(t, err) || !load_or_init(t, &resumed, err)) return false;
    // where nothing is left to do, run_config.json stays that of the steps that were done
    bool finished = t->state.step >= (uint64_t)run->schedule.max_steps;
    ready = !first ||
            ((finished || write_run_config(t, err)) && metrics_open(&t->metrics, run->log.run_dir, err));
    if (!agree(t, err) || !ready || !leave_past(t, err)) return false;
    t->peak_flops = gpt_peak_flops(&t->run);
    telemetry_start(&t->telemetry, run, first ? t->metrics.log.path : NULL, t->state.step,
                    t->local_rank == 0);
    if (first && run->log.tensorboard)
        tensorboard_open(&t->metrics.tensorboard, run->log.run_dir, t->state.step);
    if (first) metrics_in_background(&t->metrics);
    print_start(t, resumed);
    log_start(t, resumed);
    bool ok = train_loop(t, err), done = t->state.step >= (uint64_t)run->schedule.max_steps;
    ok = ok && (!first || run_state_end(done ? "done" : "stopped", err));
    if (ok && !done) {
        t->agreed = true;
        char which[32] = "a signal to another process";
        if (stop_signal != 0) snprintf(which, sizeof which, "signal %d", stop_signal);
        fail(err, EXIT_STOPPED,
             "stopped by %s at step %llu, which is saved; the same command goes on from there", which,
             (unsigned long long)t->state.step);
    }
    log_stop(t, !ok ? "error" : done ? "done" : "signal", err);
    if (ok && done)
        printf("done: step %llu; model directory %s/checkpoints/step_%08llu\n",
               (unsigned long long)t->state.step, run->log.run_dir, (unsigned long long)t->state.step);
    return ok && done;
}

// Opens what evaluating, sampling and exporting need: a model without room for a backward pass.
static inline bool open_model(Trainer* t, int B, int T, Error* err) {
    enum WeightsFrom from;
    bool created = gpt_create(t->gpt, &t->run, B, T, false, err);
    if (!agree(t, err) || !created) return false;
    if (!connect_model(t, err) || !load_weights(t, &from, err)) return false;
    t->agreed = from == WEIGHTS_NOWHERE; // all loaded together
    return !t->agreed || fail(err, EXIT_NO_INPUT,
                              "no checkpoint in %s/checkpoints: train first, or name a model directory with "
                              "checkpoint.load_from=DIR",
                              t->run.log.run_dir);
}

static inline bool command_eval(Trainer* t, const char* argument, Error* err) {
    (void)argument;
    Evaluation e;
    if (t->run.data.validation[0] == '\0')
        return fail(err, EXIT_CONFIG, "data.validation is empty: eval needs the shards to evaluate on");
    bool ready = check_memory(&t->run, false, err) && open_data(t, false, err);
    if (!agree(t, err) || !ready) return false;
    if (!open_model(t, t->run.batch.micro_batch_size, t->run.batch.sequence_length, err)) return false;
    if (!evaluate(t, &e, err)) return false;
    printf("{\"step\":%llu,\"tokens\":%llu,\"loss\":%.9g,\"perplexity\":%.9g",
           (unsigned long long)t->state.step, (unsigned long long)e.tokens, e.loss, e.perplexity);
    if (isfinite(e.bits_per_byte)) printf(",\"bits_per_byte\":%.9g", e.bits_per_byte);
    printf("}\n");
    return true;
}

// What one process alone can do.
static inline bool need_one_process(const Trainer* t, const char* command, Error* err) {
    return t->control.size == 1 ||
           fail(err, EXIT_CONFIG, "%d processes were started, and %s takes one: start it once",
                t->control.size, command);
}

static inline bool command_sample(Trainer* t, const char* argument, Error* err) {
    (void)argument;
    if (!need_one_process(t, "sample", err)) return false;
    if (t->run.data.tokenizer[0] == '\0')
        return fail(err, EXIT_CONFIG, "data.tokenizer is empty: sample needs it to read and write text");
    if (!open_tokenizer(t, err) || !open_model(t, 1, 1, err)) return false;
    for (int i = 0; i < t->run.sample.num_samples; i++) {
        String text = {NULL, 0, 0};
        if (!generate(t, i, &text, err)) return false;
        if (i > 0) printf("----\n");
        print_escaped(stdout, text.data, text.size);
        printf("\n");
        free(text.data);
    }
    return true;
}

static inline bool command_export(Trainer* t, const char* argument, Error* err) {
    if (!need_one_process(t, "export", err)) return false;
    if (t->run.data.tokenizer[0] != '\0' && (!open_tokenizer(t, err) || !choose_tokenizer_json(t, err)))
        return false;
    if (!open_model(t, 1, 1, err)) return false;
    CheckpointData data = checkpoint_data(t);
    data.m = data.v = NULL;
    if (!checkpoint_export(argument, &data, err)) return false;
    printf("wrote the model of step %llu to %s\n", (unsigned long long)t->state.step, argument);
    return true;
}

static inline bool command_plan(Trainer* t, const char* argument, Error* err) {
    (void)argument, (void)err;
    const RunConfig* run = &t->run;
    MemoryLine lines[MEMORY_LINES_MAX];
    String advice = {NULL, 0, 0};
    Plan plan;
    memset(&plan, 0, sizeof plan);
    plan.run = run, plan.memory = lines, plan.num_memory = gpt_memory(run, true, lines);
    plan.memory_limit = gpt_memory_limit();
    if (plan.memory_limit != 0 && memory_needed(run, true) > plan.memory_limit)
        memory_advice(run, plan.memory_limit, &advice);
    plan.memory_advice = advice.data;
    plan.peak_flops = gpt_peak_flops(run);
    gpt_measure(run, &plan.matmul_rate, &plan.copy_rate);
    // a plan is made before there are data, too: without them it says nothing about epochs
    Error no_data = {0, {0}};
    if (open_train(t, &no_data))
        plan.train_tokens = t->train.tokens;
    else
        fprintf(stderr, "note: %s\n", no_data.text);
    printf("device       ");
    gpt_print_device(stdout);
    plan_print(&plan, stdout);
    layout_plan_print(run, stdout);
    free(advice.data);
    return true;
}

// As resolved, on one line: what a script wants to know of a run without reading JSON with comments itself.
static inline bool command_config(Trainer* t, const char* argument, Error* err) {
    (void)argument, (void)err;
    config_write_json(&t->run, &t->config_json);
    printf("%s\n", t->config_json.data);
    return true;
}

// One value, as it is: a script need not take JSON apart.
static inline bool command_knob(Trainer* t, const char* argument, Error* err) {
    char name[80];
    String value = {NULL, 0, 0};
    for (int i = 0; i < NUM_KNOBS && value.data == NULL; i++) {
        const Knob* k = &knobs[i];
        snprintf(name, sizeof name, "%s%s%s", k->section, k->section[0] != '\0' ? "." : "", k->key);
        if (strcmp(name, argument) != 0) continue;
        if (k->type == KNOB_TEXT)
            string_append(&value, "%s", (const char*)&t->run + k->offset);
        else
            append_knob(&value, &t->run, k);
    }
    if (value.data == NULL)
        return fail(err, EXIT_USAGE, "knob: %s is no key of a run config; `help config` lists them",
                    argument);
    printf("%s\n", value.data);
    free(value.data);
    return true;
}

static inline bool command_layouts(Trainer* t, const char* argument, Error* err) {
    enum { CHOICES = 512 };
    int size = (int)strtol(argument, NULL, 10), count = CHOICES;
    if (size < 1 || size > 65536 || strspn(argument, "0123456789") != strlen(argument))
        return fail(err, EXIT_USAGE, "layouts: %s is no number of GPUs; 1 to 65536 is wanted", argument);
    LayoutChoice* choices = (LayoutChoice*)calloc_check(CHOICES, sizeof *choices);
    t->run.sample.every = 0; // samples during training would leave few layouts to compare
    layout_search(&t->run, size, gpt_memory_limit(), layout_rates_h100(), choices, &count);
    if (count == 0)
        fail(
            err, EXIT_CONFIG,
            "no layout of %d processes divides this model and batch.global_batch_size %d: try a number with small "
            "factors, or a batch that is a multiple of it",
            size, t->run.batch.global_batch_size);
    else
        layout_print(choices, count, stdout);
    free(choices);
    return count > 0;
}

static inline bool command_verify(Trainer* t, const char* argument, Error* err) {
    char work[PATH_MAX];
    return need_one_process(t, "verify", err) && path_join(work, t->run.log.run_dir, "verify", err) &&
           verify_layouts(&t->run, argument, work, err);
}

// ----------------------------------------------------------------------------
// the command line

typedef struct {
    const char* name;
    bool (*run)(Trainer*, const char* argument, Error*);
    const char* argument; // what stands behind RUN.json; NULL: nothing
    const char* does;
} Command;

static const Command commands[] = {
    {"train", command_train, NULL, "train, or resume if a checkpoint is there (the word may be left out)"},
    {"plan", command_plan, NULL, "say what it would take: parameters, FLOPs, memory, time"},
    {"config", command_config, NULL, "print the run config as it is resolved, as JSON"},
    {"knob", command_knob, "KEY", "print one value of it, as it is: log.run_dir, say"},
    {"eval", command_eval, NULL, "loss, perplexity and bits per byte on data.validation, as JSON"},
    {"sample", command_sample, NULL, "generate text from sample.prompt"},
    {"export", command_export, "OUT_DIR", "write a Hugging Face model directory"},
    {"layouts", command_layouts, "GPUS", "rank the layouts of so many GPUs by their simulated step"},
    {"verify", command_verify, "LAYOUTS",
     "compare layouts (dp2,tp2pp2z1,...) of a shrunk copy with one process"},
};
enum { NUM_COMMANDS = sizeof commands / sizeof commands[0] };

static inline void print_usage(FILE* out, const char* program) {
    fprintf(out, "usage: %s [COMMAND] RUN.json [section.key=value ...]\n\n", program);
    for (int i = 0; i < NUM_COMMANDS; i++)
        fprintf(out, "  %-6s RUN.json %-8s %s\n", commands[i].name,
                commands[i].argument != NULL ? commands[i].argument : "", commands[i].does);
    fprintf(
        out,
        "  checkpoint verify|info|diff DIR [DIR]   check, describe or compare checkpoints\n"
        "  help config                             every key of a run config, as a table\n\n"
        "exit codes: 0 done, 64 usage, 65 damaged data, 66 missing file, 69 no usable GPU,\n"
        "            70 diverged or internal, 71 out of memory, 73 cannot create, 74 I/O error,\n"
        "            75 stopped by a signal after saving, 76 another process ended or hangs (run again to\n"
        "            go on after both), 78 run config\n");
}

static inline int run_checkpoint_command(int argc, char** argv) {
    if (argc == 2 && strcmp(argv[0], "verify") == 0) return checkpoint_verify(argv[1]);
    if (argc == 2 && strcmp(argv[0], "info") == 0) return checkpoint_info(argv[1]);
    if (argc == 3 && strcmp(argv[0], "diff") == 0) return checkpoint_diff(argv[1], argv[2]);
    fprintf(stderr, "error: checkpoint takes: verify DIR, info DIR, or diff DIR DIR\n");
    return EXIT_USAGE;
}

// What the commands other than train print is their result: it must have arrived.
static inline bool flush_output(Error* err) {
    return (fflush(stdout) == 0 && ferror(stdout) == 0) ||
           fail(err, EXIT_IO, "cannot write to standard output: %s", strerror(errno));
}

// --help, --version, checkpoint: what needs no run config. -1: it is none of these.
static inline int run_without_config(const Program* program, int argc, char** argv) {
    const char* word = argc >= 2 ? argv[1] : "";
    if (strcmp(word, "checkpoint") == 0) return run_checkpoint_command(argc - 2, argv + 2);
    if (strcmp(word, "--version") == 0 && argc == 2) {
        printf("pretrain.c %s, %s\n", program->version, program->name);
        program_versions(stdout);
        return EXIT_OK;
    }
    if (strcmp(word, "--help") != 0 && strcmp(word, "-h") != 0 && strcmp(word, "help") != 0) return -1;
    if (argc == 3 && strcmp(argv[2], "config") == 0)
        config_print_reference(stdout);
    else
        print_usage(stdout, argv[0]);
    return EXIT_OK;
}

// All processes of this run find each other. The first one speaks for them.
static inline bool meet(Trainer* t, const Launch* launch, Error* err) {
    String job = {NULL, 0, 0};
    double patience = t->run.parallel.start_timeout;
    config_write_json(&t->run, &job);
    bool ok = control_open(&t->control, launch, job.data, patience, err);
    string_append(&job, "checkpoints");
    ok = ok && control_open(&t->save_control, launch, job.data, patience, err);
    string_append(&job, "copies");
    ok = ok && (t->run.checkpoint.fast_dir[0] == '\0' ||
                control_open(&t->copy_control, launch, job.data, patience, err));
    string_append(&job, "watchdog");
    ok = ok && control_open(&t->watchdog.control, launch, job.data, patience, err);
    free(job.data);
    // a checkpoint takes longer than a start, and who reads and who writes it takes not the same time
    t->control.timeout = t->save_control.timeout = t->copy_control.timeout =
        patience > 3600 ? patience : 3600;
    if (ok && launch->rank > 0 && freopen("/dev/null", "w", stdout) == NULL)
        return fail(err, EXIT_OS, "cannot open /dev/null: %s", strerror(errno));
    return ok;
}

// Whom others wait for, and who waits for a GPU. One process on a CPU, or one that only plans, may take its time.
static inline bool watch(Trainer* t, const Command* command, const Launch* launch, Error* err) {
    Watchdog* w = &t->watchdog;
    bool alone = t->control.size == 1 && !(t->program->asynchronous && command->run == command_train);
    if (t->run.parallel.hang_seconds_max == 0 || alone) return true;
    w->run = &t->run, w->gpt = t->gpt;
    w->main = w->joined = &t->control, w->metrics = &t->metrics;
    w->mine.local_rank = launch->local_rank;
    flight_phase(PHASE_START, 0);
    return watchdog_start(w, err);
}

// Every process knows an error that they agreed on; it is said once. One that fails alone tells the others, which end at
// once, and ends as they do: its device may wait for them. That another one is gone the watchdog says; where it says
// nothing, the first process does, if it knows.
static inline void end_with(Trainer* t, const Error* err) {
    Error reported = {0, {0}};
    bool alone = !t->agreed && t->control.size > 1;
    if (alone && err->code == EXIT_LOST) sleep((unsigned)flight()->patience + (t->control.rank > 0 ? 2 : 0));
    if (!t->agreed || t->control.rank == 0) say_error(err);
    if (!alone) {
        trainer_close(t);
        exit(err->code);
    }
    if (t->saver.busy && err->code != EXIT_LOST) join_saver(t, &t->saver, &reported);
    if (t->copier.busy && err->code != EXIT_LOST) join_saver(t, &t->copier, &reported);
    watchdog_stop(&t->watchdog, err);
    line_queue_flush(&t->metrics.queue, 10);
    _exit(err->code);
}

// parallel.automatic: the first process chooses, for all of them.
static inline bool choose_layout(Trainer* t, bool training, Error* err) {
    enum { CHOICES = 512 };
    RunConfig* run = &t->run;
    int count = CHOICES, size = t->control.size;
    LayoutChoice* choices = (LayoutChoice*)calloc_check(CHOICES, sizeof *choices);
    if (t->control.rank == 0 && gpt_resolve(run, training, err)) {
        bool found = layout_search(run, size, gpt_memory_limit(), layout_rates_h100(), choices, &count);
        layout_print(choices, count < 8 ? count : 8, stderr); // stdout is the command's
        if (!found)
            fail(
                err, EXIT_CONFIG,
                "parallel.automatic: of %d layouts that divide the model and the batch for %d processes none fits; "
                "`layouts` shows them",
                count, size);
    }
    free(choices);
    return control_agree(&t->control, err) &&
           control_broadcast(&t->control, &run->parallel, sizeof run->parallel, err);
}

// A config with a layout in it is as good for one process that does not train.
static inline void lay_layout_aside(RunConfig* run) {
    run->parallel.data_parallel_size = 0, run->parallel.virtual_pipeline_size = 1;
    run->parallel.context_parallel_size = run->parallel.tensor_parallel_size = 1;
    run->parallel.pipeline_parallel_size = 1, run->parallel.pipeline_schedule = PIPELINE_1F1B;
    run->parallel.automatic = false;
}

// Which part of the run this process has. A plan may be made for processes that were not started.
static inline bool find_place(Trainer* t, const Command* command, bool training, Error* err) {
    RunConfig* run = &t->run;
    int size = t->control.size, replicas = run->parallel.data_parallel_size;
    int64_t planned = (int64_t)(replicas > 0 ? replicas : 1) * run->parallel.context_parallel_size *
                      run->parallel.tensor_parallel_size * run->parallel.pipeline_parallel_size;
    bool plan = command->run == command_plan, train = command->run == command_train;
    if (size == 1 && !plan && !train) lay_layout_aside(run);
    if (plan && size == 1 && planned > 1 && !run->parallel.automatic)
        size = planned < RANKS_MAX ? (int)planned : RANKS_MAX;
    if (run->parallel.automatic && !choose_layout(t, training, err)) return false;
    return layout_resolve(run, t->control.rank, size, err) && gpt_resolve(run, training, err);
}

#define SAME_ERROR_SECONDS 10.0
// What is wrong on the command line or in a run config is so on all processes, word for word: they meet over it, and the
// first one says it. One that reads another file, or none, meets nobody and says so.
static inline void end_before_meeting(const Launch* launch, const Error* err) {
    Control control;
    Error alone = {0, {0}};
    if (launch->rank == 0) say_error(err);
    bool met = control_open(&control, launch, err->text, SAME_ERROR_SECONDS, &alone);
    control_close(&control);
    if (launch->rank > 0 && !met) say_error(err);
    exit(err->code);
}

static inline int run_with_config(const Program* program, const Command* command, const Launch* launch,
                                  int argc, char** argv) {
    static Trainer trainer;
    RunConfig* run = &trainer.run;
    Error err = {0, {0}};
    const char* argument = command->argument != NULL ? argv[1] : NULL;
    int used = argument != NULL ? 2 : 1;
    bool training =
        command->run != command_eval && command->run != command_sample && command->run != command_export;
    trainer_init(&trainer, program);
    if (!config_load(run, argv[0], argc - used, argv + used, &err)) end_before_meeting(launch, &err);
    if (command->run == command_train) run_state_watch(run->log.run_dir);
    trainer.local_rank = launch->local_rank;
    gpt_choose_device(launch->local_rank);
    if (!meet(&trainer, launch, &err)) exit_with(&err);
    bool ok = watch(&trainer, command, launch, &err) && find_place(&trainer, command, training, &err);
    if (!agree(&trainer, &err) || !ok) end_with(&trainer, &err);
    if (run->parallel.threads > 0) omp_set_num_threads(run->parallel.threads);
    ok = command->run(&trainer, argument, &err);
    ok = ok && (command->run == command_train || flush_output(&err)); // a training run has its log
    if (!ok) end_with(&trainer, &err);
    trainer_close(&trainer);
    return EXIT_OK;
}

// Both programs' main: [COMMAND] RUN.json [OUT_DIR] [section.key=value ...]
static inline int program_main(const Program* program, int argc, char** argv) {
    Error err = {0, {0}};
    Launch launch;
    hold_standard_streams();
    if (!launch_find(&launch, &argc, argv, &err)) exit_with(&err);
    int done = run_without_config(program, argc, argv);
    if (done == EXIT_OK && !flush_output(&err)) exit_with(&err);
    if (done >= 0) return done;
    const char* name = argv[0];
    const Command* command = &commands[0];
    argc--, argv++;
    for (int i = 0; argc > 0 && i < NUM_COMMANDS; i++) {
        if (strcmp(argv[0], commands[i].name) != 0) continue;
        command = &commands[i];
        argc--, argv++;
        break;
    }
    if (argc > 0 && strchr(argv[0], '.') == NULL && access(argv[0], R_OK) != 0) {
        fail(&err, EXIT_USAGE, "%s is neither a command nor a run config; %s --help lists the commands",
             argv[0], name);
        end_before_meeting(&launch, &err);
    }
    if (argc < (command->argument != NULL ? 2 : 1)) {
        if (launch.rank == 0) print_usage(stderr, name);
        return EXIT_USAGE;
    }
    return run_with_config(program, command, &launch, argc, argv);
}
