// Tokenizer: splitting, merging, files, identity and training, held against golden ids (made by tiktoken and
// Hugging Face tokenizers, see make_tokenizer_golden.py), against PCRE2 and against naive algorithms written here.
#include "dev/data/bpe_train.h"   // defines: PieceCounter, piece_counter_*, bpe_train
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

// What decides a split, a few bytes each: letters of contractions, digits, every kind of space, punctuation, and
// characters that only PCRE2 can judge.
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
    const size_t size = 1 << 20, largest = ((size_t)1 << 22) + 5;
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
            const char* unit = u < sizeof units / sizeof units[0] ? units[u] : NULL;
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

// Equal for equal tokenizers, whatever the file says that changes nothing; different for different ones.
static void test_hash(void** state) {
    (void)state;
    Json json = plain;
    json.vocab = ",\"ab\":256,\"bc\":257,\"abc\":258";
    json.merges = "\"a b\",\"b c\",\"ab c\"";
    json.added = "{\"id\":300,\"content\":\"<|endoftext|>\"}";
    Tokenizer base, same, other;
    parse(&base, json);
    static const Json spellings[] = {
        // pairs as lists; a merge that no text reaches ("a" + "bc": "ab" is always made first); specials in the vocabulary
        {"null", BYTE_LEVEL, "", ",\"ab\":256,\"bc\":257,\"abc\":258",
         "[\"a\",\"b\"],[\"b\",\"c\"],[\"ab\",\"c\"]", "{\"id\":300,\"content\":\"<|endoftext|>\"}", -1},
        {"null", BYTE_LEVEL, "\"ignore_merges\":true,", ",\"ab\":256,\"bc\":257,\"abc\":258",
         "\"a b\",\"b c\",\"ab c\",\"a bc\"", "{\"id\":300,\"content\":\"<|endoftext|>\"}", -1},
        {"null",
         SPLIT(
             "'s|'t|'re|'ve|'m|'ll|'d| ?\\\\p{L}+| ?\\\\p{N}+| ?[^\\\\s\\\\p{L}\\\\p{N}]+|\\\\s+(?!\\\\S)|\\\\s+"),
         "\"type\":\"BPE\",\"unk_token\":null,\"dropout\":null,",
         ",\"abc\":258,\"<|endoftext|>\":300,\"bc\":257,\"ab\":256", "\"a b\",\"b c\",\"ab c\"",
         "{\"id\":300,\"content\":\"<|endoftext|>\"}", -1},
    };
    for (size_t i = 0; i < sizeof spellings / sizeof spellings[0]; i++) {
        parse(&same, spellings[i]);
        assert_same_hash(&base, &same);
        tokenizer_free(&same);
    }
    static const Json others[] = {
        {"null", SPLIT("\\\\p{N}+|\\\\P{N}+"), "", ",\"ab\":256,\"bc\":257,\"abc\":258",
         "\"a b\",\"b c\",\"ab c\"", "{\"id\":300,\"content\":\"<|endoftext|>\"}", -1}, // pattern
        {"null", BYTE_LEVEL, "", ",\"ab\":256,\"bc\":257,\"abc\":258", "\"b c\",\"a b\",\"a bc\"",
         "{\"id\":300,\"content\":\"<|endoftext|>\"}", -1}, // order of merges
        {"null", BYTE_LEVEL, "", ",\"ab\":257,\"bc\":256,\"abc\":258", "\"a b\",\"b c\",\"ab c\"",
         "{\"id\":300,\"content\":\"<|endoftext|>\"}", -1}, // ids
        {"null", BYTE_LEVEL, "", ",\"ab\":256,\"bc\":257,\"abc\":258", "\"a b\",\"b c\",\"ab c\"",
         "{\"id\":301,\"content\":\"<|endoftext|>\"}", -1}, // special
        {"null", BYTE_LEVEL, "", ",\"ab\":256,\"bc\":257,\"abc\":258", "\"a b\",\"b c\",\"ab c\"", "", -1},
    };
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        parse(&other, others[i]);
        assert_other_hash(&base, &other);
        tokenizer_free(&other);
    }
    tokenizer_free(&base);
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

