// A tokenizer's files, read and written: what a file means, whoever wrote it, and what is refused.
#include "dev/test/tokenizer_fixtures.h" // defines: Json, plain, json_file, parse, load, rank_file, temp_*

// ----------------------------------------------------------------------------
// what files say

// For an array of cases: the part of a Json that differs.
#define NORMALIZER offsetof(Json, normalizer)
#define PRE offsetof(Json, pre_tokenizer)
#define MODEL offsetof(Json, model)
#define VOCAB offsetof(Json, vocab)
#define MERGES offsetof(Json, merges)
#define ADDED offsetof(Json, added)

#define GPT2_REGEX                                                                                           \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\\\p{L}+| ?\\\\p{N}+| ?[^\\\\s\\\\p{L}\\\\p{N}]+|\\\\s+(?!\\\\S)|\\\\s+"

// The same tokenizer, however the file spells it; then one difference each.
static void test_hash(void** state) {
    (void)state;
    static const char eot[] = "{\"id\":300,\"content\":\"<|endoftext|>\"}",
                      abc[] = ",\"ab\":256,\"bc\":257,\"abc\":258";
    const Json base = {"null", BYTE_LEVEL, "", abc, "\"a b\",\"b c\",\"ab c\"", eot, -1};
    const struct {
        size_t part;
        const char* json;
        bool same;
    } cases[] = {
        {MERGES, "[\"a\",\"b\"],[\"b\",\"c\"],[\"ab\",\"c\"]", true},
        {MERGES, "\"a b\",\"b c\",\"ab c\",\"a bc\"",
         true}, // no text reaches the last: "ab" always comes first
        {VOCAB, ",\"abc\":258,\"<|endoftext|>\":300,\"bc\":257,\"ab\":256", true},
        {PRE, SPLIT(GPT2_REGEX), true},
        {MODEL, "\"type\":\"BPE\",\"unk_token\":null,\"dropout\":null,\"ignore_merges\":true,", true},
        {MERGES, "\"b c\",\"a b\",\"a bc\"", false},
        {VOCAB, ",\"ab\":257,\"bc\":256,\"abc\":258", false},
        {PRE, SPLIT("\\\\p{N}+|\\\\P{N}+"), false},
        {ADDED, "{\"id\":301,\"content\":\"<|endoftext|>\"}", false},
        {ADDED, "{\"id\":300,\"content\":\"<|end_of_text|>\"}", false},
        {ADDED, "", false},
    };
    Tokenizer t, other;
    parse(&t, base);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Json json = base;
        *(const char**)((char*)&json + cases[i].part) = cases[i].json;
        parse(&other, json);
        (cases[i].same ? assert_same_hash : assert_other_hash)(&t, &other);
        tokenizer_free(&other);
    }
    tokenizer_free(&t);
}

static void test_specials_and_holes(void** state) {
    (void)state;
    static const struct {
        const char* added;
        int64_t eot;
    } cases[] = {
        {"", -1},
        {"{\"id\":256,\"content\":\"<pad>\"}", -1},
        {"{\"id\":256,\"content\":\"</s>\"},{\"id\":257,\"content\":\"<|endoftext|>\"}", 257},
        {"{\"id\":256,\"content\":\"</s>\"},{\"id\":258,\"content\":\"<|end_of_text|>\"}", 258},
        {"{\"id\":256,\"content\":\"<|end_of_text|>\"},{\"id\":257,\"content\":\"<|begin_of_text|>\"}", 257},
        {"{\"id\":999,\"content\":\"</s>\"}", 999},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Tokenizer t;
        Json json = plain;
        json.added = cases[i].added;
        parse(&t, json);
        assert_int_equal(t.eot_id, cases[i].eot);
        if (t.eot_id >= 0) assert_int_equal(token_byte_length(&t, (uint32_t)t.eot_id), 0);
        assert_int_equal(token_byte_length(&t, 'x'), 1);
        tokenizer_free(&t);
    }
    Tokenizer t;
    Json json = plain;
    json.added = cases[5].added;
    json.vocab = ",\"\\u0120\\u00e9\":400"; // space, and the byte 0xE9
    parse(&t, json);
    assert_int_equal(t.vocab_size, 1000);
    size_t n;
    assert_string_equal(token_bytes(&t, 500, &n), "");
    assert_int_equal(n, 0);
    token_bytes(&t, 1000, &n);
    assert_int_equal(n, 0);
    assert_int_equal(token_byte_length(&t, 500) + token_byte_length(&t, UINT32_MAX), 0);
    assert_memory_equal(token_bytes(&t, 999, &n), "</s>", 4);
    assert_int_equal(token_byte_length(&t, 400), 2);
    assert_memory_equal(token_bytes(&t, 400, &n), " \xe9", 2);
    assert_int_equal(tokenizer_special_id(&t, "</s>"), 999);
    assert_int_equal(tokenizer_special_id(&t, "a"), -1);
    tokenizer_free(&t);
}

