// A run with two checkpoints, for tests of what becomes of them.
#pragma once
#include "dev/test/tiny_models.h" // defines: tiny_model, Weights, weights_*, temporary_directory, remove_tree
#include "llmc/checkpoint.h"      // defines: checkpoint_save, checkpoint_load_newest
#include <setjmp.h>
#include <cmocka.h> // last: it has a macro fail()

static char run[TEMPORARY_PATH];
static ModelConfig model;
static Weights saved[2], loaded; // saved[k]: the weights of step 10 * (k + 1)

static TrainState state_of(uint64_t step) {
    TrainState s = {step,
                    step * 1000,
                    step * 8,
                    0xFEDCBA9876543210ull + step,
                    3,
                    1,
                    2,
                    {step, 1.0 / 3, 5e-324},
                    {4, -1e308, 0.1}};
    return s;
}

static CheckpointData data_of(Weights* w, uint64_t step) {
    CheckpointData d = {&model, w->params, w->m, w->v, state_of(step), "{\n  \"seed\": 1\n}\n", NULL,
                        0,      0,         NULL, NULL};
    return d;
}

static void save(Weights* w, uint64_t step, int keep_last, uint64_t permanent_every) {
    Error err = {0, {0}};
    CheckpointData d = data_of(w, step);
    if (!checkpoint_save(run, &d, keep_last, permanent_every, &err)) fail_msg("%s", err.text);
}

// Loads the newest; returns its step, 0 when nothing was found, -1 on an error.
static long load(Error* err) {
    bool found;
    CheckpointData d = data_of(&loaded, 0);
    memset(err, 0, sizeof *err);
    memset(loaded.params, 0xAB, loaded.count * 4);
    memset(loaded.m, 0xAB, loaded.count * 4);
    memset(loaded.v, 0xAB, loaded.count * 4);
    if (!checkpoint_load_newest(run, &d, &found, err)) return -1;
    if (!found) return 0;
    TrainState expected = state_of(d.state.step);
    assert_memory_equal(&d.state, &expected, sizeof expected);
    return (long)d.state.step;
}

static const char* in_run(const char* name) {
    static char paths[4][PATH_MAX];
    static int next;
    char* path = paths[next++ % 4];
    snprintf(path, PATH_MAX, "%s/%s", run, name);
    return path;
}

static bool exists(const char* name) { return access(in_run(name), F_OK) == 0; }

static void begin_run(int which_model) {
    temporary_directory(run);
    model = tiny_model(which_model);
    for (int k = 0; k < 2; k++) {
        saved[k] = weights_new(&model);
        weights_fill(&saved[k], (uint64_t)k);
    }
    loaded = weights_new(&model);
}

static void end_run(void) {
    Error ignored = {0, {0}};
    remove_tree(run, &ignored);
    for (int k = 0; k < 2; k++) weights_free(&saved[k]);
    weights_free(&loaded);
}

// Two checkpoints, of step 10 and 20.
static int setup(void** state) {
    (void)state;
    begin_run(3);
    save(&saved[0], 10, 5, 0);
    save(&saved[1], 20, 5, 0);
    return 0;
}

static int teardown(void** state) {
    (void)state;
    end_run();
    return 0;
}

static char* slurp(const char* path, size_t* size) {
    Error err = {0, {0}};
    *size = 0;
    char* data = read_file(path, SIZE_MAX, size, &err);
    if (data == NULL) fail_msg("%s", err.text);
    return data;
}

static void spill(const char* path, const void* data, size_t size) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    assert_true(fd >= 0 && write_all(fd, data, size) && close(fd) == 0);
}

// step: "step_00000020"
static inline void file_in(char out[PATH_MAX], const char* step, const char* name) {
    snprintf(out, PATH_MAX, "%s/%s/%s", run, step, name);
}

#define ON_A_RUN(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
