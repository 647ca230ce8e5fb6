// The data loader: which row comes when, for any rank count and any shards, and what it refuses.
#include "llmc/utils.h"              // defines: Error, EXIT_*, calloc_check, malloc_check
#include "dev/test/shard_fixtures.h" // defines: temp_path, patch_file, write_counting_shard, ...
#include "llmc/dataloader.h" // defines: DataLoader, dataloader_*, Prefetch, prefetch_*, document_starts, ...
#include <setjmp.h>
#include <cmocka.h> // last: it has a macro fail()

// ----------------------------------------------------------------------------
// order: arithmetic without files

static void assert_is_permutation(uint64_t n, uint64_t seed, uint64_t which) {
    uint8_t* seen = (uint8_t*)calloc_check(n, 1);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t j = permute(i, n, seed, which);
        assert_true(j < n);
        assert_int_equal(seen[j]++, 0);
    }
    free(seen);
}

static void test_permute_is_a_bijection(void** state) {
    (void)state;
    for (uint64_t n = 1; n <= 300; n++) assert_is_permutation(n, n, n % 3);
    const uint64_t sizes[] = {1023, 1024, 1025, 4095, 4096, 4097, 65535, 65536, 65537, 100003};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) assert_is_permutation(sizes[i], 1, 5);
    // too many to list: distinct images of neighbours, all in range
    const uint64_t huge = ((uint64_t)1 << 40) + 7;
    for (uint64_t i = 0; i < 1000; i++) {
        uint64_t j = permute(huge - 1 - i, huge, 1, 0);
        assert_true(j < huge);
        for (uint64_t k = 0; k < i; k += 97) assert_true(permute(huge - 1 - k, huge, 1, 0) != j);
    }
    assert_true(permute(UINT64_MAX - 1, UINT64_MAX, 1, 0) < UINT64_MAX);
}

// Every epoch, seed and source has another order, and that order looks like chance: hardly a fixed point,
// neighbours as far apart as random places are (a third of n on average), each place as likely as any other.
static void test_permute_shuffles(void** state) {
    (void)state;
    enum { N = 5000, KEYS = 20 };
    for (uint64_t key = 0; key < KEYS; key++) {
        uint64_t fixed = 0, same = 0;
        double distance = 0;
        for (uint64_t i = 0; i + 1 < N; i++) {
            uint64_t a = permute(i, N, key, 0), b = permute(i + 1, N, key, 0);
            fixed += a == i;
            same += a == permute(i, N, key, 1) || a == permute(i, N, key + 1, 0);
            distance += a > b ? (double)(a - b) : (double)(b - a);
        }
        assert_true(fixed < 10 && same < 15);
        assert_true(fabs(distance / N / N - 1.0 / 3) < 0.02);
    }
    uint64_t first[10] = {0};
    for (uint64_t key = 0; key < 10000; key++) first[permute(0, 10, 7, key)]++;
    for (int i = 0; i < 10; i++) assert_in_range(first[i], 850, 1150);
}

// The order of every run there ever was depends on these numbers: they never change.
static void test_order_is_pinned(void** state) {
    (void)state;
    const uint64_t expected[10] = {0, 4, 2, 6, 9, 1, 8, 3, 7, 5};
    for (uint64_t i = 0; i < 10; i++) assert_int_equal(permute(i, 10, 1337, 2), expected[i]);
}

static Mixture* build_mixture(const double* weights, int n, Error* err) {
    static const char* const names[] = {"a", "b", "c", "d", "e", "f", "g", "h"};
    Mixture* m = (Mixture*)malloc_check(sizeof *m);
    if (mixture_build(m, weights, names, n, err)) return m;
    free(m);
    return NULL;
}

