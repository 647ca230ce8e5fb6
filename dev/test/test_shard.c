// Token shards: the layout to the byte, every header that lies, and a writer that can die at any time.
#include "dev/test/shard_fixtures.h" // defines: temp_path, write_file, patch_file, write_counting_shard, ...
#include "llmc/shard.h"              // defines: Shard, shard_*, ShardIndex, shard_index_*
#include <signal.h>
#include <sys/resource.h>
#include <setjmp.h>
#include <cmocka.h> // last: it has a macro fail()

// ----------------------------------------------------------------------------
// reading

// A shard of `size` bytes in memory whose first words are these.
typedef struct {
    const char* what;
    int32_t words[12]; // as many as are not zero
    size_t size;
    const char* says; // NULL: accepted
} HeaderCase;

static const HeaderCase HEADERS[] = {
    {"llm.c 16-bit", {20240520, 1, 3}, 1030, NULL},
    {"llm.c 32-bit", {20240801, 7, 3}, 1036, NULL},
    {"no tokens", {20240520, 1, 0}, 1024, NULL},
    {"count in 64 bits", {20240520, 1, -1, 0, 0, 0, 0, 0, 3, 0}, 1030, NULL},
    {"both counts", {20240520, 1, 3, 0, 0, 0, 0, 0, 3, 0}, 1030, NULL},
    {"everything", {20240520, 1, 3, 3, 100, 99, 1, 0, 3, 0}, 1030, NULL},
    {"whole 16-bit vocabulary", {20240520, 1, 3, 0, 65536}, 1030, NULL},
    {"nothing", {0}, 0, "shorter than the 1024-byte header"},
    {"half a header", {20240520, 1, 3}, 1023, "shorter than the 1024-byte header"},
    {"zeros", {0}, 2048, "it starts with 0 0"},
    {"llm.c evaluation file", {20240522, 1, 3}, 1030, "is not a token shard"},
    {"llm.c 16-bit magic with the 32-bit version", {20240520, 7, 3}, 1036, "is not a token shard"},
    {"llm.c 32-bit magic with the 16-bit version", {20240801, 1, 3}, 1030, "is not a token shard"},
    {"byte-swapped", {(int32_t)0x48DA3401u, 0x01000000, 3}, 1030, "is not a token shard"},
    {"one token short", {20240520, 1, 3}, 1028, "announces 3 tokens of 2 bytes"},
    {"one byte short", {20240520, 1, 3}, 1029, "announces 3 tokens of 2 bytes"},
    {"one byte over", {20240520, 1, 3}, 1031, "truncated or damaged"},
    {"16-bit payload under a 32-bit header", {20240801, 7, 3}, 1030, "announces 3 tokens of 4 bytes"},
    {"negative count", {20240520, 1, -2, 0, 0, 0, 0, 0, 3, 0}, 1030, "two token counts"},
    {"counts that differ", {20240520, 1, 3, 0, 0, 0, 0, 0, 4, 0}, 1030, "two token counts"},
    {"minus one without the other count", {20240520, 1, -1}, 1030, "announces 0 tokens"},
    {"size that overflows", {20240801, 7, -1, 0, 0, 0, 0, 0, 0, 0x40000000}, 1024, "truncated or damaged"},
    {"size that overflows to this one",
     {20240520, 1, -1, 0, 0, 0, 0, 0, 3, INT32_MIN},
     1030,
     "truncated or damaged"},
    {"unknown flag", {20240520, 1, 3, 4}, 1030, "unknown header flags 0x4"},
    {"vocabulary beyond 16 bits", {20240520, 1, 3, 0, 65537}, 1030, "does not fit 2-byte tokens"},
    {"vocabulary beyond reason", {20240801, 7, 3, 0, 1 << 25}, 1036, "does not fit 4-byte tokens"},
    {"end of text outside", {20240520, 1, 3, 2, 100, 100}, 1030, "end-of-text token 100 is outside"},
    {"negative end of text", {20240520, 1, 3, 2, 0, -1}, 1030, "end-of-text token -1 is outside"},
    {"more documents than tokens",
     {20240520, 1, 3, 0, 0, 0, 4, 0, 3, 0},
     1030,
     "announces 4 documents in 3 tokens"},
};

