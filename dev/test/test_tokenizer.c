// The ids of a text: held against golden ones (made by tiktoken and Hugging Face tokenizers, see
// make_tokenizer_golden.py) and against a naive merge written here. Pieces: test_pretokenize.c.
#include "dev/test/tokenizer_fixtures.h" // defines: random_below, load, rank_file, plain, parse

#define RELEASE "../shared/data/gpt2"
#define SHAKESPEARE "../shared/data/text/tinyshakespeare.txt"

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

// ----------------------------------------------------------------------------
// golden ids

static int encodes_as_golden(const Tokenizer* t, const char* key) {
    Error err = {0};
    size_t size = 0;
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
    size_t size = 0;
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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_small),
        cmocka_unit_test(test_golden_small_as_rank_file),
        cmocka_unit_test(test_gpt2_release),
        cmocka_unit_test(test_gpt2_shakespeare),
        cmocka_unit_test(test_merges_agree),
        cmocka_unit_test(test_round_trip_of_random_bytes),
        cmocka_unit_test(test_huge_runs),
        cmocka_unit_test(test_ignore_merges),
        cmocka_unit_test(test_rank_file_ignores_merges),
    };
    return cmocka_run_group_tests_name("tokenizer", tests, make_temp_dir, remove_temp_dir);
}
