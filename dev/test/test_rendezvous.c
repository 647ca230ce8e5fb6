// How the processes of a run find each other and talk: forked processes as ranks on 127.0.0.1, with strangers
// among them.
#include "llmc/rendezvous.h" // defines: control_*
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
static bool set_error(Error* err, int code, const char* text) { return fail(err, code, "%s", text); }
// cmocka's macro fail() would hide ours, so its header comes last
#include <setjmp.h>
#include <cmocka.h>

#include "dev/test/environment.h" // defines: clear_environment

// ----------------------------------------------------------------------------
// ranks as processes; what they found comes back through memory that all share

enum { PROCESSES = 16 };
typedef struct {
    bool done, ok;
    double seconds;
    Error err;
    char text[64];
} Result;
static Result* results; // (PROCESSES)
static pid_t children[PROCESSES];
static int num_children, port;

typedef struct {
    int rank, size;
    double delay, timeout;
    const char* job;
    bool (*body)(Control* c, Result* r, Error* err);
    const char* secret;
} Rank;

static void start(const Rank* rank) {
    int i = num_children++;
    assert_true(i < PROCESSES);
    fflush(stdout);
    children[i] = fork();
    assert_true(children[i] >= 0);
    if (children[i] > 0) return;
    Result* r = &results[i];
    Launch l = {rank->rank, rank->size, rank->rank, rank->size, "127.0.0.1", port, true};
    Control c;
    alarm(20);
    if (rank->secret != NULL) setenv("PRETRAIN_SECRET", rank->secret, 1);
    usleep((useconds_t)(rank->delay * 1e6));
    double begin = seconds_now();
    r->ok = control_open(&c, &l, rank->job, rank->timeout, &r->err);
    r->seconds = seconds_now() - begin;
    if (r->ok && rank->body != NULL) r->ok = rank->body(&c, r, &r->err);
    control_close(&c);
    r->done = true;
    _exit(0);
}

static void wait_for_all(void) {
    for (int i = 0; i < num_children; i++) waitpid(children[i], NULL, 0);
}

static void expect_met(int from, int to) {
    for (int i = from; i < to; i++)
        if (!results[i].done || !results[i].ok) fail_msg("process %d: %s", i, results[i].err.text);
}

static void expect_error(int i, int code, const char* wanted) {
    const Result* r = &results[i];
    if (!r->done || r->ok) fail_msg("process %d: no error, but it is about \"%s\"", i, wanted);
    if (strstr(r->err.text, wanted) == NULL) fail_msg("process %d: no \"%s\" in: %s", i, wanted, r->err.text);
    assert_int_equal(r->err.code, code);
}

static int setup(void** state) {
    (void)state;
    static int tests = 0;
    memset(results, 0, PROCESSES * sizeof *results);
    num_children = 0;
    port = 11000 + (getpid() % 600) * 32 + (tests++ % 2) * 16; // below the ports of outgoing connections
    clear_environment();
    return 0;
}

// Every rank learns what rank 0 sends, and rank 0 the sum of ranks.
static bool talk(Control* c, Result* r, Error* err) {
    int all[PROCESSES] = {0}, sum = 0;
    char text[64] = "";
    if (c->rank == 0) snprintf(text, sizeof text, "hello of %d", getpid());
    if (!control_gather(c, &c->rank, sizeof c->rank, all, err) ||
        !control_broadcast(c, text, sizeof text, err))
        return false;
    for (int i = 0; i < c->size; i++) sum += all[i];
    if (c->rank == 0 && sum != c->size * (c->size - 1) / 2)
        return set_error(err, EXIT_INTERNAL, "a wrong sum");
    memcpy(r->text, text, sizeof text);
    return true;
}