static void test_bad_json(void** state) {
    (void)state;

    static const struct {
        Json json;
        const char* message; // what the error must say
    } cases[] = {
        {{"{\"type\":\"NFC\"}", BYTE_LEVEL, "", "", "", "", -1}, "normalizer 'NFC'"},
        {{"null", "null", "", "", "", "", -1}, "pre_tokenizer"},
        {{"null", "{\"type\":\"Whitespace\"}", "", "", "", "", -1}, "pre_tokenizer"},
        {{"null", "{\"type\":\"ByteLevel\",\"add_prefix_space\":true}", "", "", "", "", -1}, "pre_tokenizer"},
        {{"null", "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}", "", "", "", "",
          -1},
         "pre_tokenizer"},
        {{"null", "{\"type\":\"Sequence\",\"pretokenizers\":[" BYTE_LEVEL "]}", "", "", "", "", -1},
         "pre_tokenizer"},
        {{"null",
          "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"},\"behavior\":"
          "\"Removed\"},{\"type\":\"ByteLevel\",\"use_regex\":false}]}",
          "", "", "", "", -1},
         "pre_tokenizer"},
        {{"null",
          "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"a\"},\"behavior\":"
          "\"Isolated\",\"invert\":true},{\"type\":\"ByteLevel\",\"use_regex\":false}]}",
          "", "", "", "", -1},
         "pre_tokenizer"},
        {{"null",
          "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"String\":\"a\"},\"behavior\":"
          "\"Isolated\"},{\"type\":\"ByteLevel\",\"use_regex\":false}]}",
          "", "", "", "", -1},
         "pre_tokenizer"},
        {{"null", SPLIT("a)"), "", "", "", "", -1}, "does not compile"},
        {{"null", SPLIT("a*"), "", "", "", "", -1}, "matches the empty string"},
        {{"null", SPLIT(""), "", "", "", "", -1}, "matches the empty string"},
        {{"null", SPLIT("a{1,3}+"), "", "", "", "", -1}, "'{...}+'"},
        {{"null", SPLIT("[a&&b]"), "", "", "", "", -1}, "'&&'"},
        {{"null", SPLIT("[a[b]]"), "", "", "", "", -1}, "'['"},
        {{"null", SPLIT("\\\\h+"), "", "", "", "", -1}, "'\\h'"},
        {{"null", SPLIT("\\\\C"), "", "", "", "", -1}, "does not compile"},
        {{"null", BYTE_LEVEL, "\"type\":\"Unigram\",", "", "", "", -1}, "'Unigram'"},
        {{"null", BYTE_LEVEL, "\"dropout\":0.1,", "", "", "", -1}, "\"dropout\""},
        {{"null", BYTE_LEVEL, "\"byte_fallback\":true,", "", "", "", -1}, "\"byte_fallback\""},
        {{"null", BYTE_LEVEL, "\"continuing_subword_prefix\":\"##\",", "", "", "", -1},
         "\"continuing_subword_prefix\""},
        {{"null", BYTE_LEVEL, "\"end_of_word_suffix\":\"</w>\",", "", "", "", -1}, "\"end_of_word_suffix\""},
        {{"null", BYTE_LEVEL, "", "", "", "", 'Q'}, "byte 0x51"},
        {{"null", BYTE_LEVEL, "", "", "", "", 0}, "byte 0x00"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":-1", "", "", -1}, "'ab' is not a whole number"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":256.5", "", "", -1}, "'ab' is not a whole number"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":16777216", "", "", -1}, "'ab' is not a whole number"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":1e300", "", "", -1}, "'ab' is not a whole number"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":\"256\"", "", "", -1}, "'ab' is not a whole number"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":255", "", "", -1}, "two tokens have the id 255"},
        {{"null", BYTE_LEVEL, "", ",\"a\":256", "", "", -1}, "97 and 256 have the same bytes"},
        {{"null", BYTE_LEVEL, "", ",\"\":256", "", "", -1}, "has 0 bytes"},
        {{"null", BYTE_LEVEL, "", ",\"\\u4f60\":256", "", "", -1}, "stands for no byte"},
        {{"null", BYTE_LEVEL, "", ",\"\\u0144\":256", "", "", -1}, "stands for no byte"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":256", "\"ab\"", "", -1}, "merge 0 is 'ab'"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":256", "\"a b c\"", "", -1}, "merge 0 is 'a' + 'b c'"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":256", "\"a b\",\"a b\"", "", -1}, "merge 1 is there twice"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":256", "\"a c\"", "", -1}, "lacks"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":256", "\"a \"", "", -1}, "lacks"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":256", "[\"a\"]", "", -1}, "merge 0 is neither"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":256", "[\"a\",\"b\",\"c\"]", "", -1}, "merge 0 is neither"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":256", "[1,2]", "", -1}, "merge 0 is neither"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":256", "7", "", -1}, "merge 0 is neither"},
        {{"null", BYTE_LEVEL, "", ",\"ab\":256", "[]", "", -1}, "merge 0 is neither"},
        {{"null", BYTE_LEVEL, "", "", "", "{\"content\":\"<s>\"}", -1}, "'<s>' has no id"},
        {{"null", BYTE_LEVEL, "", "", "", "{\"id\":300}", -1}, "token 300 has 0 bytes"},
        {{"null", BYTE_LEVEL, "", "", "", "{\"id\":65,\"content\":\"<s>\"}", -1},
         "two tokens have the id 65"},
        {{"null", BYTE_LEVEL, "", "", "", "{\"id\":300,\"content\":\"<s>\"},{\"id\":300,\"content\":\"<t>\"}",
          -1},
         "the id 300"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Error err = {0};
        Tokenizer t;
        String file = json_file(cases[i].json);
        if (tokenizer_parse_json(&t, file.data, file.size, "bad.json", &err))
            fail_msg("accepted: %s", cases[i].message);
        if (strstr(err.text, cases[i].message) == NULL || strstr(err.text, "bad.json") == NULL)
            fail_msg("expected '%s' in: %s", cases[i].message, err.text);
        assert_int_equal(err.code, EXIT_BAD_DATA);
        free(file.data);
    }
    static const char* const not_tokenizers[] = {
        "[]", "{}", "{\"model\":7}", "{\"a\":1}", "null", "{\"model\":{\"vocab\":[],\"merges\":[]}}"};
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
// training

