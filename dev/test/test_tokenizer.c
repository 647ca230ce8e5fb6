// Tokenizer: splitting, merging, files and identity, held against golden ids (made by tiktoken and Hugging
// Face tokenizers, see make_tokenizer_golden.py), against PCRE2 and against a naive merge written here.
#include "llmc/rand.h"            // defines: random_bits
#include "llmc/tokenizer.h"       // defines: Tokenizer, Encoder, encode, merge_by_scan, merge_by_heap, ...
#include "llmc/tokenizer_files.h" // defines: tokenizer_load, tokenizer_parse_*
#include <setjmp.h>
#include <cmocka.h> // last: it has a macro fail()

#define RELEASE "../shared/data/gpt2"
#define SHAKESPEARE "../shared/data/text/tinyshakespeare.txt"

// ----------------------------------------------------------------------------
// helpers

static uint32_t random_below(uint64_t* counter, uint32_t n) {
    return random_bits(7, RANDOM_DATA, 0, (*counter)++).x[0] % n;
}

static void load(Tokenizer* t, const char* path) {
    Error err = {0};
    if (!tokenizer_load(t, path, &err)) fail_msg("%s", err.text);
}

// A small tokenizer of dev/test/golden.
static void load_golden(Tokenizer* t, const char* name) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "dev/test/golden/%s.json", name);
    load(t, path);
}

static void assert_decodes_to(const Tokenizer* t, const Tokens* ids, const char* text, size_t size) {
    size_t at = 0;
    for (size_t i = 0; i < ids->size; i++) {
        size_t n;
        const char* bytes = token_bytes(t, ids->data[i], &n);
        assert_true(n > 0 && n <= size - at);
        assert_memory_equal(bytes, text + at, n);
        at += n;
    }
    assert_int_equal(at, size);
}

static void assert_same_hash(const Tokenizer* a, const Tokenizer* b) {
    TokenizerHash x = tokenizer_hash(a), y = tokenizer_hash(b);
    assert_int_equal(x.low, y.low);
    assert_int_equal(x.high, y.high);
}

static void assert_other_hash(const Tokenizer* a, const Tokenizer* b) {
    TokenizerHash x = tokenizer_hash(a), y = tokenizer_hash(b);
    assert_true(x.low != y.low && x.high != y.high);
}

static char temp_dir[64];

static const char* temp_path(const char* name) {
    static char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", temp_dir, name);
    return path;
}