static void one_rank_needs_no_socket(void** state) {
    (void)state;
    Launch l = {0, 1, 0, 1, "no.such.host.example", -5, false};
    Control c;
    Error err = {0, {0}};
    int mine = 7, all = 0;
    String text = {NULL, 0, 0};
    assert_true(control_open(&c, &l, "job", 1, &err));
    assert_null(c.sockets);
    assert_true(control_gather(&c, &mine, sizeof mine, &all, &err) && all == 7);
    assert_true(control_broadcast(&c, &mine, sizeof mine, &err));
    assert_true(control_gather_text(&c, "abc", &text, &err) && control_gather_text(&c, "def", &text, &err));
    assert_string_equal(text.data, "abcdef");
    assert_true(control_agree(&c, &err));
    set_error(&err, EXIT_IO, "mine");
    assert_false(control_agree(&c, &err));
    assert_string_equal(err.text, "mine");
    control_close(&c);
    free(text.data);
}

static void eight_ranks_meet_with_a_late_first(void** state) {
    (void)state;
    for (int r = 0; r < 8; r++) {
        Rank rank = {r, 8, r == 0 ? 0.3 : 0, 5, "job", talk, NULL};
        start(&rank);
    }
    wait_for_all();
    expect_met(0, 8);
    for (int r = 0; r < 8; r++) {
        assert_string_equal(results[r].text, results[0].text);
        assert_true(results[r].seconds < 1.5);
    }
}

static void missing_ranks_are_named(void** state) {
    (void)state;
    const int there[] = {0, 1, 2, 4};
    for (int i = 0; i < 4; i++) {
        Rank rank = {there[i], 8, 0, i == 0 ? 0.6 : 5, "job", talk, NULL};
        start(&rank);
    }
    wait_for_all();
    expect_error(0, EXIT_OS, "ranks 3, 5-7 of 8 are missing");
    for (int i = 1; i < 4; i++) {
        expect_error(i, EXIT_OS, "rank 0: after 0.6 s, ranks 3, 5-7 of 8 are missing");
        assert_true(results[i].seconds < 2);
    }
}

static void missing_first_is_named(void** state) {
    (void)state;
    char wanted[100];
    Rank rank = {1, 2, 0, 0.5, "job", talk, NULL};
    start(&rank);
    wait_for_all();
    snprintf(wanted, sizeof wanted,
             "rank 0 did not answer at 127.0.0.1, ports %d to %d, within 0.5 s (Connection refused)", port,
             port + 15);
    expect_error(0, EXIT_OS, wanted);
    assert_true(results[0].seconds < 1.5);
}

static void lists_of_ranks(void** state) {
    (void)state;
    static bool flags_of[RANKS_MAX];
    char list[256];
    flags_of[0] = flags_of[2] = flags_of[3] = flags_of[9] = true;
    ranks_listed(flags_of, 10, list);
    assert_string_equal(list, "0, 2-3, 9");
    for (int r = 0; r < RANKS_MAX; r++) flags_of[r] = r % 2 == 1;
    ranks_listed(flags_of, RANKS_MAX, list);
    assert_true(strlen(list) < 250);
    assert_string_equal(list + strlen(list) - 5, ", ...");
    memset(flags_of, 1, sizeof flags_of);
    ranks_listed(flags_of, RANKS_MAX, list);
    assert_string_equal(list, "0-65535");
}

static void two_jobs_on_one_port(void** state) {
    (void)state;
    for (int i = 0; i < 8; i++) {
        Rank rank = {i / 2, 4, 0, 5, i % 2 ? "job B" : "job A", talk, NULL};
        start(&rank);
    }
    wait_for_all();
    expect_met(0, 8);
    for (int i = 0; i < 8; i++) assert_string_equal(results[i].text, results[i % 2].text);
    assert_string_not_equal(results[0].text, results[1].text);
}

static void another_secret_is_refused(void** state) {
    (void)state;
    Rank first = {0, 2, 0, 0.8, "job", talk, "right"}, second = {1, 2, 0, 0.6, "job", talk, "wrong"};
    start(&first), start(&second);
    wait_for_all();
    expect_error(0, EXIT_OS, "ranks 1 of 2 are missing (");
    assert_null(strstr(results[0].err.text, "(0 connections"));
    expect_error(1, EXIT_OS, "only a program that is not this job's rank 0");
}

static void one_secret_meets(void** state) {
    (void)state;
    Rank first = {0, 2, 0, 3, "job", talk, "right"}, second = {1, 2, 0, 3, "job", talk, "right"};
    start(&first), start(&second);
    wait_for_all();
    expect_met(0, 2);
}

