// log.jsonl: every line is JSON whatever is logged, half a line of a killed run spoils no other, and a log that
// cannot be written stops nothing.
#include "llmc/metrics.h" // defines: Metrics, metrics_open, event_begin ..., format_duration, print_escaped
// cmocka's macro fail() would hide ours, so its header comes last
#include <setjmp.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <cmocka.h>

static char directory[PATH_MAX], path[PATH_MAX + 16], textfile[PATH_MAX + 16];

static int setup(void** state) {
    (void)state;
    const char* parent = getenv("TMPDIR");
    snprintf(directory, sizeof directory, "%s/metrics.XXXXXX", parent != NULL ? parent : "/tmp");
    if (mkdtemp(directory) == NULL) return -1;
    snprintf(path, sizeof path, "%s/log.jsonl", directory);
    snprintf(textfile, sizeof textfile, "%s/metrics.prom", directory);
    return 0;
}

static int teardown(void** state) {
    (void)state;
    unlink(path), unlink(textfile);
    return rmdir(directory);
}

static void open_log(Metrics* m) {
    Error err = {0};
    if (!metrics_open(m, directory, &err)) fail_msg("%s", err.text);
}

// Line number n (from 0) of the log as JSON; the caller deletes.
static cJSON* line_json(int n) {
    Error err = {0};
    size_t size;
    char* text = read_file(path, 1 << 20, &size, &err);
    assert_non_null(text);
    char* line = text;
    for (int i = 0; i < n; i++) line = strchr(line, '\n') + 1;
    *strchr(line, '\n') = '\0';
    cJSON* json = cJSON_ParseWithOpts(line, NULL, 1);
    if (json == NULL) fail_msg("not JSON: %s", line);
    free(text);
    return json;
}

static const cJSON* item(const cJSON* json, const char* key) {
    const cJSON* found = cJSON_GetObjectItemCaseSensitive(json, key);
    if (found == NULL) fail_msg("no %s", key);
    return found;
}

static void test_line(void** state) {
    (void)state;
    static const char text[] =
        "quote \" backslash \\ newline \n tab \t bell \a delete \177 \xC3\xA9 \xE2\x82\xAC";
    Metrics m;
    open_log(&m);
    String line = event_begin("step", 18446744073709551615ull);
    event_number(&line, "loss", 3.14159265358979);
    event_number(&line, "tokens", 1234567890123.0);
    event_number(&line, "tiny", 1e-300);
    event_number(&line, "nan", NAN);
    event_number(&line, "inf", -INFINITY);
    event_text(&line, "text", text);
    event_end(&m, &line);
    metrics_close(&m);
    cJSON* json = line_json(0);
    assert_string_equal(cJSON_GetStringValue(item(json, "event")), "step");
    assert_true(fabs(item(json, "time")->valuedouble - (double)time(NULL)) < 5);
    assert_true(item(json, "step")->valuedouble == 18446744073709551615.0);
    assert_true(fabs(item(json, "loss")->valuedouble - 3.14159265) < 1e-8);
    assert_true(item(json, "tokens")->valuedouble == 1234567890123.0);
    assert_true(item(json, "tiny")->valuedouble == 1e-300);
    assert_true(cJSON_IsNull(item(json, "nan")) && cJSON_IsNull(item(json, "inf")));
    assert_string_equal(cJSON_GetStringValue(item(json, "text")), text);
    cJSON_Delete(json);
}

