// Fuzzes the readers of tokenizer files and the splitter.
//
//   '{' ...          a tokenizer.json
//   '#' ...          GPT-2's merges, then from the first '{' on its vocabulary
//   'T' ...          a text: the ASCII matchers and PCRE2 must cut it alike
//   anything else    a tiktoken rank file
//
// What is accepted must encode and decode, and its tokenizer.json must read back as the same tokenizer.
#include "llmc/tokenizer_files.h" // defines: tokenizer_parse_*, tokenizer_to_json, Encoder, encode

static void split_text(const char* text, size_t size) {
    for (int i = 0; i < NUM_NAMED_PATTERNS; i++) {
        static Pattern pattern[NUM_NAMED_PATTERNS], regex_only[NUM_NAMED_PATTERNS]; // compiled once
        Error err = {0};
        if (pattern[i].code == NULL) {
            CHECK(pattern_compile(&pattern[i], named_patterns[i].regex, "named", &err));
            regex_only[i] = pattern[i];
            regex_only[i].ascii = NULL;
        }
        Splitter fast, slow;
        splitter_init(&fast, &pattern[i]);
        splitter_init(&slow, &regex_only[i]);
        splitter_start(&fast, text, size);
        splitter_start(&slow, text, size);
        const char *a, *b;
        size_t n, total = 0;
        do {
            n = splitter_next(&fast, &a);
            CHECK(n == splitter_next(&slow, &b) && a == b);
            total += n;
        } while (n != 0);
        CHECK(total == size);
        splitter_free(&fast);
        splitter_free(&slow);
    }
}

static void round_trip(const Tokenizer* t, const char* text, size_t size) {
    Encoder e;
    Tokens ids = {0};
    encoder_init(&e, t);
    encode(&e, text, size, &ids);
    size_t at = 0, n;
    for (size_t i = 0; i < ids.size; i++, at += n) {
        const char* bytes = token_bytes(t, ids.data[i], &n);
        CHECK(n > 0 && n <= size - at && memcmp(bytes, text + at, n) == 0);
    }
    CHECK(at == size);
    free(ids.data);
    encoder_free(&e);
}

static void write_and_read(const Tokenizer* t) {
    Error err = {0};
    String json = {0};
    Tokenizer again;
    if (!check_specials(t, &err)) return;
    tokenizer_to_json(t, &json);
    CHECK(tokenizer_parse_json(&again, json.data, json.size, "written", &err));
    TokenizerHash a = tokenizer_hash(t), b = tokenizer_hash(&again);
    CHECK(a.low == b.low && a.high == b.high);
    tokenizer_free(&again);
    free(json.data);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const char* bytes = (const char*)data;
    if (size > 0 && bytes[0] == 'T') {
        split_text(bytes + 1, size - 1);
        return 0;
    }
    Error err = {0};
    Tokenizer t;
    bool ok;
    const char* vocab = size > 0 ? (const char*)memchr(bytes, '{', size) : NULL;
    if (vocab == bytes && vocab != NULL)
        ok = tokenizer_parse_json(&t, bytes, size, "input", &err);
    else if (size > 0 && bytes[0] == '#' && vocab != NULL) {
        size_t merges_size = (size_t)(vocab - bytes);
        ok = tokenizer_parse_gpt2(&t, bytes, merges_size, vocab, size - merges_size, "input", &err);
    } else
        ok = tokenizer_parse_tiktoken(&t, bytes, size, "llama3", "input", &err);
    CHECK(ok == (err.code == 0));
    if (!ok) return 0;
    if (t.pattern.ascii != NULL) round_trip(&t, bytes, size); // an unknown regex may backtrack for ever
    write_and_read(&t);
    tokenizer_free(&t);
    return 0;
}