static void another_size_is_refused(void** state) {
    (void)state;
    Rank first = {0, 2, 0, 0.8, "job", talk, NULL}, second = {1, 3, 0, 0.6, "job", talk, NULL};
    start(&first), start(&second);
    wait_for_all();
    expect_error(0, EXIT_OS, "ranks 1 of 2 are missing");
    expect_error(1, EXIT_OS, "rank 1 of 3: rank 0 did not answer");
}

// A connection to the port of rank 0, or -1.
static int stranger(void) {
    struct sockaddr_in a;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET, a.sin_port = htons((uint16_t)port), a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr*)&a, sizeof a) == 0) return fd;
    if (fd >= 0) close(fd);
    return -1;
}

static int stranger_at_last(void) {
    for (int i = 0; i < 200; i++, usleep(10000)) {
        int fd = stranger();
        if (fd >= 0) return fd;
    }
    return -1;
}

// 1,000 connections: silent ones that stay, random bytes, some bytes that look right, immediate ends.
static void thousand_strangers_cost_nothing(void** state) {
    (void)state;
    Rank first = {0, 4, 0, 5, "job", talk, NULL};
    start(&first);
    int fd = stranger_at_last();
    assert_true(fd >= 0);
    close(fd);
    pid_t junk = fork();
    if (junk == 0) {
        struct rlimit most = {4096, 4096};
        setrlimit(RLIMIT_NOFILE, &most);
        for (int i = 0; i < 1000; i++) {
            char noise[64];
            uint64_t magic = CONTROL_MAGIC;
            if ((fd = stranger()) < 0) continue;
            memset(noise, i, sizeof noise);
            if (i % 4 == 1) memcpy(noise, &magic, sizeof magic);
            if (i % 4 < 2) send(fd, noise, (size_t)(i % 64), MSG_NOSIGNAL);
            if (i % 4 == 2) close(fd);
        }
        usleep(1500000); // silent ones stay
        _exit(0);
    }
    for (int r = 1; r < 4; r++) {
        Rank rank = {r, 4, 0.02 * r, 5, "job", talk, NULL};
        start(&rank);
    }
    wait_for_all();
    kill(junk, SIGKILL), waitpid(junk, NULL, 0);
    expect_met(0, 4);
    for (int r = 1; r < 4; r++)
        if (results[r].seconds > 1.2) fail_msg("rank %d needed %g s", r, results[r].seconds);
}

static void silent_strangers_fill_the_room(void** state) {
    (void)state;
    Rank first = {0, 2, 0, 5, "job", talk, NULL}, second = {1, 2, 0, 5, "job", talk, NULL};
    int fds[3 * CONTROL_PENDING];
    start(&first);
    for (int i = 0; i < 3 * CONTROL_PENDING; i++) assert_true((fds[i] = stranger_at_last()) >= 0);
    start(&second);
    wait_for_all();
    for (int i = 0; i < 3 * CONTROL_PENDING; i++) close(fds[i]);
    expect_met(0, 2);
    assert_true(results[1].seconds < 1);
}

// As rank `rank` up to rank 0's answer; -1: refused.
static int raw_rank(int rank, int claimed_size, const char* job, Digest* answer) {
    Digest nonce, digest = job_digest(job, 3);
    uint8_t mine[HANDSHAKE_BYTES];
    int fd = stranger_at_last();
    assert_true(fd >= 0);
    assert_int_equal(recv(fd, &nonce, sizeof nonce, MSG_WAITALL), sizeof nonce);
    handshake_write(mine, &digest, &nonce, rank, claimed_size);
    for (int i = 0; i < HANDSHAKE_BYTES; i += 8, usleep(5000)) // in pieces
        assert_int_equal(send(fd, mine + i, 8, MSG_NOSIGNAL), 8);
    bool answered = recv(fd, answer, sizeof *answer, MSG_WAITALL) == sizeof *answer;
    Digest yes = handshake_digest(&digest, &nonce, ANSWER_ACCEPTED);
    if (answered && memcmp(answer, &yes, sizeof yes) == 0) return fd;
    close(fd);
    return -1;
}

