// Which run a directory is of, and which rank does not see it. Of real ranks: e2e_run_dir.sh.
#define _GNU_SOURCE 1
#include "llmc/run_identity.h" // defines: run_identity_begin, run_identity_parse, run_identity_judge, odd_rank
#include "dev/test/shard_fixtures.h" // defines: temp_dir, temp_path, make_temp_dir, remove_temp_dir
#include <setjmp.h>
#include <cmocka.h> // last: it has a macro fail()

static RunIdentity begin(const char* dir) {
    RunIdentity identity;
    Error err = {0, {0}};
    if (!run_identity_begin(&identity, dir, &err)) fail_msg("%s", err.text);
    assert_int_equal(strlen(identity.id) + strlen(identity.past) + strlen(identity.start), 3 * ID_DIGITS);
    return identity;
}

// A directory keeps its id and its past from start to start; one that was moved is another run's.
static void keeps_its_id(void** state) {
    (void)state;
    char moved[PATH_MAX];
    Control one = {.size = 1};
    Error err = {0, {0}};
    RunIdentity a = begin(temp_dir), b = begin(temp_dir);
    assert_true(!a.known && !a.foreign && b.known && !b.foreign);
    assert_string_equal(a.id, b.id);
    assert_string_equal(a.past, b.past);
    assert_string_not_equal(a.start, b.start);
    assert_true(run_identity_new_past(&b, &one, &err));
    assert_string_not_equal(a.past, b.past);
    RunIdentity c = begin(temp_dir);
    assert_string_equal(b.past, c.past);
    assert_string_equal(a.id, c.id);
    snprintf(moved, sizeof moved, "%s/moved", temp_dir);
    assert_int_equal(mkdir(moved, 0777), 0);
    assert_int_equal(rename(temp_path("run_id"), temp_path("moved/run_id")), 0);
    RunIdentity d = begin(moved);
    assert_true(d.foreign && !d.known);
    assert_string_not_equal(c.id, d.id);
    assert_string_not_equal(c.past, d.past);
}

// What ranks see, a letter each: r the run, . nothing, o another run, s the same run at an earlier start.
static void odd_one_out(void** state) {
    (void)state;
    static const struct {
        const char* seen;
        bool known;
        int odd;
        bool bad;
    } cases[] = {
        {"r", false, -1, false},    {"rrrr", true, -1, false},  {"rr.r", false, 2, true},
        {"rrr.", true, 3, true},    {"r.", true, 1, true},      {"r.", false, 1, false},
        {"rr..", true, 2, true},    {"rr..", false, 2, false},  {"r...", true, 1, false},
        {"r...", false, 1, false},  {"rooo", false, 0, true},   {"rooo", true, 0, true},
        {"ro", false, 0, true},     {"ro", true, 1, false},     {"r.ooo", false, 0, true},
        {"rsss", true, 1, false},   {"rrsr", true, 2, true},    {"rrro", false, 3, true},
        {"r.o..", false, 1, false}, {"rr.oo", false, 2, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        RankView views[8];
        RunIdentity identity;
        Error err = {0, {0}};
        char bad_node[64] = "", rank[32], node[64];
        int size = (int)strlen(cases[i].seen);
        bool bad;
        memset(views, 0, sizeof views), memset(&identity, 0, sizeof identity);
        for (int r = 0; r < size; r++) {
            char seen = cases[i].seen[r], text[RUN_ID_TEXT];
            memset(identity.id, seen == 'o' ? 'b' : 'a', ID_DIGITS);
            memset(identity.past, 'c', ID_DIGITS), memset(identity.start, seen == 's' ? 'd' : 'e', ID_DIGITS);
            run_identity_text(&identity, text);
            if (seen != '.') memcpy(views[r].ids, text, sizeof views[r].ids - 1);
            snprintf(views[r].node, sizeof views[r].node, "n%d", r);
        }
        memset(identity.id, 'a', ID_DIGITS), identity.known = cases[i].known;
        if (odd_rank(views, size, cases[i].known, &bad) != cases[i].odd || bad != cases[i].bad)
            fail_msg("%s: rank %d", cases[i].seen, odd_rank(views, size, cases[i].known, &bad));
        assert_int_equal(run_identity_judge(&identity, views, size, bad_node, &err), cases[i].odd < 0);
        snprintf(node, sizeof node, "n%d", cases[i].odd);
        snprintf(rank, sizeof rank, "rank %d: on its node, n%d, ", cases[i].odd, cases[i].odd);
        assert_string_equal(bad_node, cases[i].bad ? node : "");
        if (cases[i].odd >= 0) assert_memory_equal(err.text, rank, strlen(rank));
        // a run that is new, on a path that nobody else has: another start does not help
        assert_int_equal(err.code, cases[i].odd < 0 ? 0 : bad || cases[i].known ? EXIT_IO : EXIT_NO_INPUT);
    }
}

static void texts(void** state) {
    (void)state;
    RunIdentity a = begin(temp_dir), b;
    char text[RUN_ID_TEXT];
    run_identity_text(&a, text);
    assert_true(run_identity_parse(&b, text));
    assert_string_equal(a.past, b.past);
    for (int i = 0; i < RUN_ID_IDS; i++) { // a byte that is wrong, or the end
        char was = text[i];
        text[i] = 'x';
        assert_false(run_identity_parse(&b, text));
        text[i] = '\0';
        assert_false(run_identity_parse(&b, text));
        text[i] = was;
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(keeps_its_id, make_temp_dir, remove_temp_dir),
        cmocka_unit_test(odd_one_out),
        cmocka_unit_test_setup_teardown(texts, make_temp_dir, remove_temp_dir),
    };
    return cmocka_run_group_tests_name("run_identity", tests, NULL, NULL);
}
