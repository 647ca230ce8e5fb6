// NCCL between processes: `dev/emu/launch -n N ranks CASE [VARIANT]`. Every rank checks what it gets and exits
// with 1 if something is wrong. RANKS_ID names the file through which the unique id is handed around.
#include "dev/test/emu/ranks_clock.cuh"   // defines: case_clock
#include "dev/test/emu/ranks_failing.cuh" // defines: case_mismatch, case_killed, case_missing
#include "dev/test/emu/ranks_results.cuh" // defines: case_collectives, case_messages, case_split ...

int main(int argc, char** argv) {
    static const struct {
        const char* name;
        void (*run)(void);
    } cases[] = {{"collectives", case_collectives}, {"messages", case_messages}, {"split", case_split},
                 {"nonblocking", case_nonblocking}, {"streams", case_streams},   {"crossed", case_crossed},
                 {"capture", case_capture},         {"mismatch", case_mismatch}, {"killed", case_killed},
                 {"missing", case_missing},         {"traffic", case_traffic},   {"clock", case_clock}};
    rank = atoi(getenv("RANK")), ranks = atoi(getenv("WORLD_SIZE"));
    setvbuf(stdout, NULL, _IOLBF, 0);
    OK(cudaSetDevice(rank));
    if (argc > 2) variant = argv[2];
    for (const auto& c : cases)
        if (argc > 1 && strcmp(argv[1], c.name) == 0) {
            c.run();
            destroy_streams_and_events();
            return wrong > 0;
        }
    printf("no such case\n");
    return 2;
}