// The definition: split, then count all pairs of all pieces anew for each merge. O(merges * text).
static void train_naively(Tokenizer* t, const char* pattern, const char* text, size_t size,
                          uint32_t vocab_size) {
    Error err = {0};
    tokenizer_init(t);
    for (uint32_t b = 0; b < 256; b++) {
        char c = (char)b;
        assert_true(tokenizer_add(t, b, TOKEN_ORDINARY, &c, 1, "naive", &err));
    }
    assert_true(tokenizer_finish(t, pattern_by_name(pattern)->regex, "naive", &err));
    uint32_t* ids = (uint32_t*)malloc_check(size * sizeof *ids);      // all pieces, one after the other
    uint32_t* piece_of = (uint32_t*)malloc_check(size * sizeof *ids); // no pair across pieces
    Splitter s;
    splitter_init(&s, &t->pattern);
    splitter_start(&s, text, size);
    const char* piece;
    size_t n, total = 0;
    for (uint32_t p = 0; (n = splitter_next(&s, &piece)) != 0; p++)
        for (size_t i = 0; i < n; i++, total++) ids[total] = (uint8_t)piece[i], piece_of[total] = p;
    uint32_t* count = (uint32_t*)malloc_check((size_t)vocab_size * vocab_size * sizeof *count);
    while (t->vocab_size < vocab_size) {
        memset(count, 0, (size_t)vocab_size * vocab_size * sizeof *count);
        for (size_t i = 0; i + 1 < total; i++)
            if (piece_of[i] == piece_of[i + 1]) count[(size_t)ids[i] * vocab_size + ids[i + 1]]++;
        size_t best = 0; // the lowest left, then right, of the most frequent
        for (size_t pair = 0; pair < (size_t)vocab_size * vocab_size; pair++)
            if (count[pair] > count[best]) best = pair;
        if (count[best] < 2) break;
        uint32_t left = (uint32_t)(best / vocab_size), right = (uint32_t)(best % vocab_size),
                 id = t->vocab_size;
        char bytes[600];
        size_t a, b, out = 0;
        const char* part = token_bytes(t, left, &a);
        memcpy(bytes, part, a);
        part = token_bytes(t, right, &b);
        memcpy(bytes + a, part, b);
        assert_true(tokenizer_add(t, id, TOKEN_ORDINARY, bytes, a + b, "naive", &err));
        assert_true(tokenizer_add_merge(t, left, right, id));
        for (size_t i = 0; i < total; i++, out++) {
            bool merge =
                i + 1 < total && ids[i] == left && ids[i + 1] == right && piece_of[i] == piece_of[i + 1];
            ids[out] = merge ? id : ids[i];
            piece_of[out] = piece_of[i];
            if (merge) i++;
        }
        total = out;
    }
    splitter_free(&s);
    free(count);
    free(piece_of);
    free(ids);
}