static void test_mixture_keeps_its_ratios(void** state) {
    (void)state;
    const double cases[][8] = {{1},
                               {1, 1},
                               {7, 3},
                               {0.7, 0.2, 0.1},
                               {1, 2, 3, 4, 5, 6, 7, 8},
                               {1e-4, 1},
                               {1, 1, 1, 1, 1, 1, 1},
                               {900, 1, 1, 1, 1, 1, 95},
                               {1.0 / 3, 1.0 / 3, 1.0 / 3}};
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        int n = 0;
        double sum = 0, weights[8];
        while (n < 8 && cases[c][n] > 0) weights[n] = cases[c][n], sum += cases[c][n], n++;
        Error err = {0};
        Mixture* m = build_mixture(weights, n, &err);
        assert_non_null(m);
        uint64_t count[8] = {0}, index, quotas = 0;
        for (int k = 0; k < n; k++) {
            assert_true(fabs(m->quota[k] - weights[k] / sum * MIXTURE_PERIOD) < 1);
            quotas += m->quota[k];
        }
        assert_int_equal(quotas, MIXTURE_PERIOD);
        // any index at once gives what counting through all rows before it gives
        for (uint64_t g = 0; g < 3 * MIXTURE_PERIOD + 1000; g++) {
            int k = mixture_locate(m, g, &index);
            assert_true(k >= 0 && k < n);
            assert_int_equal(index, count[k]++);
            for (int j = 0; j < n; j++) {
                double exact = (double)(g + 1) * m->quota[j] / MIXTURE_PERIOD;
                if (fabs((double)count[j] - exact) >= 1)
                    fail_msg("case %zu: source %d after %llu rows", c, j, (unsigned long long)g);
            }
        }
        free(m);
    }
}

