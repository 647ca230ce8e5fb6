// Which process of a run this is, and where rank 0 is: from flags, or from what torchrun, Slurm or OpenMPI
// say.
#pragma once
#include "llmc/utils.h" // defines: Error, fail, EXIT_CONFIG

enum {
    RANKS_MAX = 65536,
    LAUNCH_DEFAULT_PORT = 29500,
    CONTROL_PORTS = 16, // rank 0 takes the first free one of so many, from the launch's port on
};

typedef struct {
    int rank, size;
    int local_rank, local_size; // of this host; the size is local_rank + 1 where nobody says
    char host[256];             // where rank 0 is
    int port;
    bool by_launcher; // somebody said so; else this is rank 0 of 1
} Launch;

// This machine; under Slurm, this node, as several may be on one machine.
static inline void node_name(char out[64]) {
    const char* node = getenv("SLURMD_NODENAME");
    memset(out, 0, 64);
    snprintf(out, 64, "%s", node != NULL ? node : "");
    if (node == NULL) gethostname(out, 63);
    replace_controls(out);
}

// A flag or an environment variable; value is NULL where it is not set.
typedef struct {
    const char *name, *value;
} Setting;

typedef struct {
    Setting rank, size, local_rank, local_size, host, port;
} LaunchSource;

static inline Setting setting_from_environment(const char* name) {
    Setting s = {name, getenv(name)};
    return s;
}

// Decimal digits from *at on, which moves behind them; false without any or beyond max.
static inline bool parse_digits(const char** at, uint64_t max, uint64_t* out) {
    uint64_t value = 0;
    const char* begin = *at;
    for (; **at >= '0' && **at <= '9'; (*at)++) {
        uint64_t digit = (uint64_t)(**at - '0');
        if (value > (max - digit) / 10 || digit > max) return false;
        value = value * 10 + digit;
    }
    *out = value;
    return *at > begin;
}

static inline bool setting_number(const Setting* s, uint64_t min, uint64_t max, int* out, Error* err) {
    uint64_t value = 0;
    const char* at = s->value;
    if (!parse_digits(&at, max, &value) || *at != '\0' || value < min)
        return fail(err, EXIT_CONFIG, "%s is '%.100s': it must be a whole number from %llu to %llu", s->name,
                    s->value, (unsigned long long)min, (unsigned long long)max);
    *out = (int)value;
    return true;
}

// "node[003-010,12],b7" -> "node003"; of several brackets the first of each. False: not a list of hosts.
static inline bool nodelist_first(const char* list, char host[256]) {
    size_t n = 0;
    bool inside = false, skipping = false; // in brackets; behind the first entry of these
    for (const char* at = list; *at != '\0' && (inside || *at != ','); at++) {
        bool alphanumeric =
            (*at >= '0' && *at <= '9') || (*at >= 'a' && *at <= 'z') || (*at >= 'A' && *at <= 'Z');
        if (*at == '[') {
            if (inside) return false;
            inside = true, skipping = false;
            if (at[1] == '-' || at[1] == ',' || at[1] == ']') return false;
        } else if (*at == ']') {
            if (!inside) return false;
            inside = false;
        } else if (inside && (*at == '-' || *at == ',')) {
            skipping = true;
        } else if (!alphanumeric && (inside || strchr(".-_", *at) == NULL)) {
            return false;
        } else if (!inside || !skipping) {
            if (n == 255) return false;
            host[n++] = *at;
        }
    }
    host[n] = '\0';
    return n > 0 && !inside;
}

// "2(x3),1": nodes 0 to 2 have two tasks, node 3 has one. False: no such list, or no such node.
static inline bool tasks_on_node(const char* list, int node, int* tasks) {
    uint64_t count, times, nodes = 0;
    bool found = false;
    for (const char* at = list;; at++) {
        if (!parse_digits(&at, RANKS_MAX, &count)) return false;
        times = 1;
        if (*at == '(') {
            if (at[1] != 'x') return false;
            at += 2;
            if (!parse_digits(&at, RANKS_MAX, &times) || *at++ != ')') return false;
        }
        if (!found && (uint64_t)node < nodes + times) {
            *tasks = (int)count;
            found = true;
        }
        nodes += times;
        if (*at == '\0') return found;
        if (*at != ',' || nodes > RANKS_MAX) return false;
    }
}

static inline bool is_loopback(const char* host) {
    return strcmp(host, "localhost") == 0 || strncmp(host, "127.", 4) == 0 || strcmp(host, "::1") == 0;
}