// A model's text is any bytes. JSON is UTF-8, so what is none is replaced.
static void test_text_is_utf8(void** state) {
    (void)state;
    static const char* const cases[][2] = {
        {"a\xFFz", "a\xEF\xBF\xBDz"},                               // no UTF-8 has that byte
        {"\xE2\x82", "\xEF\xBF\xBD\xEF\xBF\xBD"},                   // cut short
        {"\xC0\xAF", "\xEF\xBF\xBD\xEF\xBF\xBD"},                   // '/' in two bytes
        {"\xED\xA0\x80z", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBDz"}, // half a surrogate pair
        {"\xF0\x9F\x98\x80", "\xF0\x9F\x98\x80"},                   // a face, which is UTF-8
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        String line = {0};
        json_append_string(&line, cases[i][0]);
        cJSON* json = cJSON_Parse(line.data);
        assert_string_equal(cJSON_GetStringValue(json), cases[i][1]);
        cJSON_Delete(json);
        free(line.data);
    }
}

static void test_torn_line(void** state) {
    (void)state;
    Metrics m;
    int fd = open(path, O_WRONLY | O_CREAT, 0666);
    assert_true(write_all(fd, "{\"event\":\"a\"}\n{\"event\":\"st", 26));
    close(fd);
    for (int run = 0; run < 2; run++) { // the second finds whole lines and adds nothing of its own
        open_log(&m);
        String line = event_begin("resume", 7);
        event_end(&m, &line);
        metrics_close(&m);
        cJSON* json = line_json(2 + run);
        assert_int_equal(item(json, "step")->valueint, 7);
        cJSON_Delete(json);
    }
}

// stderr while f runs, into text
static void captured(char text[1024], void (*f)(Metrics*), Metrics* m) {
    FILE* file = tmpfile();
    assert_non_null(file);
    fflush(stderr);
    int saved = dup(2);
    dup2(fileno(file), 2);
    f(m);
    fflush(stderr);
    dup2(saved, 2);
    close(saved);
    rewind(file);
    text[fread(text, 1, 1023, file)] = '\0';
    fclose(file);
}

static void two_lines(Metrics* m) {
    for (int i = 0; i < 2; i++) {
        String line = event_begin("step", 1);
        event_end(m, &line);
    }
}

// A full disk: one warning, not one a step, and no error.
static void test_full_disk(void** state) {
    (void)state;
    Metrics m;
    char text[1024];
    assert_int_equal(symlink("/dev/full", path), 0);
    open_log(&m);
    captured(text, two_lines, &m);
    assert_non_null(strstr(text, "log.jsonl: No space left on device; training goes on, and tries again\n"));
    assert_null(strstr(strchr(text, '\n'), "warning"));
    metrics_close(&m);
}

// Files may grow no further, half way through a line and through a record; then they may.
static void a_while(Metrics* m) {
    struct rlimit none, limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &none), 0);
    limit = none;
    void (*before)(int) = signal(SIGXFSZ, SIG_IGN);
    for (int step = 0; step < 30; step++) {
        if (step == 10) { // room for part of a line, and for none of what follows
            off_t log = lseek(m->log.fd, 0, SEEK_END), events = lseek(m->tensorboard.fd, 0, SEEK_END);
            assert_true(log > events);
            limit.rlim_cur = (rlim_t)log + 20;
        }
        if (step == 13) limit.rlim_cur = (rlim_t)lseek(m->tensorboard.fd, 0, SEEK_END) + 20;
        if (step == 20) limit = none;
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
        String line = event_begin("step", (uint64_t)step);
        event_number(&line, "loss", 2.5);
        event_text(&line, "text",
                   "as long as the records of the event file are, and somewhat longer than that");
        event_end(m, &line);
    }
    signal(SIGXFSZ, before);
}