// A connection that proves to be rank 1, and ends, makes room for the next attempt.
static void a_rank_may_come_again(void** state) {
    (void)state;
    Digest answer;
    Rank ranks[3] = {
        {0, 3, 0, 4, "job", talk, NULL}, {1, 3, 0, 4, "job", talk, NULL}, {2, 3, 0.3, 4, "job", talk, NULL}};
    start(&ranks[0]);
    int fd = raw_rank(1, 3, "job", &answer);
    assert_true(fd >= 0);
    assert_int_equal(raw_rank(1, 3, "other", &answer), -1);
    assert_int_equal(raw_rank(0, 3, "job", &answer), -1);
    assert_int_equal(raw_rank(3, 3, "job", &answer), -1);
    assert_int_equal(raw_rank(2, 4, "job", &answer), -1);
    assert_int_equal(raw_rank(1, 3, "job", &answer), -1);
    close(fd);
    start(&ranks[1]), start(&ranks[2]);
    wait_for_all();
    expect_met(0, 3);
}

static void a_rank_that_died_is_missing(void** state) {
    (void)state;
    Digest answer;
    Rank first = {0, 3, 0, 0.8, "job", talk, NULL}, last = {2, 3, 0.1, 4, "job", talk, NULL};
    start(&first);
    int fd = raw_rank(1, 3, "job", &answer);
    assert_true(fd >= 0);
    close(fd);
    start(&last);
    wait_for_all();
    expect_error(0, EXIT_OS, "ranks 1 of 3 are missing");
    expect_error(1, EXIT_OS, "ranks 1 of 3 are missing");
}

static void duplicates_are_refused(void** state) {
    (void)state;
    const double delays[] = {0, 0, 0.2, 0.4};
    const int ranks[] = {0, 1, 1, 2};
    for (int i = 0; i < 4; i++) {
        Rank rank = {ranks[i], 3, delays[i], 4, "job", talk, NULL};
        start(&rank);
    }
    wait_for_all();
    expect_met(0, 2), expect_met(3, 4);
    expect_error(2, EXIT_CONFIG, "another process is rank 1 of 3");
    assert_true(results[2].seconds < 1);
}

static void taken_ports_are_an_error(void** state) {
    (void)state;
    int fds[CONTROL_PORTS];
    for (int i = 0; i < CONTROL_PORTS; i++) assert_true((fds[i] = listen_on("127.0.0.1", port + i)) >= 0);
    Rank rank = {0, 2, 0, 1, "job", talk, NULL};
    start(&rank);
    wait_for_all();
    expect_error(0, EXIT_OS, "are all taken");
    for (int i = 0; i < CONTROL_PORTS; i++) close(fds[i]);
}

static void all_addresses_are_listened_on(void** state) {
    (void)state;
    int fd = listen_on("some.host", port), other = stranger();
    assert_true(fd >= 0 && other >= 0);
    close(fd), close(other);
    assert_int_equal(control_port(65530, 3), 65533);
    assert_int_equal(control_port(65530, 6), 65524);
}

// ----------------------------------------------------------------------------
// the calls

enum { LARGE = 3000000 };
static bool large_data(Control* c, Result* r, Error* err) {
    (void)r;
    char *data = (char*)malloc_check(LARGE), *all = (char*)malloc_check((size_t)c->size * LARGE);
    String text = {NULL, 0, 0};
    bool ok = true;
    memset(data, c->rank == 0 ? 'z' : 0, LARGE);
    ok = control_broadcast(c, data, LARGE, err);
    for (int i = 0; ok && i < LARGE; i++) ok = data[i] == 'z';
    memset(data, 'a' + c->rank, LARGE);
    data[LARGE - 1] = '\0';
    ok = ok && control_gather(c, data, LARGE, all, err);
    for (int i = 0; ok && c->rank == 0 && i < c->size * LARGE; i++)
        ok = all[i] == (i % LARGE == LARGE - 1 ? 0 : 'a' + i / LARGE);
    data[c->rank * 1000000] = '\0'; // texts of 0, 1 and 2 million bytes
    string_append(&text, "=");
    ok = ok && control_gather_text(c, data, &text, err) &&
         control_gather_text(c, c->rank == 1 ? "end" : "", &text, err);
    ok = ok && text.size == (c->rank == 0 ? 1 + 3000000 + 3 : 1);
    for (size_t i = 1; ok && i + 3 < text.size; i++) ok = text.data[i] == (i <= 1000000 ? 'b' : 'c');
    ok = ok && (c->rank > 0 || strcmp(text.data + text.size - 3, "end") == 0);
    free(data), free(all), free(text.data);
    return ok && control_agree(c, err);
}

