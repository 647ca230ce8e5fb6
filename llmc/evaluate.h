// What a model has learnt: its loss on the validation set, and text that it continues.
#pragma once
#include "llmc/sampler.h" // defines: sample_token, Candidate
#include "llmc/stop.h"    // defines: stop_requested
#include "llmc/trainer.h" // defines: Trainer, gpt_losses, decoder_step ...

typedef struct {
    double loss, perplexity, bits_per_byte; // bits_per_byte is NaN without a tokenizer
    uint64_t tokens;
    bool cut; // short, by a stop signal of some process: the rest is worth nothing
} Evaluation;

// Adds up `count` numbers of all processes, in their order.
static inline bool sum_everywhere(Control* control, double* sums, int count, Error* err) {
    size_t bytes = (size_t)count * sizeof *sums;
    double* all = (double*)calloc_check((size_t)control->size, bytes);
    bool ok = control_gather(control, sums, bytes, all, err);
    for (int k = 0; ok && control->rank == 0 && k < count; k++) {
        sums[k] = 0;
        for (int r = 0; r < control->size; r++) sums[k] += all[count * r + k];
    }
    free(all);
    return ok && control_broadcast(control, sums, bytes, err);
}

// Whether a stop signal has come to any process, which they ask together. It takes the first one a time that grows with
// their number, a few microseconds each.
static inline bool stop_anywhere(Control* control, bool* stop, Error* err) {
    double signals = stop_requested();
    bool ok = sum_everywhere(control, &signals, 1, err);
    *stop = ok && signals > 0;
    return ok;
}

enum { ASKED_IN_A_ROUND = 32 }; // processes; more are asked less often

// Mean loss over the validation set, or over its first eval.batches micro-batches, which data-parallel ranks take in
// turn.
static inline bool evaluate(Trainer* t, Evaluation* e, Error* err) {
    int B = t->run.batch.micro_batch_size, T = t->run.batch.sequence_length;
    uint64_t num_rows = t->validation.rows, limit = (uint64_t)t->run.eval.batches * (uint64_t)B;
    if (limit != 0 && limit < num_rows) num_rows = limit;
    size_t row = (size_t)T + 1;
    int32_t* rows = (int32_t*)malloc_check((size_t)B * row * sizeof *rows);
    const Layout* l = &t->run.layout;
    double sums[3] = {0, 0, 0}; // loss; loss of, and number of, bytes
    bool ok = true;
    // every rank makes every round, as it may have to help
    uint64_t together = (uint64_t)B * (uint64_t)num_replicas(l),
             ask_every = 1 + (uint64_t)t->control.size / ASKED_IN_A_ROUND;
    e->cut = false;
    for (uint64_t round = 0; ok && round < num_rows; round += together) {
        flight_phase(PHASE_EVAL, t->state.step);
        if (round / together % ask_every == 0) ok = stop_anywhere(&t->control, &e->cut, err);
        if (!ok || e->cut) break;
        uint64_t first = round + (uint64_t)B * (uint64_t)replica(l),
                 left = first < num_rows ? num_rows - first : 0;
        int now = left < (uint64_t)B ? (int)left : B, counted = now;
        if (now == 0) first = 0, now = 1;
        for (int b = 0; ok && b < now; b++)
            ok = dataloader_row(&t->validation, first + (uint64_t)b, rows + (size_t)b * row, err);
        if (!ok) break;
        const float* losses = gpt_losses(t->gpt, rows, now, t->run.data.document_mask, t->eot_id);
        for (int i = 0; losses != NULL && l->tp == 0 && i < counted * T; i++) {
            int32_t target = rows[(size_t)(i / T) * row + (size_t)(i % T) + 1];
            uint32_t length = token_byte_length(&t->tokenizer, (uint32_t)target);
            sums[0] += losses[i];
            sums[2] += length;
            if (length != 0) sums[1] += losses[i];
        }
    }
    free(rows);
    ok = ok && (e->cut || sum_everywhere(&t->control, sums, 3, err));
    double loss = sums[0], byte_loss = sums[1], bytes = sums[2];
    e->tokens = num_rows * (uint64_t)T;
    e->loss = loss / (double)e->tokens;
    e->perplexity = exp(e->loss);
    e->bits_per_byte = bytes > 0 ? byte_loss / bytes / M_LN2 : NAN;
    return ok;
}

// The prompt's tokens, behind the token that begins every document in our shards. The caller frees
// tokens->data.
static inline bool prompt_tokens(const Trainer* t, Tokens* tokens, Error* err) {
    const char* prompt = t->run.sample.prompt;
    int room = t->run.model.max_position_embeddings;
    uint32_t eot = (uint32_t)t->tokenizer.eot_id;
    Encoder encoder;
    encoder_init(&encoder, &t->tokenizer);
    if (t->tokenizer.eot_id >= 0) tokens_append(tokens, &eot, 1);
    encode(&encoder, prompt, strlen(prompt), tokens);
    encoder_free(&encoder);
    if (tokens->size > 0 && tokens->size < (size_t)room) return true;
    return fail(err, EXIT_CONFIG, "sample.prompt is %zu tokens long; 1 to %d are possible with this model",
                tokens->size, room - 1);
}

// Continues the prompt; the text (decoded, prompt included) is appended to out. A stop signal cuts it short.
static inline bool generate(Trainer* t, int number, String* out, Error* err) {
    const RunConfig* run = &t->run;
    int V = run->model.vocab_size, room = run->model.max_position_embeddings;
    int64_t eot = t->tokenizer.eot_id;
    Tokens tokens = {NULL, 0, 0};
    if (!prompt_tokens(t, &tokens, err)) {
        free(tokens.data);
        return false;
    }
    int capacity = (int)tokens.size + run->sample.max_new_tokens;
    capacity = capacity < room ? capacity : room;
    Decoder* decoder = t->program->decoder;
    decoder_create(decoder, t->gpt, capacity);
    Candidate* candidates = (Candidate*)malloc_check((size_t)V * sizeof *candidates);
    for (size_t i = 0; i < tokens.size && !stop_requested(); i++) {
        decoder_step(decoder, (int)tokens.data[i]);
        if (tokens.data[i] != (uint32_t)eot) {
            size_t size;
            const char* bytes = token_bytes(&t->tokenizer, tokens.data[i], &size);
            string_append_bytes(out, bytes, size);
        }
        if (i + 1 < tokens.size || tokens.size == (size_t)capacity) continue;
        double u = random_uniform(run->sample.seed, RANDOM_SAMPLE, (uint64_t)number, tokens.size);
        int next = sample_token(decoder_logits(decoder), V, run->sample.temperature, run->sample.top_k,
                                run->sample.top_p, u, candidates);
        if (next == eot || next == run->model.eos_token_id) break;
        uint32_t id = (uint32_t)next;
        tokens_append(&tokens, &id, 1);
    }
    free(candidates), free(tokens.data);
    decoder_free(decoder);
    return true;
}