static void test_mixture_refuses_weights(void** state) {
    (void)state;
    const struct {
        double weights[3];
        const char* says;
    } cases[] = {{{1, 0, 1}, "'b': weight 0 must be a positive number"},
                 {{1, 1, -2}, "'c': weight -2"},
                 {{NAN, 1, 1}, "'a': weight nan"},
                 {{1, INFINITY, 1}, "'b': weight inf"},
                 {{1, 1, 1e-6}, "'c': weight 1e-06 is less than one row in 65536"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Error err = {0};
        assert_null(build_mixture(cases[i].weights, 3, &err));
        assert_int_equal(err.code, EXIT_CONFIG);
        if (strstr(err.text, cases[i].says) == NULL) fail_msg("%s", err.text);
    }
}

static void test_document_starts(void** state) {
    (void)state;
    const int32_t tokens[9] = {4, 9, 1, 1, 9, 9, 2, 3, 9}, expected[8] = {0, 1, 1, 1, 4, 5, 5, 5};
    int32_t starts[8];
    document_starts(starts, tokens, 8, 9);
    assert_memory_equal(starts, expected, sizeof expected);
    const int32_t none[8] = {0};
    document_starts(starts, tokens, 8, -1);
    assert_memory_equal(starts, none, sizeof none);
}

// ----------------------------------------------------------------------------
// rows

enum { T = 8, VOCAB = 50000 };

// Three shards of unequal sizes and both widths: a_0 has 12 rows, a_1 none, a_2 25. The tokens count up, so
// that a row's first token says which row it is.
static void write_source_a(void) {
    write_counting_shard(temp_path("a_0.bin"), 2, VOCAB, 1000, 12 * T + 1 + 3);
    write_counting_shard(temp_path("a_1.bin"), 2, VOCAB, 2000, T);
    write_counting_shard(temp_path("a_2.bin"), 4, VOCAB, 3000, 25 * T + 1 + 7);
}

static DataSource source(const char* name, const char* glob, double weight) {
    DataSource s = {name, temp_path(glob), weight};
    return s;
}

static void open_loader(DataLoader* loader, const DataSource* sources, int n, uint64_t seed, bool shuffle) {
    Error err = {0};
    if (!dataloader_open(loader, sources, n, T, VOCAB, seed, shuffle, &err)) fail_msg("%s", err.text);
}

static void read_row(const DataLoader* loader, uint64_t g, int32_t* row) {
    Error err = {0};
    if (!dataloader_row(loader, g, row, &err)) fail_msg("row %llu: %s", (unsigned long long)g, err.text);
}

static void assert_counts_up(const int32_t* row) {
    for (int t = 1; t <= T; t++) assert_int_equal(row[t], row[0] + t);
}

static void test_rows_of_unequal_shards(void** state) {
    (void)state;
    DataSource a = source("a", "a_*.bin", 1);
    DataLoader loader;
    int32_t row[T + 1];
    write_source_a();
    open_loader(&loader, &a, 1, 0, false);
    assert_int_equal(loader.rows, 37);
    assert_int_equal(loader.tokens, 12 * T + 4 + T + 25 * T + 8);
    assert_int_equal(loader.sources[0].dropped, 4 + T + 8);
    for (uint64_t g = 0; g < 3 * 37; g++) { // in order, and over again
        read_row(&loader, g, row);
        uint64_t r = g % 37;
        assert_int_equal(row[0], r < 12 ? 1000 + r * T : 3000 + (r - 12) * T);
        assert_counts_up(row);
    }
    dataloader_close(&loader);

    open_loader(&loader, &a, 1, 5, true);
    int order_changes = 0;
    uint64_t previous[37] = {0};
    for (uint64_t epoch = 0; epoch < 4; epoch++) { // each row once an epoch, in another order
        int seen[37] = {0};
        for (uint64_t i = 0; i < 37; i++) {
            read_row(&loader, epoch * 37 + i, row);
            assert_counts_up(row);
            uint64_t r = row[0] < 3000 ? (uint64_t)(row[0] - 1000) / T : (uint64_t)(row[0] - 3000) / T + 12;
            assert_int_equal(seen[r]++, 0);
            order_changes += epoch > 0 && previous[i] != r;
            previous[i] = r;
        }
    }
    assert_true(order_changes > 90);
    dataloader_close(&loader);
}

// Two sources, 3 : 1. Training on 1, 2 and 4 ranks sees the same global batches.
static void test_ranks_share_one_order(void** state) {
    (void)state;
    enum { BATCH = 16, STEPS = 12 };
    write_source_a();
    write_counting_shard(temp_path("b_0.bin"), 2, VOCAB, 20000, 10 * T + 1);
    const DataSource sources[2] = {source("a", "a_*.bin", 3), source("b", "b_*.bin", 1)};
    DataLoader loader;
    open_loader(&loader, sources, 2, 42, true);
    int32_t *alone = (int32_t*)malloc_check(STEPS * BATCH * (T + 1) * sizeof *alone), from_b = 0;
    for (uint64_t g = 0; g < STEPS * BATCH; g++) {
        read_row(&loader, g, alone + g * (T + 1));
        from_b += alone[g * (T + 1)] >= 20000;
    }
    assert_int_equal(from_b, STEPS * BATCH / 4);
    for (int ranks = 1; ranks <= 4; ranks *= 2) {
        for (int rank = 0; rank < ranks; rank++) {
            Prefetch prefetch;
            Error err = {0};
            int micro = BATCH / 4, rows = BATCH / ranks; // four micro-batches, which ranks take in turn
            const uint64_t first_step = 3;               // as a resume does
            assert_true(prefetch_start(&prefetch, &loader, first_step * BATCH, BATCH, micro, rank, ranks,
                                       1 + rank, &err));
            for (uint64_t step = first_step; step < STEPS; step++) {
                const int32_t* batch = prefetch_next(&prefetch, &err);
                assert_non_null(batch);
                for (int m = 0; m < rows / micro; m++)
                    assert_memory_equal(batch + m * micro * (T + 1),
                                        alone +
                                            (step * BATCH + (uint64_t)((m * ranks + rank) * micro)) * (T + 1),
                                        (size_t)micro * (T + 1) * sizeof *batch);
            }
            prefetch_stop(&prefetch);
        }
    }
    free(alone);
    dataloader_close(&loader);
}

// A 3 GB shard: offsets beyond 31 bits, in bytes and in tokens.
static void test_rows_past_2_gib(void** state) {
    (void)state;
    const char* path = temp_path("big.bin");
    const uint64_t n = 1500000001;
    write_sparse_shard(path, 2, n);
    const uint64_t first_row = 1400000000 / T;
    uint16_t marks[3 * T];
    for (size_t i = 0; i < 3 * T; i++) marks[i] = (uint16_t)(100 + i);
    patch_file(path, (off_t)(SHARD_HEADER_BYTES + 2 * first_row * T), marks, sizeof marks);
    DataSource big = source("big", "big.bin", 1);
    DataLoader loader;
    int32_t row[T + 1];
    open_loader(&loader, &big, 1, 0, false);
    assert_int_equal(loader.rows, (n - 1) / T);
    for (uint64_t i = 0; i < 2; i++) {
        read_row(&loader, first_row + i, row);
        assert_int_equal(row[0], 100 + i * T);
        assert_counts_up(row);
    }
    read_row(&loader, loader.rows - 1, row);
    assert_int_equal(row[T], 0);
    dataloader_close(&loader);

    const uint64_t more = ((uint64_t)1 << 32) + 2 * T + 1; // 8 GB: token numbers beyond 32 bits
    write_sparse_shard(path, 2, more);
    patch_file(path, (off_t)(SHARD_HEADER_BYTES + 2 * (more - 1 - 2 * T)), marks, sizeof marks / 3 * 2);
    open_loader(&loader, &big, 1, 0, false);
    for (uint64_t i = 0; i < 2; i++) {
        read_row(&loader, loader.rows - 2 + i, row);
        assert_int_equal(row[0], 100 + i * T);
    }
    dataloader_close(&loader);
    unlink(path);
}

// ----------------------------------------------------------------------------
// refusing

static void test_bad_token_is_named(void** state) {
    (void)state;
    for (int token_bytes = 2; token_bytes <= 4; token_bytes += 2)
        for (uint64_t place = 0; place < 3 * T + 1; place++) {
            const char* path = temp_path("bad.bin");
            const uint32_t bad = token_bytes == 2 ? VOCAB : 0x80000005u;
            write_counting_shard(path, token_bytes, VOCAB, 0, 3 * T + 1);
            patch_file(path, (off_t)(SHARD_HEADER_BYTES + place * (uint64_t)token_bytes), &bad,
                       (size_t)token_bytes);
            DataSource s = source("s", "bad.bin", 1);
            DataLoader loader;
            int32_t row[T + 1];
            open_loader(&loader, &s, 1, 0, false);
            for (uint64_t g = 0; g < 3; g++) {
                Error err = {0};
                bool holds_it = place >= g * T && place <= g * T + T;
                assert_int_equal(dataloader_row(&loader, g, row, &err), !holds_it);
                if (!holds_it) continue;
                char says[64];
                snprintf(says, sizeof says, "bad.bin: token %llu is %u", (unsigned long long)place, bad);
                if (strstr(err.text, says) == NULL) fail_msg("%s", err.text);
                assert_int_equal(err.code, EXIT_BAD_DATA);
            }
            // and from the background thread: the rows before it, then the error, again and again
            Prefetch prefetch;
            Error err = {0};
            assert_true(prefetch_start(&prefetch, &loader, 0, 1, 1, 0, 1, 2, &err));
            for (uint64_t g = 0; place > g * T + T; g++) assert_non_null(prefetch_next(&prefetch, &err));
            assert_null(prefetch_next(&prefetch, &err));
            assert_null(prefetch_next(&prefetch, &err));
            assert_non_null(strstr(err.text, "bad.bin: token"));
            prefetch_stop(&prefetch);
            dataloader_close(&loader);
        }
}

static void write_shard_of_tokenizer(const char* name, uint64_t hash, uint32_t vocab_size, int eot) {
    ShardWriter w;
    Error err = {0};
    const uint64_t words[2] = {hash, hash};
    uint32_t tokens[2 * T] = {0};
    CHECK(shard_writer_open(&w, temp_path(name), 2, vocab_size, eot, words, &err));
    CHECK(shard_writer_tokens(&w, tokens, 2 * T, &err));
    shard_writer_end_document(&w, 100);
    CHECK(shard_writer_finish(&w, &err) && shard_publish(temp_path(name), &err));
}

static void test_open_refuses(void** state) {
    (void)state;
    write_shard_of_tokenizer("t_1.bin", 1, 1000, 0);
    write_shard_of_tokenizer("t_2.bin", 2, 1000, 0);
    write_shard_of_tokenizer("t_large.bin", 1, VOCAB + 1, 0);
    write_shard_of_tokenizer("t_eot.bin", 0, 1000, 5);
    write_counting_shard(temp_path("short.bin"), 2, VOCAB, 0, T);
    write_file(temp_path("damaged.bin"), "damaged", 7);
    const struct {
        const char *globs[2], *says;
        int code;
    } cases[] = {
        {{"nothing_*.bin", NULL}, "data source 'one': no file matches", EXIT_NO_INPUT},
        {{"t_1.bin", "damaged.bin"}, "damaged.bin is 7 bytes", EXIT_BAD_DATA},
        {{"short.bin", NULL}, "has no row of 8 + 1 tokens in its 1 shard(s) of 8 tokens", EXIT_BAD_DATA},
        {{"t_large.bin", NULL},
         "t_large.bin has a vocabulary of 50001, but the model's vocab_size is 50000",
         EXIT_BAD_DATA},
        {{"t_1.bin", "t_2.bin"}, "t_2.bin were encoded by different tokenizers", EXIT_BAD_DATA},
        {{"t_[12].bin", NULL}, "t_1.bin and", EXIT_BAD_DATA},
        {{"t_1.bin", "t_eot.bin"},
         "t_eot.bin has the end-of-text token 5, the shards before it have 0",
         EXIT_BAD_DATA},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int n = cases[i].globs[1] != NULL ? 2 : 1;
        DataSource sources[2] = {source("one", cases[i].globs[0], 1)};
        if (n == 2) sources[1] = source("two", cases[i].globs[1], 1);
        DataLoader loader;
        Error err = {0};
        assert_false(dataloader_open(&loader, sources, n, T, VOCAB, 0, true, &err));
        assert_int_equal(err.code, cases[i].code);
        if (strstr(err.text, cases[i].says) == NULL) fail_msg("case %zu: %s", i, err.text);
    }
    DataLoader loader;
    Error err = {0};
    assert_false(dataloader_open(&loader, NULL, 0, T, VOCAB, 0, true, &err));
    assert_int_equal(err.code, EXIT_CONFIG);
}

static void test_what_shards_say(void** state) {
    (void)state;
    write_shard_of_tokenizer("w_1.bin", 77, 1000, 9);
    write_shard_of_tokenizer("w_2.bin", 0, 0, -1);
    const DataSource sources[2] = {source("one", "w_1.bin", 1), source("two", "w_2.bin", 1)};
    DataLoader loader;
    open_loader(&loader, sources, 2, 0, true);
    assert_int_equal(loader.tokenizer_hash[0], 77);
    assert_int_equal(loader.eot_id, 9);
    assert_int_equal(loader.source_bytes, 200);
    char text[2000] = {0};
    FILE* out = fmemopen(text, sizeof text - 1, "w");
    dataloader_describe(&loader, out);
    fclose(out);
    assert_non_null(strstr(text, "data: 32 tokens in 2 source(s), 2 rows of 8"));
    assert_non_null(
        strstr(text, "two               50.00 % of rows, 1 shard(s), 16 tokens, 1 rows, 8 tokens left over"));
    dataloader_close(&loader);
    write_counting_shard(temp_path("w_3.bin"), 2, VOCAB, 0, 2 * T); // does not know its bytes of text
    const DataSource third[3] = {sources[0], sources[1], source("three", "w_3.bin", 1)};
    open_loader(&loader, third, 3, 0, true);
    assert_int_equal(loader.source_bytes, 0);
    dataloader_close(&loader);
}

static void test_shard_that_shrinks(void** state) {
    (void)state;
    write_counting_shard(temp_path("shrink.bin"), 2, VOCAB, 0, 100000);
    DataSource s = source("s", "shrink.bin", 1);
    DataLoader loader;
    Error err = {0};
    int32_t row[T + 1];
    open_loader(&loader, &s, 1, 0, true);
    assert_int_equal(truncate(temp_path("shrink.bin"), 1024), 0);
    assert_false(dataloader_row(&loader, 0, row, &err)); // and no SIGBUS
    assert_non_null(strstr(err.text, "shrink.bin changed from 201024 to 1024 bytes while it was in use"));
    dataloader_close(&loader);
}

// ----------------------------------------------------------------------------
// fingerprint

static uint64_t fingerprint_of(const DataSource* sources, int n, int sequence, uint64_t seed, bool shuffle) {
    DataLoader loader;
    Error err = {0};
    if (!dataloader_open(&loader, sources, n, sequence, VOCAB, seed, shuffle, &err)) fail_msg("%s", err.text);
    uint64_t fingerprint = loader.fingerprint;
    dataloader_close(&loader);
    return fingerprint;
}

static void test_fingerprint(void** state) {
    (void)state;
    write_source_a();
    write_counting_shard(temp_path("b_0.bin"), 2, VOCAB, 20000, 5000);
    DataSource sources[2] = {source("a", "a_*.bin", 3), source("b", "b_*.bin", 1)};
    uint64_t base = fingerprint_of(sources, 2, T, 1, true);
    assert_true(base != 0);
    assert_true(fingerprint_of(sources, 2, T, 1, true) == base);
    // names and places may change, and weights that are the same shares
    DataSource moved[2] = {source("x", "a_*.bin", 6), source("y", "moved_*.bin", 2)};
    assert_int_equal(rename(temp_path("b_0.bin"), temp_path("moved_0.bin")), 0);
    assert_true(fingerprint_of(moved, 2, T, 1, true) == base);
    assert_int_equal(rename(temp_path("moved_0.bin"), temp_path("b_0.bin")), 0);
    // anything that changes a row may not
    const DataSource other_weight[2] = {sources[0], source("b", "b_*.bin", 2)};
    const DataSource other_order[2] = {sources[1], sources[0]};
    const uint64_t others[] = {
        fingerprint_of(sources, 2, T + 1, 1, true),  fingerprint_of(sources, 2, T, 2, true),
        fingerprint_of(sources, 2, T, 1, false),     fingerprint_of(sources, 1, T, 1, true),
        fingerprint_of(other_weight, 2, T, 1, true), fingerprint_of(other_order, 2, T, 1, true)};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) assert_true(others[i] != base);
    // one token in the middle, written anew: the header's hash of the tokens tells
    ShardWriter w;
    Error err = {0};
    assert_true(shard_writer_open(&w, temp_path("b_0.bin"), 2, VOCAB, -1, NULL, &err));
    for (uint32_t i = 0; i < 5000; i++) {
        uint32_t token = i == 2500 ? 0 : 20000 + i;
        assert_true(shard_writer_tokens(&w, &token, 1, &err));
    }
    shard_writer_end_document(&w, 0);
    assert_true(shard_writer_finish(&w, &err) && shard_publish(temp_path("b_0.bin"), &err));
    assert_true(fingerprint_of(sources, 2, T, 1, true) != base);
    // a file of llm.c has no such hash: its first and last tokens tell
    write_sparse_shard(temp_path("b_0.bin"), 2, 5000);
    uint64_t sparse = fingerprint_of(sources, 2, T, 1, true);
    const uint16_t token = 3;
    patch_file(temp_path("b_0.bin"), SHARD_HEADER_BYTES + 2 * 4999, &token, sizeof token);
    assert_true(fingerprint_of(sources, 2, T, 1, true) != sparse);
}