static void large_data_arrives(void** state) {
    (void)state;
    for (int r = 0; r < 3; r++) {
        Rank rank = {r, 3, 0, 5, "job", large_data, NULL};
        start(&rank);
    }
    wait_for_all();
    expect_met(0, 3);
}

static bool text_too_large(Control* c, Result* r, Error* err) {
    (void)r;
    char* mine = (char*)malloc_check(CONTROL_TEXT_MAX + 2);
    String text = {NULL, 0, 0};
    memset(mine, 'a', CONTROL_TEXT_MAX + 1);
    mine[c->rank == 1 ? CONTROL_TEXT_MAX + 1 : 1] = '\0';
    return control_gather_text(c, mine, &text, err);
}

static void too_large_a_text_is_refused(void** state) {
    (void)state;
    for (int r = 0; r < 2; r++) {
        Rank rank = {r, 2, 0, 5, "job", text_too_large, NULL};
        start(&rank);
    }
    wait_for_all();
    for (int r = 0; r < 2; r++) expect_error(r, EXIT_OS, "rank 1's text has 67108865 bytes");
}

static bool disagree(Control* c, Result* r, Error* err) {
    (void)r;
    if (!control_agree(c, err)) return false;
    if (c->rank == 3) set_error(err, EXIT_IO, "disk of rank 3");
    if (c->rank == 1) set_error(err, EXIT_BAD_DATA, "shard of rank 1");
    if (control_agree(c, err)) return true;
    Error before = *err;
    if (control_agree(c, err)) return true; // the same error again is not named twice
    if (strcmp(before.text, err->text) != 0) return set_error(err, EXIT_INTERNAL, "changed");
    Error first = {0, {0}};
    if (c->rank == 0) set_error(&first, EXIT_CONFIG, "config");
    if (control_agree(c, &first) || strcmp(first.text, "rank 0: config") != 0 || first.code != EXIT_CONFIG)
        return true;
    Error none = {0, {0}};
    return control_agree(c, &none) ? false : true; // the channel still works
}

static void the_lowest_failing_rank_speaks(void** state) {
    (void)state;
    for (int r = 0; r < 4; r++) {
        Rank rank = {r, 4, 0, 5, "job", disagree, NULL};
        start(&rank);
    }
    wait_for_all();
    for (int r = 0; r < 4; r++) {
        expect_error(r, EXIT_BAD_DATA, "rank 1: shard of rank 1");
        assert_string_equal(results[r].err.text, "rank 1: shard of rank 1");
    }
}

// Rank 2 ends although others are still busy: rank 0 must not wait for these before it says so.
static bool second_dies(Control* c, Result* r, Error* err) {
    int all[PROCESSES];
    if (c->rank == 2) kill(getpid(), SIGKILL);
    if (c->rank == 1) usleep(700000);
    double begin = seconds_now();
    bool ok =
        control_gather(c, &c->rank, sizeof c->rank, all, err) && control_broadcast(c, all, sizeof all, err);
    if (ok) ok = control_broadcast(c, all, sizeof all, err);
    r->seconds = seconds_now() - begin;
    Error again = {0, {0}}; // every later call fails, too, and does not hide the first error
    if (control_agree(c, &again) || control_agree(c, err)) return true;
    return ok;
}

static void a_rank_that_dies_is_named(void** state) {
    (void)state;
    for (int r = 0; r < 4; r++) {
        Rank rank = {r, 4, 0, 5, "job", second_dies, NULL};
        start(&rank);
    }
    wait_for_all();
    expect_error(0, EXIT_LOST, "rank 0 lost rank 2 of 4");
    expect_error(1, EXIT_LOST, "rank 1 lost rank 0 of 4");
    expect_error(3, EXIT_LOST, "rank 3 lost rank 0 of 4");
    assert_true(results[0].seconds < 0.5);
}

