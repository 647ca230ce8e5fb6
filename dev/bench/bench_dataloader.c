// How fast are rows: through the loader, and through its thread?
// usage: bench_dataloader [ROWS]     default 200,000 rows of 1,025 tokens a measurement
//
// The baseline is memcpy of as many bytes as a row's tokens become (4 a token) from scattered places of a
// buffer as large as a 32-bit shard, in the same run: the speed that no copy can exceed. The shard (1e8
// tokens, in TMPDIR or /tmp) is in the page cache except in the row that says so. Best of several rounds.
#include "llmc/utils.h"            // defines: seconds_now, malloc_check
#include "dev/data/shard_writer.h" // defines: ShardWriter, shard_writer_*
#include "llmc/dataloader.h"       // defines: DataLoader, dataloader_*, Prefetch, prefetch_*

enum { ROUNDS = 5, T = 1024, VOCAB = 50000, SHARD_TOKENS = 100000000 };

static void must(bool ok, const Error* err) {
    if (!ok) exit_with(err);
}

static void write_shard(const char* path, int token_bytes) {
    ShardWriter w;
    Error err = {0};
    uint32_t tokens[1000];
    must(shard_writer_open(&w, path, token_bytes, VOCAB, -1, NULL, &err), &err);
    for (uint32_t i = 0; i < SHARD_TOKENS; i += 1000) {
        for (uint32_t k = 0; k < 1000; k++) tokens[k] = (i + k) * 2654435761u % VOCAB;
        must(shard_writer_tokens(&w, tokens, 1000, &err), &err);
    }
    shard_writer_end_document(&w, 0);
    must(shard_writer_finish(&w, &err) && shard_publish(path, &err), &err);
}

static double copy_seconds(const DataLoader* loader, uint64_t rows) {
    char* buffer = (char*)malloc_check((size_t)SHARD_TOKENS * 4);
    int32_t row[T + 1];
    double best = 1e30;
    memset(buffer, 1, (size_t)SHARD_TOKENS * 4);
    for (int round = 0; round < ROUNDS; round++) {
        double start = seconds_now();
        for (uint64_t g = 0; g < rows; g++) {
            memcpy(row, buffer + g * 7919 % loader->rows * T * 4, sizeof row);
            __asm__ volatile("" ::"r"(row) : "memory"); // the copy must happen
        }
        best = seconds_now() - start < best ? seconds_now() - start : best;
    }
    free(buffer);
    return best;
}

static double row_seconds(const DataLoader* loader, uint64_t rows, int rounds) {
    int32_t row[T + 1];
    Error err = {0};
    double best = 1e30;
    for (int round = 0; round < rounds; round++) {
        double start = seconds_now();
        for (uint64_t g = 0; g < rows; g++) must(dataloader_row(loader, g, row, &err), &err);
        best = seconds_now() - start < best ? seconds_now() - start : best;
    }
    return best;
}

// What a trainer waits for when its own work takes as long as a batch takes to prepare: nothing, ideally.
static double prefetch_seconds(const DataLoader* loader, uint64_t rows) {
    enum { BATCH = 64 };
    double best = 1e30;
    for (int round = 0; round < ROUNDS; round++) {
        Prefetch prefetch;
        Error err = {0};
        double start = seconds_now();
        must(prefetch_start(&prefetch, loader, 0, BATCH, BATCH, 0, 1, 4, &err), &err);
        for (uint64_t g = 0; g < rows; g += BATCH) must(prefetch_next(&prefetch, &err) != NULL, &err);
        prefetch_stop(&prefetch);
        best = seconds_now() - start < best ? seconds_now() - start : best;
    }
    return best;
}

static void report(const char* what, double seconds, double baseline, uint64_t rows) {
    printf("%-34s %8.2f us a row  %7.0f M tokens/s  %5.2f x baseline\n", what, seconds / (double)rows * 1e6,
           (double)rows * T / seconds * 1e-6, seconds / baseline);
}

int main(int argc, char** argv) {
    uint64_t rows = argc > 1 ? strtoull(argv[1], NULL, 10) : 200000;
    const char* root = getenv("TMPDIR");
    for (int token_bytes = 2; token_bytes <= 4; token_bytes += 2) {
        char path[PATH_MAX];
        Error err = {0};
        snprintf(path, sizeof path, "%s/bench_dataloader_%d.bin", root != NULL ? root : "/tmp", getpid());
        write_shard(path, token_bytes);
        DataSource source = {"bench", path, 1};
        DataLoader loader;
        must(dataloader_open(&loader, &source, 1, T, VOCAB, 1, true, &err), &err);
        double baseline = copy_seconds(&loader, rows);
        printf("%d-bit tokens, rows of %d + 1\n", 8 * token_bytes, T);
        report("memcpy (baseline)", baseline, baseline, rows);
        report("dataloader_row, shuffled", row_seconds(&loader, rows, ROUNDS), baseline, rows);
        report("prefetch_next, shuffled", prefetch_seconds(&loader, rows), baseline, rows);
        dataloader_close(&loader);

        int fd = open(path, O_RDONLY);
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
        must(dataloader_open(&loader, &source, 1, T, VOCAB, 1, true, &err), &err);
        report("dataloader_row, from disk", row_seconds(&loader, rows / 100, 1) * 100, baseline, rows);
        dataloader_close(&loader);
        unlink(path);
        char index[PATH_MAX];
        if (shard_index_path(index, path, &err)) unlink(index);
    }
    return 0;
}
