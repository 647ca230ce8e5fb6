// What `corpus` is made of: JSONL fields, compressed streams, documents cut out of files, foreign tokens.
#include "llmc/utils.h"        // defines: Error, EXIT_*, String, string_append_bytes
#include "dev/data/convert.h"  // defines: TokenSpan, convert_nanogpt, convert_megatron, megatron_index_parse
#include "dev/data/options.h"  // defines: edit_distance, parse_number
#include "dev/data/pipeline.h" // defines: Pipeline, pipeline_run, WorkUnit, TextReader, reader_next, ...
#include "dev/test/shard_fixtures.h" // defines: temp_path, write_file, make_temp_dir, remove_temp_dir
#include <setjmp.h>
#include <cmocka.h> // last: it has a macro fail()

// ----------------------------------------------------------------------------
// JSONL

static void test_json_fields(void** state) {
    (void)state;
    const struct {
        const char *line, *text, *problem; // one of the last two
    } cases[] = {
        {"{\"text\":\"abc\"}", "abc", NULL},
        {" { \"text\" : \"\" } \r\n", "", NULL},
        {"{\"id\":1,\"text\":\"x\",\"meta\":{\"text\":\"no\",\"a\":[1,{\"b\":[]}]}}", "x", NULL},
        {"{\"a\":[],\"b\":{},\"c\":null,\"d\":-1.5e+3,\"e\":true,\"text\":\"y\"}", "y", NULL},
        {"{\"a\":\"}\\\"]\",\"text\":\"z\"}", "z", NULL},
        {"{\"text\":\"one\",\"text\":\"two\"}", "two", NULL},
        {"{\"te\\u0078t\":\"key in escapes\"}", "key in escapes", NULL},
        {"{\"text\":\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"}", "\"\\/\b\f\n\r\t", NULL},
        {"{\"text\":\"\\u00e9\\u20AC\\ud83d\\uDE00\"}", "\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80", NULL},
        {"{\"text\":\"\\ud83d!\\ude00\\ud83d\"}", "\xEF\xBF\xBD!\xEF\xBF\xBD\xEF\xBF\xBD", NULL},
        {"{\"text\":\"\\ud83d\\u0041\"}", "\xEF\xBF\xBD\x41", NULL},
        {"{\"text\":\"\xC3\xA9 raw\"}", "\xC3\xA9 raw", NULL},
        {"", NULL, "not a JSON object"},
        {"[1]", NULL, "not a JSON object"},
        {"{}", NULL, "no such field"},
        {"{\"Text\":\"x\"}", NULL, "no such field"},
        {"{\"text\":1}", NULL, "not a string"},
        {"{\"text\":null}", NULL, "not a string"},
        {"{\"text\":\"x\"", NULL, "no ',' or '}'"},
        {"{\"text\":\"x\"} {}", NULL, "something behind the object"},
        {"{\"text\":\"x", NULL, "does not end"},
        {"{\"text\":\"x\\", NULL, "does not end"},
        {"{\"text\":\"\\q\"}", NULL, "unknown escape"},
        {"{\"text\":\"\\u12\"}", NULL, "four hexadecimal digits"},
        {"{\"text\":\"\\u12`4\"}", NULL, "four hexadecimal digits"},
        {"{\"text\":\"\\ud83d\\u12\"}", NULL, "four hexadecimal digits"},
        {"{\"text\" \"x\"}", NULL, "no ':'"},
        {"{text:\"x\"}", NULL, "a string was expected"},
        {"{\"text\":\"x\",}", NULL, "a string was expected"},
        {"{\"a\":,\"text\":\"x\"}", NULL, "a value was expected"},
        {"{\"a\":[1,2", NULL, "a value that does not end"},
        {"{\"a\":[1,2,\"text\":\"x\"}", NULL, "no ',' or '}'"},
    };
    String out = {0}, scratch = {0};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char* problem;
        size_t n = strlen(cases[i].line);
        char* exact = (char*)malloc_check(n); // without a NUL behind it, so that reading on would be seen
        memcpy(exact, cases[i].line, n);
        bool ok = json_line_field(exact, n, "text", &out, &scratch, &problem);
        if (ok != (cases[i].text != NULL)) fail_msg("%s: %s", cases[i].line, ok ? "accepted" : problem);
        if (ok && (out.size != strlen(cases[i].text) || memcmp(out.data, cases[i].text, out.size) != 0))
            fail_msg("%s: %.*s", cases[i].line, (int)out.size, out.data);
        if (!ok && strstr(problem, cases[i].problem) == NULL) fail_msg("%s: %s", cases[i].line, problem);
        free(exact);
    }
    const char* problem;
    const char nul[] = "{\"text\":\"a\\u0000b\"}";
    assert_true(json_line_field(nul, sizeof nul - 1, "text", &out, &scratch, &problem));
    assert_int_equal(out.size, 3);
    assert_memory_equal(out.data, "a\0b", 3);
    for (size_t depth = 64; depth <= 65; depth++) {
        String deep = {0};
        string_append(&deep, "{\"a\":");
        for (size_t i = 0; i < depth; i++) string_append(&deep, "[");
        for (size_t i = 0; i < depth; i++) string_append(&deep, "]");
        string_append(&deep, ",\"text\":\"x\"}");
        assert_int_equal(json_line_field(deep.data, deep.size, "text", &out, &scratch, &problem),
                         depth == 64);
        free(deep.data);
    }
    free(out.data);
    free(scratch.data);
}

