// How fast are checkpoints: hashed, saved, verified, loaded?
// usage: bench_checkpoint [DIR]      default $TMPDIR or /tmp; needs 3 GB there
//
// GPT-2 124M with both moments (1.49 GB). Saving is held against a plain write() of as many bytes and one
// fsync, reading against a plain read() from the page cache: what the same disk and the same memory do
// without any checkpoint. One thread, best of three rounds that alternate.
#include "dev/test/tiny_models.h" // defines: Weights, weights_new, weights_free, remove_tree
#include "llmc/checkpoint.h"      // defines: checkpoint_save, checkpoint_load, checkpoint_read
#include "llmc/hashed_file.h"     // defines: HASH_PIECE
#include "llmc/checkpoint_tool.h" // defines: tool_result

enum { ROUNDS = 3 };
enum Row { PLAIN_WRITE, SAVE, PLAIN_READ, HASH, VERIFY, LOAD, NUM_ROWS };

static const struct {
    const char* name;
    enum Row baseline;
} rows[NUM_ROWS] = {
    {"plain write and fsync (baseline)", PLAIN_WRITE},
    {"save: hash, write, fsync, rename", PLAIN_WRITE},
    {"plain read (baseline)", PLAIN_READ},
    {"XXH3-128 in memory", PLAIN_READ},
    {"verify: read and hash", PLAIN_READ},
    {"load: read, hash, transpose", PLAIN_READ},
};

static double best[NUM_ROWS];
static double started;

static void stop(enum Row row) {
    double seconds = seconds_now() - started;
    if (best[row] == 0 || seconds < best[row]) best[row] = seconds;
}

// The three arrays in pieces of 1 MB, as a file or from it.
static void plain_file(const char* path, const Weights* w, bool writing) {
    char* piece = (char*)malloc_check(1 << 20);
    int fd = open(path, writing ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY, 0666);
    CHECK(fd >= 0);
    const float* parts[3] = {w->params, w->m, w->v};
    for (int k = 0; k < 3; k++) {
        for (size_t at = 0, n; at < w->count * 4; at += n) {
            n = w->count * 4 - at < 1 << 20 ? w->count * 4 - at : 1 << 20;
            CHECK(writing ? write_all(fd, (const char*)parts[k] + at, n) : read(fd, piece, n) == (ssize_t)n);
        }
    }
    CHECK(!writing || fsync(fd) == 0);
    close(fd);
    free(piece);
}

int main(int argc, char** argv) {
    char work[TEMPORARY_PATH], plain[PATH_MAX], step[PATH_MAX];
    if (argc > 1) setenv("TMPDIR", argv[1], 1);
    temporary_directory(work);
    Error err = {0, {0}};
    ModelConfig model = tiny_model(0);
    model.vocab_size = 50257, model.hidden_size = 768, model.num_hidden_layers = 12;
    model.num_attention_heads = model.num_key_value_heads = 12, model.head_dim = 64;
    model.intermediate_size = 3072, model.max_position_embeddings = 1024;
    Weights w = weights_new(&model);
    CheckpointData data = {&model, w.params, w.m, w.v, {.step = 1}, "{}\n", NULL, 0, 0, NULL, NULL};
    CheckpointData nothing = {&model, NULL, NULL, NULL, {0}, NULL, NULL, 0, 0, NULL, NULL};
    CHECK(path_join(plain, work, "plain", &err) && step_path(step, work, 1, "", &err));
    for (int round = 0; round < ROUNDS && err.code == 0; round++) {
        XXH128_hash_t sum = {0, 0};
        const float* parts[3] = {w.params, w.m, w.v};
        started = seconds_now();
        plain_file(plain, &w, true);
        stop(PLAIN_WRITE);
        started = seconds_now();
        plain_file(plain, &w, false);
        stop(PLAIN_READ);
        unlink(plain);
        started = seconds_now();
        checkpoint_save(work, &data, 1, 0, &err);
        stop(SAVE);
        started = seconds_now();
        checkpoint_read(step, &nothing, &err);
        stop(VERIFY);
        started = seconds_now();
        checkpoint_load(step, &data, &err);
        stop(LOAD);
        started = seconds_now();
        for (int k = 0; k < 3; k++) sum.low64 ^= XXH3_128bits(parts[k], w.count * 4).low64;
        stop(HASH);
        CHECK(sum.low64 != 0);
    }
    double gigabytes = 3 * 4e-9 * (double)w.count;
    for (int row = 0; row < NUM_ROWS && err.code == 0; row++)
        printf("%-36s %6.2f s %7.2f GB/s %6.2f of the baseline\n", rows[row].name, best[row],
               gigabytes / best[row], best[rows[row].baseline] / best[row]);
    remove_tree(work, &err);
    weights_free(&w);
    return tool_result(&err);
}