// Trains on a text that is counted by several counters, each taking every n-th part.
static bool train(Tokenizer* t, const char* pattern, const char* text, size_t size, uint32_t vocab_size,
                  int counters, Error* err) {
    PieceCounter c[8];
    for (int i = 0; i < counters; i++) assert_true(piece_counter_init(&c[i], pattern, err));
    const size_t part = 1000;
    for (size_t at = 0, k = 0; at < size; at += part, k++)
        piece_counter_add_document(&c[(k * 5 + 3) % (size_t)counters], text + at,
                                   size - at < part ? size - at : part);
    for (int i = 1; i < counters; i++) piece_counter_merge(&c[0], &c[i]);
    bool ok = bpe_train(t, &c[0], vocab_size, NULL, 0, err);
    for (int i = 0; i < counters; i++) piece_counter_free(&c[i]);
    return ok;
}

// Words of few letters, so that ties, overlaps ("aaa") and merges of merges abound.
static String training_text(uint64_t seed, uint32_t letters, size_t words) {
    String text = {0};
    uint64_t counter = seed << 32;
    for (size_t w = 0; w < words; w++) {
        uint32_t length = 1 + random_below(&counter, 12);
        for (uint32_t i = 0; i < length; i++)
            string_append(&text, "%c", 'a' + random_below(&counter, letters));
        string_append(&text, "%s", &"\n  1!"[random_below(&counter, 5)]);
    }
    return text;
}

static void assert_same_merges(const Tokenizer* a, const Tokenizer* b) {
    assert_int_equal(a->num_merges, b->num_merges);
    for (uint32_t i = 0; i < a->num_merges; i++)
        if (a->merges[i].left != b->merges[i].left || a->merges[i].right != b->merges[i].right)
            fail_msg("merge %u is %u + %u, not %u + %u", i, a->merges[i].left, a->merges[i].right,
                     b->merges[i].left, b->merges[i].right);
}

static void test_training_equals_definition(void** state) {
    (void)state;
    for (uint32_t letters = 1; letters <= 26; letters = letters * 2 + 1) {
        String text = training_text(letters, letters, 150);
        Tokenizer naive, t;
        Error err = {0};
        train_naively(&naive, "gpt2", text.data, text.size < 1000 ? text.size : 1000, 400);
        if (!train(&t, "gpt2", text.data, text.size < 1000 ? text.size : 1000, naive.vocab_size, 1, &err))
            fail_msg("%s", err.text);
        assert_same_merges(&naive, &t);
        assert_same_hash(&naive, &t);
        tokenizer_free(&t);
        // one more is one too many, where the definition ran out of pairs
        if (naive.vocab_size < 400) {
            assert_false(train(&t, "gpt2", text.data, text.size < 1000 ? text.size : 1000,
                               naive.vocab_size + 1, 1, &err));
            assert_non_null(strstr(err.text, "too small"));
        }
        tokenizer_free(&naive);
        free(text.data);
    }
}

static void test_ties_go_to_the_lower_ids(void** state) {
    (void)state;
    Error err = {0};
    Tokenizer t;
    // "zb", "ad", "ac" twice each: the order must be a-c, a-d, z-b
    assert_true(train(&t, "gpt2", "zb\nad\nac\nac\nzb\nad\n", 18, 259, 1, &err));
    static const Merge expected[] = {{'a', 'c', 256}, {'a', 'd', 257}, {'z', 'b', 258}};
    assert_memory_equal(t.merges, expected, sizeof expected);
    tokenizer_free(&t);
}

static void test_training_is_the_same_for_any_threads(void** state) {
    (void)state;
    String text = training_text(99, 9, 20000);
    Tokenizer one, many;
    Error err = {0};
    assert_true(train(&one, "llama3", text.data, text.size, 1500, 1, &err));
    for (int counters = 2; counters <= 8; counters += 3) {
        assert_true(train(&many, "llama3", text.data, text.size, 1500, counters, &err));
        assert_same_hash(&one, &many);
        tokenizer_free(&many);
    }
    // a trained vocabulary encodes each of its tokens as itself
    MergeScratch scratch = {0};
    for (uint32_t id = 0; id < one.vocab_size; id++) {
        size_t n;
        const char* bytes = token_bytes(&one, id, &n);
        assert_int_equal(merge_piece(&one, &scratch, bytes, n), 1);
        assert_int_equal(scratch.id[0], id);
    }
    merge_scratch_free(&scratch);
    tokenizer_free(&one);
    free(text.data);
}