// ----------------------------------------------------------------------------
// streams

static void gzip_file(const char* path, const void* bytes, size_t size) {
    gzFile f = gzopen(path, "wb");
    CHECK(f != NULL && gzwrite(f, bytes, (unsigned)size) == (int)size && gzclose(f) == Z_OK);
}

static void zstd_file(const char* path, const void* bytes, size_t size) {
    size_t capacity = ZSTD_compressBound(size);
    void* compressed = malloc_check(capacity);
    size_t n = ZSTD_compress(compressed, capacity, bytes, size, 3);
    CHECK(!ZSTD_isError(n));
    write_file(path, compressed, n);
    free(compressed);
}

// The whole stream, read n bytes at a time.
static bool slurp(const char* path, size_t n, String* out, Error* err) {
    ByteStream stream;
    size_t got = 1;
    char* buffer = (char*)malloc_check(n);
    out->size = 0;
    bool ok = byte_stream_open(&stream, path, err);
    while (ok && got > 0) {
        ok = byte_stream_read(&stream, buffer, n, &got, err);
        if (ok) string_append_bytes(out, buffer, got);
    }
    byte_stream_close(&stream);
    free(buffer);
    return ok;
}

static void test_streams(void** state) {
    (void)state;
    enum { N = 300000 };
    char* text = (char*)malloc_check(N);
    for (size_t i = 0; i < N; i++) text[i] = (char)('a' + (i * i / 7 + i) % 26);
    const char* names[] = {"s.txt", "s.txt.gz", "s.txt.zst"};
    write_file(temp_path(names[0]), text, N);
    gzip_file(temp_path(names[1]), text, N);
    zstd_file(temp_path(names[2]), text, N);
    String out = {0};
    for (size_t i = 0; i < 3; i++)
        for (size_t n = 1000; n < 2 * N; n *= 9) {
            Error err = {0};
            if (!slurp(temp_path(names[i]), n, &out, &err)) fail_msg("%s", err.text);
            assert_int_equal(out.size, N);
            assert_memory_equal(out.data, text, N);
        }
    // cut short anywhere, or damaged: never a shorter text
    for (size_t i = 1; i < 3; i++) {
        size_t size = 0;
        Error err = {0};
        char* whole = read_file(temp_path(names[i]), 1 << 20, &size, &err);
        const char* cut = temp_path(i == 1 ? "cut.txt.gz" : "cut.txt.zst");
        for (size_t n = 1; n < size; n += n < 40 || n > size - 40 ? 1 : 997) {
            memset(&err, 0, sizeof err);
            write_file(cut, whole, n);
            if (slurp(cut, 4096, &out, &err))
                fail_msg("%s cut to %zu of %zu bytes is accepted", cut, n, size);
            assert_int_equal(err.code, EXIT_BAD_DATA);
        }
        whole[size / 2] ^= 0x55;
        write_file(cut, whole, size);
        memset(&err, 0, sizeof err);
        assert_true(!slurp(cut, 4096, &out, &err) || memcmp(out.data, text, N) != 0);
        whole[size / 2] ^= 0x55;
        int fd = open(cut, O_WRONLY | O_TRUNC); // two members, one after the other, are one text
        CHECK(fd >= 0 && write_all(fd, whole, size) && write_all(fd, whole, size));
        close(fd);
        memset(&err, 0, sizeof err);
        assert_true(slurp(cut, 4096, &out, &err));
        assert_int_equal(out.size, 2 * N);
        write_file(cut, text, 1000); // not compressed at all
        assert_false(slurp(cut, 4096, &out, &err));
        free(whole);
    }
    free(out.data);
    free(text);
}

