// How a process learns which one of a run it is: the environments of launchers, and flags.
#include "llmc/launch.h" // defines: launch_find, nodelist_first, tasks_on_node
// cmocka's macro fail() would hide ours, so its header comes last
#include <setjmp.h>
#include <cmocka.h>

#include "dev/test/environment.h" // defines: clear_environment

static Launch launch;
static Error error;

// Looks at an environment of these variables, "A=1 B=2", and a command line.
static bool find(const char* variables, const char* command_line) {
    char text[2048], line[512];
    char* argv[16] = {(char*)"program"};
    int argc = 1;
    clear_environment();
    snprintf(text, sizeof text, "%s", variables), snprintf(line, sizeof line, "%s", command_line);
    for (char* word = strtok(text, " "); word != NULL; word = strtok(NULL, " ")) {
        char* equals = strchr(word, '=');
        assert_non_null(equals);
        *equals = '\0';
        setenv(word, equals + 1, 1);
    }
    for (char* word = strtok(line, " "); word != NULL; word = strtok(NULL, " ")) argv[argc++] = word;
    memset(&error, 0, sizeof error);
    bool ok = launch_find(&launch, &argc, argv, &error);
    assert_int_equal(ok, error.code == 0);
    if (ok) { // our flags are gone, others stay
        assert_null(argv[argc]);
        for (int i = 1; i < argc; i++) assert_int_equal(argv[i][0], 'k');
    }
    clear_environment();
    return ok;
}

static void expect_launch(const char* variables, const char* line, int rank, int size, int local_rank,
                          int local_size, const char* host, int port) {
    if (!find(variables, line)) fail_msg("%s %s: %s", variables, line, error.text);
    assert_int_equal(launch.rank, rank);
    assert_int_equal(launch.size, size);
    assert_int_equal(launch.local_rank, local_rank);
    assert_int_equal(launch.local_size, local_size);
    assert_string_equal(launch.host, host);
    assert_int_equal(launch.port, port);
}

static void expect_bad(const char* variables, const char* line, const char* wanted) {
    if (find(variables, line)) fail_msg("accepted: %s %s", variables, line);
    assert_int_equal(error.code, EXIT_CONFIG);
    if (strstr(error.text, wanted) == NULL) fail_msg("no \"%s\" in: %s", wanted, error.text);
}

static void alone_without_launcher(void** state) {
    (void)state;
    expect_launch("", "keep.this=1 kept", 0, 1, 0, 1, "127.0.0.1", 29500);
    assert_false(launch.by_launcher);
    expect_launch("MASTER_ADDR=far LOCAL_RANK=3", "", 0, 1, 0, 1, "127.0.0.1", 29500); // say nothing alone
    assert_false(launch.by_launcher);
}

static void flags(void** state) {
    (void)state;
    expect_launch("", "k1 --rank=3 k2 --world-size=8 --master=node7:1234 k3", 3, 8, 0, 1, "node7", 1234);
    assert_true(launch.by_launcher);
    expect_launch("", "--rank=3 --world-size=8 --master=node7 --local-rank=2", 3, 8, 2, 3, "node7", 29500);
    expect_launch("", "--rank=3 --world-size=8 --master=localhost", 3, 8, 3, 8, "localhost", 29500);
    expect_launch("", "--rank=1 --world-size=2 --master=[fe80::1]:77", 1, 2, 0, 1, "fe80::1", 77);
    expect_launch("", "--rank=1 --world-size=2 --master=[fe80::1]", 1, 2, 0, 1, "fe80::1", 29500);
    expect_launch("", "--rank=1 --world-size=2 --master=fe80::1", 1, 2, 0, 1, "fe80::1", 29500);
    expect_launch("", "--rank=0 --world-size=1", 0, 1, 0, 1, "127.0.0.1", 29500);
    expect_launch("RANK=1 WORLD_SIZE=2", "--rank=0 --world-size=3 --master=a", 0, 3, 0, 1, "a", 29500);
    expect_bad("", "--rank=3 --world-size=8", "--master is not set, and --world-size is 8");
    expect_bad("", "--rank=3 --master=a", "--rank is '3' and --world-size is not set");
    expect_bad("", "--world-size=3 --master=a", "--world-size is '3' and --rank is not set");
    expect_bad("", "--master=a", "--rank is not set");
    expect_bad("", "--rank=3 --rank=4 --world-size=8 --master=a", "--rank is given twice");
    expect_bad("", "--rank=8 --world-size=8 --master=a", "--rank is 8 and --world-size is 8");
    expect_bad("", "--rank=1x --world-size=8 --master=a", "--rank is '1x'");
    expect_bad("", "--rank=-1 --world-size=8 --master=a", "--rank is '-1'");
    expect_bad("", "--rank= --world-size=8 --master=a", "--rank is ''");
    expect_bad("", "--rank=1 --world-size=8 --master=", "--master is ''");
    expect_bad("", "--rank=1 --world-size=8 --master=:5", "--master is ''");
    expect_bad("", "--rank=1 --world-size=8 --master=a:0", "'0'");
    expect_bad("", "--rank=1 --world-size=8 --master=a:65536", "'65536'");
    expect_bad("", "--rank=1 --world-size=8 --master=[::1", "--master is '[::1'");
    expect_bad("", "--rank=1 --world-size=8 --master=a --local-rank=8",
               "--local-size is 9 and --world-size is 8");
}