static inline bool launch_from(Launch* out, const LaunchSource* s, Error* err) {
    out->by_launcher = true;
    const Setting *there = &s->rank, *missing = &s->size;
    if (there->value == NULL) there = &s->size, missing = &s->rank;
    if (there->value == NULL || missing->value == NULL)
        return fail(err, EXIT_CONFIG, "%s is '%.100s' and %s is not set: set both or neither", there->name,
                    there->value != NULL ? there->value : "", missing->name);
    if (!setting_number(&s->size, 1, RANKS_MAX, &out->size, err) ||
        !setting_number(&s->rank, 0, RANKS_MAX - 1, &out->rank, err))
        return false;
    if (out->rank >= out->size)
        return fail(err, EXIT_CONFIG, "%s is %d and %s is %d: ranks count from 0 and stay below the size",
                    s->rank.name, out->rank, s->size.name, out->size);
    if (s->host.value != NULL) {
        size_t n = strlen(s->host.value);
        if (n == 0 || n >= sizeof out->host)
            return fail(err, EXIT_CONFIG, "%s is '%.100s': it must name rank 0's host in 1 to %zu characters",
                        s->host.name, s->host.value, sizeof out->host - 1);
        memcpy(out->host, s->host.value, n + 1);
    } else if (out->size > 1) {
        return fail(err, EXIT_CONFIG, "%s is not set, and %s is %d: set it to the host of rank 0",
                    s->host.name, s->size.name, out->size);
    }
    if (s->port.value != NULL && !setting_number(&s->port, 1, 65535, &out->port, err)) return false;
    bool one_host = is_loopback(out->host);
    out->local_rank = one_host ? out->rank : 0;
    if (s->local_rank.value != NULL &&
        !setting_number(&s->local_rank, 0, RANKS_MAX - 1, &out->local_rank, err))
        return false;
    out->local_size = one_host ? out->size : out->local_rank + 1;
    if (s->local_size.value != NULL && !setting_number(&s->local_size, 1, RANKS_MAX, &out->local_size, err))
        return false;
    if (out->local_size > out->size)
        return fail(err, EXIT_CONFIG, "%s is %d and %s is %d: a host cannot have more ranks than the run",
                    s->local_size.name, out->local_size, s->size.name, out->size);
    if (out->local_rank >= out->local_size)
        return fail(err, EXIT_CONFIG, "%s is %d and this host has %d ranks (%s): local ranks count from 0",
                    s->local_rank.name, out->local_rank, out->local_size,
                    s->local_size.value != NULL ? s->local_size.name : s->size.name);
    return true;
}

// HOST, HOST:PORT, [IPv6]:PORT or a bare IPv6 address
static inline bool split_address(LaunchSource* s, const char* address, char host[256], Error* err) {
    size_t n = strlen(address);
    const char* colon = strchr(address, ':');
    const char* begin = address;
    if (address[0] == '[') {
        const char* close = strchr(address, ']');
        if (close == NULL || (close[1] != '\0' && close[1] != ':'))
            return fail(err, EXIT_CONFIG, "--master is '%.100s': it must be HOST, HOST:PORT or [IPv6]:PORT",
                        address);
        begin++, n = (size_t)(close - begin);
        if (close[1] == ':') s->port.value = close + 2;
    } else if (colon != NULL && strchr(colon + 1, ':') == NULL) {
        n = (size_t)(colon - begin), s->port.value = colon + 1;
    }
    if (n > 255) n = 0; // launch_from says what a name must be
    memcpy(host, begin, n);
    host[n] = '\0';
    s->host.value = host;
    return true;
}

// Takes the flags out of argv. found: there were any.
static inline bool launch_from_flags(Launch* out, int* argc, char** argv, bool* found, Error* err) {
    LaunchSource s = {{"--rank", NULL},       {"--world-size", NULL}, {"--local-rank", NULL},
                      {"--local-size", NULL}, {"--master", NULL},     {"--master's port", NULL}};
    Setting* flags[4] = {&s.rank, &s.size, &s.local_rank, &s.host};
    char host[256];
    int kept = 0;
    for (int i = 0; i < *argc; i++) {
        bool taken = false;
        for (int f = 0; i > 0 && f < 4 && !taken; f++) {
            size_t n = strlen(flags[f]->name);
            taken = strncmp(argv[i], flags[f]->name, n) == 0 && argv[i][n] == '=';
            if (!taken) continue;
            if (flags[f]->value != NULL)
                return fail(err, EXIT_CONFIG, "%s is given twice, '%.100s' and '%.100s': leave one out",
                            flags[f]->name, flags[f]->value, argv[i] + n + 1);
            flags[f]->value = argv[i] + n + 1;
        }
        *found = *found || taken;
        if (!taken) argv[kept++] = argv[i];
    }
    if (!*found) return true;
    *argc = kept, argv[kept] = NULL;
    if (s.host.value != NULL && !split_address(&s, s.host.value, host, err)) return false;
    return launch_from(out, &s, err);
}

// Two jobs get different ports, and their ranges of ports rarely overlap: below those that Linux hands out
// itself.
static inline int slurm_port(uint64_t job, uint64_t step) {
    return 12000 + CONTROL_PORTS * (int)((job * 7 + step) % 1000);
}