// ----------------------------------------------------------------------------
// documents

// All documents of the files in one string, "[name:number]text" each.
static void read_documents(const char* const* names, size_t count, const char* separator, size_t batch_bytes,
                           String* out) {
    StringList files = {0};
    for (size_t i = 0; i < count; i++) string_list_add(&files, temp_path(names[i]));
    TextReader reader = {.files = &files, .separator = separator, .batch_bytes = batch_bytes};
    Batch batch = {0};
    Error err = {0};
    out->size = 0;
    string_append_bytes(out, "", 0);
    do {
        if (!reader_next(&reader, &batch, &err)) fail_msg("%s", err.text);
        for (size_t i = 0; i < batch.count; i++) {
            const RawDocument* d = &batch.documents[i];
            string_append(out, "[%s:%llu]", strrchr(d->path, '/') + 1, (unsigned long long)d->number);
            string_append_bytes(out, batch.bytes.data + d->offset, d->size);
        }
    } while (batch.count > 0);
    reader_close(&reader);
    batch_free(&batch);
    string_list_free(&files);
}

static void test_documents(void** state) {
    (void)state;
    const char* names[] = {"d1.txt", "d2.txt", "d3.jsonl", "d4.txt"};
    write_file(temp_path(names[0]), "one##two####three#", 18);
    write_file(temp_path(names[1]), " \n##\t", 5);
    write_file(temp_path(names[2]), "{1}\n\n  \n{2}##{3}\n{4}", 20);
    write_file(temp_path(names[3]), "", 0);
    String out = {0};
    for (size_t batch_bytes = 1; batch_bytes < 100; batch_bytes += 7) {
        read_documents(names, 4, "##", batch_bytes, &out);
        assert_string_equal(out.data, "[d1.txt:1]one[d1.txt:2]two[d1.txt:4]three#"
                                      "[d3.jsonl:1]{1}[d3.jsonl:4]{2}##{3}[d3.jsonl:5]{4}");
        read_documents(names, 4, NULL, batch_bytes, &out);
        assert_string_equal(out.data, "[d1.txt:1]one##two####three#[d2.txt:1] \n##\t[d3.jsonl:1]{1}"
                                      "[d3.jsonl:4]{2}##{3}[d3.jsonl:5]{4}");
    }
    // a separator across the reader's chunks of 1 MiB, at every offset
    enum { CHUNK = 1 << 20 };
    char* text = (char*)malloc_check(CHUNK + 100);
    for (size_t at = CHUNK - 5; at <= CHUNK + 1; at++) {
        memset(text, 'x', CHUNK + 100);
        memcpy(text + at, "<--->", 5);
        write_file(temp_path(names[0]), text, CHUNK + 100);
        read_documents(names, 1, "<--->", CHUNK / 2, &out);
        assert_int_equal(out.size, 2 * strlen("[d1.txt:1]") + CHUNK + 95);
        assert_memory_equal(out.data + strlen("[d1.txt:1]") + at, "[d1.txt:2]x", 11);
    }
    free(text);
    free(out.data);
}