#define TORCH "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 "
static void torchrun(void** state) {
    (void)state;
    expect_launch(TORCH "MASTER_ADDR=n0 MASTER_PORT=4000 SLURM_PROCID=1 SLURM_STEP_ID=0", "", 5, 8, 1, 4,
                  "n0", 4000);
    assert_true(launch.by_launcher);
    expect_launch("RANK=5 WORLD_SIZE=8 MASTER_ADDR=n0", "", 5, 8, 0, 1, "n0", 29500);
    expect_launch("RANK=65535 WORLD_SIZE=65536 MASTER_ADDR=n0", "", 65535, 65536, 0, 1, "n0", 29500);
    expect_bad(TORCH, "", "MASTER_ADDR is not set, and WORLD_SIZE is 8");
    expect_bad("RANK=5", "", "RANK is '5' and WORLD_SIZE is not set");
    expect_bad("WORLD_SIZE=5", "", "WORLD_SIZE is '5' and RANK is not set");
    expect_bad("RANK=8 WORLD_SIZE=8 MASTER_ADDR=a", "", "RANK is 8 and WORLD_SIZE is 8");
    expect_bad("RANK=0 WORLD_SIZE=65537 MASTER_ADDR=a", "", "WORLD_SIZE is '65537'");
    expect_bad("RANK=0 WORLD_SIZE=0 MASTER_ADDR=a", "", "WORLD_SIZE is '0'");
    expect_bad("RANK=0 WORLD_SIZE=99999999999999999999999 MASTER_ADDR=a", "", "WORLD_SIZE is '999");
    expect_bad(TORCH "MASTER_ADDR=n0 MASTER_PORT=http", "", "MASTER_PORT is 'http'");
    expect_bad("RANK=0 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=1 MASTER_ADDR=a", "",
               "LOCAL_RANK is 1 and this host has 1");
    expect_bad("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=3 MASTER_ADDR=a", "",
               "LOCAL_WORLD_SIZE is 3");
    char variables[400] = "RANK=0 WORLD_SIZE=2 MASTER_ADDR=";
    memset(variables + strlen(variables), 'a', 256);
    expect_bad(variables, "", "MASTER_ADDR is 'aaa");
}

#define STEP "SLURM_PROCID=3 SLURM_NTASKS=7 SLURM_LOCALID=1 SLURM_STEP_ID=2 SLURM_JOB_ID=90000123 "
static void slurm(void** state) {
    (void)state;
    int port = slurm_port(90000123, 2);
    assert_in_range(port, 1024, 32000);
    assert_int_not_equal(port, slurm_port(90000123, 3));
    expect_launch(STEP "SLURM_TASKS_PER_NODE=2(x3),1 SLURM_NODEID=1 SLURM_JOB_NODELIST=node[003-010,12],b7",
                  "", 3, 7, 1, 2, "node003", port);
    assert_true(launch.by_launcher);
    expect_launch(STEP "SLURM_STEP_NODELIST=b1 SLURM_JOB_NODELIST=a1", "", 3, 7, 1, 2, "b1", port);
    expect_launch(STEP "SLURM_STEP_NUM_TASKS=4 SLURM_JOB_NODELIST=a1", "", 3, 4, 1, 2, "a1", port);
    expect_launch(STEP "SLURM_TASKS_PER_NODE=7 SLURM_STEP_TASKS_PER_NODE=3,4 SLURM_JOB_NODELIST=a1", "", 3, 7,
                  1, 3, "a1", port);
    expect_launch(STEP "MASTER_ADDR=m MASTER_PORT=99 SLURM_JOB_NODELIST=a1", "", 3, 7, 1, 2, "m", 99);
    // shells of sbatch and salloc, and what mpirun's daemons leave in the environment of their ranks
    expect_launch("SLURM_PROCID=0 SLURM_NTASKS=7 SLURM_LOCALID=0 SLURM_JOB_ID=9", "", 0, 1, 0, 1, "127.0.0.1",
                  29500);
    expect_launch("SLURM_NTASKS=7 SLURM_STEP_ID=1 SLURM_JOB_ID=9", "", 0, 1, 0, 1, "127.0.0.1", 29500);
    expect_launch("SLURM_PROCID=0 SLURM_NTASKS=7 SLURM_LOCALID=0 SLURM_STEP_ID=4294967290", "", 0, 1, 0, 1,
                  "127.0.0.1", 29500);
    assert_false(launch.by_launcher);
    expect_launch(STEP "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 MASTER_ADDR=m", "", 0, 2, 0, 1, "m",
                  29500);
    expect_bad(STEP, "", "SLURM_STEP_NODELIST is not set, and SLURM_NTASKS is 7");
    expect_bad(STEP "SLURM_JOB_NODELIST=node[3", "", "SLURM_JOB_NODELIST is 'node[3'");
    expect_bad(STEP "SLURM_JOB_NODELIST=a SLURM_TASKS_PER_NODE=2(x3 SLURM_NODEID=0", "",
               "SLURM_TASKS_PER_NODE is '2(x3'");
    expect_bad(STEP "SLURM_JOB_NODELIST=a SLURM_TASKS_PER_NODE=1 SLURM_NODEID=0", "", "SLURM_LOCALID is 1");
    expect_bad(STEP "SLURM_JOB_NODELIST=a SLURM_TASKS_PER_NODE=2 SLURM_NODEID=1", "",
               "how many tasks node 1 has");
    expect_bad(STEP "SLURM_JOB_NODELIST=a SLURM_TASKS_PER_NODE=2 SLURM_NODEID=x", "", "SLURM_NODEID is 'x'");
    expect_bad("SLURM_PROCID=3 SLURM_STEP_ID=2 SLURM_NTASKS=8", "", "SLURM_LOCALID is not set");
    expect_bad("SLURM_PROCID=3 SLURM_STEP_ID=2 SLURM_LOCALID=0", "",
               "SLURM_PROCID is '3' and SLURM_NTASKS is not");
    expect_bad("SLURM_PROCID=3 SLURM_STEP_ID=2 SLURM_LOCALID=0 SLURM_NTASKS=8 SLURM_JOB_ID=1_4", "",
               "SLURM_JOB_ID is '1_4'");
}