// ----------------------------------------------------------------------------
// the thread

static void test_prefetch_stops_at_any_time(void** state) {
    (void)state;
    write_source_a();
    DataSource a = source("a", "a_*.bin", 1);
    DataLoader loader;
    open_loader(&loader, &a, 1, 0, true);
    for (int taken = 0; taken < 20; taken++) {
        Prefetch prefetch;
        Error err = {0};
        assert_true(prefetch_start(&prefetch, &loader, 0, 4, 4, 0, 1, 1 + taken % 3, &err));
        for (int i = 0; i < taken; i++) assert_non_null(prefetch_next(&prefetch, &err));
        prefetch_stop(&prefetch);
    }
    // a batch stays as it is while it is held, however far the thread is
    Prefetch prefetch;
    Error err = {0};
    int32_t copy[4 * (T + 1)];
    assert_true(prefetch_start(&prefetch, &loader, 0, 4, 4, 0, 1, 2, &err));
    for (int i = 0; i < 50; i++) {
        const int32_t* batch = prefetch_next(&prefetch, &err);
        memcpy(copy, batch, sizeof copy);
        usleep(200);
        assert_memory_equal(batch, copy, sizeof copy);
    }
    prefetch_stop(&prefetch);
    dataloader_close(&loader);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_permute_is_a_bijection),
        cmocka_unit_test(test_permute_shuffles),
        cmocka_unit_test(test_order_is_pinned),
        cmocka_unit_test(test_mixture_keeps_its_ratios),
        cmocka_unit_test(test_mixture_refuses_weights),
        cmocka_unit_test(test_document_starts),
        cmocka_unit_test(test_rows_of_unequal_shards),
        cmocka_unit_test(test_ranks_share_one_order),
        cmocka_unit_test(test_rows_past_2_gib),
        cmocka_unit_test(test_bad_token_is_named),
        cmocka_unit_test(test_open_refuses),
        cmocka_unit_test(test_what_shards_say),
        cmocka_unit_test(test_shard_that_shrinks),
        cmocka_unit_test(test_fingerprint),
        cmocka_unit_test(test_prefetch_stops_at_any_time),
    };
    return cmocka_run_group_tests_name("dataloader", tests, make_temp_dir, remove_temp_dir);
}
