// Fuzzes the readers of run configs and of Hugging Face's config.json.
//
//   [override '\n' ...] '\0' text      a run config with a command line
//   text                               a run config, or a config.json
//
// What is accepted must be written so that it reads back as the same struct and is written the same again; what is
// refused must say so in a sentence that a terminal can show.
#include "llmc/config_print.h" // defines: config_write_json
#include "llmc/config.h"       // defines: config_parse, RunConfig

enum { MAX_OVERRIDES = 8 };

static void check_error(const Error* err) {
    CHECK(err->code == EXIT_CONFIG || err->code == EXIT_USAGE);
    CHECK(err->text[0] != '\0');
    for (const char* c = err->text; *c != '\0'; c++) CHECK((unsigned char)*c >= 32 && *c != 127);
}

static void read_run_config(const char* text, size_t size, int num_overrides, char** overrides) {
    static RunConfig run, again;
    Error err = {0};
    bool ok = config_parse(&run, text, size, "input", num_overrides, overrides, &err);
    CHECK(ok == (err.code == 0));
    if (!ok) {
        check_error(&err);
        return;
    }
    String written = {NULL, 0, 0}, rewritten = {NULL, 0, 0};
    config_write_json(&run, &written);
    if (!config_parse(&again, written.data, written.size, "written", 0, NULL, &err)) exit_with(&err);
    CHECK(memcmp(&run, &again, sizeof run) == 0);
    config_write_json(&again, &rewritten);
    CHECK(strcmp(written.data, rewritten.data) == 0);
    free(written.data);
    free(rewritten.data);
}

static bool read_model_config(ModelConfig* c, const char* bytes, size_t size, String* notes, Error* err) {
    String text = {NULL, 0, 0};
    string_append_bytes(&text, bytes, size);
    JsonSource source = {"input", text.data, text.size, "", 0, NULL};
    cJSON* json = json_parse_object(text.data, &source, err);
    bool ok = json != NULL && model_config_from_json(c, json, &source, "", notes, err);
    CHECK(ok == (err->code == 0));
    cJSON_Delete(json);
    free(text.data);
    return ok;
}

static void read_config_json(const char* bytes, size_t size) {
    ModelConfig model, again;
    Error err = {0};
    String notes = {NULL, 0, 0}, written = {NULL, 0, 0};
    if (read_model_config(&model, bytes, size, &notes, &err)) {
        model_config_write_json(&model, &written);
        if (!read_model_config(&again, written.data, written.size, NULL, &err)) exit_with(&err);
        CHECK(memcmp(&model, &again, sizeof model) == 0);
    } else {
        check_error(&err);
    }
    for (size_t i = 0; i < notes.size; i++)
        CHECK(notes.data[i] == '\n' || ((unsigned char)notes.data[i] >= 32 && notes.data[i] != 127));
    free(notes.data);
    free(written.data);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const char* text = (const char*)data;
    const char* nul = size > 0 ? (const char*)memchr(text, '\0', size) : NULL;
    char* overrides[MAX_OVERRIDES];
    char* line = strdup_check(nul != NULL ? text : "");
    char* lines = line;
    int count = 0;
    for (; nul != NULL && count < MAX_OVERRIDES && line != NULL; count++)
        overrides[count] = strsep(&line, "\n");
    size_t begin = nul != NULL ? (size_t)(nul + 1 - text) : 0;
    read_run_config(text + begin, size - begin, count, overrides);
    read_config_json(text + begin, size - begin);
    free(lines);
    return 0;
}
