// The knobs of a run config: the struct that holds them, and the table that says all there is to say of each. A knob's
// JSON key is its struct field is its printed label. The table drives defaults, types, ranges, messages (config.h), the
// resolved config that is stored beside a run, and the reference in the README (config_print.h).
#pragma once
#include "llmc/layout.h"       // defines: Layout
#include "llmc/model_config.h" // defines: ModelConfig

enum { CONFIG_TEXT = 1024, MAX_DATA_SOURCES = 32 };
enum ScheduleType { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_WSD, SCHEDULE_CONSTANT };
enum ComputePrecision { COMPUTE_AUTO, COMPUTE_FP32, COMPUTE_TF32, COMPUTE_BF16 };
enum StoredPrecision { STORE_FP32, STORE_BF16 };
enum GuardPolicy { GUARD_SKIP, GUARD_WARN, GUARD_REWIND, GUARD_STOP };
enum ZeroStage { ZERO_NONE, ZERO_OPTIMIZER, ZERO_GRADIENTS, ZERO_PARAMETERS };
enum Recompute {
    RECOMPUTE_NONE,
    RECOMPUTE_ACTIVATION,
    RECOMPUTE_NORM,
    RECOMPUTE_BLOCK
}; // each and all before

typedef struct {
    char name[64], path[CONFIG_TEXT];
    double weight;
} DataSourceConfig;

typedef struct {
    uint64_t seed;
    ModelConfig model;
    struct {
        DataSourceConfig sources[MAX_DATA_SOURCES]; // data.train
        int num_sources;
        char validation[CONFIG_TEXT], tokenizer[CONFIG_TEXT];
        bool document_mask;
    } data;
    struct {
        int micro_batch_size, sequence_length, global_batch_size;
        int recompute; // a Recompute
    } batch;
    struct {
        double learning_rate, beta1, beta2, eps, weight_decay, grad_clip;
    } optimizer;
    struct {
        int type, max_steps, warmup_steps; // type: a ScheduleType
        double decay_fraction, final_lr_fraction;
    } schedule;
    struct {
        int threads;
        bool autotune, cuda_graph;
        int data_parallel_size, context_parallel_size, tensor_parallel_size;
        int pipeline_parallel_size, virtual_pipeline_size;
        int pipeline_schedule; // a PipelineSchedule
        int zero_stage;        // a ZeroStage
        bool deterministic, automatic;
        bool self_test;
        int start_timeout; // seconds
        int hang_seconds_min, hang_seconds_max;
    } parallel;
    Layout layout; // where this process is in it; not a knob
    struct {
        int compute;                            // a ComputePrecision; COMPUTE_AUTO until gpt_resolve
        int master_weights, gradients, moments; // StoredPrecision
        bool fused_gelu;
    } precision;
    struct {
        int every, keep_last, permanent_every, fast_every;
        double minutes, failures_per_day;
        char load_from[CONFIG_TEXT], fast_dir[CONFIG_TEXT];
    } checkpoint;
    struct {
        int max_skipped_steps, policy; // policy: a GuardPolicy
        double sigma;
        int window, rewind_max, rewind_skip, check_every, replay_every;
    } guard;
    struct {
        char run_dir[CONFIG_TEXT];
        int every, layers_every;
        bool tensorboard;
    } log;
    struct {
        int every, batches;
    } eval;
    struct {
        int every;
        char prompt[CONFIG_TEXT];
        int max_new_tokens;
        double temperature;
        int top_k;
        double top_p;
        uint64_t seed;
        int num_samples;
    } sample;
} RunConfig;

// ----------------------------------------------------------------------------
// the knobs

enum KnobType {
    KNOB_INT,
    KNOB_U64,
    KNOB_NUMBER,
    KNOB_BOOL,
    KNOB_TEXT,
    KNOB_CHOICE,
    KNOB_SOURCES,
    KNOB_MODEL
};

