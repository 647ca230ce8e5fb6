// Tokenizers for tests: of a path, of a rank file, or of a tokenizer.json whose parts the test gives.
#pragma once
#include "llmc/rand.h"            // defines: random_bits
#include "llmc/tokenizer.h"       // defines: Tokenizer, token_bytes, tokenizer_hash
#include "llmc/tokenizer_files.h" // defines: tokenizer_load, tokenizer_parse_json
#include <setjmp.h>
#include <cmocka.h> // last: it has a macro fail()

static inline uint32_t random_below(uint64_t* counter, uint32_t n) {
    return random_bits(7, RANDOM_DATA, 0, (*counter)++).x[0] % n;
}

static inline void load(Tokenizer* t, const char* path) {
    Error err = {0};
    if (!tokenizer_load(t, path, &err)) fail_msg("%s", err.text);
}

static inline void assert_same_hash(const Tokenizer* a, const Tokenizer* b) {
    TokenizerHash x = tokenizer_hash(a), y = tokenizer_hash(b);
    assert_int_equal(x.low, y.low);
    assert_int_equal(x.high, y.high);
}

static inline void assert_other_hash(const Tokenizer* a, const Tokenizer* b) {
    TokenizerHash x = tokenizer_hash(a), y = tokenizer_hash(b);
    assert_true(x.low != y.low && x.high != y.high);
}

// ----------------------------------------------------------------------------
// files

static char temp_dir[64];

static inline const char* temp_path(const char* name) {
    static char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", temp_dir, name);
    return path;
}

static inline int make_temp_dir(void** state) {
    (void)state;
    const char* base = getenv("TMPDIR");
    snprintf(temp_dir, sizeof temp_dir, "%s/tokenizer_XXXXXX",
             base != NULL && strlen(base) < 40 ? base : "/tmp");
    return mkdtemp(temp_dir) != NULL ? 0 : -1;
}

// Fails if a test has left anything else there.
static inline int remove_temp_dir(void** state) {
    (void)state;
    static const char* const names[] = {"gpt2.json", "saved.json"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) unlink(temp_path(names[i]));
    return rmdir(temp_dir);
}

// The tokens of a file as a tiktoken rank file.
static inline String rank_file(const Tokenizer* t) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    String out = {0};
    for (uint32_t id = 0; id < t->vocab_size; id++) {
        size_t n;
        const uint8_t* p = (const uint8_t*)token_bytes(t, id, &n);
        if (t->tokens[id].kind != TOKEN_ORDINARY) continue;
        for (size_t i = 0; i < n; i += 3) {
            uint32_t bits = p[i] << 16 | (i + 1 < n ? p[i + 1] << 8 : 0) | (i + 2 < n ? p[i + 2] : 0);
            char four[4] = {digits[bits >> 18], digits[bits >> 12 & 63],
                            i + 1 < n ? digits[bits >> 6 & 63] : '=', i + 2 < n ? digits[bits & 63] : '='};
            string_append_bytes(&out, four, 4);
        }
        string_append(&out, " %u\n", id);
    }
    return out;
}

// The parts of a tokenizer.json, for tests that change one.
typedef struct {
    const char *normalizer, *pre_tokenizer, *model, *vocab, *merges, *added; // more entries, each as JSON
    int missing_byte;                                                        // -1: none
} Json;

#define BYTE_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true}"
#define SPLIT(regex)                                                                                         \
    "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex          \
    "\"},\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\",\"use_regex\":false}]}"

static const Json plain = {"null", BYTE_LEVEL, "", "", "", "", -1};

// The 256 bytes in their order, then json.vocab.
static inline String json_file(Json json) {
    ByteAlphabet alphabet;
    byte_alphabet_init(&alphabet);
    String out = {0}, spelled = {0};
    string_append(&out,
                  "{\"added_tokens\":[%s],\"normalizer\":%s,\"pre_tokenizer\":%s,\"model\":{%s\"vocab\":{",
                  json.added, json.normalizer, json.pre_tokenizer, json.model);
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        if (b == json.missing_byte) continue;
        spelled.size = 0;
        bytes_to_alphabet(&alphabet, &byte, 1, &spelled);
        if (out.data[out.size - 1] != '{') string_append(&out, ",");
        append_json_string(&out, spelled.data, spelled.size);
        string_append(&out, ":%d", b);
    }
    string_append(&out, "%s},\"merges\":[%s]}}", json.vocab, json.merges);
    free(spelled.data);
    return out;
}

static inline void parse(Tokenizer* t, Json json) {
    Error err = {0};
    String file = json_file(json);
    if (!tokenizer_parse_json(t, file.data, file.size, "test", &err)) fail_msg("%s", err.text);
    free(file.data);
}
