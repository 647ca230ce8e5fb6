// What a run does about a bad step (guard.h): says it, with what was in the batch, and warns, goes on, ends or goes back
// to the newest checkpoint. Every process does the same, since all judged the same numbers.
#pragma once
#include "llmc/guard.h"   // defines: Alarm, guard_describe, guard_rows_after_rewind
#include "llmc/trainer.h" // defines: Trainer, load_or_init, leave_past, event_begin

// Rows of the batch that the log names one by one; the others follow from first_row (data_order.h). Tokens shown.
enum { GUARD_ROWS_LISTED = 16, GUARD_HEAD_TOKENS = 64 };

// ----------------------------------------------------------------------------
// the log

// Where the rows come from, how many documents begin in each, and how the first one begins, decoded.
static inline void guard_event_batch(Trainer* t, String* line, uint64_t first, uint64_t rows) {
    int T = t->run.batch.sequence_length;
    int32_t* tokens = (int32_t*)malloc_check(((size_t)T + 1) * sizeof *tokens);
    String head = {NULL, 0, 0};
    Error unreadable = {0, {0}};
    event_number(line, "first_row", (double)first);
    event_number(line, "rows", (double)rows);
    string_append(line, ",\"batch\":[");
    for (uint64_t i = 0; i < rows && i < GUARD_ROWS_LISTED; i++) {
        RowPlace place = dataloader_locate(&t->train, first + i);
        uint64_t documents = 0;
        string_append(line, "%s{\"row\":%llu", i > 0 ? "," : "", (unsigned long long)(first + i));
        event_text(line, "source", place.source);
        event_text(line, "shard", place.shard->path);
        event_number(line, "token", (double)place.first_token);
        if (dataloader_row(&t->train, first + i, tokens, &unreadable)) {
            for (int k = 0; k < T; k++) documents += tokens[k] == t->eot_id;
            event_number(line, "documents", (double)documents);
            for (int k = 0; i == 0 && t->tokenizer.vocab_size > 0 && k < T && k < GUARD_HEAD_TOKENS; k++) {
                size_t size;
                const char* bytes = token_bytes(&t->tokenizer, (uint32_t)tokens[k], &size);
                string_append_bytes(&head, bytes, size);
            }
        }
        string_append(line, "}");
    }
    string_append(line, "]");
    if (head.data != NULL) event_bytes(line, "text", head.data, head.size);
    free(head.data), free(tokens);
}

// What is wrong and what is done; of bad numbers also what they came from.
static inline void guard_report(Trainer* t, const char* action) {
    const Alarm* a = &t->alarm;
    uint64_t rows = (uint64_t)t->run.batch.global_batch_size, first = t->state.rows - rows;
    char text[512], which[64] = "";
    if (t->control.rank > 0) return;
    guard_describe(a, text);
    if (a->fault == NULL)
        snprintf(which, sizeof which, "rows %llu to %llu | ", (unsigned long long)first,
                 (unsigned long long)(first + rows - 1));
    printf("guard %6llu | %s | %s%s\n", (unsigned long long)t->state.step, text, which, action);
    fflush(stdout);
    String line = event_begin("guard", t->state.step);
    event_text(&line, "what", a->what);
    string_append(&line, ",\"policy\":\"");
    append_choice(&line, find_knob("guard", "policy")->choices, t->run.guard.policy);
    string_append(&line, "\"");
    event_text(&line, "action", action);
    if (a->fault != NULL) {
        event_text(&line, "ranks", a->ranks);
    } else {
        event_number(&line, "value", a->value);
        event_number(&line, "limit", a->limit);
        guard_event_batch(t, &line, first, rows);
    }
    event_end(&t->metrics, &line);
}

// ----------------------------------------------------------------------------
// what is done

// An error that every process has found by itself: the first one says it.
static inline bool guard_end(Trainer* t, const char* why, const char* remedy, Error* err) {
    char text[512];
    guard_describe(&t->alarm, text);
    guard_report(t, "stop");
    t->agreed = true;
    return fail(err, EXIT_INTERNAL, "%s in step %llu: %s; %s", text, (unsigned long long)t->state.step, why,
                remedy);
}

// Behind a step with an alarm. False: the run ends. *rewind: it goes back instead (guard_rewind).
static inline bool guard_act(Trainer* t, bool applied, bool* rewind, Error* err) {
    const RunConfig* run = &t->run;
    int policy = run->guard.policy;
    const RankFault* fault = t->alarm.fault;
    if (policy == GUARD_STOP || (policy == GUARD_SKIP && fault != NULL && fault->stays))
        return guard_end(
            t, "guard.policy ends the run",
            fault != NULL ? fault->remedy : "log.jsonl has the batch; resume with another guard.policy", err);
    if (policy == GUARD_REWIND && t->state.rewinds >= (uint64_t)run->guard.rewind_max)
        return guard_end(t, "guard.rewind_max rewinds were not enough",
                         "lower optimizer.learning_rate or look at the data or the GPUs", err);
    *rewind = policy == GUARD_REWIND;
    guard_report(t, *rewind ? "rewind" : applied ? "applied" : "skipped");
    return true;
}

// Goes back to the newest checkpoint, or to the start where there is none; no save is under way. Behind bad numbers the
// data go on behind their batch, behind a fault of ranks where the checkpoint was.
static inline bool guard_rewind(Trainer* t, Error* err) {
    TrainState bad = t->state;
    bool from_checkpoint;
    flight_phase(PHASE_START, t->state.step);
    if (!load_or_init(t, &from_checkpoint, err)) return false;
    if (t->tier.directory[0] != '\0' && !leave_past(t, err)) return false;
    t->tried_step = t->saved_step;
    t->state.rewinds = bad.rewinds + 1;
    if (t->alarm.fault == NULL) t->state.rows = guard_rows_after_rewind(t->state.rows, bad.rows, &t->run);
    if (t->control.rank > 0) return true;
    line_queue_flush(&t->metrics.queue, 10); // it is read
    telemetry_resume(&t->telemetry, t->metrics.log.path,
                     t->state.step); // steps that are done again count once
    printf("rewound from step %llu to step %llu, row %llu: %llu of at most %d\n",
           (unsigned long long)bad.step, (unsigned long long)t->state.step, (unsigned long long)t->state.rows,
           (unsigned long long)t->state.rewinds, t->run.guard.rewind_max);
    String line = event_begin("rewind", t->state.step);
    event_number(&line, "from_step", (double)bad.step);
    event_number(&line, "row", (double)t->state.rows);
    event_number(&line, "rewinds", (double)t->state.rewinds);
    event_end(&t->metrics, &line);
    return true;
}
