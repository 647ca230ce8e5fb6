// (being written) the API:
typedef struct {
    uint64_t step;                // optimizer steps done
    uint64_t tokens;              // seen so far
    uint64_t rows;                // next global row of the data order
    uint64_t data_fingerprint;    // of the data that rows counts in
    uint64_t skipped_steps;       // by the guard, in all
    uint64_t consecutive_skipped; // by the guard, up to now without a break
} TrainState;

typedef struct {
    const ModelConfig* model;
    float* params;              // (num_parameters), laid out by parameter_layout; fp32, the master weights
    float *m, *v;               // the same, AdamW's moments; NULL: the model alone
    TrainState state;
    const char* config_json;    // the resolved run config, stored as run_config.json; not read back
    const char* tokenizer_path; // a tokenizer.json to store with the model, "" or NULL: none; not read back
} CheckpointData;

bool checkpoint_save(const char* checkpoints_dir, const CheckpointData* data, int keep_last,
                     uint64_t permanent_every, Error* err);
bool checkpoint_load_newest(const char* checkpoints_dir, CheckpointData* into, bool* found, Error* err);
bool checkpoint_load(const char* dir, CheckpointData* into, Error* err);
bool checkpoint_export(const char* dir, const CheckpointData* data, Error* err);
// llmc/checkpoint_tool.h: print to stdout / stderr, return the exit code
int checkpoint_verify(const char* dir);
int checkpoint_info(const char* dir);
int checkpoint_diff(const char* a, const char* b);
