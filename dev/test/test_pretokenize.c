// Splitting a text into pieces: the ASCII matchers are held against PCRE2, UTF-8 against its definition.
#include "dev/test/tokenizer_fixtures.h" // defines: random_below, plain, SPLIT, json_file, parse

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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ascii_matchers_agree_with_pcre2),
        cmocka_unit_test(test_skip_letters),
        cmocka_unit_test(test_invalid_utf8),
        cmocka_unit_test(test_utf8_sequence),
        cmocka_unit_test(test_foreign_pattern),
    };
    return cmocka_run_group_tests_name("pretokenize", tests, NULL, NULL);
}