// What the writer writes, the reader reads: holes, quotes and control characters in specials, any pattern.
static void test_save_and_load(void** state) {
    (void)state;
    Error err = {0};
    Tokenizer t, again;
    Json json = plain;
    json.pre_tokenizer = SPLIT("\\\"|\\\\p{L}+|\\\\s|\\\\P{L}+?");
    json.model = "\"ignore_merges\":true,";
    json.vocab = ",\"\\\"\\\\\":700,\"\\u0120\\u0120\":256";
    json.merges = "\"\\u0120 \\u0120\",\"\\\" \\\\\"";
    json.added = "{\"id\":800,\"content\":\"<\\u0001\\n\\\"\\\\\\u00e9>\"}";
    parse(&t, json);
    assert_true(tokenizer_save_json(&t, temp_path("saved.json"), &err));
    assert_int_equal(access(temp_path("saved.json.tmp"), F_OK), -1);
    load(&again, temp_path("saved.json"));
    assert_same_hash(&t, &again);
    assert_true(again.ignore_merges);
    assert_int_equal(again.vocab_size, 801);
    assert_string_equal(again.pattern.regex, t.pattern.regex);
    assert_int_equal(tokenizer_special_id(&again, "<\x01\n\"\\\xc3\xa9>"), 800);
    tokenizer_free(&again);

    assert_false(tokenizer_save_json(&t, temp_path("no/such/directory.json"), &err));
    assert_int_equal(err.code, EXIT_CANNOT_WRITE);
    static const char* const bad[] = {"\xc4\xa0\xc4\xa0", "\"\\",
                                      "\xff"}; // as two tokens are spelled; no text
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        memset(&err, 0, sizeof err);
        load(&again, temp_path("saved.json"));
        assert_true(tokenizer_add(&again, 900, TOKEN_SPECIAL, bad[i], strlen(bad[i]), "test", &err));
        assert_false(tokenizer_save_json(&again, temp_path("bad.json"), &err));
        assert_int_equal(err.code, EXIT_USAGE);
        assert_int_equal(access(temp_path("bad.json"), F_OK), -1);
        tokenizer_free(&again);
    }
    tokenizer_free(&t);
}
// The known rank files by their number of ranks; here of all pairs of bytes, then triples.
static void test_known_rank_files(void** state) {
    (void)state;
    static const struct {
        uint32_t ranks, vocab_size, eot;
        const char* pattern;
    } cases[] = {{50256, 50257, 50256, "gpt2"},
                 {100256, 100277, 100257, "cl100k"},
                 {128000, 128256, 128000, "llama3"},
                 {151643, 151646, 151643, "qwen2"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Error err = {0};
        Tokenizer source, t;
        tokenizer_init(&source);
        for (uint32_t id = 0; id < cases[i].ranks; id++) {
            uint32_t n = id < 256           ? 1
                         : id < 256 + 65536 ? 2
                                            : 3,
                     of = id - (n == 1   ? 0
                                : n == 2 ? 256
                                         : 256 + 65536);
            char bytes[3] = {(char)of, (char)(of >> 8), (char)(of >> 16)};
            assert_true(tokenizer_add(&source, id, TOKEN_ORDINARY, bytes, n, "test", &err));
        }
        String file = rank_file(&source);
        assert_true(tokenizer_parse_tiktoken(&t, file.data, file.size, NULL, "test", &err));
        assert_int_equal(t.vocab_size, cases[i].vocab_size);
        assert_int_equal(t.eot_id, cases[i].eot);
        assert_int_equal(t.num_merges, cases[i].ranks - 256);
        assert_string_equal(t.pattern.regex, pattern_by_name(cases[i].pattern)->regex);
        tokenizer_free(&t);
        assert_true(tokenizer_parse_tiktoken(&t, file.data, file.size, "qwen2", "test", &err));
        assert_int_equal(t.vocab_size, cases[i].ranks); // its pattern named, it has no specials
        free(file.data);
        tokenizer_free(&t);
        tokenizer_free(&source);
    }
}
// ----------------------------------------------------------------------------
// paths

static void write_temp(const char* name, const char* data, size_t size) {
    int fd = open(temp_path(name), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    assert_true(fd >= 0 && write_all(fd, data, size));
    close(fd);
}

static void test_load_by_path(void** state) {
    (void)state;
    Error err = {0};
    Tokenizer t;
    assert_false(tokenizer_load(&t, temp_path("absent.json"), &err));
    assert_int_equal(err.code, EXIT_NO_INPUT);
    memset(&err, 0, sizeof err);
    assert_false(tokenizer_load(&t, temp_dir, &err)); // a directory with none of the known names
    assert_int_equal(err.code, EXIT_NO_INPUT);

    // GPT-2's two files, here of 256 bytes and two merges, under both pairs of names
    ByteAlphabet alphabet;
    byte_alphabet_init(&alphabet);
    String vocab = {0}, spelled = {0};
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        spelled.size = 0;
        bytes_to_alphabet(&alphabet, &byte, 1, &spelled);
        string_append(&vocab, b == 0 ? "{" : ", ");
        append_json_string(&vocab, spelled.data, spelled.size);
        string_append(&vocab, ": %d", b);
    }
    string_append(&vocab, ", \"th\": 256, \"\\u0120th\": 257, \"<|endoftext|>\": 258}");
    static const char merges[] = "#version: 0.2\nt h\n\xc4\xa0 th\n";
    static const char* const names[][2] = {{"vocab.bpe", "encoder.json"}, {"merges.txt", "vocab.json"}};
    for (int i = 0; i < 2; i++) {
        write_temp(names[i][0], merges, strlen(merges));
        memset(&err, 0, sizeof err);
        assert_false(tokenizer_load(&t, temp_dir, &err)); // the vocabulary is not beside it
        assert_int_equal(err.code, EXIT_NO_INPUT);
        write_temp(names[i][1], vocab.data, vocab.size);
        load(&t, temp_dir);
        assert_int_equal(t.vocab_size, 259);
        assert_int_equal(t.num_merges, 2);
        assert_int_equal(t.eot_id, 258);
        assert_int_equal(token_byte_length(&t, 257), 3);
        tokenizer_free(&t);
        unlink(temp_path(names[i][1]));
        unlink(temp_path(names[i][0]));
    }
    // "th" has a part in a merge, so it is no special token although no merge makes it
    memset(&err, 0, sizeof err);
    assert_true(tokenizer_parse_gpt2(&t, "\xc4\xa0 th", 5, vocab.data, vocab.size, "test", &err));
    assert_int_equal(token_byte_length(&t, 256), 2);
    assert_int_equal(token_byte_length(&t, 258), 0);
    tokenizer_free(&t);
    static const struct {
        const char *merges, *vocab, *message;
    } bad[] = {{"#version\nt h\nt h\n", NULL, "merge 1 is there twice"},
               {"#version\nth\n", NULL, "merge 0 is 'th'"},
               {"t z\n", NULL, "lacks"},
               {"t h\n", "{", "not valid JSON"},
               {"t h\n", "{}", "lacks"},
               {"", "{}", "byte 0x00"}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        const char* with = bad[i].vocab != NULL ? bad[i].vocab : vocab.data;
        memset(&err, 0, sizeof err);
        assert_false(tokenizer_parse_gpt2(&t, bad[i].merges, strlen(bad[i].merges), with, strlen(with),
                                          "bad.bpe", &err));
        if (strstr(err.text, bad[i].message) == NULL)
            fail_msg("expected '%s' in: %s", bad[i].message, err.text);
    }
    free(spelled.data);
    free(vocab.data);
}

// ----------------------------------------------------------------------------
// files that are no tokenizers

// The byte at which a reader may stop: every prefix of a file fails cleanly, none crashes.
static void test_truncated_files(void** state) {
    (void)state;
    Json json = plain;
    json.vocab = ",\"ab\":256";
    json.merges = "\"a b\"";
    String file = json_file(json);
    for (size_t n = 0; n < file.size; n++) {
        Error err = {0};
        Tokenizer t;
        char* exact = (char*)malloc_check(n); // so that a sanitizer sees a read behind the end
        memcpy(exact, file.data, n);
        assert_false(tokenizer_parse_json(&t, exact, n, "cut.json", &err));
        assert_non_null(strstr(err.text, "cut.json"));
        assert_int_equal(err.code, EXIT_BAD_DATA);
        free(exact);
    }
    free(file.data);
}

// One part of an otherwise good file, and what the error must say of it.
typedef struct {
    size_t part; // offset in Json
    const char *json, *message;
} BadPart;

#define SPLIT_BY(pattern, rest)                                                                              \
    "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":" pattern                     \
    ",\"behavior\":" rest "},{\"type\":\"ByteLevel\",\"use_regex\":false}]}"

static const BadPart bad_parts[] = {
    {NORMALIZER, "{\"type\":\"NFC\"}", "normalizer 'NFC'"},
    {PRE, "null", "pre_tokenizer"},
    {PRE, "{\"type\":\"Whitespace\"}", "pre_tokenizer"},
    {PRE, "{\"type\":\"ByteLevel\",\"add_prefix_space\":true}", "pre_tokenizer"},
    {PRE, "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}", "pre_tokenizer"},
    {PRE, "{\"type\":\"Sequence\",\"pretokenizers\":[" BYTE_LEVEL "]}", "pre_tokenizer"},
    {PRE, "{\"type\":\"Sequence\",\"pretokenizers\":[" BYTE_LEVEL "," BYTE_LEVEL "]}", "pre_tokenizer"},
    {PRE, SPLIT_BY("{\"Regex\":\"a\"}", "\"Removed\""), "pre_tokenizer"},
    {PRE, SPLIT_BY("{\"Regex\":\"a\"}", "\"Isolated\",\"invert\":true"), "pre_tokenizer"},
    {PRE, SPLIT_BY("{\"String\":\"a\"}", "\"Isolated\""), "pre_tokenizer"},
    {PRE, SPLIT("a)"), "does not compile"},
    {PRE, SPLIT("\\\\C"), "does not compile"},
    {PRE, SPLIT("a|\xe4\xbd"), "does not compile"}, // not UTF-8
    {PRE, SPLIT("a*"), "matches the empty string"},
    {PRE, SPLIT(""), "matches the empty string"},
    {PRE, SPLIT("a{1,3}+"), "'{...}+'"},
    {PRE, SPLIT("[a&&b]"), "'&&'"},
    {PRE, SPLIT("[a[b]]"), "'['"},
    {PRE, SPLIT("\\\\h+"), "'\\h'"},
    {MODEL, "\"type\":\"Unigram\",", "'Unigram'"},
    {MODEL, "\"dropout\":0.1,", "\"dropout\""},
    {MODEL, "\"byte_fallback\":true,", "\"byte_fallback\""},
    {MODEL, "\"continuing_subword_prefix\":\"##\",", "\"continuing_subword_prefix\""},
    {MODEL, "\"end_of_word_suffix\":\"</w>\",", "\"end_of_word_suffix\""},
    {VOCAB, ",\"ab\":-1", "'ab' is not a whole number"},
    {VOCAB, ",\"ab\":256.5", "'ab' is not a whole number"},
    {VOCAB, ",\"ab\":16777216", "'ab' is not a whole number"},
    {VOCAB, ",\"ab\":1e300", "'ab' is not a whole number"},
    {VOCAB, ",\"ab\":\"256\"", "'ab' is not a whole number"},
    {VOCAB, ",\"ab\":255", "two tokens have the id 255"},
    {VOCAB, ",\"a\":256", "97 and 256 have the same bytes"},
    {VOCAB, ",\"\":256", "has 0 bytes"},
    {VOCAB, ",\"\\u4f60\":256", "stands for no byte"},
    {VOCAB, ",\"\\u0144\":256", "stands for no byte"},
    {MERGES, "\"ab\"", "merge 0 is 'ab'"},
    {MERGES, "\"a b c\"", "merge 0 is 'a' + 'b c'"},
    {MERGES, "\"a c\"", "lacks"},
    {MERGES, "\"a \"", "lacks"},
    {MERGES, "[\"a\"]", "merge 0 is neither"},
    {MERGES, "[\"a\",\"b\",\"c\"]", "merge 0 is neither"},
    {MERGES, "[1,2]", "merge 0 is neither"},
    {MERGES, "7", "merge 0 is neither"},
    {MERGES, "[]", "merge 0 is neither"},
    {ADDED, "{\"content\":\"<s>\"}", "'<s>' has no id"},
    {ADDED, "{\"id\":300}", "token 300 has 0 bytes"},
    {ADDED, "{\"id\":65,\"content\":\"<s>\"}", "two tokens have the id 65"},
    {ADDED, "{\"id\":300,\"content\":\"<s>\"},{\"id\":300,\"content\":\"<t>\"}", "the id 300"},
};

static void assert_refused(Json json, const char* message) {
    Error err = {0};
    Tokenizer t;
    String file = json_file(json);
    if (tokenizer_parse_json(&t, file.data, file.size, "bad.json", &err)) fail_msg("accepted: %s", message);
    if (strstr(err.text, message) == NULL || strstr(err.text, "bad.json") == NULL)
        fail_msg("expected '%s' in: %s", message, err.text);
    assert_int_equal(err.code, EXIT_BAD_DATA);
    free(file.data);
}

static void test_bad_json(void** state) {
    (void)state;
    for (size_t i = 0; i < sizeof bad_parts / sizeof bad_parts[0]; i++) {
        Json json = plain;
        *(const char**)((char*)&json + bad_parts[i].part) = bad_parts[i].json;
        assert_refused(json, bad_parts[i].message);
    }
    Json json = plain;
    json.missing_byte = 'Q';
    assert_refused(json, "byte 0x51");
    json.missing_byte = 0;
    assert_refused(json, "byte 0x00");
    json = plain;
    json.vocab = ",\"ab\":256";
    json.merges = "\"a b\",\"a b\"";
    assert_refused(json, "merge 1 is there twice");
    static const char* const not_tokenizers[] = {"[]",
                                                 "{}",
                                                 "{\"model\":7}",
                                                 "null",
                                                 "{\"model\":{}}",
                                                 "{\"pre_tokenizer\":" BYTE_LEVEL
                                                 ",\"model\":{\"vocab\":[],\"merges\":[]}}"};
    for (size_t i = 0; i < sizeof not_tokenizers / sizeof not_tokenizers[0]; i++) {
        Error err = {0};
        Tokenizer t;
        assert_false(
            tokenizer_parse_json(&t, not_tokenizers[i], strlen(not_tokenizers[i]), "bad.json", &err));
    }
}

static void test_bad_rank_files(void** state) {
    (void)state;
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"", "0 ranks"},
        {"QQ== 0", "1 ranks"},
        {"QQ==", "line 1 is no line"},
        {"QQ== 0\nQQ=\n", "line 2 is no line"},
        {"QQ== 0\n\nQ Q 1", "line 3 is no line"},
        {"QQ== 0x", "line 1 is no line"},
        {"QQ==  0", "line 1 is no line"},
        {"Q=== 0", "line 1 is no line"},
        {"QQ=Q 0", "line 1 is no line"},
        {"QQ!! 0", "line 1 is no line"},
        {"QQ== 99999999", "out of range"},
        {"QQ== 123456789", "line 1 is no line"},
        {" 0", "has 0 bytes"},
        {"QQ== 0\nQQ== 1", "same bytes"},
        {"QQ== 0\nQg== 0", "two tokens have the id 0"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Error err = {0};
        Tokenizer t;
        assert_false(tokenizer_parse_tiktoken(&t, cases[i].text, strlen(cases[i].text), NULL, "bad", &err));
        if (strstr(err.text, cases[i].message) == NULL)
            fail_msg("expected '%s' in: %s", cases[i].message, err.text);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_hash),          cmocka_unit_test(test_specials_and_holes),
        cmocka_unit_test(test_save_and_load), cmocka_unit_test(test_known_rank_files),
        cmocka_unit_test(test_load_by_path),  cmocka_unit_test(test_truncated_files),
        cmocka_unit_test(test_bad_json),      cmocka_unit_test(test_bad_rank_files),
    };
    return cmocka_run_group_tests_name("tokenizer_files", tests, make_temp_dir, remove_temp_dir);
}