static void test_headers(void** state) {
    (void)state;
    for (size_t i = 0; i < sizeof HEADERS / sizeof HEADERS[0]; i++) {
        const HeaderCase* c = &HEADERS[i];
        uint8_t* bytes = (uint8_t*)calloc_check(1, c->size + sizeof c->words);
        memcpy(bytes, c->words, sizeof c->words);
        Shard shard;
        Error err = {0};
        bool ok = shard_parse(&shard, bytes, c->size, "x.bin", &err);
        if (ok != (c->says == NULL)) fail_msg("%s: %s", c->what, ok ? "accepted" : err.text);
        if (!ok && strstr(err.text, c->says) == NULL) fail_msg("%s: the message is: %s", c->what, err.text);
        if (!ok) assert_int_equal(err.code, EXIT_BAD_DATA);
        free(bytes);
    }
}

static void test_not_a_file(void** state) {
    (void)state;
    const struct {
        const char *name, *says;
        int code;
    } cases[] = {{"missing", "cannot open", EXIT_NO_INPUT},
                 {"fifo", "not a regular file", EXIT_NO_INPUT},
                 {"folder", "not a regular file", EXIT_NO_INPUT},
                 {"empty", "0 bytes", EXIT_BAD_DATA}};
    assert_int_equal(mkfifo(temp_path("fifo"), 0666), 0);
    assert_int_equal(mkdir(temp_path("folder"), 0777), 0);
    write_file(temp_path("empty"), "", 0);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Shard shard;
        Error err = {0};
        assert_false(shard_open(&shard, temp_path(cases[i].name), &err));
        assert_int_equal(err.code, cases[i].code);
        assert_non_null(strstr(err.text, cases[i].says));
        assert_null(shard.map);
    }
}

// More tokens than 31 bits count, read on both sides of 4 GiB: every offset must be 64 bits wide.
static void test_more_than_2_to_31_tokens(void** state) {
    (void)state;
    const char* path = temp_path("huge.bin");
    const uint64_t n = ((uint64_t)1 << 31) + 1000;
    const uint16_t last = 0xBEEF;
    write_sparse_shard(path, 2, n);
    patch_file(path, (off_t)(SHARD_HEADER_BYTES + 2 * (n - 1)), &last, sizeof last);
    Shard shard;
    Error err = {0};
    assert_true(shard_open(&shard, path, &err));
    assert_int_equal(shard.header.num_tokens, n);
    int32_t row[4];
    assert_int_equal(shard_copy(row, &shard, n - 4, 4), 0xBEEF);
    assert_int_equal(row[3], 0xBEEF);
    assert_int_equal(row[2], 0);
    assert_int_equal(shard_token(&shard, n - 1), 0xBEEF);
    shard_close(&shard);
    unlink(path);
}

static void test_copy_finds_the_largest(void** state) {
    (void)state;
    for (int token_bytes = 2; token_bytes <= 4; token_bytes += 2) {
        const char* path = temp_path("largest.bin");
        write_counting_shard(path, token_bytes, 60000, 0, 1000);
        Shard shard;
        Error err = {0};
        int32_t row[1000];
        assert_true(shard_open(&shard, path, &err));
        for (uint64_t n = 0; n <= 100; n++) {
            assert_int_equal(shard_copy(row, &shard, 900 - n, n), n > 0 ? 899 : 0);
            for (uint64_t i = 0; i < n; i++) assert_int_equal(row[i], 900 - n + i);
        }
        shard_close(&shard);
    }
    // the largest in each position, and an id that is negative as an int32
    for (size_t place = 0; place < 67; place++) {
        uint32_t bytes[SHARD_HEADER_BYTES / 4 + 67] = {20240801, 7, 67};
        bytes[SHARD_HEADER_BYTES / 4 + place] = 0xFFFFFFF0u;
        Shard shard;
        Error err = {0};
        int32_t row[67];
        assert_true(shard_parse(&shard, bytes, sizeof bytes, "x.bin", &err));
        assert_true(shard_copy(row, &shard, 0, 67) == 0xFFFFFFF0u);
    }
}

