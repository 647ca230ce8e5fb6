// A run of tiny checkpoints without the training, for e2e_checkpoint.sh to kill and starve.
//
//     save_driver save DIR STEP KEEP    saves weights that depend on STEP alone; exit code as train_gpt_cpu's
//     save_driver load DIR              prints the step of the newest whole checkpoint, 0 for none
//
// `load` exits with 1 when a checkpoint loads whose weights are not those that were saved.
#include "dev/test/tiny_models.h" // defines: tiny_model, Weights, weights_new, weights_fill, weights_equal
#include "llmc/checkpoint.h"      // defines: CheckpointData, checkpoint_save, checkpoint_load_newest

int main(int argc, char** argv) {
    Error err = {0, {0}};
    bool saving = argc == 5 && strcmp(argv[1], "save") == 0, found = false;
    if (!saving && !(argc == 3 && strcmp(argv[1], "load") == 0)) {
        fail(&err, EXIT_USAGE, "usage: save_driver save DIR STEP KEEP | load DIR");
        exit_with(&err);
    }
    ModelConfig model = tiny_model(3);
    Weights w = weights_new(&model), expected = weights_new(&model);
    CheckpointData data = {&model, w.params, w.m, w.v, {0}, "{}\n", NULL, 0, 0, NULL};
    if (saving) {
        data.state.step = strtoull(argv[3], NULL, 10);
        weights_fill(&w, data.state.step);
        if (!checkpoint_save(argv[2], &data, (int)strtol(argv[4], NULL, 10), 0, &err)) exit_with(&err);
    } else {
        if (!checkpoint_load_newest(argv[2], &data, &found, &err)) exit_with(&err);
        weights_fill(&expected, data.state.step);
        if (found && !weights_equal(&w, &expected)) return 1;
        printf("%llu\n", (unsigned long long)data.state.step);
    }
    weights_free(&w);
    weights_free(&expected);
    return EXIT_OK;
}