static void test_find_files(void** state) {
    (void)state;
    const char* made[] = {"tree/b.txt",       "tree/a.jsonl.gz", "tree/sub/c.txt.zst",
                          "tree/.hidden.txt", "tree/skip.md",    "tree/B.txt"};
    Error err = {0};
    assert_true(make_directories(temp_path("tree/sub"), &err) &&
                make_directories(temp_path("tree/.git"), &err));
    for (size_t i = 0; i < sizeof made / sizeof made[0]; i++) write_file(temp_path(made[i]), "x", 1);
    write_file(temp_path("tree/.git/d.txt"), "x", 1);
    assert_int_equal(symlink("..", temp_path("tree/sub/circle")), 0);
    StringList operands = {0}, files = {0};
    string_list_add(&operands, temp_path("tree"));
    string_list_add(&operands, temp_path("tree/skip.md")); // by name: whatever it is called
    if (!find_files(&operands, &files, &err)) fail_msg("%s", err.text);
    const char* expected[] = {"tree/B.txt", "tree/a.jsonl.gz", "tree/b.txt", "tree/sub/c.txt.zst",
                              "tree/skip.md"};
    assert_int_equal(files.count, 5);
    for (size_t i = 0; i < 5; i++) assert_string_equal(files.items[i], temp_path(expected[i]));
    string_list_free(&files);
    string_list_free(&operands);

    const struct {
        const char *name, *says;
    } wrong[] = {{"nowhere", "cannot read"},
                 {"tree/.git/empty", "has no .txt or .jsonl file"},
                 {"fifo", "neither a file"}};
    assert_true(make_directories(temp_path("tree/.git/empty"), &err));
    assert_int_equal(mkfifo(temp_path("fifo"), 0666), 0);
    for (size_t i = 0; i < 3; i++) {
        memset(&err, 0, sizeof err);
        string_list_add(&operands, temp_path(wrong[i].name));
        assert_false(find_files(&operands, &files, &err));
        if (strstr(err.text, wrong[i].says) == NULL) fail_msg("%s", err.text);
        string_list_free(&operands);
        string_list_free(&files);
    }
}

// ----------------------------------------------------------------------------
// the pipeline

static void free_string(void* string) { free(((String*)string)->data); }

// Upper case; a document "bad" is an error.
static bool shout_unit(void* context, int thread, const Batch* batch, WorkUnit* unit, Error* err) {
    (void)context, (void)thread;
    String* result = (String*)unit->result;
    result->size = 0;
    for (size_t i = unit->first; i < unit->first + unit->count; i++) {
        const RawDocument* d = &batch->documents[i];
        const char* text = batch->bytes.data + d->offset;
        for (size_t k = 0; k < d->size; k++) string_append(result, "%c", text[k] - 32);
        if (d->size != 3 || memcmp(text, "bad", 3) != 0) continue;
        err->code = EXIT_BAD_DATA;
        snprintf(err->text, sizeof err->text, "document %llu is bad", (unsigned long long)d->number);
        return false;
    }
    return true;
}

static bool collect_unit(void* context, const WorkUnit* unit, Error* err) {
    const String* result = (const String*)unit->result;
    (void)err;
    string_append_bytes((String*)context, result->data, result->size);
    return true;
}

static bool run_pipeline(const char* name, int threads, size_t batch_bytes, size_t unit_bytes, String* out,
                         Error* err) {
    StringList files = {0};
    string_list_add(&files, temp_path(name));
    Pipeline p = {.reader = {.files = &files, .separator = "\n", .batch_bytes = batch_bytes},
                  .unit_bytes = unit_bytes,
                  .result_bytes = sizeof(String),
                  .context = out,
                  .work = shout_unit,
                  .emit = collect_unit,
                  .free_result = free_string,
                  .threads = threads};
    out->size = 0;
    bool ok = pipeline_run(&p, err);
    string_list_free(&files);
    return ok;
}