static void test_change_under_a_reader(void** state) {
    (void)state;
    const char* path = temp_path("changing.bin");
    write_counting_shard(path, 2, 100, 0, 10000);
    Shard shard;
    Error err = {0};
    assert_true(shard_open(&shard, path, &err));
    assert_true(shard_unchanged(&shard, &err));
    assert_int_equal(truncate(path, 2048), 0);
    assert_false(shard_unchanged(&shard, &err));
    assert_non_null(strstr(err.text, "changed from 21024 to 2048 bytes"));
    memset(&err, 0, sizeof err);
    unlink(path);
    assert_false(shard_unchanged(&shard, &err));
    assert_non_null(strstr(err.text, "went away"));
    shard_close(&shard);
}

// ----------------------------------------------------------------------------
// the index

static void test_index_lies(void** state) {
    (void)state;
    const struct {
        const char* what;
        uint64_t words[5]; // behind the magic: the count, the ends
        size_t size;
        const char* says; // NULL: accepted, for a shard of 3 documents and 10 tokens
    } cases[] = {
        {"right", {3, 4, 9, 10}, 40, NULL},
        {"one byte short", {3, 4, 9, 10}, 39, "truncated or damaged"},
        {"one byte over", {3, 4, 9, 10}, 41, "truncated or damaged"},
        {"no count", {3}, 15, "is not a document index"},
        {"another number of documents", {2, 4, 10}, 32, "has 2 documents, but its shard 3"},
        {"size that overflows", {(uint64_t)1 << 61, 4, 9, 10}, 40, "truncated or damaged"},
        {"an empty document", {3, 4, 4, 10}, 40, "document 1 ends at token 4"},
        {"an empty first document", {3, 0, 4, 10}, 40, "document 0 ends at token 0"},
        {"descending ends", {3, 4, 3, 10}, 40, "document 1 ends at token 3"},
        {"another number of tokens", {3, 4, 9, 11}, 40, "ends at token 11, but its shard at 10"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint64_t bytes[6];
        memcpy(bytes, SHARD_INDEX_MAGIC, 8);
        memcpy(bytes + 1, cases[i].words, sizeof cases[i].words);
        ShardIndex index;
        Error err = {0};
        bool ok = shard_index_parse(&index, bytes, cases[i].size, 3, 10, "x.idx", &err);
        if (ok != (cases[i].says == NULL)) fail_msg("%s: %s", cases[i].what, ok ? "accepted" : err.text);
        if (!ok && strstr(err.text, cases[i].says) == NULL) fail_msg("%s: %s", cases[i].what, err.text);
    }
    ShardIndex index;
    Error err = {0};
    assert_false(shard_index_parse(&index, "PTCIDX2\0\3\0\0\0\0\0\0\0", 16, 0, 0, "x.idx", &err));
    const char* names[][2] = {
        {"a/b.bin", "a/b.idx"}, {"b", "b.idx"}, {"b.binary", "b.binary.idx"}, {".bin", ".bin.idx"}};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char path[PATH_MAX];
        assert_true(shard_index_path(path, names[i][0], &err) || err.code != 0);
        assert_string_equal(path, names[i][1]);
    }
}

// ----------------------------------------------------------------------------
// writing

