// A virtual clock: how long each operation would take at given rates, and when it would run by the streams, events
// and waits of the program alone, in whatever order the emulator runs it.
//
//     EMU_CLOCK=matmul=1e12,copy=1e12,link=1e10,latency=1e-6    FLOP/s, bytes/s, bytes/s that a rank sends, seconds
//                                                               of a message; what is not named costs nothing
//     EMU_CLOCK_FILE=path    path.RANK: start, end, stream, what it was, the host's NVTX range: one line each
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <string>

#include "emu.h" // defines: EmuClock, emu_report

EmuRunning emu_running;

static EmuClock read_clock(void) {
    const char* text = getenv("EMU_CLOCK");
    EmuClock clock = {text != NULL, INFINITY, INFINITY, INFINITY, 0};
    for (const char* at = text; at != NULL && *at != '\0'; at += *at == ',') {
        char name[16];
        int length = -1;
        double value;
        sscanf(at, "%15[a-z]=%lf%n", name, &value, &length);
        std::string which = length > 0 ? name : "";
        double* rate = which == "matmul"    ? &clock.matmul
                       : which == "copy"    ? &clock.copy
                       : which == "link"    ? &clock.link
                       : which == "latency" ? &clock.latency
                                            : NULL;
        if (rate == NULL || !(value > 0 || (value == 0 && rate == &clock.latency)) ||
            (at[length] != ',' && at[length] != '\0'))
            emu_report("EMU_CLOCK is %s; matmul=FLOP/s,copy=BYTES/s,link=BYTES/s,latency=SECONDS is wanted",
                       text);
        *rate = value;
        at += length;
    }
    return clock;
}

const EmuClock* emu_clock(void) {
    static const EmuClock clock = read_clock();
    return &clock;
}

static FILE* open_timeline(void) {
    const char *path = getenv("EMU_CLOCK_FILE"), *rank = getenv("RANK");
    if (path == NULL) return NULL;
    FILE* file = fopen((std::string(path) + "." + (rank != NULL ? rank : "0")).c_str(), "w");
    if (file == NULL) emu_report("cannot write EMU_CLOCK_FILE %s", path);
    return file;
}

void emu_take(const char* what, double seconds) {
    if (!emu_clock()->on) return;
    static FILE* const timeline = open_timeline();
    double start = emu_running.now;
    emu_running.now += seconds;
    if (timeline == NULL) return;
    fprintf(timeline, "%.12f\t%.12f\t%d\t%s\t%s\n", start, emu_running.now, emu_running.stream, what,
            emu_running.range);
}