typedef struct {
    const char *section, *key; // section "": the top level
    enum KnobType type;
    size_t offset;
    const char* standard; // the default as JSON; NULL: must be given
    double min, max;
    const char* choices; // "a|b|c"
    const char* meaning;
} Knob;

#define STEPS_MAX 2000000000
#define SEED_MAX 9007199254740991.0 // JSON's numbers are doubles: whole to 2^53 - 1

// clang-format off
#define AT(field) offsetof(RunConfig, field)
static const Knob knobs[] = {
    {"", "seed", KNOB_U64, AT(seed), "1", 0, SEED_MAX, NULL,
        "initial weights and order of the data"},
    {"", "model", KNOB_MODEL, AT(model), NULL, 0, 0, NULL,
        "the keys of a Hugging Face `config.json`, or the path of one, which `model.key=value` then changes"},
    {"data", "train", KNOB_SOURCES, AT(data.sources), NULL, 0, 0, NULL,
        "token shards to train on; several sources are mixed by weight"},
    {"data", "validation", KNOB_TEXT, AT(data.validation), "\"\"", 0, 0, NULL,
        "glob of the validation shards; empty: no evaluation"},
    {"data", "tokenizer", KNOB_TEXT, AT(data.tokenizer), "\"\"", 0, 0, NULL,
        "`tokenizer.json`, a `.tiktoken` file, or a directory with either or GPT-2's two files; for samples"},
    {"data", "document_mask", KNOB_BOOL, AT(data.document_mask), "false", 0, 0, NULL,
        "attention stays inside a document"},
    {"batch", "micro_batch_size", KNOB_INT, AT(batch.micro_batch_size), NULL, 1, 65536, NULL,
        "sequences in one forward and backward pass (B)"},
    {"batch", "sequence_length", KNOB_INT, AT(batch.sequence_length), NULL, 1, 1 << 24, NULL,
        "tokens in a sequence (T); at most `model.max_position_embeddings`"},
    {"batch", "global_batch_size", KNOB_INT, AT(batch.global_batch_size), "0", 0, 1 << 24, NULL,
        "sequences in an optimizer step, a multiple of `micro_batch_size`; 0: the same"},
    {"batch", "recompute", KNOB_CHOICE, AT(batch.recompute), "\"none\"", 0, 0, "none|activation|norm|block",
        "GPU: what the backward pass computes again instead of keeping; each includes those before it"},
    {"optimizer", "learning_rate", KNOB_NUMBER, AT(optimizer.learning_rate), NULL, 0, 100, NULL,
        "AdamW's, at the peak of the schedule"},
    {"optimizer", "beta1", KNOB_NUMBER, AT(optimizer.beta1), "0.9", 0, 0.999999, NULL,
        "decay of the first moment"},
    {"optimizer", "beta2", KNOB_NUMBER, AT(optimizer.beta2), "0.95", 0, 0.999999, NULL,
        "decay of the second moment"},
    {"optimizer", "eps", KNOB_NUMBER, AT(optimizer.eps), "1e-8", 1e-30, 1, NULL,
        "keeps the division by the second moment's root finite"},
    {"optimizer", "weight_decay", KNOB_NUMBER, AT(optimizer.weight_decay), "0.1", 0, 100, NULL,
        "decoupled; on matrices, not on biases and norms"},
    {"optimizer", "grad_clip", KNOB_NUMBER, AT(optimizer.grad_clip), "1.0", 0, 1e9, NULL,
        "largest global gradient norm; 0: no clipping"},
    {"schedule", "type", KNOB_CHOICE, AT(schedule.type), "\"cosine\"", 0, 0, "cosine|linear|wsd|constant",
        "shape of the learning rate behind the warm-up"},
    {"schedule", "max_steps", KNOB_INT, AT(schedule.max_steps), NULL, 1, STEPS_MAX, NULL,
        "optimizer steps of the whole run"},
    {"schedule", "warmup_steps", KNOB_INT, AT(schedule.warmup_steps), "0", 0, STEPS_MAX, NULL,
        "steps of linear warm-up; at most `max_steps`"},
    {"schedule", "decay_fraction", KNOB_NUMBER, AT(schedule.decay_fraction), "0.2", 0, 1, NULL,
        "wsd: share of `max_steps`, at the end, that decays"},
    {"schedule", "final_lr_fraction", KNOB_NUMBER, AT(schedule.final_lr_fraction), "0.1", 0, 1, NULL,
        "learning rate of the last step, as a share of the peak; not for constant"},
    {"parallel", "threads", KNOB_INT, AT(parallel.threads), "0", 0, 1024, NULL,
        "CPU threads; 0: one for each core"},
    {"parallel", "autotune", KNOB_BOOL, AT(parallel.autotune), "false", 0, 0, NULL,
        "GPU: time the matmul's algorithms on first use and keep the choice beside the run"},
    {"parallel", "cuda_graph", KNOB_BOOL, AT(parallel.cuda_graph), "false", 0, 0, NULL,
        "GPU: launch a micro-batch as one CUDA graph"},
    {"parallel", "data_parallel_size", KNOB_INT, AT(parallel.data_parallel_size), "0", 0, 65536, NULL,
        "GPU: ranks that share a batch; 0: all that the other sizes leave"},
    {"parallel", "context_parallel_size", KNOB_INT, AT(parallel.context_parallel_size), "1", 1, 1024, NULL,
        "GPU: ranks that share every sequence, each with two parts of it"},
    {"parallel", "tensor_parallel_size", KNOB_INT, AT(parallel.tensor_parallel_size), "1", 1, 1024, NULL,
        "GPU: ranks that share every layer, and the sequence between layers"},
    {"parallel", "pipeline_parallel_size", KNOB_INT, AT(parallel.pipeline_parallel_size), "1", 1, 1024, NULL,
        "GPU: stages that the layers are divided into"},
    {"parallel", "virtual_pipeline_size", KNOB_INT, AT(parallel.virtual_pipeline_size), "1", 1, 1024, NULL,
        "GPU: parts of the model that a stage has, in turn with the others; more than 1: interleaved"},
    {"parallel", "pipeline_schedule", KNOB_CHOICE, AT(parallel.pipeline_schedule), "\"1f1b\"", 0, 0,
        "afab|1f1b|interleaved|zero_bubble", "GPU: the order of a stage's forward and backward passes"},
    {"parallel", "zero_stage", KNOB_INT, AT(parallel.zero_stage), "1", 0, 3, NULL,
        "GPU: what data-parallel ranks share out: 1 optimizer state, 2 gradients too, 3 weights too"},
    {"parallel", "deterministic", KNOB_BOOL, AT(parallel.deterministic), "false", 0, 0, NULL,
        "GPU: gradients add up in the order of micro-batches: the same bits for any `data_parallel_size`"},
    {"parallel", "automatic", KNOB_BOOL, AT(parallel.automatic), "false", 0, 0, NULL,
        "GPU: takes the fastest layout that fits, by `layouts`; the sizes and `zero_stage` above do not count"},
    {"parallel", "self_test", KNOB_BOOL, AT(parallel.self_test), "false", 0, 0, NULL,
        "GPU: before training, is memory whole, is a matmul right, is a rank much slower than the others?"},
    {"parallel", "start_timeout", KNOB_INT, AT(parallel.start_timeout), "300", 1, 86400, NULL,
        "seconds that ranks wait for each other at the start"},
    {"parallel", "hang_seconds_min", KNOB_INT, AT(parallel.hang_seconds_min), "60", 3, 86400, NULL,
        "a rank that is silent for so long ends the run; so does one that takes 5 times as long as lately, and this long"},
    {"parallel", "hang_seconds_max", KNOB_INT, AT(parallel.hang_seconds_max), "1800", 0, 864000, NULL,
        "a rank ends the run that takes so long for a step, a save or its start; 0: nobody watches"},
    {"precision", "compute", KNOB_CHOICE, AT(precision.compute), "\"auto\"", 0, 0, "auto|fp32|tf32|bf16",
        "what the inputs of matmuls are rounded to, sums are fp32; auto: bf16 in `train_gpt`, else fp32"},
    {"precision", "master_weights", KNOB_CHOICE, AT(precision.master_weights), "\"fp32\"", 0, 0, "fp32|bf16",
        "the weights that the optimizer changes; bf16 (GPU): with stochastic rounding"},
    {"precision", "gradients", KNOB_CHOICE, AT(precision.gradients), "\"fp32\"", 0, 0, "fp32|bf16",
        "what micro-batches add up their gradients in; bf16: GPU"},
    {"precision", "moments", KNOB_CHOICE, AT(precision.moments), "\"fp32\"", 0, 0, "fp32|bf16",
        "AdamW's moments; bf16 (GPU): with stochastic rounding"},
    {"precision", "fused_gelu", KNOB_BOOL, AT(precision.fused_gelu), "true", 0, 0, NULL,
        "GPU: GELU inside the matmul, from its fp32 sum; not with `batch.recompute` activation or norm"},
    {"checkpoint", "every", KNOB_INT, AT(checkpoint.every), "0", 0, STEPS_MAX, NULL,
        "steps between checkpoints; 0: only at the end"},
    {"checkpoint", "minutes", KNOB_NUMBER, AT(checkpoint.minutes), "0", 0, 1e6, NULL,
        "minutes between checkpoints, besides; 0: time does not count"},
    {"checkpoint", "failures_per_day", KNOB_NUMBER, AT(checkpoint.failures_per_day), "0", 0, 1e4, NULL,
        "of the whole job: as often as loses the least time (Young), besides; 0: does not count"},
    {"checkpoint", "keep_last", KNOB_INT, AT(checkpoint.keep_last), "2", 1, 1000000, NULL,
        "newest checkpoints that are kept"},
    {"checkpoint", "permanent_every", KNOB_INT, AT(checkpoint.permanent_every), "0", 0, STEPS_MAX, NULL,
        "checkpoints of every so many steps stay for good, a multiple of `every`; 0: none does"},
    {"checkpoint", "fast_dir", KNOB_TEXT, AT(checkpoint.fast_dir), "\"\"", 0, 0, NULL,
        "directory on a disk of each node: checkpoints are written there first, then copied beside training"},
    {"checkpoint", "fast_every", KNOB_INT, AT(checkpoint.fast_every), "0", 0, STEPS_MAX, NULL,
        "steps between checkpoints that stay in `fast_dir`, besides; 0: none does"},
    {"checkpoint", "load_from", KNOB_TEXT, AT(checkpoint.load_from), "\"\"", 0, 0, NULL,
        "a checkpoint or Hugging Face model directory with weights to start from, evaluate or export"},
    {"guard", "max_skipped_steps", KNOB_INT, AT(guard.max_skipped_steps), "10", 1, 1000000, NULL,
        "steps in a row that are skipped before the run gives up"},
    {"guard", "policy", KNOB_CHOICE, AT(guard.policy), "\"skip\"", 0, 0, "skip|warn|rewind|stop",
        "of a bad step: leave it out, apply it all the same if finite, go back to a checkpoint, end the run"},
    {"guard", "sigma", KNOB_NUMBER, AT(guard.sigma), "0", 0, 1e6, NULL,
        "standard deviations above the mean from which a loss or gradient norm is a spike; 0: none is"},
    {"guard", "window", KNOB_INT, AT(guard.window), "128", 8, 1000000, NULL,
        "steps of that mean and deviation, exponentially weighted; without so many there are no spikes"},
    {"guard", "rewind_max", KNOB_INT, AT(guard.rewind_max), "10", 1, 1000000, NULL,
        "rewinds of the whole run before it ends (70)"},
    {"guard", "rewind_skip", KNOB_INT, AT(guard.rewind_skip), "0", 0, 1000000, NULL,
        "batches that a rewind leaves out from its checkpoint on; at least all up to the bad one"},
    {"guard", "check_every", KNOB_INT, AT(guard.check_every), "0", 0, STEPS_MAX, NULL,
        "GPU: steps between comparisons of the weights of data-parallel ranks, ZeRO 0 to 2; 0: none"},
    {"guard", "replay_every", KNOB_INT, AT(guard.replay_every), "0", 0, STEPS_MAX, NULL,
        "GPU: steps between steps that are computed twice and compared to the bit; 0: none"},
    {"log", "run_dir", KNOB_TEXT, AT(log.run_dir), NULL, 0, 0, NULL,
        "directory of the run: `log.jsonl`, `run_config.json`, `checkpoints/`"},
    {"log", "every", KNOB_INT, AT(log.every), "1", 1, STEPS_MAX, NULL,
        "steps between lines of the log"},
    {"log", "layers_every", KNOB_INT, AT(log.layers_every), "0", 0, STEPS_MAX, NULL,
        "steps between lines with each layer's gradient, weight and update norms and size of activations; 0: none"},
    {"log", "tensorboard", KNOB_BOOL, AT(log.tensorboard), "false", 0, 0, NULL,
        "also write what TensorBoard reads, to `tensorboard/` in `run_dir`"},
    {"eval", "every", KNOB_INT, AT(eval.every), "0", 0, STEPS_MAX, NULL,
        "steps between evaluations on `data.validation`; 0: only at the end"},
    {"eval", "batches", KNOB_INT, AT(eval.batches), "0", 0, STEPS_MAX, NULL,
        "micro-batches of an evaluation; 0: the whole validation set"},
    {"sample", "every", KNOB_INT, AT(sample.every), "0", 0, STEPS_MAX, NULL,
        "steps between samples; 0: none during training"},
    {"sample", "prompt", KNOB_TEXT, AT(sample.prompt), "\"\"", 0, 0, NULL,
        "text to continue"},
    {"sample", "max_new_tokens", KNOB_INT, AT(sample.max_new_tokens), "128", 1, 1 << 24, NULL,
        "a sample ends there, at the end of text, or at `model.max_position_embeddings`"},
    {"sample", "temperature", KNOB_NUMBER, AT(sample.temperature), "1.0", 0, 100, NULL,
        "divides the logits; 0: always the most probable token"},
    {"sample", "top_k", KNOB_INT, AT(sample.top_k), "0", 0, 1 << 24, NULL,
        "only the k most probable tokens; 0: all"},
    {"sample", "top_p", KNOB_NUMBER, AT(sample.top_p), "1.0", 0, 1, NULL,
        "only the most probable tokens that together hold this share; 1: all"},
    {"sample", "seed", KNOB_U64, AT(sample.seed), "1", 0, SEED_MAX, NULL,
        "the same seed, the same text"},
    {"sample", "num_samples", KNOB_INT, AT(sample.num_samples), "1", 1, 10000, NULL,
        "texts to generate"},
};
#undef AT
// clang-format on
enum { NUM_KNOBS = sizeof knobs / sizeof knobs[0] };

static inline const Knob* find_knob(const char* section, const char* key) {
    for (int i = 0; i < NUM_KNOBS; i++)
        if (strcmp(knobs[i].section, section) == 0 && strcmp(knobs[i].key, key) == 0) return &knobs[i];
    return NULL;
}

static inline bool is_section(const char* name) {
    for (int i = 0; i < NUM_KNOBS; i++)
        if (name[0] != '\0' && strcmp(knobs[i].section, name) == 0) return true;
    return false;
}
