// NVTX: ranges must nest. A pop without a push, and a range still open when the program ends well, are findings.
#include "nvtx3/nvToolsExt.h" // defines: nvtxRangePushA, nvtxRangePop

#include <stdlib.h>

#include "emu.h" // defines: emu_report

enum { MAX_DEPTH = 64 };
static thread_local const char* open_ranges[MAX_DEPTH];
static thread_local int depth;

// A program that ends early with an error of its own may leave ranges open.
static void at_exit(int status, void*) {
    if (status == 0 && depth > 0)
        emu_report("the program ends inside NVTX range \"%s\"", open_ranges[depth - 1]);
}

int nvtxRangePushA(const char* message) {
    static const int registered = on_exit(at_exit, NULL);
    if (registered != 0 || depth == MAX_DEPTH) emu_report("NVTX range \"%s\" is one too many", message);
    open_ranges[depth] = message;
    return depth++;
}

int nvtxRangePop(void) {
    if (depth == 0) emu_report("nvtxRangePop without an open range");
    return --depth;
}

const char* emu_range(void) { return depth > 0 ? open_ranges[depth - 1] : ""; }

void nvtxMarkA(const char*) {}
