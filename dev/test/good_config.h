// A run config without mistakes, for tests that make one in it.
#pragma once
#include "llmc/config.h" // defines: config_parse, RunConfig
#include <setjmp.h>
#include <cmocka.h> // last: it has a macro fail()

// One setting a line, so that a message's line number says which.
static const char good[] = "{\n"
                           "  \"model\": {\n"
                           "    \"model_type\": \"llama\",\n"
                           "    \"vocab_size\": 100,\n"
                           "    \"hidden_size\": 48,\n"
                           "    \"num_hidden_layers\": 2,\n"
                           "    \"num_attention_heads\": 4,\n"
                           "    \"num_key_value_heads\": 2,\n"
                           "    \"intermediate_size\": 96,\n"
                           "    \"max_position_embeddings\": 64,\n"
                           "    \"eos_token_id\": 99\n"
                           "  },\n"
                           "  \"data\": {\"train\": \"t_*.bin\", \"validation\": \"v.bin\"},\n"
                           "  \"batch\": {\n"
                           "    \"micro_batch_size\": 4,\n"
                           "    \"sequence_length\": 32,\n"
                           "    \"global_batch_size\": 8\n"
                           "  },\n"
                           "  \"optimizer\": {\"learning_rate\": 1e-3},\n"
                           "  \"schedule\": {\"max_steps\": 100, \"warmup_steps\": 10},\n"
                           "  \"log\": {\"run_dir\": \"run\"}\n"
                           "}\n";

// text with its only `find` replaced. Caller frees.
static inline char* replaced(const char* text, const char* find, const char* by) {
    const char* at = strstr(text, find);
    if (at == NULL) fail_msg("the good config has no %s", find);
    String s = {NULL, 0, 0};
    string_append(&s, "%.*s%s%s", (int)(at - text), text, by, at + strlen(find));
    return s.data;
}

static RunConfig run; // too large for the stack

static inline void parse(const char* text, char* override) {
    Error err = {0};
    if (!config_parse(&run, text, strlen(text), "run.json", override != NULL, &override, &err))
        fail_msg("%s", err.text);
}

// What parse() would say, where the text is not to be accepted.
static inline void expect(const char* text, size_t size, char* override, const char* message) {
    Error err = {0};
    bool ok = config_parse(&run, text, size, "run.json", override != NULL, &override, &err);
    if (ok) fail_msg("accepted, but should say: %s", message);
    assert_string_equal(err.text, message);
    assert_int_equal(err.code,
                     strstr(message, ": section.key=value is wanted") != NULL ? EXIT_USAGE : EXIT_CONFIG);
}