static void test_a_disk_that_is_full_for_a_while(void** state) {
    (void)state;
    static Metrics m;
    Error err = {0};
    char said[2048], events[PATH_MAX + 320];
    size_t size = 0, records = 0;
    open_log(&m);
    tensorboard_open(&m.tensorboard, directory, 0);
    snprintf(events, sizeof events, "%s", m.tensorboard.path);
    captured(said, a_while, &m);
    metrics_close(&m);
    const char* of_log = strstr(said, "log.jsonl: File too large; training goes on, and tries again\n");
    assert_non_null(of_log);
    assert_null(strstr(of_log + 1, "log.jsonl: File too large"));
    assert_non_null(strstr(of_log, "log.jsonl is written again"));
    for (int n = 0; n < 20; n++) { // 0 to 9, 20 to 29
        cJSON* json = line_json(n);
        assert_int_equal(item(json, "step")->valueint, n < 10 ? n : n + 10);
        cJSON_Delete(json);
    }
    char* text = read_file(events, 1 << 20, &size, &err);
    assert_non_null(text);
    for (size_t at = 0; at < size; records++) { // length, its checksum, data, their checksum
        uint64_t length;
        uint32_t checksum;
        assert_true(at + 16 <= size);
        memcpy(&length, text + at, sizeof length), memcpy(&checksum, text + at + 8, sizeof checksum);
        assert_int_equal(checksum, masked_crc32c(&length, sizeof length));
        at += 16 + length;
        assert_true(at <= size);
    }
    assert_in_range(records, 2 + 20, 2 + 24); // two begin the file; those of 10 to 12 had room
    free(text);
    unlink(events);
    *strrchr(events, '/') = '\0';
    assert_int_equal(rmdir(events), 0);
}

// A disk that fails may not even cut off what it took of a line.
static void test_half_a_line_is_cut_off_later(void** state) {
    (void)state;
    static Metrics m;
    Error err = {0};
    size_t size = 0;
    open_log(&m);
    sink_append(&m.log, "one\ntw", 6);
    m.log.torn = true, m.log.whole = 4;
    sink_append(&m.log, "three\n", 6);
    sink_append(&m.log, "four\n", 5);
    char* text = read_file(path, 1 << 16, &size, &err);
    assert_string_equal(text, "one\nthree\nfour\n");
    free(text);
    metrics_close(&m);
}

static void test_no_directory(void** state) {
    (void)state;
    Metrics m;
    Error err = {0};
    assert_false(metrics_open(&m, "/nowhere/at/all", &err));
    assert_int_equal(err.code, EXIT_CANNOT_WRITE);
    assert_string_equal(err.text, "cannot open /nowhere/at/all/log.jsonl: No such file or directory");
}

static void test_duration(void** state) {
    (void)state;
    static const struct {
        double seconds;
        const char* text;
    } cases[] = {{0, "0s"},
                 {0.6, "1s"},
                 {59.4, "59s"},
                 {59.6, "1m00s"},
                 {187, "3m07s"},
                 {3720, "1h02m"},
                 {172799, "47h59m"},
                 {172800, "2d00h"},
                 {360000, "4d04h"},
                 {2.36e10, "273148d03h"},
                 {-5, "0s"},
                 {NAN, "0s"},
                 {INFINITY, "11574074074d01h"},
                 {1e300, "11574074074d01h"}};
    char text[24];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        format_duration(text, cases[i].seconds);
        assert_string_equal(text, cases[i].text);
    }
}

// What a step line says, for Prometheus: each number once, none of them unreadable, and a disk that is full is said once.
static void test_textfile(void** state) {
    (void)state;
    Metrics m;
    Error err = {0};
    size_t size;
    char wanted[512];
    open_log(&m);
    String line = event_begin("step", 7);
    event_number(&line, "loss", 2.5);
    event_number(&line, "grad_norm", NAN);
    event_number(&line, "tokens", 1234567890123.0);
    event_text(&line, "text", "no number");
    event_end(&m, &line);
    char* text = read_file(textfile, 1 << 16, &size, &err);
    if (text == NULL) fail_msg("%s", err.text);
    const char* numbers = strstr(text, "# TYPE pretrain_step");
    snprintf(wanted, sizeof wanted,
             "# TYPE pretrain_step gauge\npretrain_step 7\n# TYPE pretrain_loss gauge\npretrain_loss 2.5\n"
             "# TYPE pretrain_grad_norm gauge\npretrain_grad_norm NaN\n"
             "# TYPE pretrain_tokens gauge\npretrain_tokens 1234567890123\n");
    assert_non_null(numbers);
    assert_string_equal(numbers, wanted);
    assert_memory_equal(text, "# TYPE pretrain_time gauge\npretrain_time ", 41);
    free(text);
    assert_int_equal(unlink(textfile), 0);
    assert_int_equal(mkdir(textfile, 0777), 0); // nothing can be written there
    char said[1024];
    m.textfile_written = 0;
    captured(said, two_lines, &m);
    assert_non_null(strstr(said, "metrics.prom: Is a directory; training goes on, and tries again\n"));
    assert_null(strstr(strchr(said, '\n'), "warning"));
    assert_int_equal(rmdir(textfile), 0);
    m.textfile_written = 0;
    captured(said, two_lines, &m);
    assert_non_null(strstr(said, "metrics.prom is written again"));
    metrics_close(&m);
}