static void test_training_arguments(void** state) {
    (void)state;
    static const struct {
        uint32_t vocab_size;
        const char* specials[2];
        int num_specials;
        const char* message; // NULL: fine
    } cases[] = {
        {256, {NULL, NULL}, 0, NULL},
        {258, {"<|endoftext|>", "<|pad|>"}, 2, NULL},
        {259, {"<|endoftext|>", "<|pad|>"}, 2, NULL},
        {257, {"<|endoftext|>", "<|pad|>"}, 2, "257 is out of range"},
        {255, {NULL, NULL}, 0, "255 is out of range"},
        {(1u << 24) + 1, {NULL, NULL}, 0, "out of range"},
        {300, {"<s>", "<s>"}, 2, "too small"},
        {258, {"<s>", "<s>"}, 2, "'<s>' is given twice"},
        {257, {"", NULL}, 1, "0 bytes"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Error err = {0};
        PieceCounter c;
        Tokenizer t;
        assert_true(piece_counter_init(&c, "qwen2", &err));
        piece_counter_add_document(&c, "abab", 4);
        bool ok = bpe_train(&t, &c, cases[i].vocab_size, cases[i].specials, cases[i].num_specials, &err);
        assert_int_equal(ok, cases[i].message == NULL);
        if (!ok && strstr(err.text, cases[i].message) == NULL)
            fail_msg("expected '%s' in: %s", cases[i].message, err.text);
        if (ok) {
            assert_int_equal(t.vocab_size, cases[i].vocab_size);
            assert_int_equal(t.eot_id, cases[i].num_specials > 0 ? (int)cases[i].vocab_size - 2 : -1);
            assert_int_equal(tokenizer_special_id(&t, "<|pad|>"),
                             cases[i].num_specials > 0 ? (int)cases[i].vocab_size - 1 : -1);
            tokenizer_free(&t);
        }
        piece_counter_free(&c);
    }
    Error err = {0};
    PieceCounter c;
    assert_false(piece_counter_init(&c, "gpt3", &err));
    assert_non_null(strstr(err.text, "gpt2 cl100k llama3 qwen2"));
}

// Text without spaces, bytes that are no text: training neither hangs nor loses counts.
static void test_training_on_long_pieces(void** state) {
    (void)state;
    const size_t size = 1 << 20;
    char* text = (char*)malloc_check(size);
    uint64_t counter = 0;
    for (int kind = 0; kind < 2; kind++) {
        for (size_t i = 0; i < size; i++) text[i] = kind == 0 ? 'a' : (char)random_below(&counter, 256);
        Error err = {0};
        PieceCounter c;
        Tokenizer t;
        assert_true(piece_counter_init(&c, "gpt2", &err));
        piece_counter_add_document(&c, text, size);
        uint64_t bytes = 0;
        for (uint32_t i = 0; i < c.num_pieces; i++) bytes += c.pieces[i].count * c.pieces[i].size;
        assert_int_equal(bytes, size);
        if (!bpe_train(&t, &c, kind == 0 ? 264 : 2000, NULL, 0, &err)) fail_msg("%s", err.text);
        if (kind == 0) assert_int_equal(token_byte_length(&t, 263), 256); // aa, aaaa, ... 256 times a
        tokenizer_free(&t);
        piece_counter_free(&c);
    }
    free(text);
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
        cmocka_unit_test(test_hash),
        cmocka_unit_test(test_specials_and_holes),
        cmocka_unit_test(test_save_and_load),
        cmocka_unit_test(test_truncated_files),
        cmocka_unit_test(test_bad_json),
        cmocka_unit_test(test_bad_rank_files),
        cmocka_unit_test(test_known_rank_files),
        cmocka_unit_test(test_load_by_path),
        cmocka_unit_test(test_training_equals_definition),
        cmocka_unit_test(test_ties_go_to_the_lower_ids),
        cmocka_unit_test(test_training_is_the_same_for_any_threads),
        cmocka_unit_test(test_training_arguments),
        cmocka_unit_test(test_training_on_long_pieces),
    };
    return cmocka_run_group_tests_name("tokenizer", tests, make_temp_dir, remove_temp_dir);
}
