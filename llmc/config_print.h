// A run config written out: as the resolved JSON that is stored beside a run (it parses back to the same
// struct), as the table at a run's start, and as the reference in the README. All walk the tables of keys.
#pragma once
#include "llmc/config.h" // defines: RunConfig, Knob, knobs

// ----------------------------------------------------------------------------
// the resolved config

// The name of choice n.
static inline void append_choice(String* out, const char* choices, int n) {
    while (n-- > 0) choices = strchr(choices, '|') + 1;
    string_append(out, "%.*s", (int)strcspn(choices, "|"), choices);
}

static inline void append_sources(String* out, const RunConfig* run) {
    for (int i = 0; i < run->data.num_sources; i++) {
        const DataSourceConfig* s = &run->data.sources[i];
        string_append(out, "%s{\"name\": ", i == 0 ? "[" : ", ");
        json_append_string(out, s->name);
        string_append(out, ", \"path\": ");
        json_append_string(out, s->path);
        string_append(out, ", \"weight\": ");
        json_append_number(out, s->weight);
        string_append(out, "}");
    }
    string_append(out, "]");
}

// config.json on one line: no text in it, all names of the field, holds a newline.
static inline void append_model(String* out, const ModelConfig* model) {
    size_t end = out->size, at = out->size;
    model_config_write_json(model, out);
    while (at < out->size) {
        char c = out->data[at++];
        if (c == '\n') at += strspn(out->data + at, " ");
        out->data[end++] = c == '\n' ? ' ' : c;
    }
    out->size = end - 1; // without the last newline
    out->data[out->size] = '\0';
}

// A knob's value as JSON
static inline void append_knob(String* out, const RunConfig* run, const Knob* k) {
    const void* field = (const char*)run + k->offset;
    switch (k->type) {
    case KNOB_INT:
        string_append(out, "%d", *(const int*)field);
        return;
    case KNOB_U64:
        string_append(out, "%llu", (unsigned long long)*(const uint64_t*)field);
        return;
    case KNOB_NUMBER:
        json_append_number(out, *(const double*)field);
        return;
    case KNOB_BOOL:
        string_append(out, "%s", *(const bool*)field ? "true" : "false");
        return;
    case KNOB_TEXT:
        json_append_string(out, (const char*)field);
        return;
    case KNOB_CHOICE:
        string_append(out, "\"");
        append_choice(out, k->choices, *(const int*)field);
        string_append(out, "\"");
        return;
    case KNOB_SOURCES:
        append_sources(out, run);
        return;
    case KNOB_MODEL:
        append_model(out, &run->model);
        return;
    }
}

// On one line, as log.jsonl and state files want it.
static inline void config_write_json(const RunConfig* run, String* out) {
    const char* section = "";
    for (int i = 0; i < NUM_KNOBS; i++) {
        const Knob* k = &knobs[i];
        bool begins = strcmp(k->section, section) != 0;
        if (begins)
            string_append(out, "%s, \"%s\": {", section[0] != '\0' ? "}" : "", k->section);
        else
            string_append(out, i == 0 ? "{" : ", ");
        string_append(out, "\"%s\": ", k->key);
        append_knob(out, run, k);
        section = k->section;
    }
    string_append(out, "}}");
}

// ----------------------------------------------------------------------------
// for people

static inline void print_value(FILE* out, const char* section, const cJSON* item) {
    char label[80];
    char* value = cJSON_PrintUnformatted(item);
    CHECK(value != NULL);
    snprintf(label, sizeof label, "%s%s%s", section, section[0] != '\0' ? "." : "", item->string);
    fprintf(out, "%-32s %s\n", label, value);
    cJSON_free(value);
}

// A table of every key and value, defaults included.
static inline void config_print(const RunConfig* run, FILE* out) {
    String text = {NULL, 0, 0};
    config_write_json(run, &text);
    cJSON* root = cJSON_Parse(text.data);
    CHECK(root != NULL);
    for (const cJSON* section = root->child; section != NULL; section = section->next) {
        if (!cJSON_IsObject(section)) print_value(out, "", section);
        for (const cJSON* item = section->child; cJSON_IsObject(section) && item != NULL; item = item->next)
            print_value(out, section->string, item);
    }
    cJSON_Delete(root);
    free(text.data);
}