// Rank 0 gives up; the others learn of it at once, although its process goes on.
static bool third_hangs(Control* c, Result* r, Error* err) {
    int all[PROCESSES];
    c->timeout = c->rank == 0 ? 0.4 : 5;
    if (c->rank == 3) usleep(900000);
    double begin = seconds_now();
    bool ok =
        control_gather(c, &c->rank, sizeof c->rank, all, err) && control_broadcast(c, all, sizeof all, err);
    r->seconds = seconds_now() - begin;
    if (c->rank == 0) usleep(1200000);
    return ok;
}

static void a_rank_that_hangs_is_named(void** state) {
    (void)state;
    for (int r = 0; r < 4; r++) {
        Rank rank = {r, 4, 0, 5, "job", third_hangs, NULL};
        start(&rank);
    }
    wait_for_all();
    expect_error(0, EXIT_LOST, "rank 0 waited 0.4 s for rank 3 of 4");
    expect_error(1, EXIT_LOST, "lost rank 0");
    assert_true(results[1].seconds < 1);
}

static bool sends_into_the_void(Control* c, Result* r, Error* err) {
    (void)r;
    if (c->rank == 0) return true;
    for (int i = 0; i < 4; i++, usleep(100000))
        if (!control_gather(c, &i, sizeof i, NULL, err)) return false;
    return true;
}

static void a_sender_survives_without_a_reader(void** state) {
    (void)state;
    for (int r = 0; r < 2; r++) {
        Rank rank = {r, 2, 0, 5, "job", sends_into_the_void, NULL};
        start(&rank);
    }
    wait_for_all();
    expect_met(0, 1);
    expect_error(1, EXIT_LOST, "rank 1 lost rank 0 of 2");
}

static bool waits_for_first(Control* c, Result* r, Error* err) {
    (void)r;
    int data = 0;
    if (c->rank == 0) usleep(600000);
    c->timeout = c->rank == 0 ? 0 : 0.3; // 0: for ever
    return control_broadcast(c, &data, sizeof data, err);
}

static void a_first_that_hangs_is_named(void** state) {
    (void)state;
    for (int r = 0; r < 2; r++) {
        Rank rank = {r, 2, 0, 0, "job", waits_for_first, NULL}; // meets without a deadline
        start(&rank);
    }
    wait_for_all();
    expect_error(1, EXIT_LOST, "rank 1 waited 0.3 s for rank 0 of 2");
}

int main(void) {
    results = (Result*)mmap(NULL, PROCESSES * sizeof *results, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (results == MAP_FAILED) return 1;
#define ON_SETUP(f) cmocka_unit_test_setup(f, setup)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_rank_needs_no_socket),
        cmocka_unit_test(lists_of_ranks),
        ON_SETUP(eight_ranks_meet_with_a_late_first),
        ON_SETUP(missing_ranks_are_named),
        ON_SETUP(missing_first_is_named),
        ON_SETUP(two_jobs_on_one_port),
        ON_SETUP(another_secret_is_refused),
        ON_SETUP(one_secret_meets),
        ON_SETUP(another_size_is_refused),
        ON_SETUP(thousand_strangers_cost_nothing),
        ON_SETUP(silent_strangers_fill_the_room),
        ON_SETUP(a_rank_may_come_again),
        ON_SETUP(a_rank_that_died_is_missing),
        ON_SETUP(duplicates_are_refused),
        ON_SETUP(taken_ports_are_an_error),
        ON_SETUP(all_addresses_are_listened_on),
        ON_SETUP(large_data_arrives),
        ON_SETUP(too_large_a_text_is_refused),
        ON_SETUP(the_lowest_failing_rank_speaks),
        ON_SETUP(a_rank_that_dies_is_named),
        ON_SETUP(a_rank_that_hangs_is_named),
        ON_SETUP(a_first_that_hangs_is_named),
        ON_SETUP(a_sender_survives_without_a_reader),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
