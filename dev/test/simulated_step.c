// Seconds of a step as llmc/layout_plan.h simulates it, at given rates, where only matmuls and messages take time: what
// dev/emu's virtual clock counts. For e2e_overlap.sh:
//
//     simulated_step FLOPS LINK_BYTES_PER_S LATENCY RANKS CONFIG [KEY=VALUE ...]
#include "llmc/layout_plan.h" // defines: layout_cost, layout_resolve

int main(int argc, char** argv) {
    static RunConfig run;
    Error err = {0, {0}};
    if (argc < 6)
        fail(&err, EXIT_USAGE, "usage: simulated_step FLOPS LINK LATENCY RANKS CONFIG [KEY=VALUE ...]");
    if (err.code != 0 || !config_load(&run, argv[5], argc - 6, argv + 6, &err) ||
        !layout_resolve(&run, 0, atoi(argv[4]), &err))
        exit_with(&err);
    // as many rows in sequences of one token for each rank leave next to nothing of attention
    int cp = run.layout.cp_size, tokens = run.batch.sequence_length / cp;
    run.batch.micro_batch_size *= tokens, run.batch.global_batch_size *= tokens;
    run.batch.sequence_length = cp;
    double link = atof(argv[2]);
    LayoutRates rates = {atof(argv[1]), INFINITY, link, link, atof(argv[3]), run.layout.size, false};
    printf("%.9g\n", layout_cost(&run, &run.layout, rates).seconds);
    return EXIT_OK;
}