static void write_temp(const char* name, const char* data, size_t size) {
    int fd = open(temp_path(name), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    assert_true(fd >= 0 && write_all(fd, data, size));
    close(fd);
}

// The tokens of a file as a tiktoken rank file.
static String rank_file(const Tokenizer* t) {
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

// The parts of a tokenizer.json, for tests that need one part wrong.
typedef struct {
    const char *normalizer, *pre_tokenizer, *model, *vocab, *merges, *added; // more entries, each as JSON
    int missing_byte;                                                        // -1: none
} Json;

#define BYTE_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true}"
#define SPLIT(regex)                                                                                         \
    "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex          \
    "\"},\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\",\"use_regex\":false}]}"
#define NORMALIZER offsetof(Json, normalizer)
#define PRE offsetof(Json, pre_tokenizer)
#define MODEL offsetof(Json, model)
#define VOCAB offsetof(Json, vocab)
#define MERGES offsetof(Json, merges)
#define ADDED offsetof(Json, added)

static const Json plain = {"null", BYTE_LEVEL, "", "", "", "", -1};

// The 256 bytes in their order, then json.vocab.
static String json_file(Json json) {
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

static void parse(Tokenizer* t, Json json) {
    Error err = {0};
    String file = json_file(json);
    if (!tokenizer_parse_json(t, file.data, file.size, "test", &err)) fail_msg("%s", err.text);
    free(file.data);
}

// ----------------------------------------------------------------------------
// golden ids

static int encodes_as_golden(const Tokenizer* t, const char* key) {
    Error err = {0};
    size_t size;
    char* file = read_file("dev/test/golden/tokenizer_ids.json", 1 << 20, &size, &err);
    assert_non_null(file);
    cJSON* rows = json_parse(file, size, "golden", &err);
    assert_non_null(rows);
    Encoder e;
    encoder_init(&e, t);
    Tokens ids = {0};
    int n = 0;
    const cJSON* row;
    cJSON_ArrayForEach(row, rows) {
        const char* text = cJSON_GetObjectItem(row, "text")->valuestring;
        const cJSON* expected = cJSON_GetObjectItem(cJSON_GetObjectItem(row, "ids"), key);
        ids.size = 0;
        size_t appended = encode(&e, text, strlen(text), &ids);
        assert_int_equal(appended, ids.size);
        bool same = (int)ids.size == cJSON_GetArraySize(expected);
        const cJSON* id = expected->child;
        for (size_t i = 0; same && i < ids.size; i++, id = id->next)
            same = ids.data[i] == (uint32_t)id->valueint;
        if (!same) fail_msg("%s: other ids than the reference for '%s'", key, text);
        assert_decodes_to(t, &ids, text, strlen(text));
        n++;
    }
    free(ids.data);
    encoder_free(&e);
    cJSON_Delete(rows);
    free(file);
    return n;
}

static void test_golden_small(void** state) {
    (void)state;
    for (int i = 0; i < NUM_NAMED_PATTERNS; i++) {
        Tokenizer t;
        load_golden(&t, named_patterns[i].name);
        assert_int_equal(t.vocab_size, 640);
        assert_int_equal(t.eot_id, 639);
        assert_true(encodes_as_golden(&t, named_patterns[i].name) > 150);
        tokenizer_free(&t);
    }
}

// The rank file of the same tokens gives the same ids and the same hash.
static void test_golden_small_as_rank_file(void** state) {
    (void)state;
    for (int i = 0; i < NUM_NAMED_PATTERNS; i++) {
        Error err = {0};
        Tokenizer t, ranks;
        load_golden(&t, named_patterns[i].name);
        String file = rank_file(&t);
        assert_true(
            tokenizer_parse_tiktoken(&ranks, file.data, file.size, named_patterns[i].name, "ranks", &err));
        encodes_as_golden(&ranks, named_patterns[i].name);
        assert_true(tokenizer_add(&ranks, 639, TOKEN_SPECIAL, "<|endoftext|>", 13, "ranks", &err));
        assert_same_hash(&t, &ranks);
        free(file.data);
        tokenizer_free(&ranks);
        tokenizer_free(&t);
    }
}

static void test_gpt2_release(void** state) {
    (void)state;
    if (access(RELEASE, F_OK) != 0) {
        print_message("SKIP: " RELEASE " is not here\n");
        skip();
    }
    Error err = {0};
    Tokenizer t, again, ranks;
    load(&t, RELEASE);
    assert_int_equal(t.vocab_size, 50257);
    assert_int_equal(t.eot_id, 50256);
    encodes_as_golden(&t, "gpt2_release");
    assert_true(tokenizer_save_json(&t, temp_path("gpt2.json"), &err));
    load(&again, temp_path("gpt2.json"));
    encodes_as_golden(&again, "gpt2_release");
    assert_same_hash(&t, &again);
    String file = rank_file(&t);
    assert_true(tokenizer_parse_tiktoken(&ranks, file.data, file.size, NULL, "r50k", &err));
    encodes_as_golden(&ranks, "gpt2_release");
    assert_same_hash(&t, &ranks);
    free(file.data);
    tokenizer_free(&ranks);
    tokenizer_free(&again);
    tokenizer_free(&t);
}

// nanoGPT's data/shakespeare prints 301,966 + 36,059 tokens for this file.
static void test_gpt2_shakespeare(void** state) {
    (void)state;
    if (access(RELEASE, F_OK) != 0 || access(SHAKESPEARE, F_OK) != 0) {
        print_message("SKIP: " RELEASE " or " SHAKESPEARE " is not here\n");
        skip();
    }
    Error err = {0};
    Tokenizer t;
    load(&t, RELEASE "/vocab.bpe");
    size_t size;
    char* text = read_file(SHAKESPEARE, 1 << 30, &size, &err);
    Encoder e;
    encoder_init(&e, &t);
    Tokens ids = {0};
    assert_int_equal(encode(&e, text, size, &ids), 338025);
    assert_decodes_to(&t, &ids, text, size);
    free(text);
    free(ids.data);
    encoder_free(&e);
    tokenizer_free(&t);
}

// ----------------------------------------------------------------------------
// splitting

// What decides a split, a few bytes each: letters of contractions, digits, every kind of space, punctuation,
// and characters that only PCRE2 can judge.
static const char* const atoms[] = {"a",
                                    "s",
                                    "L",
                                    "e",
                                    "'",
                                    "1",
                                    " ",
                                    "\n",
                                    "\r",
                                    "\t",
                                    "!",
                                    "\xc3\xa9",
                                    "\xe3\x80\x80",
                                    "\xc5\xbf",
                                    "\xd9\xa3",
                                    "\xcc\x81",
                                    "\xe2\x80\x94",
                                    "\xff",
                                    "\x01",
                                    "9",
                                    "v",
                                    "T"};
enum { NUM_ATOMS = sizeof atoms / sizeof atoms[0], EXHAUSTIVE_ATOMS = 14 };

static void assert_splits_alike(Splitter* fast, Splitter* slow, const char* text, size_t size) {
    const char *a, *b;
    size_t n, m, total = 0;
    splitter_start(fast, text, size);
    splitter_start(slow, text, size);
    do {
        n = splitter_next(fast, &a);
        m = splitter_next(slow, &b);
        if (n != m)
            fail_msg("%s: ASCII matcher and PCRE2 differ at byte %zu of '%s'", fast->pattern->regex, total,
                     text);
        total += n;
    } while (n != 0);
    assert_int_equal(total, size);
}

static void test_ascii_matchers_agree_with_pcre2(void** state) {
    (void)state;
    for (int i = 0; i < NUM_NAMED_PATTERNS; i++) {
        Error err = {0};
        Pattern pattern, regex_only;
        assert_true(pattern_compile(&pattern, named_patterns[i].regex, "test", &err));
        assert_non_null(pattern.ascii);
        regex_only = pattern;
        regex_only.ascii = NULL;
        Splitter fast, slow;
        splitter_init(&fast, &pattern);
        splitter_init(&slow, &regex_only);
        char text[512];
        for (int code = 0; code < 14 * 14 * 14 * 14; code++) { // every string of four of the first 14 atoms
            text[0] = '\0';
            for (int k = 0, rest = code; k < 4; k++, rest /= EXHAUSTIVE_ATOMS)
                strcat(text, atoms[rest % EXHAUSTIVE_ATOMS]);
            assert_splits_alike(&fast, &slow, text, strlen(text));
        }
        uint64_t counter = 0;
        for (int round = 0; round < 20000; round++) {
            uint32_t length = random_below(&counter, 40), few = 1 + random_below(&counter, NUM_ATOMS);
            text[0] = '\0';
            for (uint32_t k = 0; k < length; k++)
                strcat(text, atoms[(random_below(&counter, few) + (uint32_t)round) % NUM_ATOMS]);
            assert_splits_alike(&fast, &slow, text, strlen(text));
        }
        for (int round = 0; round < 3000; round++) { // and any ASCII
            uint32_t length = random_below(&counter, sizeof text);
            for (uint32_t k = 0; k < length; k++) text[k] = (char)random_below(&counter, 128);
            assert_splits_alike(&fast, &slow, text, length);
        }
        splitter_free(&fast);
        splitter_free(&slow);
        pattern_free(&pattern);
    }
}

static void test_skip_letters(void** state) {
    (void)state;
    for (int byte = 0; byte < 256; byte++)
        for (int at = 0; at < 20; at++) {
            uint8_t text[20];
            memset(text, 'q', sizeof text);
            text[at] = (uint8_t)byte;
            bool letter = (byte >= 'a' && byte <= 'z') || (byte >= 'A' && byte <= 'Z');
            assert_int_equal(skip_letters(text, text + sizeof text) - text, letter ? 20 : at);
        }
}

// Bytes that are no UTF-8 are pieces of their own; the text around them is split as if alone.
static void test_invalid_utf8(void** state) {
    (void)state;
    static const struct {
        const char *text, *pieces; // pieces separated by '|'
    } cases[] = {
        {"ab\xff\xfe"
         "cd",
         "ab|\xff\xfe|cd"},
        {"\xe2\x82", "\xe2\x82"}, // cut off
        {"a\xe2\x82 b", "a|\xe2\x82| b"},
        {"\xc0\xaf\xed\xa0\x80\xf4\x90\x80\x80",
         "\xc0\xaf\xed\xa0\x80\xf4\x90\x80\x80"}, // overlong, surrogate, too high
        {"\xe0\x80\x80z", "\xe0\x80\x80|z"},
        {"x  \xff  y", "x|  |\xff| | y"}, // the stretch ends: both spaces are its tail
        {"\x80\xc3\xa9\x80", "\x80|\xc3\xa9|\x80"},
        {"\xf0\x9f\x98\x80\xf0\x9f\x98", "\xf0\x9f\x98\x80|\xf0\x9f\x98"},
    };
    Error err = {0};
    Pattern pattern;
    Splitter s;
    assert_true(pattern_compile(&pattern, pattern_by_name("gpt2")->regex, "test", &err));
    splitter_init(&s, &pattern);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        String got = {0};
        const char* piece;
        size_t n;
        splitter_start(&s, cases[i].text, strlen(cases[i].text));
        while ((n = splitter_next(&s, &piece)) != 0) {
            if (got.size > 0) string_append(&got, "|");
            string_append_bytes(&got, piece, n);
        }
        assert_string_equal(got.data, cases[i].pieces);
        free(got.data);
    }
    splitter_free(&s);
    pattern_free(&pattern);
}

// Well-formedness against the definition: decode, check range and shortest form.
static void test_utf8_sequence(void** state) {
    (void)state;
    uint64_t counter = 0;
    for (int round = 0; round < 2000000; round++) {
        uint8_t p[4];
        uint32_t bits = random_bits(1, RANDOM_DATA, 1, counter++).x[0];
        memcpy(p, &bits, 4);
        p[0] |= 0xC0;
        for (int i = 1; i < 4; i++) // mostly continuation bytes
            if ((bits >> i & 7) != 0) p[i] = (uint8_t)(0x80 | (p[i] & 0x3F));
        size_t n = p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : p[0] < 0xF8 ? 4 : 0;
        uint32_t c = n != 0 ? p[0] & (0x7Fu >> n) : 0;
        bool ok = n != 0;
        for (size_t i = 1; i < n; i++) ok = ok && (p[i] & 0xC0) == 0x80, c = c << 6 | (p[i] & 0x3F);
        static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
        ok = ok && c >= least[n] && c <= 0x10FFFF && !(c >= 0xD800 && c <= 0xDFFF);
        assert_int_equal(utf8_sequence(p, p + 4), ok ? n : 0);
        if (ok) assert_int_equal(utf8_sequence(p, p + n - 1), 0);
    }
}

static void test_foreign_pattern(void** state) {
    (void)state;
    Tokenizer t;
    Json json = plain;
    json.pre_tokenizer = SPLIT("[0-9]+|[a-z]+x");     // leaves text between its matches
    json.vocab = ",\"ab\":256,\"bx\":257,\"- \":258"; // "- " is no spelling: see below
    Error err = {0};
    String file = json_file(json);
    assert_false(tokenizer_parse_json(&t, file.data, file.size, "test", &err));
    assert_non_null(strstr(err.text, "'- '"));
    free(file.data);
    json.vocab = ",\"ab\":256,\"bx\":257,\"--\":258";
    json.merges = "\"b x\",\"a b\",\"- -\"";
    parse(&t, json);
    assert_null(t.pattern.ascii);
    Encoder e;
    encoder_init(&e, &t);
    Tokens ids = {0};
    static const uint32_t expected[] = {258, '1', '2', 'a', 257, 'Q', 258, 256};
    assert_int_equal(encode(&e, "--12abxQ--ab", 12, &ids), 8);
    assert_memory_equal(ids.data, expected, sizeof expected);
    free(ids.data);
    encoder_free(&e);
    tokenizer_free(&t);
}

// ----------------------------------------------------------------------------
// merging

// The definition: as long as some pair has a merge, apply the lowest rank, leftmost first.
static size_t merge_naively(const Tokenizer* t, uint32_t* ids, size_t n) {
    for (;;) {
        size_t best = SIZE_MAX;
        for (size_t i = 0; i + 1 < n; i++)
            if (pair_rank(t, ids[i], ids[i + 1]) != NO_RANK &&
                (best == SIZE_MAX ||
                 pair_rank(t, ids[i], ids[i + 1]) < pair_rank(t, ids[best], ids[best + 1])))
                best = i;
        if (best == SIZE_MAX) return n;
        ids[best] = t->merges[pair_rank(t, ids[best], ids[best + 1])].id;
        memmove(ids + best + 1, ids + best + 2, (--n - best - 1) * sizeof *ids);
    }
}

static void test_merges_agree(void** state) {
    (void)state;
    Tokenizer t;
    load_golden(&t, "gpt2");
    MergeScratch scan = {0}, heap = {0};
    merge_scratch_reserve(&scan, 300);
    merge_scratch_reserve(&heap, 300);
    uint64_t counter = 0;
    for (int round = 0; round < 20000; round++) {
        uint32_t n = 1 + random_below(&counter, round % 10 == 0 ? 300 : 30),
                 few = 1 + random_below(&counter, 26);
        uint32_t naive[300];
        for (uint32_t i = 0; i < n; i++)
            naive[i] = scan.id[i] = heap.id[i] =
                t.byte_id["etaonh isrdlua\nwycf'!  gmb"[random_below(&counter, few)] & 0xFF];
        scan.last_rank = heap.last_rank = NO_RANK;
        size_t expected = merge_naively(&t, naive, n);
        assert_int_equal(merge_by_scan(&t, &scan, n), expected);
        assert_int_equal(merge_by_heap(&t, &heap, n), expected);
        assert_memory_equal(scan.id, naive, expected * sizeof *naive);
        assert_memory_equal(heap.id, naive, expected * sizeof *naive);
        assert_int_equal(scan.last_rank, heap.last_rank);
    }
    merge_scratch_free(&scan);
    merge_scratch_free(&heap);
    tokenizer_free(&t);
}

static void test_round_trip_of_random_bytes(void** state) {
    (void)state;
    uint64_t counter = 0;
    for (int i = 0; i < NUM_NAMED_PATTERNS; i++) {
        Tokenizer t;
        load_golden(&t, named_patterns[i].name);
        Encoder e, fresh;
        encoder_init(&e, &t);
        Tokens ids = {0}, other = {0};
        char text[700];
        for (int round = 0; round < 3000; round++) {
            uint32_t n = random_below(&counter, sizeof text), range = round % 3 == 0   ? 256
                                                                      : round % 3 == 1 ? 128
                                                                                       : 8;
            for (uint32_t k = 0; k < n; k++)
                text[k] = (char)(range == 8 ? " aeth\n'."[random_below(&counter, 8)]
                                            : (char)random_below(&counter, range));
            ids.size = 0;
            encode(&e, text, n, &ids);
            assert_decodes_to(&t, &ids, text, n);
            if (round % 300 != 0) continue;
            encoder_init(&fresh, &t); // what was encoded before makes no difference
            other.size = 0;
            encode(&fresh, text, n, &other);
            assert_int_equal(ids.size, other.size);
            if (n > 0) assert_memory_equal(ids.data, other.data, ids.size * sizeof *ids.data);
            encoder_free(&fresh);
        }
        free(ids.data);
        free(other.data);
        encoder_free(&e);
        tokenizer_free(&t);
    }
}

// Texts that make a quadratic merge or a backtracking pattern hang, and one piece above MAX_PIECE.
static void test_huge_runs(void** state) {
    (void)state;
    static const char* const units[] = {
        "a", " ", "1", "\n", "!", "\xff", "\xc3\xa9", "ab", " \n", "\xe4\xbd\xa0", "\xe3\x80\x80", "'s"};
    const size_t largest = ((size_t)1 << 22) + 5;
    char* text = (char*)malloc_check(largest);
    uint64_t counter = 0;
    double start = seconds_now();
    for (int i = 0; i < NUM_NAMED_PATTERNS; i++) {
        Tokenizer t;
        load_golden(&t, named_patterns[i].name);
        Encoder e;
        encoder_init(&e, &t);
        Tokens ids = {0};
        for (size_t u = 0; u <= sizeof units / sizeof units[0]; u++) {
            const char* unit = u < sizeof units / sizeof units[0] ? units[u] : NULL; // else random bytes
            const size_t size = u < 2 ? 1 << 20 : 1 << 17;
            for (size_t k = 0; k < size; k++)
                text[k] = unit != NULL ? unit[k % strlen(unit)] : (char)random_below(&counter, 256);
            ids.size = 0;
            encode(&e, text, size, &ids);
            assert_decodes_to(&t, &ids, text, size);
            text[size - 1] = 'z';
            ids.size = 0;
            encode(&e, text, size, &ids);
            assert_decodes_to(&t, &ids, text, size);
        }
        if (i == 0) {
            memset(text, 'a', largest);
            ids.size = 0;
            encode(&e, text, largest, &ids);
            assert_decodes_to(&t, &ids, text, largest);
        }
        free(ids.data);
        encoder_free(&e);
        tokenizer_free(&t);
    }
    free(text);
    assert_true(seconds_now() - start < 60);
}

// ----------------------------------------------------------------------------
// files and identity

static void test_ignore_merges(void** state) {
    (void)state;
    // "abc" is a token that the merges never make: they begin with "bc"
    Json json = plain;
    json.vocab = ",\"ab\":256,\"bc\":257,\"abc\":258";
    json.merges = "\"b c\",\"a b\",[\"ab\",\"c\"]";
    static const struct {
        const char* model;
        uint32_t ids[2];
        size_t n;
    } cases[] = {{"\"ignore_merges\":false,", {'a', 257}, 2}, {"\"ignore_merges\":true,", {258, 0}, 1}};
    Tokenizer t[2];
    for (int i = 0; i < 2; i++) {
        json.model = cases[i].model;
        parse(&t[i], json);
        Encoder e;
        encoder_init(&e, &t[i]);
        Tokens ids = {0};
        assert_int_equal(encode(&e, "abc", 3, &ids), cases[i].n);
        assert_memory_equal(ids.data, cases[i].ids, cases[i].n * sizeof(uint32_t));
        free(ids.data);
        encoder_free(&e);
    }
    assert_other_hash(&t[0], &t[1]);
    tokenizer_free(&t[0]);
    tokenizer_free(&t[1]);
}

// In a rank file, too, a token that the merges never make is found as a whole piece.
static void test_rank_file_ignores_merges(void** state) {
    (void)state;
    Error err = {0};
    Tokenizer t, ranks;
    parse(&t, plain);
    assert_true(tokenizer_add(&t, 256, TOKEN_ORDINARY, "bc", 2, "test", &err));
    assert_true(tokenizer_add(&t, 257, TOKEN_ORDINARY, "abcd", 4, "test", &err));
    String file = rank_file(&t);
    assert_true(tokenizer_parse_tiktoken(&ranks, file.data, file.size, "gpt2", "test", &err));
    assert_int_equal(ranks.num_merges, 1);
    Encoder e;
    encoder_init(&e, &ranks);
    Tokens ids = {0};
    static const uint32_t expected[] = {257, ' ', 'a', 256, 'd'};
    assert_int_equal(encode(&e, "abcd abcd", 9, &ids), 5);
    assert_memory_equal(ids.data, expected, sizeof expected);
    free(ids.data);
    free(file.data);
    encoder_free(&e);
    tokenizer_free(&ranks);
    tokenizer_free(&t);
}

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

static int make_temp_dir(void** state) {
    (void)state;
    const char* base = getenv("TMPDIR");
    snprintf(temp_dir, sizeof temp_dir, "%s/tokenizer_XXXXXX",
             base != NULL && strlen(base) < 40 ? base : "/tmp");
    return mkdtemp(temp_dir) != NULL ? 0 : -1;
}

static int remove_temp_dir(void** state) {
    (void)state;
    static const char* const names[] = {"gpt2.json", "saved.json"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) unlink(temp_path(names[i]));
    return rmdir(temp_dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_small),
        cmocka_unit_test(test_golden_small_as_rank_file),
        cmocka_unit_test(test_gpt2_release),
        cmocka_unit_test(test_gpt2_shakespeare),
        cmocka_unit_test(test_ascii_matchers_agree_with_pcre2),
        cmocka_unit_test(test_skip_letters),
        cmocka_unit_test(test_invalid_utf8),
        cmocka_unit_test(test_utf8_sequence),
        cmocka_unit_test(test_foreign_pattern),
        cmocka_unit_test(test_merges_agree),
        cmocka_unit_test(test_round_trip_of_random_bytes),
        cmocka_unit_test(test_huge_runs),
        cmocka_unit_test(test_ignore_merges),
        cmocka_unit_test(test_rank_file_ignores_merges),
        cmocka_unit_test(test_hash),
        cmocka_unit_test(test_specials_and_holes),
        cmocka_unit_test(test_save_and_load),
        cmocka_unit_test(test_truncated_files),
        cmocka_unit_test(test_bad_json),
        cmocka_unit_test(test_bad_rank_files),
        cmocka_unit_test(test_known_rank_files),
        cmocka_unit_test(test_load_by_path),
    };
    return cmocka_run_group_tests_name("tokenizer", tests, make_temp_dir, remove_temp_dir);
}