// Two documents, byte for byte.
static void test_layout(void** state) {
    (void)state;
    const uint32_t tokens[] = {9, 1, 2, 9, 3};
    const uint64_t hash[2] = {0x1122334455667788u, 0x99AABBCCDDEEFF00u};
    for (int token_bytes = 2; token_bytes <= 4; token_bytes += 2) {
        const char *path = temp_path("layout.bin"), *index_path = temp_path("layout.idx");
        ShardWriter w;
        Error err = {0};
        assert_true(shard_writer_open(&w, path, token_bytes, 10, 9, hash, &err));
        assert_true(shard_writer_tokens(&w, tokens, 3, &err));
        shard_writer_end_document(&w, 7);
        assert_true(shard_writer_tokens(&w, tokens + 3, 2, &err));
        shard_writer_end_document(&w, 4);
        shard_writer_end_document(&w, 0); // nothing in it: no document
        assert_true(shard_writer_finish(&w, &err) && shard_publish(path, &err));

        size_t size;
        uint8_t* bytes = (uint8_t*)read_file(path, 1 << 20, &size, &err);
        assert_int_equal(size, 1024 + 5 * token_bytes);
        uint32_t words[256];
        memcpy(words, bytes, sizeof words);
        const uint32_t expected[] = {token_bytes == 2 ? 20240520 : 20240801,
                                     token_bytes == 2 ? 1 : 7,
                                     5,
                                     3,
                                     10,
                                     9,
                                     2,
                                     0,
                                     5,
                                     0,
                                     0x55667788,
                                     0x11223344,
                                     0xDDEEFF00,
                                     0x99AABBCC,
                                     0,
                                     0,
                                     11,
                                     0};
        assert_memory_equal(words, expected, sizeof expected);
        XXH128_hash_t payload = XXH3_128bits(bytes + 1024, size - 1024);
        assert_memory_equal(words + 18, &payload.low64, 8);
        assert_memory_equal(words + 20, &payload.high64, 8);
        for (size_t i = 22; i < 256; i++) assert_int_equal(words[i], 0);
        for (size_t i = 0; i < 5; i++) {
            uint32_t token = 0;
            memcpy(&token, bytes + 1024 + i * (size_t)token_bytes, (size_t)token_bytes);
            assert_int_equal(token, tokens[i]);
        }
        free(bytes);

        char* index = read_file(index_path, 1 << 20, &size, &err);
        const uint64_t index_words[] = {2, 3, 5};
        assert_int_equal(size, 32);
        assert_memory_equal(index, "PTCIDX1\0", 8);
        assert_memory_equal(index + 8, index_words, sizeof index_words);
        free(index);
    }
}

// More than a buffer's worth, in pieces of all sizes: what is read back is what was written.
static void test_round_trip(void** state) {
    (void)state;
    enum { N = 700000 };
    const char* path = temp_path("round.bin");
    uint32_t* tokens = (uint32_t*)malloc_check(N * sizeof *tokens);
    for (uint32_t i = 0; i < N; i++) tokens[i] = (i * 2654435761u) >> 16;
    for (int token_bytes = 2; token_bytes <= 4; token_bytes += 2) {
        ShardWriter w;
        Error err = {0};
        assert_true(shard_writer_open(&w, path, token_bytes, 65536, -1, NULL, &err));
        uint64_t documents = 0;
        for (size_t at = 0, n = 1; at < N; at += n, n = n * 3 + 1, documents++) {
            if (n > N - at) n = N - at;
            assert_true(shard_writer_tokens(&w, tokens + at, n, &err));
            shard_writer_end_document(&w, 0);
        }
        assert_true(shard_writer_finish(&w, &err) && shard_publish(path, &err));
        Shard shard = {0};
        ShardIndex index = {0};
        assert_true(shard_open(&shard, path, &err) && shard_index_open(&index, &shard, &err));
        assert_int_equal(shard.header.num_tokens, N);
        assert_int_equal(shard.header.num_documents, documents);
        assert_int_equal(shard.eot_id, -1);
        for (uint64_t i = 0; i < N; i++) assert_int_equal(shard_token(&shard, i), tokens[i]);
        uint64_t start = 0;
        for (uint64_t i = 0, n = 1; i + 1 < documents; i++, n = n * 3 + 1) {
            assert_int_equal(index.ends[i] - start, n);
            start = index.ends[i];
        }
        shard_index_close(&index);
        shard_close(&shard);
    }
    free(tokens);
}

