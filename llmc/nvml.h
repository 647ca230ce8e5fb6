// What a GPU says of itself (power, clocks, why it is slow, memory errors), from the driver's NVML, which is
// looked for at run time. A thread of its own asks once a second, and nobody ever waits for it: a driver that
// hangs takes this thread along and nothing else. What a GPU or a driver does not tell is left out, figure by
// figure. Figures of this process's GPU go into the log; those of all GPUs of its node, where it is asked for them,
// into a file for Prometheus' node exporter.
#pragma once
#include "llmc/launch.h"  // defines: node_name
#include "llmc/metrics.h" // defines: String, event_number
#include "llmc/sink.h"    // defines: Sink, sink_replace

#include <dlfcn.h>
#include <pthread.h>

// The few declarations of NVML's that are needed (nvml.h of the CUDA toolkit, API version 2).
typedef void* NvmlDevice;
typedef struct {
    unsigned long long total, free, used; // bytes
} NvmlMemory;
typedef int (*NvmlInit)(void); // 0: done; anything else: it was not
typedef int (*NvmlFind)(const char* bus_id, NvmlDevice* device);
typedef int (*NvmlCount)(unsigned* count);
typedef int (*NvmlAt)(unsigned index, NvmlDevice* device);

enum NvmlCall { NVML_UNSIGNED, NVML_UNSIGNED_OF, NVML_LONG, NVML_ERRORS, NVML_MEMORY };
typedef struct {
    const char *key, *symbol;
    enum NvmlCall call; // the function's type
    int argument;       // which sensor, clock or kind of error
    double factor;
} NvmlFigure;

static const NvmlFigure nvml_figures[] = {
    {"gpu_power_watts", "nvmlDeviceGetPowerUsage", NVML_UNSIGNED, 0, 1e-3},
    {"gpu_temperature_celsius", "nvmlDeviceGetTemperature", NVML_UNSIGNED_OF, 0, 1}, // 0: the GPU's
    {"gpu_sm_clock_mhz", "nvmlDeviceGetClockInfo", NVML_UNSIGNED_OF, 1, 1},          // 1: the SMs'
    {"gpu_memory_clock_mhz", "nvmlDeviceGetClockInfo", NVML_UNSIGNED_OF, 2, 1},      // 2: the memory's
    {"gpu_throttle_reasons", "nvmlDeviceGetCurrentClocksThrottleReasons", NVML_LONG, 0, 1},
    {"gpu_ecc_corrected", "nvmlDeviceGetTotalEccErrors", NVML_ERRORS, 0, 1},
    {"gpu_ecc_uncorrected", "nvmlDeviceGetTotalEccErrors", NVML_ERRORS, 1, 1},
    {"gpu_memory_used_bytes", "nvmlDeviceGetMemoryInfo", NVML_MEMORY, 0, 1},
};
enum { NVML_FIGURES = sizeof nvml_figures / sizeof nvml_figures[0] };
#define NVML_PERIOD 1.0       // seconds between two polls
#define NVML_NODE_PERIOD 15.0 // seconds between two files: who reads them comes by no more often
#define NVML_TOO_OLD 10.0     // seconds after which a figure says nothing any more
#define NVML_PATIENCE 1.0     // seconds that the end of a run waits for a poll under way

typedef struct {
    pthread_mutex_t mutex; // never held during a call of NVML
    pthread_cond_t changed;
    char bus_id[32];
    Sink textfile;                // path "": nobody has asked for the node's GPUs
    bool stop, left;              // asked to, and has: the thread
    double asked;                 // seconds_now of the newest figures
    double figures[NVML_FIGURES]; // NaN: not known
} Nvml;

static inline double nvml_ask(const NvmlFigure* f, void* function, NvmlDevice device) {
    unsigned small = 0;
    unsigned long long large = 0;
    NvmlMemory memory = {0, 0, 0};
    int failed = 1;
    if (function == NULL) return NAN;
    switch (f->call) {
    case NVML_UNSIGNED:
        failed = ((int (*)(NvmlDevice, unsigned*))function)(device, &small);
        break;
    case NVML_UNSIGNED_OF:
        failed = ((int (*)(NvmlDevice, int, unsigned*))function)(device, f->argument, &small);
        break;
    case NVML_LONG:
        failed = ((int (*)(NvmlDevice, unsigned long long*))function)(device, &large);
        break;
    case NVML_ERRORS: // 0: since the driver was loaded
        failed =
            ((int (*)(NvmlDevice, int, int, unsigned long long*))function)(device, f->argument, 0, &large);
        break;
    case NVML_MEMORY:
        failed = ((int (*)(NvmlDevice, NvmlMemory*))function)(device, &memory);
        large = memory.used;
        break;
    }
    return failed != 0 ? NAN : f->factor * ((double)small + (double)large);
}

static inline struct timespec nvml_deadline(double seconds) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += (time_t)seconds;
    return t;
}

// What a driver has to say, and what of it a process wants.
typedef struct {
    NvmlDevice mine; // NULL: it does not know this process's GPU
    NvmlCount count;
    NvmlAt at;
    void* functions[NVML_FIGURES];
} NvmlDriver;

