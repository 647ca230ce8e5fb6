// Fuzzes run configs, overrides, and Hugging Face's config.json.
//
//   'M' ...          a config.json of its own
//   anything else    a run config; behind its first NUL overrides, with a NUL behind each
//
// What is accepted must be written as JSON that is accepted, and written the same again; what is refused must say so
// in a sentence that a terminal can show.
#include "llmc/config_print.h" // defines: config_parse, config_write_json, model_config_from_json, ...

static void check_error(const Error* err) {
    CHECK(err->code == EXIT_CONFIG || err->code == EXIT_USAGE);
    CHECK(err->text[0] != '\0');
    for (const char* c = err->text; *c != '\0'; c++) CHECK((unsigned char)*c >= 32 && *c != 127);
}

static void model_config(char* text, size_t size) {
    static ModelConfig model, again;
    Error err = {0};
    String notes = {0}, written[2] = {{0}, {0}};
    JsonSource source = {"config.json", text, size, "", 0, NULL};
    cJSON* json = json_parse_object(text, &source, &err);
    bool ok = json != NULL && model_config_from_json(&model, json, &source, "", &notes, &err);
    cJSON_Delete(json);
    free(notes.data);
    if (!ok) {
        check_error(&err);
        return;
    }
    // read back as strictly as a run config's model section
    model_config_write_json(&model, &written[0]);
    JsonSource own = {"written", written[0].data, written[0].size, "", 0, NULL};
    json = json_parse_object(written[0].data, &own, &err);
    CHECK(json != NULL && model_config_from_json(&again, json, &own, "", NULL, &err));
    cJSON_Delete(json);
    model_config_write_json(&again, &written[1]);
    CHECK(strcmp(written[0].data, written[1].data) == 0);
    free(written[0].data), free(written[1].data);
}

static void run_config(char* text, size_t size) {
    enum { MAX_OVERRIDES = 8 };
    static RunConfig run;
    char* overrides[MAX_OVERRIDES];
    int num_overrides = 0;
    size_t text_size = strlen(text);
    for (size_t at = text_size + 1; at < size && num_overrides < MAX_OVERRIDES; at += strlen(text + at) + 1)
        overrides[num_overrides++] = text + at;
    Error err = {0};
    if (!config_parse(&run, text, text_size, "input", num_overrides, overrides, &err)) {
        check_error(&err);
        return;
    }
    CHECK(err.code == 0);
    String written[2] = {{0}, {0}};
    config_write_json(&run, &written[0]);
    CHECK(config_parse(&run, written[0].data, written[0].size, "written", 0, NULL, &err));
    config_write_json(&run, &written[1]);
    CHECK(strcmp(written[0].data, written[1].data) == 0);
    free(written[0].data), free(written[1].data);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    char* text = malloc_check(size + 1);
    memcpy(text, data, size);
    text[size] = '\0';
    if (text[0] == 'M')
        model_config(text + 1, size - 1);
    else
        run_config(text, size);
    free(text);
    return 0;
}