// Neither the order nor the error depends on threads, batches or units.
static void test_pipeline(void** state) {
    (void)state;
    String lines = {0}, expected = {0}, out = {0};
    for (int i = 0; i < 3000; i++)
        for (int k = i % 37 + 1; k >= 0; k--) {
            string_append(&lines, "%c", k > 0 ? 'a' + (i + k) % 26 : '\n');
            if (k > 0) string_append(&expected, "%c", 'A' + (i + k) % 26);
        }
    write_file(temp_path("good.txt"), lines.data, lines.size);
    string_append(&lines, "bad\nbad\n");
    write_file(temp_path("bad.txt"), lines.data, lines.size);
    for (int threads = 1; threads <= 5; threads += 2)
        for (size_t batch_bytes = 10; batch_bytes < 200000; batch_bytes *= 20)
            for (size_t unit_bytes = 1; unit_bytes < 2000; unit_bytes *= 30) {
                Error err = {0};
                if (!run_pipeline("good.txt", threads, batch_bytes, unit_bytes, &out, &err))
                    fail_msg("%s", err.text);
                assert_int_equal(out.size, expected.size);
                assert_memory_equal(out.data, expected.data, out.size);
                assert_false(run_pipeline("bad.txt", threads, batch_bytes, unit_bytes, &out, &err));
                assert_string_equal(err.text, "document 3001 is bad");
            }
    Error err = {0};
    assert_false(run_pipeline("missing.txt", 2, 100, 10, &out, &err));
    assert_non_null(strstr(err.text, "cannot open"));
    free(lines.data);
    free(expected.data);
    free(out.data);
}

// ----------------------------------------------------------------------------
// conversion

// The tokens of a converted shard, as "a b c|d e" with a bar behind each document of the index.
static void print_converted(const char* path, String* out) {
    Shard shard;
    ShardIndex index = {0};
    Error err = {0};
    assert_true(shard_open(&shard, path, &err));
    bool indexed = (shard.header.flags & SHARD_HAS_INDEX) != 0;
    if (indexed) assert_true(shard_index_open(&index, &shard, &err));
    out->size = 0;
    string_append(out, "%d: ", 8 * shard.token_bytes);
    for (uint64_t i = 0, d = 0; i < shard.header.num_tokens; i++) {
        string_append(out, "%u", shard_token(&shard, i));
        bool ends = indexed && index.ends[d] == i + 1;
        string_append(out, ends ? "|" : " ");
        d += ends;
    }
    shard_index_close(&index);
    shard_close(&shard);
}

static void test_convert_nanogpt(void** state) {
    (void)state;
    const struct {
        uint16_t tokens[8];
        uint64_t count;
        int eot;
        const char* expected;
    } cases[] = {
        {{1, 2, 9, 3, 9}, 5, 9, "16: 9 1 2|9 3|"},  // nanoGPT: end of text behind
        {{1, 2, 9, 3}, 4, 9, "16: 9 1 2|9 3|"},     // cut off in the middle of a document
        {{9, 1, 2, 9, 3}, 5, 9, "16: 9 1 2|9 3|"},  // llm.c: in front
        {{9, 9, 1, 9, 9}, 5, 9, "16: 9 1|"},        // empty documents are none
        {{1, 2, 9, 3, 9}, 5, -1, "16: 1 2 9 3 9 "}, // not known: as it is
        {{0}, 0, 9, "16: "},
    };
    String out = {0};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char* path = temp_path("nano.bin");
        ShardWriter w;
        Error err = {0};
        TokenSpan all = {(const uint8_t*)cases[i].tokens, cases[i].count, TOKEN_U16};
        assert_true(shard_writer_open(&w, path, 2, 10, cases[i].eot, NULL, &err));
        assert_true(convert_nanogpt(&w, &all, cases[i].eot, &err));
        assert_true(shard_writer_finish(&w, &err) && shard_publish(path, &err));
        print_converted(path, &out);
        assert_string_equal(out.data, cases[i].expected);
    }
    free(out.data);
}