#define MPI "OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=1 "
static void openmpi(void** state) {
    (void)state;
    expect_launch(MPI "OMPI_COMM_WORLD_LOCAL_SIZE=8", "", 5, 8, 1, 8, "127.0.0.1", 29500);
    assert_true(launch.by_launcher);
    expect_launch(MPI "OMPI_COMM_WORLD_LOCAL_SIZE=4 MASTER_ADDR=a MASTER_PORT=7", "", 5, 8, 1, 4, "a", 7);
    expect_bad(MPI "OMPI_COMM_WORLD_LOCAL_SIZE=4", "",
               "MASTER_ADDR is not set, and OMPI_COMM_WORLD_SIZE is 8");
    expect_bad("OMPI_COMM_WORLD_RANK=1", "", "OMPI_COMM_WORLD_SIZE is not set");
    expect_bad("OMPI_COMM_WORLD_SIZE=1", "", "OMPI_COMM_WORLD_RANK is not set");
}

static void nodelists(void** state) {
    (void)state;
    const char* good[][2] = {{"node[003-010,12],b7", "node003"},
                             {"a", "a"},
                             {"a,b", "a"},
                             {"a[1,3]-x[07-9],c", "a1-x07"},
                             {"x[9]", "x9"},
                             {"a.b-c_d,e", "a.b-c_d"},
                             {"[1-2]", "1"},
                             {"a[1-2]", "a1"},
                             {"n[0a-0f]", "n0a"}};
    const char* bad[] = {"",      ",a", "a[",     "a[1", "a[]",    "a[-1]",
                         "a[,1]", "a]", "a[[1]]", "a b", "a[1.2]", "a/b"};
    char host[256];
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_true(nodelist_first(good[i][0], host));
        assert_string_equal(host, good[i][1]);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (nodelist_first(bad[i], host)) fail_msg("accepted '%s' as %s", bad[i], host);
    char longest[300];
    memset(longest, 'a', sizeof longest), longest[255] = '\0';
    assert_true(nodelist_first(longest, host));
    longest[255] = 'a', longest[256] = '\0';
    assert_false(nodelist_first(longest, host));
}

static void tasks_per_node(void** state) {
    (void)state;
    const char* bad[] = {"",   "x",  "2(",  "2(x",   "2(x3",   "2(3)", "2(x)",
                         "2,", ",2", "2;3", "65537", "2(x3)4", "2 "};
    int expected[] = {2, 2, 2, 1, 16}, tasks;
    for (int node = 0; node < 5; node++) {
        assert_true(tasks_on_node("2(x3),1,16", node, &tasks));
        assert_int_equal(tasks, expected[node]);
    }
    assert_false(tasks_on_node("2(x3),1,16", 5, &tasks));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (tasks_on_node(bad[i], 0, &tasks)) fail_msg("accepted '%s' as %d", bad[i], tasks);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(alone_without_launcher),
        cmocka_unit_test(flags),
        cmocka_unit_test(torchrun),
        cmocka_unit_test(slurm),
        cmocka_unit_test(openmpi),
        cmocka_unit_test(nodelists),
        cmocka_unit_test(tasks_per_node),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
