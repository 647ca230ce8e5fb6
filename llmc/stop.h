// Signals that ask for a stop are blocked in every thread while training, and looked for between steps. There
// is no handler, since its frame could land on live data: oneDNN's generated gemm points the stack register
// into its work area on the heap (2.6.3; a few signals in a hundred corrupted it). Ctrl-\ and SIGKILL still
// end the program at once, which costs the steps since the last checkpoint and nothing else.
#pragma once
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <time.h>

static int stop_signal = 0; // the one that came

static inline sigset_t stop_signals(void) {
    sigset_t set;
    struct sigaction hangup;
    sigemptyset(&set);
    sigaddset(&set, SIGINT), sigaddset(&set, SIGTERM);
    if (sigaction(SIGHUP, NULL, &hangup) == 0 && hangup.sa_handler != SIG_IGN)
        sigaddset(&set, SIGHUP); // no nohup
    return set;
}

// Before the first thread is started, so that all of them inherit it.
static inline void block_stop_signals(void) {
    sigset_t set = stop_signals();
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN); // `train_gpt_cpu ... | head` ends the reader, not the run
}

static inline bool stop_requested(void) {
    sigset_t set = stop_signals();
    const struct timespec no_wait = {0, 0};
    int signal_number = stop_signal == 0 ? sigtimedwait(&set, NULL, &no_wait) : 0;
    if (signal_number > 0) stop_signal = signal_number;
    return stop_signal != 0;
}
