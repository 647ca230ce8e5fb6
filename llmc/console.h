// What a run shows to people: with colours and a bar of how far it is on a terminal that can show them, and
// otherwise the same lines plain, as they go into a file.
#pragma once
#include <sys/ioctl.h>

#include "llmc/metrics.h" // defines: format_duration

typedef struct {
    const char *dim, *bold, *alarm, *plain; // what switches them on, and all of them off
    const char* clear;                      // to the end of the line, where the bar may be
} Style;

static const Style style_of_files = {"", "", "", "", ""};
static const Style style_of_terminals = {"\033[2m", "\033[1m", "\033[1;31m", "\033[0m", "\033[K"};

// NO_COLOR: no-color.org
static inline const Style* console_style(FILE* out) {
    const char *term = getenv("TERM"), *no_color = getenv("NO_COLOR");
    bool can = isatty(fileno(out)) && term != NULL && term[0] != '\0' && strcmp(term, "dumb") != 0 &&
               (no_color == NULL || no_color[0] == '\0');
    return can ? &style_of_terminals : &style_of_files;
}

// On a terminal, a bar without an end of line: the next line takes its place.
static inline void console_progress(FILE* out, const Style* style, uint64_t done, uint64_t all,
                                    double seconds_left) {
    char left[24], tail[64], bar[128];
    struct winsize window;
    if (style->clear[0] == '\0' || done >= all) return;
    int columns = ioctl(fileno(out), TIOCGWINSZ, &window) == 0 && window.ws_col != 0 ? window.ws_col : 80;
    format_duration(left, seconds_left);
    int room = columns - 3 -
               snprintf(tail, sizeof tail, " %5.1f %%  %s left", 100 * (double)done / (double)all, left);
    room = room > 60 ? 60 : room;
    if (room < 4) return;
    int full = (int)((double)room * (double)done / (double)all);
    for (int i = 0; i < room; i++) bar[i] = i < full ? '#' : '.';
    fprintf(out, "[%.*s]%s%s\r", room, bar, tail, style->clear);
}

// A program that is started with a standard stream closed would open a checkpoint in its place, and print
// into it. What is written to these fails, as it would have.
static inline void hold_standard_streams(void) {
    int fd = open("/dev/null", O_RDONLY);
    while (fd >= 0 && fd <= STDERR_FILENO) fd = open("/dev/null", O_RDONLY);
    if (fd >= 0) close(fd);
}
