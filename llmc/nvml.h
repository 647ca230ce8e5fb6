// What a GPU says of itself (power, clocks, why it is slow, memory errors), from the driver's NVML, which is
// looked for at run time. A thread of its own asks once a second, and nobody ever waits for it: a driver that
// hangs takes this thread along and nothing else. What a GPU or a driver does not tell is left out, figure by
// figure.
#pragma once
#include "llmc/metrics.h" // defines: String, event_number

#include <dlfcn.h>
#include <pthread.h>

// The few declarations of NVML's that are needed (nvml.h of the CUDA toolkit, API version 2).
typedef void* NvmlDevice;
typedef struct {
    unsigned long long total, free, used; // bytes
} NvmlMemory;
typedef int (*NvmlInit)(void); // 0: done; anything else: it was not
typedef int (*NvmlFind)(const char* bus_id, NvmlDevice* device);

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
#define NVML_PERIOD 1.0   // seconds between two polls
#define NVML_TOO_OLD 10.0 // seconds after which a figure says nothing any more
#define NVML_PATIENCE 1.0 // seconds that the end of a run waits for a poll under way

typedef struct {
    pthread_mutex_t mutex; // never held during a call of NVML
    pthread_cond_t changed;
    char bus_id[32];
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

static inline void nvml_poll(Nvml* n, NvmlDevice device, void* const functions[NVML_FIGURES]) {
    double figures[NVML_FIGURES];
    bool stop = false;
    while (!stop) {
        for (int i = 0; i < NVML_FIGURES; i++) figures[i] = nvml_ask(&nvml_figures[i], functions[i], device);
        struct timespec next = nvml_deadline(NVML_PERIOD);
        pthread_mutex_lock(&n->mutex);
        memcpy(n->figures, figures, sizeof figures);
        n->asked = seconds_now();
        while (!n->stop && pthread_cond_timedwait(&n->changed, &n->mutex, &next) == 0) continue;
        stop = n->stop;
        pthread_mutex_unlock(&n->mutex);
    }
}

static inline void* nvml_main(void* argument) {
    Nvml* n = (Nvml*)argument;
    NvmlDevice device = NULL;
    void *functions[NVML_FIGURES] = {NULL}, *library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    NvmlInit init = library != NULL ? (NvmlInit)dlsym(library, "nvmlInit_v2") : NULL;
    NvmlFind find = library != NULL ? (NvmlFind)dlsym(library, "nvmlDeviceGetHandleByPciBusId_v2") : NULL;
    for (int i = 0; library != NULL && i < NVML_FIGURES; i++)
        functions[i] = dlsym(library, nvml_figures[i].symbol);
    if (init != NULL && find != NULL && init() == 0 && find(n->bus_id, &device) == 0)
        nvml_poll(n, device, functions);
    pthread_mutex_lock(&n->mutex);
    n->left = true;
    pthread_cond_broadcast(&n->changed);
    pthread_mutex_unlock(&n->mutex);
    return NULL;
}

// bus_id: the GPU's, "00000000:17:00.0". NULL: there is no thread for it.
static inline Nvml* nvml_start(const char* bus_id) {
    Nvml* n = (Nvml*)calloc_check(1, sizeof *n);
    pthread_condattr_t monotonic;
    pthread_t thread;
    snprintf(n->bus_id, sizeof n->bus_id, "%s", bus_id);
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