static void test_span_types(void** state) {
    (void)state;
    const uint8_t bytes[] = {0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x05, 0x80, 0, 0, 0, 0, 0, 0};
    const struct {
        int code;
        uint64_t at;
        int64_t value;
    } cases[] = {{1, 0, 0xFE},   {2, 0, -2}, {3, 0, -2},     {3, 4, -32763}, {4, 0, -2},
                 {4, 2, 0x8005}, {5, 0, -2}, {5, 1, 0x8005}, {8, 0, 0xFFFE}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        TokenSpan span = {bytes, 0, {0}};
        for (size_t k = 0; k < sizeof TOKEN_TYPES / sizeof TOKEN_TYPES[0]; k++)
            if (TOKEN_TYPES[k].code == cases[i].code) span.type = TOKEN_TYPES[k];
        assert_true(span_token(&span, cases[i].at) == cases[i].value);
    }
}

// An index of three sequences in two documents; every field can be made to lie.
typedef struct __attribute__((packed)) {
    char magic[9];
    uint64_t version;
    uint8_t code;
    uint64_t num_sequences, num_boundaries;
    int32_t lengths[3];
    int64_t offsets[3], boundaries[3];
} MegatronFile;

static MegatronFile megatron_file(void) {
    MegatronFile f = {"MMIDIDX\0", 1, 4, 3, 3, {2, 1, 3}, {0, 8, 12}, {0, 2, 3}};
    return f;
}

static void test_convert_megatron(void** state) {
    (void)state;
    const int32_t payload[] = {1, 2, 9, 3, 70000, 9};
    const struct {
        int eot;
        const char* expected;
    } cases[] = {{9, "32: 9 1 2|9 3 70000|"}, {-1, "32: 1 2 9|3 70000 9|"}};
    String out = {0};
    for (size_t i = 0; i < 2; i++) {
        const char* path = temp_path("megatron.bin");
        MegatronFile file = megatron_file();
        MegatronIndex index;
        ShardWriter w;
        Error err = {0};
        assert_true(megatron_index_parse(&index, &file, sizeof file, sizeof payload, "x.idx", &err));
        assert_true(shard_writer_open(&w, path, 4, 0, cases[i].eot, NULL, &err));
        assert_true(convert_megatron(&w, &index, payload, cases[i].eot, &err));
        assert_true(shard_writer_finish(&w, &err) && shard_publish(path, &err));
        print_converted(path, &out);
        assert_string_equal(out.data, cases[i].expected);
    }
    free(out.data);
    const int32_t negative[] = {1, 2, 9, 3, -1, 9};
    MegatronFile file = megatron_file();
    MegatronIndex index;
    ShardWriter w;
    Error err = {0};
    assert_true(megatron_index_parse(&index, &file, sizeof file, sizeof negative, "x.idx", &err));
    assert_true(shard_writer_open(&w, temp_path("megatron.bin"), 4, 0, -1, NULL, &err));
    assert_false(convert_megatron(&w, &index, negative, -1, &err));
    assert_non_null(strstr(err.text, "token 4 for"));
    assert_non_null(strstr(err.text, "is -1, which no vocabulary has"));
    shard_writer_free(&w);
}