static inline bool launch_from_slurm(Launch* out, Error* err) {
    LaunchSource s = {
        setting_from_environment("SLURM_PROCID"),  setting_from_environment("SLURM_STEP_NUM_TASKS"),
        setting_from_environment("SLURM_LOCALID"), setting_from_environment("SLURM_STEP_TASKS_PER_NODE"),
        setting_from_environment("MASTER_ADDR"),   setting_from_environment("MASTER_PORT")};
    Setting job = setting_from_environment("SLURM_JOB_ID"), step = setting_from_environment("SLURM_STEP_ID"),
            nodes = setting_from_environment("SLURM_STEP_NODELIST"),
            node = setting_from_environment("SLURM_NODEID");
    char host[256], port[16], tasks[16];
    int node_id = 0, num_tasks = 0;
    uint64_t ids[2] = {0, 0};
    if (s.size.value == NULL) s.size = setting_from_environment("SLURM_NTASKS");
    if (s.local_size.value == NULL) s.local_size = setting_from_environment("SLURM_TASKS_PER_NODE");
    if (s.local_rank.value == NULL)
        return fail(err, EXIT_CONFIG,
                    "SLURM_PROCID is '%.100s' and SLURM_LOCALID is not set: start with srun", s.rank.value);
    if (s.local_size.value != NULL) {
        if (node.value != NULL && !setting_number(&node, 0, RANKS_MAX - 1, &node_id, err)) return false;
        if (!tasks_on_node(s.local_size.value, node_id, &num_tasks))
            return fail(err, EXIT_CONFIG, "%s is '%.100s', which does not say how many tasks node %d has",
                        s.local_size.name, s.local_size.value, node_id);
        snprintf(tasks, sizeof tasks, "%d", num_tasks);
        s.local_size.value = tasks;
    }
    if (nodes.value == NULL) nodes = setting_from_environment("SLURM_JOB_NODELIST");
    if (s.host.value == NULL && nodes.value != NULL) {
        if (!nodelist_first(nodes.value, host))
            return fail(err, EXIT_CONFIG, "%s is '%.100s', which is not a list of hosts; set MASTER_ADDR",
                        nodes.name, nodes.value);
        s.host.value = host;
    } else if (s.host.value == NULL) {
        s.host.name = "SLURM_STEP_NODELIST";
    }
    for (int i = 0; s.port.value == NULL && i < 2; i++) {
        const Setting* id = i == 0 ? &job : &step;
        const char* at = id->value;
        if (at != NULL && (!parse_digits(&at, UINT32_MAX, &ids[i]) || *at != '\0'))
            return fail(err, EXIT_CONFIG, "%s is '%.100s': it must be a number", id->name, id->value);
    }
    snprintf(port, sizeof port, "%d", slurm_port(ids[0], ids[1]));
    if (s.port.value == NULL) s.port.value = port;
    return launch_from(out, &s, err);
}

// A step that srun started with as many processes as its variables say. Scripts of sbatch and shells of
// salloc have some of the variables and are one process; a shell may be a step, too, of the number given
// here. The daemons of mpirun are steps of Slurm, whose variables their ranks inherit: OpenMPI's count then.
static inline bool in_slurm_step(void) {
    const char* step = getenv("SLURM_STEP_ID");
    return getenv("SLURM_PROCID") != NULL && step != NULL && strcmp(step, "4294967290") != 0 &&
           getenv("OMPI_COMM_WORLD_RANK") == NULL;
}

// Who this process is. From, in this order: --rank=R --world-size=N --master=HOST[:PORT] [--local-rank=L],
// which are taken out of argv; torchrun's, Slurm's, OpenMPI's environment variables; else rank 0 of 1.
// MASTER_ADDR and MASTER_PORT, where set, also come before what Slurm says. Variables that contradict each
// other are EXIT_CONFIG.
static inline bool launch_find(Launch* out, int* argc, char** argv, Error* err) {
    bool found = false;
    memset(out, 0, sizeof *out);
    out->size = out->local_size = 1;
    strcpy(out->host, "127.0.0.1");
    out->port = LAUNCH_DEFAULT_PORT;
    if (!launch_from_flags(out, argc, argv, &found, err) || found) return !found || err->code == 0;
    if (getenv("RANK") != NULL || getenv("WORLD_SIZE") != NULL) {
        LaunchSource s = {
            setting_from_environment("RANK"),        setting_from_environment("WORLD_SIZE"),
            setting_from_environment("LOCAL_RANK"),  setting_from_environment("LOCAL_WORLD_SIZE"),
            setting_from_environment("MASTER_ADDR"), setting_from_environment("MASTER_PORT")};
        return launch_from(out, &s, err);
    }
    if (in_slurm_step()) return launch_from_slurm(out, err);
    if (getenv("OMPI_COMM_WORLD_RANK") == NULL && getenv("OMPI_COMM_WORLD_SIZE") == NULL) return true;
    LaunchSource s = {setting_from_environment("OMPI_COMM_WORLD_RANK"),
                      setting_from_environment("OMPI_COMM_WORLD_SIZE"),
                      setting_from_environment("OMPI_COMM_WORLD_LOCAL_RANK"),
                      setting_from_environment("OMPI_COMM_WORLD_LOCAL_SIZE"),
                      setting_from_environment("MASTER_ADDR"),
                      setting_from_environment("MASTER_PORT")};
    if (s.host.value == NULL && s.size.value != NULL && s.local_size.value != NULL &&
        strcmp(s.size.value, s.local_size.value) == 0)
        s.host.value = "127.0.0.1"; // all are here
    return launch_from(out, &s, err);
}
