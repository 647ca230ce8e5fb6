// Training: held against the definition (count all pairs of the whole text anew for each merge) on texts full
// of ties, and against itself for any number of threads.
#include "dev/data/bpe_train.h"          // defines: PieceCounter, piece_counter_*, bpe_train
#include "dev/test/tokenizer_fixtures.h" // defines: random_below, assert_same_hash

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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_training_equals_definition),
        cmocka_unit_test(test_ties_go_to_the_lower_ids),
        cmocka_unit_test(test_training_is_the_same_for_any_threads),
        cmocka_unit_test(test_training_arguments),
        cmocka_unit_test(test_training_on_long_pieces),
    };
    return cmocka_run_group_tests_name("bpe_train", tests, NULL, NULL);
}
