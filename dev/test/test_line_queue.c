// Lines go to the log by a thread: all of them, in order; and when it hangs, nobody waits and nothing grows.
#include "llmc/line_queue.h" // defines: LineQueue, line_queue_start, line_queue_put, line_queue_flush, line_queue_stop
// cmocka's macro fail() would hide ours, so its header comes last
#include <setjmp.h>
#include <cmocka.h>

typedef struct {
    bool hangs; // atomic
    String written;
    int calls;
} Sink;

static void write_line(void* to, const char* line, size_t size) {
    Sink* sink = (Sink*)to;
    while (__atomic_load_n(&sink->hangs, __ATOMIC_ACQUIRE)) usleep(1000);
    string_append_bytes(&sink->written, line, size);
    sink->calls++;
}
static void hang(Sink* sink, bool on) { __atomic_store_n(&sink->hangs, on, __ATOMIC_RELEASE); }
static void* goes_on_later(void* sink) {
    usleep(100000);
    hang((Sink*)sink, false);
    return NULL;
}

static Sink new_sink(void) {
    Sink sink = {false, {NULL, 0, 0}, 0};
    string_append(&sink.written, "%s", "");
    return sink;
}

static void lines_arrive_in_order(void** state) {
    (void)state;
    enum { LINES = 20000 };
    Sink sink = new_sink();
    String expected = {NULL, 0, 0};
    LineQueue q;
    line_queue_start(&q, write_line, &sink, "the log");
    for (int i = 0; i < LINES; i++) {
        char line[64];
        size_t size = (size_t)snprintf(line, sizeof line, "line %d\n", i);
        string_append(&expected, "%s", line);
        assert_true(line_queue_put(&q, line, size));
        if (i == LINES / 2) {
            assert_true(line_queue_flush(&q, 60));
            assert_int_equal(sink.calls, i + 1);
        }
    }
    assert_true(line_queue_stop(&q, 60));
    assert_int_equal(sink.calls, LINES);
    assert_string_equal(sink.written.data, expected.data);
    free(sink.written.data), free(expected.data);
}

// What is said on stderr meanwhile, into `said` (size).
static void captured(char* said, size_t size, void (*act)(LineQueue*), LineQueue* q) {
    FILE* file = tmpfile();
    int before = dup(STDERR_FILENO);
    assert_true(file != NULL && before >= 0 && dup2(fileno(file), STDERR_FILENO) >= 0);
    act(q);
    assert_true(dup2(before, STDERR_FILENO) >= 0);
    close(before);
    rewind(file);
    said[fread(said, 1, size - 1, file)] = '\0';
    fclose(file);
}

static void put_ten_of_ten_bytes(LineQueue* q) {
    for (int i = 0; i < 10; i++) assert_true(line_queue_put(q, "123456789\n", 10));
}
static void stop_soon(LineQueue* q) { assert_false(line_queue_stop(q, 0)); }

static void a_log_that_hangs_holds_up_nothing(void** state) {
    (void)state;
    Sink sink = new_sink();
    LineQueue q;
    char said[1024];
    line_queue_start(&q, write_line, &sink, "the log");
    q.limit = 60;
    hang(&sink, true);
    assert_true(line_queue_put(&q, "first\n", 6));
    while (!__atomic_load_n(&q.writing, __ATOMIC_ACQUIRE)) usleep(1000); // the first one hangs
    pthread_t later;
    assert_int_equal(pthread_create(&later, NULL, goes_on_later, &sink), 0);
    assert_true(line_queue_flush(&q, 60)); // nothing waits, but the line is not there before it is written
    pthread_join(later, NULL);
    hang(&sink, true);
    assert_true(line_queue_put(&q, "second\n", 7));
    while (!__atomic_load_n(&q.writing, __ATOMIC_ACQUIRE)) usleep(1000);
    captured(said, sizeof said, put_ten_of_ten_bytes, &q);
    assert_string_equal(
        said, "warning: the log has taken nothing for so long that lines are lost; training goes on\n");
    assert_true(q.waiting.size <= 60);
    assert_false(line_queue_flush(&q, 0));
    hang(&sink, false);
    assert_true(line_queue_flush(&q, 60));
    assert_string_equal(sink.written.data,
                        "first\nsecond\n123456789\n123456789\n123456789\n123456789\n123456789\n");
    put_ten_of_ten_bytes(&q); // it takes lines again
    assert_true(line_queue_flush(&q, 60));
    assert_true(sink.calls > 7);
    hang(&sink, true);
    assert_true(line_queue_put(&q, "last\n", 5));
    captured(said, sizeof said, stop_soon, &q);
    assert_string_equal(said, "warning: the log takes nothing any more: the last lines are not in it\n");
    hang(&sink, false);
    pthread_mutex_lock(&q.mutex); // its thread is this test's to end
    q.closing = true;
    pthread_cond_broadcast(&q.changed);
    pthread_mutex_unlock(&q.mutex);
    pthread_join(q.thread, NULL);
    free(sink.written.data), free(q.waiting.data);
}

static void without_a_thread_the_caller_writes(void** state) {
    (void)state;
    LineQueue q;
    memset(&q, 0, sizeof q);
    assert_false(line_queue_put(&q, "line\n", 5));
    assert_true(line_queue_flush(&q, 0) && line_queue_stop(&q, 0));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lines_arrive_in_order),
        cmocka_unit_test(a_log_that_hangs_holds_up_nothing),
        cmocka_unit_test(without_a_thread_the_caller_writes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