// A figure of every GPU of the node that tells it; a group of lines, as the format wants it.
static inline void nvml_append_figure(String* out, const NvmlDriver* d, int figure, const char* node,
                                      unsigned gpus) {
    const char* key = nvml_figures[figure].key;
    for (unsigned gpu = 0, lines = 0; gpu < gpus; gpu++) {
        NvmlDevice device = NULL;
        double value =
            d->at(gpu, &device) != 0 ? NAN : nvml_ask(&nvml_figures[figure], d->functions[figure], device);
        if (!isfinite(value)) continue;
        if (lines++ == 0) string_append(out, "# TYPE pretrain_node_%s gauge\n", key);
        string_append(out, "pretrain_node_%s{node=\"%s\",gpu=\"%u\"} %.15g\n", key, node, gpu, value);
    }
}

static inline void nvml_write_node(Nvml* n, const NvmlDriver* d) {
    char node[64];
    unsigned gpus = 0;
    String gauges = {NULL, 0, 0};
    node_name(node);
    for (char* at = node; *at != '\0'; at++) *at = *at == '"' || *at == '\\' ? '_' : *at;
    if (d->count == NULL || d->at == NULL || d->count(&gpus) != 0) return;
    for (int i = 0; i < NVML_FIGURES; i++) nvml_append_figure(&gauges, d, i, node, gpus);
    if (gauges.size > 0) sink_replace(&n->textfile, gauges.data, gauges.size);
    free(gauges.data);
}

static inline void nvml_poll(Nvml* n, const NvmlDriver* d) {
    double figures[NVML_FIGURES], written = -INFINITY;
    bool stop = false;
    while (!stop) {
        for (int i = 0; i < NVML_FIGURES; i++)
            figures[i] = d->mine == NULL ? NAN : nvml_ask(&nvml_figures[i], d->functions[i], d->mine);
        struct timespec next = nvml_deadline(NVML_PERIOD);
        pthread_mutex_lock(&n->mutex);
        memcpy(n->figures, figures, sizeof figures);
        n->asked = seconds_now();
        pthread_mutex_unlock(&n->mutex);
        if (n->textfile.path[0] != '\0' && n->asked - written >= NVML_NODE_PERIOD)
            nvml_write_node(n, d), written = n->asked;
        pthread_mutex_lock(&n->mutex);
        while (!n->stop && pthread_cond_timedwait(&n->changed, &n->mutex, &next) == 0) continue;
        stop = n->stop;
        pthread_mutex_unlock(&n->mutex);
    }
}

static inline void* nvml_main(void* argument) {
    Nvml* n = (Nvml*)argument;
    NvmlDriver d;
    void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    memset(&d, 0, sizeof d);
    if (library != NULL) {
        NvmlInit init = (NvmlInit)dlsym(library, "nvmlInit_v2");
        NvmlFind find = (NvmlFind)dlsym(library, "nvmlDeviceGetHandleByPciBusId_v2");
        d.count = (NvmlCount)dlsym(library, "nvmlDeviceGetCount_v2");
        d.at = (NvmlAt)dlsym(library, "nvmlDeviceGetHandleByIndex_v2");
        for (int i = 0; i < NVML_FIGURES; i++) d.functions[i] = dlsym(library, nvml_figures[i].symbol);
        if (init != NULL && init() == 0) {
            if (find == NULL || find(n->bus_id, &d.mine) != 0) d.mine = NULL;
            nvml_poll(n, &d);
        }
    }
    pthread_mutex_lock(&n->mutex);
    n->left = true;
    pthread_cond_broadcast(&n->changed);
    pthread_mutex_unlock(&n->mutex);
    return NULL;
}

// bus_id: the GPU's, "00000000:17:00.0". textfile: for the figures of all GPUs of this node; "": for none. NULL: there is
// no thread for it.
static inline Nvml* nvml_start(const char* bus_id, const char* textfile) {
    Nvml* n = (Nvml*)calloc_check(1, sizeof *n);
    pthread_condattr_t monotonic;
    pthread_t thread;
    snprintf(n->bus_id, sizeof n->bus_id, "%s", bus_id);
    sink_init(&n->textfile);
    snprintf(n->textfile.path, sizeof n->textfile.path, "%s", textfile);
    pthread_mutex_init(&n->mutex, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&n->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (pthread_create(&thread, NULL, nvml_main, n) == 0) {
        pthread_detach(thread);
        return n;
    }
    free(n);
    return NULL;
}

// The newest figures, unless they are old.
static inline void nvml_event(Nvml* n, String* line) {
    if (n == NULL) return;
    pthread_mutex_lock(&n->mutex);
    bool fresh = n->asked != 0 && seconds_now() - n->asked < NVML_TOO_OLD;
    for (int i = 0; fresh && i < NVML_FIGURES; i++)
        if (isfinite(n->figures[i])) event_number(line, nvml_figures[i].key, n->figures[i]);
    pthread_mutex_unlock(&n->mutex);
}

// A thread that does not come back from the driver keeps its memory.
static inline void nvml_stop(Nvml* n) {
    if (n == NULL) return;
    struct timespec latest = nvml_deadline(NVML_PATIENCE);
    pthread_mutex_lock(&n->mutex);
    n->stop = true;
    pthread_cond_broadcast(&n->changed);
    while (!n->left && pthread_cond_timedwait(&n->changed, &n->mutex, &latest) == 0) continue;
    bool left = n->left;
    pthread_mutex_unlock(&n->mutex);
    if (left) free(n);
}
