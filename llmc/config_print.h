// A run config written out: as the resolved JSON that is stored beside a run (it parses back to the same
// struct), as the table at a run's start, and as the reference in the README. All three walk the knob table.
#pragma once
#include "llmc/config.h" // defines: RunConfig, Knob, knobs

// The n-th of "a|b|c"
static inline void append_choice(String* out, const char* choices, int n) {
    while (n-- > 0) choices = strchr(choices, '|') + 1;
    string_append_bytes(out, choices, (size_t)(strchrnul(choices, '|') - choices));
}

// One value as JSON
static inline void knob_write(String* out, const RunConfig* run, const Knob* k) {
    const char* field = (const char*)run + k->offset;
    switch (k->type) {
    case KNOB_INT: string_append(out, "%d", *(const int*)field); return;
    case KNOB_U64: string_append(out, "%llu", (unsigned long long)*(const uint64_t*)field); return;
    case KNOB_NUMBER: json_append_number(out, *(const double*)field); return;
    case KNOB_BOOL: string_append(out, "%s", *(const bool*)field ? "true" : "false"); return;
    case KNOB_TEXT: json_append_string(out, field); return;
    case KNOB_CHOICE:
        string_append(out, "\"");
        append_choice(out, k->choices, *(const int*)field);
        string_append(out, "\"");
        return;
    }
}

static inline void config_write_sources(const RunConfig* run, String* out) {
    string_append(out, "[");
    for (int i = 0; i < run->data.num_sources; i++) {
        const DataSourceConfig* s = &run->data.sources[i];
        string_append(out, "%s{\"name\": ", i > 0 ? ", " : "");
        json_append_string(out, s->name);
        string_append(out, ", \"path\": ");
        json_append_string(out, s->path);
        string_append(out, ", \"weight\": ");
        json_append_number(out, s->weight);
        string_append(out, "}");
    }
    string_append(out, "]");
}

// On one line, as log.jsonl and state files want it.
static inline void config_write_json(const RunConfig* run, String* out) {
    String model = {NULL, 0, 0};
    model_config_write_json(&run->model, &model);
    for (size_t i = 0; i < model.size; i++)
        if (model.data[i] == '\n') model.data[i] = ' '; // names and numbers: no text in it has a newline
    string_append(out, "{");
    const char* section = "";
    for (int i = 0; i < NUM_KNOBS; i++) {
        const Knob* k = &knobs[i];
        bool begins = strcmp(k->section, section) != 0;
        if (begins) string_append(out, "%s, \"%s\": {", section[0] != '\0' ? "}" : "", k->section);
        if (begins && strcmp(k->section, "data") == 0) {
            string_append(out, "\"train\": ");
            config_write_sources(run, out);
            string_append(out, ", ");
        } else if (!begins && i > 0) string_append(out, ", ");
        string_append(out, "\"%s\": ", k->key);
        knob_write(out, run, k);
        section = k->section;
    }
    string_append(out, "}, \"model\": %s}", model.data);
    free(model.data);
}

static inline void config_print(const RunConfig* run, FILE* out) {
    String text = {NULL, 0, 0};
    model_config_write_json(&run->model, &text);
    fprintf(out, "model %s\n", text.data);
    for (int i = 0; i < run->data.num_sources; i++)
        fprintf(out, "%-28s %s, weight %g\n", "data.train", run->data.sources[i].path, run->data.sources[i].weight);
    for (int i = 0; i < NUM_KNOBS; i++) {
        char label[80];
        text.size = 0;
        knob_write(&text, run, &knobs[i]);
        snprintf(label, sizeof label, "%s%s%s", knobs[i].section, knobs[i].section[0] != '\0' ? "." : "", knobs[i].key);
        fprintf(out, "%-28s %s\n", label, text.data);
    }
    free(text.data);
}

// Markdown, as the README shows it (a test compares)
static inline void config_print_reference(FILE* out) {
    fprintf(out, "| key | default | possible | meaning |\n| --- | --- | --- | --- |\n");
    fprintf(out, "| `model` | required | an object, or a path | Hugging Face's `config.json`: `model_type` (gpt2, llama, "
                 "mistral, qwen2), `vocab_size`, `hidden_size`, `num_hidden_layers`, `num_attention_heads`, ... |\n");
    fprintf(out, "| `data.train` | required | a glob, or an array of `{\"name\", \"path\", \"weight\"}` | token shards to "
                 "train on |\n");
    for (int i = 0; i < NUM_KNOBS; i++) {
        const Knob* k = &knobs[i];
        fprintf(out, "| `%s%s%s` | %s%s%s | ", k->section, k->section[0] != '\0' ? "." : "", k->key,
                k->standard != NULL ? "`" : "", k->standard != NULL ? k->standard : "required",
                k->standard != NULL ? "`" : "");
        if (k->type == KNOB_CHOICE)
            for (const char* c = k->choices; *c != '\0'; c++) fprintf(out, *c == '|' ? ", " : "%c", *c);
        else if (k->type == KNOB_BOOL) fprintf(out, "true, false");
        else if (k->type == KNOB_TEXT) fprintf(out, "text");
        else fprintf(out, "%s%.15g to %.15g", k->type == KNOB_NUMBER ? "" : "whole, ", k->min, k->max);
        fprintf(out, " | %s |\n", k->meaning);
    }
}