// What is different between two resolved configs, a line for each key: a resumed run is allowed to change its
// learning rate, but not silently. A `before` that is not JSON has nothing to compare.
static inline void config_print_changes(const char* before, const char* now, FILE* out) {
    cJSON *old_root = cJSON_Parse(before), *root = cJSON_Parse(now);
    CHECK(root != NULL);
    for (const cJSON* section = root->child; section != NULL && old_root != NULL; section = section->next) {
        const cJSON* old_section = cJSON_GetObjectItemCaseSensitive(old_root, section->string);
        bool object = cJSON_IsObject(section);
        for (const cJSON* item = object ? section->child : section; item != NULL;
             item = object ? item->next : NULL) {
            const cJSON* old =
                object ? cJSON_GetObjectItemCaseSensitive(old_section, item->string) : old_section;
            if (cJSON_Compare(old, item, 1)) continue;
            char *was = cJSON_PrintUnformatted(old), *is = cJSON_PrintUnformatted(item);
            fprintf(out, "changed since the last start: %s%s%s was %s, is %s\n",
                    object ? section->string : "", object ? "." : "", item->string,
                    was != NULL ? was : "not there", is != NULL ? is : "?");
            cJSON_free(was), cJSON_free(is);
        }
    }
    cJSON_Delete(old_root), cJSON_Delete(root);
}

// What a knob may be, as a cell of the reference
static inline void print_possible(FILE* out, const Knob* k) {
    switch (k->type) {
    case KNOB_INT:
    case KNOB_U64:
        fprintf(out, "whole, %.16g to %.16g", k->min, k->max);
        return;
    case KNOB_NUMBER:
        fprintf(out, "%.16g to %.16g", k->min, k->max);
        return;
    case KNOB_BOOL:
        fprintf(out, "true, false");
        return;
    case KNOB_TEXT:
        fprintf(out, "text");
        return;
    case KNOB_SOURCES:
        fprintf(out, "glob, or array of `{\"name\", \"path\", \"weight\"}`");
        return;
    case KNOB_MODEL:
        fprintf(out, "object, or path");
        return;
    case KNOB_CHOICE:
        for (const char* c = k->choices; *c != '\0'; c++) fprintf(out, *c == '|' ? ", " : "%c", *c);
        return;
    }
}

static inline void print_model_reference(FILE* out) {
    fprintf(out, "| key of `model` | in GPT-2's spelling | model types | default | possible |\n"
                 "| --- | --- | --- | --- | --- |\n"
                 "| `model_type` | | | required | ");
    for (int i = 0; i < NUM_MODEL_FAMILIES; i++)
        fprintf(out, "%s%s", i > 0 ? ", " : "", model_families[i].model_type);
    fprintf(out, " |\n");
    for (int i = 0; i < NUM_MODEL_KEYS; i++) {
        const ModelKey* k = &model_keys[i];
        if (i > 0 && strcmp(k->key, model_keys[i - 1].key) == 0) continue;
        fprintf(out, "| `%s` | %s | %s | %s | ", k->key, k->gpt2 != NULL ? k->gpt2 : "",
                k->families != NULL ? k->families : "all", k->standard != NULL ? k->standard : "required");
        if (k->type == MODEL_BOOL)
            fprintf(out, "true, false |\n");
        else
            fprintf(out, "%s%.16g to %.16g |\n", k->type == MODEL_NUMBER ? "" : "whole, ", k->min, k->max);
    }
    fprintf(
        out,
        "| `rope_scaling` | | %s | null | `{\"rope_type\": \"linear\" or \"llama3\", \"factor\": ...}` |\n",
        ROPE);
}

// Two tables in Markdown, as the README shows them.
static inline void config_print_reference(FILE* out) {
    fprintf(out, "| key | default | possible | meaning |\n| --- | --- | --- | --- |\n");
    for (int i = 0; i < NUM_KNOBS; i++) {
        const Knob* k = &knobs[i];
        const char* quote = k->standard != NULL ? "`" : "";
        fprintf(out, "| `%s%s%s` | %s%s%s | ", k->section, k->section[0] != '\0' ? "." : "", k->key, quote,
                k->standard != NULL ? k->standard : "required", quote);
        print_possible(out, k);
        fprintf(out, " | %s |\n", k->meaning);
    }
    fprintf(out, "\n");
    print_model_reference(out);
}
