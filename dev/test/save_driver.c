// A run of tiny checkpoints without the training, for e2e_checkpoint.sh to kill and starve.
//
//     save_driver save DIR STEP KEEP    saves weights that depend on STEP alone; exit code as train_gpt_cpu's
//     save_driver load DIR              prints the step of the newest whole checkpoint, 0 for none
//
// FAST_DIR=DIRECTORY in the environment: through a fast tier there, the checkpoint of which is then copied to DIR.
// `load` exits with 1 when a checkpoint loads whose weights are not those that were saved.
#include "dev/test/tiny_models.h" // defines: tiny_model, Weights, weights_new, weights_fill, weights_equal
#include "llmc/fast_tier.h" // defines: CheckpointData, checkpoint_save, checkpoint_load_newest, fast_save

static FastTier tier;

// As train_loop.h does: what the tier does not take goes to DIR from memory.
static bool save(const char* dir, CheckpointData* data, int keep_last, Error* err) {
    static CheckpointPart part;
    Error why = {0, {0}};
    data->part = &part;
    if (tier.directory[0] != '\0' && fast_save(&tier, data, &part, data->state.step, &why)) {
        if (!step_path(part.source, tier.directory, data->state.step, "", err)) return false;
    } else if (why.code != 0) {
        fprintf(stderr, "warning: %s\n", why.text);
    }
    part.alone = false;
    return checkpoint_save(dir, data, keep_last, 0, err);
}

int main(int argc, char** argv) {
    Error err = {0, {0}};
    bool saving = argc == 5 && strcmp(argv[1], "save") == 0, found = false;
    if (!saving && !(argc == 3 && strcmp(argv[1], "load") == 0)) {
        fail(&err, EXIT_USAGE, "usage: save_driver save DIR STEP KEEP | load DIR");
        exit_with(&err);
    }
    ModelConfig model = tiny_model(3);
    Weights w = weights_new(&model), expected = weights_new(&model);
    Control alone = {.size = 1};
    CheckpointData data = {&model, w.params, w.m, w.v, {0}, "{}\n", NULL, 0, 0, &alone, NULL};
    const char* fast_dir = getenv("FAST_DIR");
    data.end = parameter_layout(&model).num_parameters;
    if (fast_dir != NULL) {
        snprintf(tier.base, sizeof tier.base, "%s", fast_dir);
        if (!path_join(tier.run, fast_dir, "run", &err) || !path_join(tier.past, tier.run, "past", &err) ||
            !path_join(tier.directory, tier.past, "rank_0-of-1", &err))
            exit_with(&err);
    }
    if (saving) {
        data.state.step = strtoull(argv[3], NULL, 10);
        weights_fill(&w, data.state.step);
        if (!save(argv[2], &data, (int)strtol(argv[4], NULL, 10), &err)) exit_with(&err);
    } else {
        if (!(fast_dir != NULL ? fast_load_newest(&tier, argv[2], &data, &found, &err)
                               : checkpoint_load_newest(argv[2], &data, &found, &err)))
            exit_with(&err);
        weights_fill(&expected, data.state.step);
        if (found && !weights_equal(&w, &expected)) return 1;
        printf("%llu\n", (unsigned long long)data.state.step);
    }
    weights_free(&w);
    weights_free(&expected);
    return EXIT_OK;
}
