// Fuzzes what comes from strangers on the network and from launchers.
//
//   size (1), nonce (16), answer (32), ...     a handshake; of it only the answer is the stranger's
//   text                                       Slurm's lists of nodes and of tasks, and --master
//
// No bytes may prove a rank unless they are the answer that this nonce calls for. A host that is accepted is
// a name, and reads back as itself.
#include "llmc/rendezvous.h" // defines: handshake_read, nodelist_first, tasks_on_node, launch_find

static void read_handshake(const uint8_t* data, size_t size) {
    uint8_t answer[HANDSHAKE_BYTES];
    Digest job = job_digest("job", 2), nonce;
    if (size < 1 + sizeof nonce + sizeof answer) return;
    int ranks = 2 + data[0];
    memcpy(nonce.bytes, data + 1, sizeof nonce);
    memcpy(answer, data + 1 + sizeof nonce, sizeof answer);
    int rank = handshake_read(answer, &job, &nonce, ranks);
    if (rank != 0) { // a fuzzer that sees what memcmp compares can do it
        uint8_t right[HANDSHAKE_BYTES];
        CHECK(rank > 0 && rank < ranks);
        handshake_write(right, &job, &nonce, rank, ranks);
        CHECK(memcmp(right, answer, sizeof right) == 0);
    }
    rank = 1 + answer[0] % (ranks - 1);
    handshake_write(answer, &job, &nonce, rank, ranks);
    CHECK(handshake_read(answer, &job, &nonce, ranks) == rank);
    CHECK(handshake_read(answer, &job, &nonce, ranks + 1) == 0);
    answer[data[0] % HANDSHAKE_BYTES] ^= (uint8_t)(1 << data[1] % 8);
    CHECK(handshake_read(answer, &job, &nonce, ranks) == 0);
}

static void read_lists(const char* text) {
    char host[256], again[256];
    int tasks = -1;
    if (nodelist_first(text, host)) {
        CHECK(host[0] != '\0' && strpbrk(host, "[],/ \t\n") == NULL);
        CHECK(nodelist_first(host, again) && strcmp(host, again) == 0);
    }
    for (int node = 0; node < 3; node++)
        if (tasks_on_node(text, node, &tasks)) CHECK(tasks >= 0 && tasks <= RANKS_MAX);
}

static void read_flags(const char* text) {
    char line[512], program[] = "program", rank[] = "--rank=1", size[] = "--world-size=2";
    char* argv[] = {program, line, rank, size, NULL};
    int argc = 4;
    Launch launch;
    Error err = {0};
    snprintf(line, sizeof line, "--master=%s", text);
    bool ok = launch_find(&launch, &argc, argv, &err);
    CHECK(ok == (err.code == 0));
    if (ok)
        CHECK(argc == 1 && launch.rank == 1 && launch.host[0] != '\0' && launch.port > 0 &&
              launch.port < 65536);
    else
        CHECK(err.code == EXIT_CONFIG && err.text[0] != '\0');
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    String text = {NULL, 0, 0};
    string_append_bytes(&text, data, size);
    read_handshake(data, size);
    read_lists(text.data);
    read_flags(text.data);
    free(text.data);
    return 0;
}