// Once a second, and at the end what was not written by then.
static void test_textfile_is_not_written_too_often(void** state) {
    (void)state;
    Metrics m;
    Error err = {0};
    size_t size;
    open_log(&m);
    for (int step = 1; step <= 4; step++) {
        if (step == 2) m.textfile_written = seconds_now() + 1000;
        if (step == 3) m.textfile_written = seconds_now() - 1;
        if (step == 4) m.textfile_written = seconds_now() + 1000;
        String line = event_begin("step", (uint64_t)step);
        event_end(&m, &line);
        char* text = read_file(textfile, 1 << 16, &size, &err);
        assert_non_null(strstr(text, step < 3 ? "pretrain_step 1\n" : "pretrain_step 3\n"));
        free(text);
    }
    metrics_close(&m);
    char* text = read_file(textfile, 1 << 16, &size, &err);
    assert_non_null(strstr(text, "pretrain_step 4\n"));
    free(text);
}

// The thread that writes is behind, and the process gives up.
static void test_exit_loses_no_line(void** state) {
    (void)state;
    enum { LINES = 5000 };
    fflush(stdout);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        static Metrics m;
        open_log(&m);
        metrics_in_background(&m);
        for (int i = 0; i < LINES; i++) {
            String line = event_begin("step", (uint64_t)i);
            event_end(&m, &line);
        }
        Error err = {EXIT_OS, "the device has failed"};
        fclose(stderr);
        exit_with(&err);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == EXIT_OS);
    Error err = {0};
    size_t size = 0, lines = 0;
    char* text = read_file(path, 1 << 22, &size, &err);
    assert_non_null(text);
    for (size_t i = 0; i < size; i++) lines += text[i] == '\n';
    assert_int_equal(lines, LINES);
    free(text);
}

static void test_print_escaped(void** state) {
    (void)state;
    char text[64] = {0};
    FILE* file = fmemopen(text, sizeof text, "w");
    print_escaped(file, "a\n\t\033[2J\r\0\x7F\xC3\xA9", 12);
    fclose(file);
    assert_string_equal(text, "a\n\t\\x1b[2J\\x0d\\x00\\x7f\xC3\xA9");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_line, setup, teardown),
        cmocka_unit_test(test_text_is_utf8),
        cmocka_unit_test_setup_teardown(test_torn_line, setup, teardown),
        cmocka_unit_test_setup_teardown(test_full_disk, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_disk_that_is_full_for_a_while, setup, teardown),
        cmocka_unit_test_setup_teardown(test_half_a_line_is_cut_off_later, setup, teardown),
        cmocka_unit_test(test_no_directory),
        cmocka_unit_test_setup_teardown(test_textfile, setup, teardown),
        cmocka_unit_test_setup_teardown(test_textfile_is_not_written_too_often, setup, teardown),
        cmocka_unit_test_setup_teardown(test_exit_loses_no_line, setup, teardown),
        cmocka_unit_test(test_duration),
        cmocka_unit_test(test_print_escaped),
    };
    return cmocka_run_group_tests_name("metrics", tests, NULL, NULL);
}