static void test_writer_refuses_tokens(void** state) {
    (void)state;
    const struct {
        int token_bytes;
        uint32_t vocab_size, good, bad;
    } cases[] = {{2, 100, 99, 100}, {4, 100, 99, 100}, {2, 0, 65535, 65536}, {4, 0, (1 << 24) - 1, 1 << 24}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char* path = temp_path("refused.bin");
        ShardWriter w;
        Error err = {0};
        uint32_t tokens[3] = {0, cases[i].good, cases[i].bad};
        assert_true(shard_writer_open(&w, path, cases[i].token_bytes, cases[i].vocab_size, -1, NULL, &err));
        assert_true(shard_writer_tokens(&w, tokens, 2, &err));
        assert_false(shard_writer_tokens(&w, tokens, 3, &err));
        assert_non_null(strstr(err.text, "token 4 for"));
        shard_writer_free(&w);
        shard_discard(path);
        assert_int_equal(access(temp_path("refused.bin.tmp"), F_OK), -1);
    }
}

// Until it is published nothing has the shard's name; what a killed program left behind does not survive.
static void test_names_appear_at_the_end(void** state) {
    (void)state;
    const char *path = temp_path("named.bin"), *index = temp_path("named.idx");
    ShardWriter w;
    Error err = {0};
    const uint32_t token = 5;
    write_file(temp_path("named.idx.tmp"), "stale", 5);
    write_file(index, "stale", 5);
    assert_true(shard_writer_open(&w, path, 2, 10, -1, NULL, &err));
    assert_true(shard_writer_tokens(&w, &token, 1, &err)); // no document: no index
    assert_int_equal(access(path, F_OK), -1);
    assert_true(shard_writer_finish(&w, &err));
    assert_int_equal(access(path, F_OK), -1);
    assert_true(shard_publish(path, &err));
    assert_int_equal(access(path, F_OK), 0);
    assert_int_equal(access(index, F_OK), -1);
    assert_false(shard_publish(path, &err));
    assert_non_null(strstr(err.text, "cannot rename"));
    memset(&err, 0, sizeof err);
    assert_false(shard_writer_open(&w, temp_path("no/such/folder.bin"), 2, 10, -1, NULL, &err));
    assert_int_equal(err.code, EXIT_CANNOT_WRITE);
}

// A disk that is full at any point of the writing: an error, never a shard.
static void test_full_disk(void** state) {
    (void)state;
    struct rlimit before, limit;
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before);
    const char* path = temp_path("full.bin");
    const rlim_t sizes[] = {0, 1000, 1024, 1030, 5000, 5023};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        ShardWriter w;
        Error err = {0};
        uint32_t tokens[2000] = {0};
        limit = before;
        limit.rlim_cur = sizes[i];
        setrlimit(RLIMIT_FSIZE, &limit);
        bool ok = shard_writer_open(&w, path, 2, 10, -1, NULL, &err);
        if (ok) {
            ok = shard_writer_tokens(&w, tokens, 2000, &err);
            shard_writer_end_document(&w, 0);
            ok = shard_writer_finish(&w, &err) && ok;
        }
        setrlimit(RLIMIT_FSIZE, &before);
        assert_false(ok);
        assert_int_equal(err.code, EXIT_IO);
        assert_int_equal(access(path, F_OK), -1);
        shard_discard(path);
    }
    signal(SIGXFSZ, SIG_DFL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_headers),
        cmocka_unit_test(test_not_a_file),
        cmocka_unit_test(test_more_than_2_to_31_tokens),
        cmocka_unit_test(test_copy_finds_the_largest),
        cmocka_unit_test(test_change_under_a_reader),
        cmocka_unit_test(test_index_lies),
        cmocka_unit_test(test_layout),
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_writer_refuses_tokens),
        cmocka_unit_test(test_names_appear_at_the_end),
        cmocka_unit_test(test_full_disk),
    };
    return cmocka_run_group_tests_name("shard", tests, make_temp_dir, remove_temp_dir);
}