static void test_megatron_index_lies(void** state) {
    (void)state;
    const struct {
        size_t at; // which byte of the index
        uint64_t value;
        size_t value_bytes;
        const char* says;
    } cases[] = {
        {offsetof(MegatronFile, magic), 'm', 1, "not a Megatron index"},
        {offsetof(MegatronFile, version), 2, 8, "not a Megatron index"},
        {offsetof(MegatronFile, code), 6, 1, "type code 6"},
        {offsetof(MegatronFile, code), 5, 1, "sequence 2 of 3 tokens does not lie"}, // 8 bytes each
        {offsetof(MegatronFile, num_sequences), 4, 8, "does not fit its 4 sequences"},
        {offsetof(MegatronFile, num_sequences), UINT64_MAX / 12, 8, "does not fit"},
        {offsetof(MegatronFile, num_sequences), UINT64_MAX, 8, "does not fit"},
        {offsetof(MegatronFile, num_boundaries), 2, 8, "does not fit"},
        {offsetof(MegatronFile, num_boundaries), (uint64_t)1 << 61, 8, "does not fit"},
        {offsetof(MegatronFile, lengths) + 4, UINT32_MAX, 4, "sequence 1 of -1 tokens"},
        {offsetof(MegatronFile, lengths) + 8, 4, 4, "sequence 2 of 4 tokens does not lie"},
        {offsetof(MegatronFile, offsets), 20, 8, "sequence 0 of 2 tokens does not lie"},
        {offsetof(MegatronFile, offsets), UINT64_MAX - 3, 8, "sequence 0 of 2 tokens does not lie"},
        {offsetof(MegatronFile, boundaries), 1, 8, "boundary 0 is sequence 1"},
        {offsetof(MegatronFile, boundaries) + 8, 4, 8, "boundary 1 is sequence 4"},
        {offsetof(MegatronFile, boundaries) + 16, 1, 8, "boundary 2 is sequence 1, after 2"},
        {offsetof(MegatronFile, boundaries) + 16, 2, 8, "do not end with its last sequence"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        MegatronFile file = megatron_file();
        MegatronIndex index;
        Error err = {0};
        memcpy((char*)&file + cases[i].at, &cases[i].value, cases[i].value_bytes);
        if (megatron_index_parse(&index, &file, sizeof file, 24, "x.idx", &err))
            fail_msg("case %zu is accepted", i);
        if (strstr(err.text, cases[i].says) == NULL) fail_msg("case %zu: %s", i, err.text);
    }
    MegatronFile file = megatron_file();
    for (size_t n = 0; n <= sizeof file; n++) {
        MegatronIndex index;
        Error err = {0};
        assert_int_equal(megatron_index_parse(&index, &file, n, 24, "x.idx", &err), n == sizeof file);
    }
    char with_modes[sizeof file + 3] = {0};
    memcpy(with_modes, &file, sizeof file);
    MegatronIndex index;
    Error err = {0};
    assert_true(megatron_index_parse(&index, with_modes, sizeof with_modes, 24, "x.idx", &err));
}

// ----------------------------------------------------------------------------
// options

static void test_option_values(void** state) {
    (void)state;
    assert_int_equal(edit_distance("--seed", "--seed"), 0);
    assert_int_equal(edit_distance("--sed", "--seed"), 1);
    assert_int_equal(edit_distance("kitten", "sitting"), 3);
    assert_int_equal(edit_distance("", "abc"), 3);
    uint64_t n;
    assert_true(parse_number("18446744073709551615", &n) && n == UINT64_MAX);
    const char* wrong[] = {"", "-1", "+1", " 1", "1 ", "1e6", "0x10", "18446744073709551616"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) assert_false(parse_number(wrong[i], &n));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_json_fields),
        cmocka_unit_test(test_streams),
        cmocka_unit_test(test_documents),
        cmocka_unit_test(test_find_files),
        cmocka_unit_test(test_pipeline),
        cmocka_unit_test(test_convert_nanogpt),
        cmocka_unit_test(test_span_types),
        cmocka_unit_test(test_convert_megatron),
        cmocka_unit_test(test_megatron_index_lies),
        cmocka_unit_test(test_option_values),
    };
    return cmocka_run_group_tests_name("corpus", tests, make_temp_dir, remove_temp_dir);
}
