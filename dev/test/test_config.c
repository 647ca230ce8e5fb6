// The run config and config.json: what is wrong is named in one exact sentence, what is right reads back.
#include "llmc/config_print.h" // defines: config_write_json, config_print_reference
#include "llmc/config.h"       // defines: config_parse, config_load
#include <glob.h>
#include <setjmp.h>
#include <cmocka.h>

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
static char* replaced(const char* text, const char* find, const char* by) {
    const char* at = strstr(text, find);
    if (at == NULL) fail_msg("the good config has no %s", find);
    String s = {NULL, 0, 0};
    string_append(&s, "%.*s%s%s", (int)(at - text), text, by, at + strlen(find));
    return s.data;
}

static RunConfig run; // too large for the stack

static void expect(const char* text, size_t size, char* override, const char* message) {
    Error err = {0};
    bool ok = config_parse(&run, text, size, "run.json", override != NULL, &override, &err);
    if (ok) fail_msg("accepted, but should say: %s", message);
    assert_string_equal(err.text, message);
    assert_int_equal(err.code,
                     strstr(message, ": section.key=value is wanted") != NULL ? EXIT_USAGE : EXIT_CONFIG);
}

// ----------------------------------------------------------------------------
// wrong files: in the good one, `find` is replaced

#define E5 "\u00e9\u00e9\u00e9\u00e9\u00e9" // 10 bytes: a value is cut at 60, between characters
static const struct {
    const char *find, *by, *message;
} wrong_values[] = {
    // keys
    {"micro_batch_size", "micro_batchsize",
     "run.json:15: batch.micro_batchsize: unknown key; did you mean batch.micro_batch_size?"},
    {"\"batch\"", "\"bach\"", "run.json:14: bach: unknown key; did you mean batch?"},
    {"\"log\"", "\"lerning_rate\": 1, \"log\"",
     "run.json:21: lerning_rate: unknown key; did you mean optimizer.learning_rate?"},
    {"\"max_steps\"", "\"grad_clip\": 1, \"max_steps\"",
     "run.json:20: schedule.grad_clip: unknown key; did you mean optimizer.grad_clip?"},
    {"num_hidden_layers", "num_layers",
     "run.json:6: model.num_layers: unknown key for a llama model; did you mean num_hidden_layers?"},
    {"\"eos_token_id\": 99", "\"mlp_biass\": true",
     "run.json:11: model.mlp_biass: unknown key for a llama model; did you mean mlp_bias?"},
    {"\"eos_token_id\": 99", "\"n_embd\": 48",
     "run.json:11: model.n_embd: unknown key for a llama model; did you mean hidden_size?"},
    {"\"sequence_length\": 32", "\"micro_batch_size\": 32",
     "run.json:15: batch.micro_batch_size is given twice, again in line 16"},
    {"\"log\"", "\"seed\": 1,\n \"seed\": 1, \"log\"", "run.json:21: seed is given twice, again in line 22"},
    {"\"t_*.bin\"", "[{\"name\": \"a\", \"name\": \"b\", \"path\": \"c\"}]",
     "run.json:13: data.train.name is given twice"},
    {"\"micro_batch_size\": 4,", "",
     "run.json:14: batch.micro_batch_size is missing; it has no default: sequences in one forward "
     "and backward pass "
     "(B)"},
    {"\"train\": \"t_*.bin\",", "",
     "run.json:13: data.train is missing; it has no default: token shards to train on; several "
     "sources are mixed by "
     "weight"},
    {"\"model\"", "\"sample\": {\"model\": 1}, \"model\"",
     "run.json:2: sample.model: unknown key; did you mean model?"},
    // types
    {"\"micro_batch_size\": 4", "\"micro_batch_size\": \"4\"",
     "run.json:15: batch.micro_batch_size is \"4\"; a whole number from 1 to 65536 is wanted"},
    {"\"micro_batch_size\": 4", "\"micro_batch_size\": 4.5",
     "run.json:15: batch.micro_batch_size is 4.5; a whole number from 1 to 65536 is wanted"},
    {"\"micro_batch_size\": 4", "\"micro_batch_size\": null",
     "run.json:15: batch.micro_batch_size is null; a whole number from 1 to 65536 is wanted"},
    {"\"micro_batch_size\": 4", "\"micro_batch_size\": [4]",
     "run.json:15: batch.micro_batch_size is [4]; a whole number from 1 to 65536 is wanted"},
    {"1e-3", "true", "run.json:19: optimizer.learning_rate is true; a number from 0 to 100 is wanted"},
    {"\"t_*.bin\",", "\"t_*.bin\", \"document_mask\": 1,",
     "run.json:13: data.document_mask is 1; true or false is wanted"},
    {"\"run\"", "7", "run.json:21: log.run_dir is 7; text in quotes is wanted"},
    {"\"log\"", "\"eval\": [], \"log\"", "run.json:21: eval is []; an object, { ... }, is wanted"},
    {"{\"max_steps\": 100, \"warmup_steps\": 10}", "100",
     "run.json:20: schedule is 100; an object, { ... }, is wanted"},
    {"\"t_*.bin\"", "17", "run.json:13: data.train is 17; a glob or an array of 1 to 32 sources is wanted"},
    {"\"t_*.bin\"", "[]", "run.json:13: data.train is []; a glob or an array of 1 to 32 sources is wanted"},
    {"\"t_*.bin\"", "[\"a\"]",
     "run.json:13: data.train is \"a\"; a source is {\"name\": TEXT, \"path\": GLOB, \"weight\": NUMBER}"},
    {"\"t_*.bin\"", "[{\"name\": \"a\", \"path\": \"b\", \"wait\": 1}]",
     "run.json:13: data.train.weight is missing; a number from 1e-09 to 1000000000 is wanted"},
    {"\"t_*.bin\"", "[{\"name\": \"a\", \"path\": \"b\", \"weight\": -1}]",
     "run.json:13: data.train.weight is -1; a number from 1e-09 to 1000000000 is wanted"},
    {"\"max_steps\"", "\"type\": \"cosinus\", \"max_steps\"",
     "run.json:20: schedule.type is \"cosinus\"; one of cosine|linear|wsd|constant is wanted"},
    {"\"max_steps\"", "\"type\": 0, \"max_steps\"",
     "run.json:20: schedule.type is 0; one of cosine|linear|wsd|constant is wanted"},
    // ranges
    {"\"micro_batch_size\": 4", "\"micro_batch_size\": 0",
     "run.json:15: batch.micro_batch_size is 0; a whole number from 1 to 65536 is wanted"},
    {"\"max_steps\": 100", "\"max_steps\": 3000000000",
     "run.json:20: schedule.max_steps is 3000000000; a whole number from 1 to 2000000000 is wanted"},
    {"1e-3", "-1e-3", "run.json:19: optimizer.learning_rate is -0.001; a number from 0 to 100 is wanted"},
    {"1e-3", "1e400",
     "run.json:19: optimizer.learning_rate is too large a number; a number from 0 to 100 is wanted"},
    {"1e-3", "1e-3, \"beta2\": 1",
     "run.json:19: optimizer.beta2 is 1; a number from 0 to 0.999999 is wanted"},
    {"\"log\"", "\"seed\": 9007199254740993, \"log\"",
     "run.json:21: seed is 9007199254740992; a whole number from 0 to 9007199254740991 is wanted"},
    {"\"log\"", "\"sample\": {\"top_p\": 1.5}, \"log\"",
     "run.json:21: sample.top_p is 1.5; a number from 0 to 1 is wanted"},
    {"\"log\"", "\"checkpoint\": {\"keep_last\": 0}, \"log\"",
     "run.json:21: checkpoint.keep_last is 0; a whole number from 1 to 1000000 is wanted"},
    // combinations
    {"\"global_batch_size\": 8", "\"global_batch_size\": 6",
     "run.json:17: batch.global_batch_size is 6; it must be a multiple of micro_batch_size, 4"},
    {"\"sequence_length\": 32", "\"sequence_length\": 65",
     "run.json:16: batch.sequence_length is 65; at most model.max_position_embeddings, 64, is possible"},
    {"\"warmup_steps\": 10", "\"warmup_steps\": 101",
     "run.json:20: schedule.warmup_steps is 101; at most schedule.max_steps, 100, is possible"},
    {"\"warmup_steps\": 10", "\"warmup_steps\": 71, \"type\": \"wsd\", \"decay_fraction\": 0.3",
     "run.json:20: schedule.warmup_steps is 71; the decay, 0.3 of 100 steps, leaves at most 70 for it"},
    {"\"log\"", "\"checkpoint\": {\"every\": 20, \"permanent_every\": 50}, \"log\"",
     "run.json:21: checkpoint.permanent_every is 50; it must be a multiple of checkpoint.every, 20"},
    {"\"log\"", "\"checkpoint\": {\"every\": 20, \"fast_every\": 5}, \"log\"",
     "run.json:21: checkpoint.fast_every is 5; checkpoint.fast_dir is empty: name a directory on a disk of each node"},
    {", \"validation\": \"v.bin\"", "}, \"eval\": {\"every\": 10",
     "run.json:13: eval.every is 10; data.validation is empty: name the shards to evaluate on"},
    {"\"log\"", "\"sample\": {\"every\": 10}, \"log\"",
     "run.json:21: sample.every is 10; data.tokenizer is empty: name what turns tokens into text"},
    {"\"run\"", "\"\"", "run.json:21: log.run_dir is \"\"; a directory is wanted"},
    // the model
    {"\"llama\"", "\"bert\"",
     "run.json:3: model.model_type is \"bert\"; gpt2, llama, mistral or qwen2 is wanted"},
    {"\"model_type\": \"llama\",", "",
     "run.json:2: model.model_type is missing; gpt2, llama, mistral or qwen2 is wanted"},
    {"\"hidden_size\": 48", "\"hidden_size\": 50",
     "run.json:5: model.hidden_size is 50; it must be a multiple of num_attention_heads, 4, or "
     "head_dim be given"},
    {"\"hidden_size\": 48", "\"hidden_size\": 20",
     "run.json:5: model.hidden_size makes heads of 5; rotary positions turn pairs, so that must be even"},
    {"\"eos_token_id\": 99", "\"head_dim\": 7",
     "run.json:11: model.head_dim makes heads of 7; rotary positions turn pairs, so that must be even"},
    {"\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3",
     "run.json:8: model.num_key_value_heads is 3; it must divide num_attention_heads, 4"},
    {"\"eos_token_id\": 99", "\"eos_token_id\": 100",
     "run.json:11: model.eos_token_id is 100; it must be below vocab_size, 100"},
    {"\"eos_token_id\": 99", "\"eos_token_id\": [98, 99]",
     "run.json:11: model.eos_token_id is [98,99]; one token is wanted"},
    {"\"intermediate_size\": 96,", "",
     "run.json:2: model.intermediate_size is missing; a llama model has no default for it"},
    {"\"vocab_size\": 100", "\"vocab_size\": 1e9",
     "run.json:4: model.vocab_size is 1000000000; a whole number from 2 to 16777216 is wanted"},
    {"\"eos_token_id\": 99", "\"hidden_act\": \"gelu\"",
     "run.json:11: model.hidden_act is \"gelu\"; a llama model has \"silu\""},
    {"\"eos_token_id\": 99", "\"attention_dropout\": 0.1",
     "run.json:11: model.attention_dropout is 0.1; only 0 is implemented"},
    {"\"eos_token_id\": 99", "\"pretraining_tp\": 2",
     "run.json:11: model.pretraining_tp is 2; only 1 is implemented"},
    {"\"eos_token_id\": 99", "\"layer_types\": [\"full_attention\", \"sliding_attention\"]",
     "run.json:11: model.layer_types is [\"full_attention\",\"sliding_attention\"]; only full_attention is "
     "implemented"},
    {"\"eos_token_id\": 99", "\"rope_scaling\": 2",
     "run.json:11: model.rope_scaling is 2; an object or null is wanted"},
    {"\"eos_token_id\": 99", "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 2}",
     "run.json:11: model.rope_scaling.type is \"yarn\"; default, linear or llama3 is wanted"},
    {"\"eos_token_id\": 99", "\"rope_scaling\": {\n\"rope_type\": \"linear\",\n\"factor\": 0.5}",
     "run.json:13: model.rope_scaling.factor is 0.5; a number from 1 to 1000000 is wanted"},
    {"\"eos_token_id\": 99", "\"rope_scaling\": {\"rope_type\": \"linear\"}",
     "run.json:11: model.rope_scaling.factor is missing; a number from 1 to 1000000 is wanted"},
    {"\"eos_token_id\": 99", "\"rope_scaling\": {\"factor\": 2.0}",
     "run.json:11: model.rope_scaling.factor: not a key of rope_type default"},
    {"\"eos_token_id\": 99",
     "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, "
     "\"high_freq_factor\": 4, "
     "\"original_max_position_embeddings\": 32}",
     "run.json:11: model.rope_scaling: high_freq_factor 4 must be above low_freq_factor 4"},
    {"\"eos_token_id\": 99", "\"rope_theta\": 5, \"rope_parameters\": {\"rope_theta\": 6}",
     "run.json:11: model.rope_theta is 5; model.rope_parameters.rope_theta has another value: give "
     "one of them"},
    {"\"eos_token_id\": 99",
     "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2}, \"rope_parameters\": {}",
     "run.json:11: model.rope_parameters: rope_scaling and rope_parameters are two names of one thing; give one"},
    {"\"eos_token_id\": 99",
     "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2, \"attention_factor\": 1}",
     "run.json:11: model.rope_scaling.attention_factor: not a key of rope_type linear"},
    {"\"llama\"", "\"gpt2\", \"rope_scaling\": null",
     "run.json:3: model.rope_scaling: unknown key for a gpt2 model; did you mean vocab_size?"},
    {"\"llama\"", "\"mistral\", \"sliding_window\": 63",
     "run.json:3: model.sliding_window is 63; attention here has no window: set it to null, or "
     "max_position_embeddings to it"},
    {"\"llama\"", "\"qwen2\", \"use_sliding_window\": true",
     "run.json:3: model.use_sliding_window is true; only false is implemented"},
    {"\"llama\"", "\"qwen2\", \"attention_bias\": true",
     "run.json:3: model.attention_bias: unknown key for a qwen2 model; did you mean num_attention_heads?"},
    {"\"model\": {", "\"model\": 3, \"x\": {", "run.json:2: x: unknown key; did you mean log?"},
    {"\"log\"", "\"model_path\": 1, \"log\"", "run.json:21: model_path: unknown key; did you mean model?"},
    // text
    {"\"run\"", "\"a\\u0000b\"", "run.json:21: a NUL character; a config is text"},
    {"\"max_steps\": 100,", "\"max_steps\": 100",
     "run.json:20: not JSON from here on: \"warmup_steps\": 10},"},
    {"\"max_steps\": 100,", "\"max_steps\": NaN,",
     "run.json:20: not JSON from here on: NaN, \"warmup_steps\": 10}"},
    {"\"run\"}", "\"run\",}", "run.json:21: not JSON from here on: } (a comma too many before it)"},
    {"\"micro_batch_size\": 4", "\"micro_batch_size\": [4,\n]", "run.json:16: not JSON from here on: ],"},
    {"\"max_steps\": 100", "\"max_steps\": +100",
     "run.json:20: not JSON from here on: +100, \"warmup_steps\": 10"},
    {"\"max_steps\": 100", "\"max_steps\": 0x64",
     "run.json:20: not JSON from here on: x64, \"warmup_steps\": 10}"},
    {"\"run\"", "\"\\ud800\"", "run.json:21: not JSON from here on: \"\\ud800\"}"},
    {"\"run\"", "\"r\xE9\"", "run.json:21: byte 0xe9 is not UTF-8"},
    {"\"v.bin\"", "\"v.bin",
     "run.json:13: the text that begins with \"v.bin}, has no closing quote in its line"},
    {"\"run\"", "'run'", "run.json:21: not JSON from here on: 'run'}"},
    {"\"run\"}\n}", "\"run\"}\n} more", "run.json:22: not JSON from here on: more"},
    {"\"run\"}\n}", "\"run\"}", "run.json:22: the file ends inside an object, an array or a string"},
    {"\"run\"", "\"run", "run.json:21: the text that begins with \"run} has no closing quote in its line"},
    {"\"log\"", "\"\\u001b[2J\": 1, \"log\"", "run.json: ?[2J: unknown key; did you mean seed?"},
    {"\"log\"", "\"data\\u007f\": 1, \"log\"", "run.json: data?: unknown key; did you mean data?"},
    {"\"max_steps\"", "\"type\": \"\x7f\", \"max_steps\"",
     "run.json:20: schedule.type is \"?\"; one of cosine|linear|wsd|constant is wanted"},
    {"\"max_steps\"", "\"type\": \"" E5 E5 E5 E5 E5 E5 "\", \"max_steps\"",
     "run.json:20: schedule.type is \"" E5 E5 E5 E5 E5
     "\u00e9\u00e9\u00e9\u00e9...; one of cosine|linear|wsd|constant is "
     "wanted"},
    {"\"batch\"", "/* \"batch\"", "run.json:14: the comment that begins here has no end (*/)"},
};

static void each_wrong_value_is_named(void** state) {
    (void)state;
    for (size_t i = 0; i < sizeof wrong_values / sizeof wrong_values[0]; i++) {
        char* text = replaced(good, wrong_values[i].find, wrong_values[i].by);
        expect(text, strlen(text), NULL, wrong_values[i].message);
        free(text);
    }
}

// ----------------------------------------------------------------------------
// wrong as a whole

static void other_texts_are_not_configs(void** state) {
    (void)state;
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"", "run.json is empty; an object, { ... }, is wanted"},
        {" \n\n // nothing\n", "run.json is empty; an object, { ... }, is wanted"},
        {"\n[1]", "run.json:2: the top level must be an object, { ... }"},
        {"\"text\"", "run.json:1: the top level must be an object, { ... }"},
        {"\xEF\xBB\xBF{}", "run.json:1: begins with a byte order mark; save it as UTF-8 without one"},
        {"{}", "run.json: model is missing; it has no default: the keys of a Hugging Face `config.json`, "
               "or the path "
               "of one, which `model.key=value` then changes"},
        {"seed: 1", "run.json:1: not JSON from here on: seed: 1"},
        {"{\"model\": \"absent/config.json\"}", "run.json:1: model is \"absent/config.json\"; cannot open "
                                                "absent/config.json: No such file or directory"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        expect(cases[i].text, strlen(cases[i].text), NULL, cases[i].message);
    expect("{\n\0}", 4, NULL, "run.json:2: a NUL character; a config is text");
}

static void size_and_nesting_are_limited(void** state) {
    (void)state;
    String deep = {NULL, 0, 0}, large = {NULL, 0, 0}, wide = {NULL, 0, 0};
    string_append(&deep, "{\"a\": ");
    for (int i = 0; i < JSON_MAX_DEPTH; i++) string_append(&deep, "[");
    expect(deep.data, deep.size, NULL, "run.json: objects and arrays are nested more than 32 deep");
    while (large.size <= JSON_MAX_BYTES) string_append(&large, "%100s", "");
    expect(large.data, large.size, NULL, "run.json: 1048600 bytes; a config has at most 1048576");
    for (int i = 0; i <= JSON_MAX_KEYS; i++) string_append(&wide, "%c\"%d\": 0", i == 0 ? '{' : ',', i);
    string_append(&wide, "}");
    expect(wide.data, wide.size, NULL, "run.json: an object has more than 1000 keys");
    free(deep.data), free(large.data), free(wide.data);
    char path[CONFIG_TEXT + 1];
    memset(path, 'a', CONFIG_TEXT);
    path[CONFIG_TEXT] = '\0';
    char* text = replaced(good, "v.bin", path);
    expect(text, strlen(text), NULL,
           "run.json:13: data.validation is 1024 bytes long; at most 1023 are possible");
    free(text);
}

static void models_of_absurd_size_are_refused(void** state) {
    (void)state;
    char* layers =
        replaced(good, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 4096, \"head_dim\": 1024");
    char* vast = replaced(layers, "\"hidden_size\": 48", "\"hidden_size\": 131072");
    expect(vast, strlen(vast), NULL,
           "run.json:5: model.hidden_size: the model has 6.75e+12 parameters; at most 2^40 are possible");
    char* longer =
        replaced(layers, "\"max_position_embeddings\": 64", "\"max_position_embeddings\": 16777216");
    char* tokens = replaced(longer, "\"sequence_length\": 32", "\"sequence_length\": 16777216");
    expect(tokens, strlen(tokens), NULL,
           "run.json:15: batch.micro_batch_size is 4; with sequence_length 16777216 this model would "
           "need more than "
           "2^50 bytes");
    free(layers), free(vast), free(longer), free(tokens);
}

// ----------------------------------------------------------------------------
// the command line

static void wrong_overrides_are_named(void** state) {
    (void)state;
    static const struct {
        const char *override, *message;
    } cases[] = {
        {"schedule.max_steps", "command line: schedule.max_steps: section.key=value is wanted"},
        {"=5", "command line: =5: section.key=value is wanted"},
        {".key=5", "command line: .key=5: section.key=value is wanted"},
        {"batch.=5", "command line: batch.=5: section.key=value is wanted"},
        {"a.b.c=5", "command line: a.b.c=5: section.key=value is wanted"},
        {"bach.micro_batch_size=5", "command line: bach: unknown key; did you mean batch?"},
        {"batch.micro=5", "command line: batch.micro: unknown key; did you mean batch.micro_batch_size?"},
        {"batch.micro_batch_size=x",
         "command line: batch.micro_batch_size is \"x\"; a whole number from 1 to 65536 is wanted"},
        {"batch.micro_batch_size=",
         "command line: batch.micro_batch_size is \"\"; a whole number from 1 to 65536 is wanted"},
        {"batch.micro_batch_size=3",
         "run.json:17: batch.global_batch_size is 8; it must be a multiple of micro_batch_size, 3"},
        {"batch={\"micro_batch_size\": -1, \"sequence_length\": 8}",
         "command line: batch.micro_batch_size is -1; a whole number from 1 to 65536 is wanted"},
        {"seed={\"a\": 1, \"a\": 2}", "command line: seed.a is given twice"},
        {"seed.key=1",
         "command line: seed is {\"key\":1}; a whole number from 0 to 9007199254740991 is wanted"},
        {"model.hidden_sise=5",
         "command line: model.hidden_sise: unknown key for a llama model; did you mean "
         "hidden_size?"},
        {"model=5",
         "command line: model is 5; the keys of a Hugging Face config.json, or the path of one, are wanted"},
        {"model.vocab_size=50", "run.json:11: model.eos_token_id is 99; it must be below vocab_size, 50"},
        {"data.train={\"path\": \"x\"}",
         "command line: data.train is {\"path\":\"x\"}; a glob or an array of 1 to 32 sources is wanted"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char* override = strdup_check(cases[i].override);
        expect(good, strlen(good), override, cases[i].message);
        free(override);
    }
}

static void parse(const char* text, char* override) {
    Error err = {0};
    if (!config_parse(&run, text, strlen(text), "run.json", override != NULL, &override, &err))
        fail_msg("%s", err.text);
}

static void overrides_win(void** state) {
    (void)state;
    char* overrides[] = {"batch.micro_batch_size=2",
                         "batch.micro_batch_size=8",
                         "sample.prompt=42",
                         "log.run_dir=true",
                         "data.tokenizer=\"quoted\"",
                         "data.train=[ab]*.bin",
                         "schedule.type=wsd",
                         "seed=7",
                         "optimizer={\"learning_rate\": 0.5}",
                         "data.validation=",
                         "model.eos_token_id=null"};
    Error err = {0};
    if (!config_parse(&run, good, strlen(good), "run.json", 11, overrides, &err)) fail_msg("%s", err.text);
    assert_int_equal(run.batch.micro_batch_size, 8);
    assert_string_equal(run.sample.prompt, "42");
    assert_string_equal(run.log.run_dir, "true");
    assert_string_equal(run.data.tokenizer, "quoted");
    assert_string_equal(run.data.sources[0].path, "[ab]*.bin");
    assert_int_equal(run.schedule.type, SCHEDULE_WSD);
    assert_int_equal(run.seed, 7);
    assert_true(run.optimizer.learning_rate == 0.5 && run.optimizer.beta2 == 0.95);
    assert_string_equal(run.data.validation, "");
    assert_int_equal(run.model.eos_token_id, -1);
    expect(good, strlen(good), "sample.prompt=\xFF", "command line: sample.prompt: the value is not UTF-8");
    parse(good, "sample.prompt=http://a/*b*/\\u0000"); // neither a comment nor an escape
    assert_string_equal(run.sample.prompt, "http://a/*b*/\\u0000");
}

// ----------------------------------------------------------------------------
// what is right

static void comments_and_line_ends_are_free(void** state) {
    (void)state;
    char* text =
        replaced(good, "\"model\": {", "// \"seed\": 1, [[[ \" /*\r\n/* \"seed\": 2,\n // */ \"model\": {");
    char* more = replaced(text, "\"run\"", "\"a//b/*c*/\\\"//\" // end\n");
    parse(more, NULL);
    assert_int_equal(run.seed, 1);
    assert_string_equal(run.log.run_dir, "a//b/*c*/\"//");
    char* wrong = replaced(more, "\"vocab_size\": 100", "\"vocab_size\": 1");
    expect(wrong, strlen(wrong), NULL,
           "run.json:6: model.vocab_size is 1; a whole number from 2 to 16777216 is wanted");
    free(text), free(more), free(wrong);
}

static void sources_are_read(void** state) {
    (void)state;
    char* text =
        replaced(good, "\"t_*.bin\"",
                 "[{\"name\": \"a\", \"path\": \"a_*\", \"weight\": 3}, {\"weight\": 0.5, \"path\": \"b\", "
                 "\"name\": \"b\"}]");
    parse(text, NULL);
    assert_int_equal(run.data.num_sources, 2);
    assert_string_equal(run.data.sources[0].path, "a_*");
    assert_string_equal(run.data.sources[1].name, "b");
    assert_true(run.data.sources[0].weight == 3 && run.data.sources[1].weight == 0.5);
    free(text);
}

static void defaults_are_the_tables(void** state) {
    (void)state;
    parse(good, NULL);
    assert_true(run.optimizer.beta1 == 0.9 && run.optimizer.eps == 1e-8 && run.optimizer.weight_decay == 0.1);
    assert_true(run.schedule.decay_fraction == 0.2 && run.schedule.final_lr_fraction == 0.1);
    assert_int_equal(run.schedule.type, SCHEDULE_COSINE);
    assert_int_equal(run.precision.compute, COMPUTE_AUTO);
    assert_true(run.precision.fused_gelu && !run.parallel.autotune && !run.parallel.cuda_graph);
    assert_int_equal(run.precision.gradients | run.precision.moments | run.precision.master_weights,
                     STORE_FP32);
    assert_int_equal(run.batch.recompute, RECOMPUTE_NONE);
    assert_int_equal(run.checkpoint.keep_last, 2);
    assert_int_equal(run.guard.max_skipped_steps, 10);
    assert_true(run.guard.policy == GUARD_SKIP && run.guard.sigma == 0 && run.guard.check_every == 0);
    assert_true(run.sample.temperature == 1.0 && run.sample.top_p == 1.0 && !run.data.document_mask);
    parse(good, "batch.global_batch_size=0");
    assert_int_equal(run.batch.global_batch_size, run.batch.micro_batch_size);
}

// GELU fused into the matmul cannot be computed again alone; SwiGLU is never fused.
static void fused_gelu_excludes_its_recompute(void** state) {
    (void)state;
    static const struct {
        const char *recompute, *fused, *model;
        bool ok;
    } cases[] = {
        {"activation", "true", "gpt2", false}, {"norm", "true", "gpt2", false},
        {"block", "true", "gpt2", true},       {"none", "true", "gpt2", true},
        {"activation", "false", "gpt2", true}, {"norm", "false", "gpt2", true},
        {"activation", "true", "llama", true}, {"norm", "true", "llama", true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char path[64], recompute[64], fused[64], *overrides[] = {recompute, fused};
        Error err = {0};
        snprintf(path, sizeof path, "configs/tiny_%s.json", cases[i].model);
        snprintf(recompute, sizeof recompute, "batch.recompute=%s", cases[i].recompute);
        snprintf(fused, sizeof fused, "precision.fused_gelu=%s", cases[i].fused);
        bool ok = config_load(&run, path, 2, overrides, &err);
        if (ok != cases[i].ok) fail_msg("%s %s %s: %s", path, recompute, fused, err.text);
        if (!ok) assert_non_null(strstr(err.text, "precision.fused_gelu must then be false"));
    }
}

static bool no_duplicate_knobs_in_range(void) {
    for (int i = 0; i < NUM_KNOBS; i++)
        if (find_knob(knobs[i].section, knobs[i].key) != &knobs[i]) return false;
    return true;
}

static void every_committed_config_loads(void** state) {
    (void)state;
    assert_true(no_duplicate_knobs_in_range());
    glob_t files;
    assert_int_equal(glob("configs/*.json", 0, NULL, &files), 0);
    assert_true(files.gl_pathc >= 10);
    for (size_t i = 0; i < files.gl_pathc; i++) {
        Error err = {0};
        if (!config_load(&run, files.gl_pathv[i], 0, NULL, &err)) fail_msg("%s", err.text);
    }
    globfree(&files);
}

static void published_sizes_are_met(void** state) {
    (void)state;
    static const struct {
        char* path;
        uint64_t parameters;
    } models[] = {
        {"configs/gpt2_124M.json", 124439808},  {"configs/gpt2_350M.json", 354823168},
        {"configs/gpt2_774M.json", 774030080},  {"configs/gpt2_1558M.json", 1557611200},
        {"configs/gpt3_125M.json", 125226240},  {"configs/llama3.2_1B.json", 1235814400},
        {"configs/llama3_8B.json", 8030261248},
    };
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        Error err = {0};
        if (!config_load(&run, models[i].path, 0, NULL, &err)) fail_msg("%s", err.text);
        assert_int_equal(model_num_parameters(&run.model), models[i].parameters);
        char* expected = replaced(models[i].path, "configs/", "runs/"); // its run has a directory of its own
        expected[strlen(expected) - strlen(".json")] = '\0';
        assert_string_equal(run.log.run_dir, expected);
        free(expected);
    }
}

// ----------------------------------------------------------------------------
// written and read again

static ModelConfig odd_model(int family) {
    ModelConfig c;
    memset(&c, 0, sizeof c);
    c.family = &model_families[family];
    bool gpt2 = c.family->conv1d, llama = strcmp(c.family->model_type, "llama") == 0;
    c.vocab_size = 1001, c.hidden_size = 36, c.num_hidden_layers = 5, c.num_attention_heads = 6;
    c.num_key_value_heads = gpt2 ? 6 : 3, c.head_dim = gpt2 ? 6 : 10, c.intermediate_size = 77;
    c.max_position_embeddings = 4099, c.norm_eps = 3e-7, c.initializer_range = 0.1 / 3;
    c.attention_bias = gpt2 ? false : llama || c.family->qkv_bias;
    c.attention_output_bias = c.mlp_bias = llama;
    c.tie_word_embeddings = !c.family->tie_word_embeddings;
    c.rope.theta = gpt2 ? 10000 : 1e6 / 3;
    c.bos_token_id = 17, c.eos_token_id = 18;
    return c;
}

static const RopeConfig odd_scalings[3] = {
    {.theta = 12345.678},
    {.theta = 2, .scaling = ROPE_SCALING_LINEAR, .factor = 1.7},
    {500000, ROPE_SCALING_LLAMA3, 8, 1.1, 4.1, 31},
};

static void written_models_read_back(void** state) {
    (void)state;
    for (int i = 0; i < 3 * NUM_MODEL_FAMILIES; i++) {
        ModelConfig c = odd_model(i / 3), again;
        if (c.family->position == POSITION_ROPE) c.rope = odd_scalings[i % 3];
        String text = {NULL, 0, 0};
        Error err = {0};
        model_config_write_json(&c, &text);
        JsonSource source = {"config.json", text.data, text.size, "", 0, NULL};
        cJSON* json = json_parse_object(text.data, &source, &err);
        // as strictly as a run config's own section: nothing that we write is unknown to us
        if (json == NULL || !model_config_from_json(&again, json, &source, "", NULL, &err))
            fail_msg("%s", err.text);
        assert_memory_equal(&c, &again, sizeof c);
        cJSON_Delete(json);
        free(text.data);
    }
}

// A value for every knob that is not its default.
static void set_odd_knob(RunConfig* r, const Knob* k, int i) {
    void* field = (char*)r + k->offset;
    switch (k->type) {
    case KNOB_INT:
        *(int*)field = k->max < 1000 ? (int)k->max : 100 + i;
        return;
    case KNOB_U64:
        *(uint64_t*)field = (uint64_t)SEED_MAX - (uint64_t)i;
        return;
    case KNOB_NUMBER:
        *(double*)field = (i + 1) / 131.0;
        return;
    case KNOB_BOOL:
        *(bool*)field = strcmp(k->standard, "false") == 0;
        return;
    case KNOB_TEXT:
        snprintf(field, CONFIG_TEXT, "%d \"\\/\n\t\x01\x7f \u00e9", i);
        return;
    case KNOB_CHOICE:
        *(int*)field = k->choices[0] == 'a' && strchr(k->choices, '1') != NULL ? 2 : 1; // not the default
        return;
    case KNOB_SOURCES:
        for (int s = 0; s < MAX_DATA_SOURCES; s++) {
            snprintf(r->data.sources[s].name, sizeof r->data.sources[s].name, "s\"%d", s);
            snprintf(r->data.sources[s].path, sizeof r->data.sources[s].path, "{p},%d", s);
            r->data.sources[s].weight = 1.0 / (s + 3);
        }
        r->data.num_sources = MAX_DATA_SOURCES;
        return;
    case KNOB_MODEL:
        r->model = odd_model(1);
        return;
    }
}

static void resolved_configs_read_back(void** state) {
    (void)state;
    static RunConfig odd, standard;
    memset(&odd, 0, sizeof odd);
    for (int i = 0; i < NUM_KNOBS; i++) set_odd_knob(&odd, &knobs[i], i);
    odd.batch.global_batch_size = 3 * odd.batch.micro_batch_size; // what the rules between knobs want
    odd.schedule.warmup_steps = 7;
    odd.layout = layout_single();
    odd.checkpoint.permanent_every = 2 * odd.checkpoint.every;
    String text = {NULL, 0, 0};
    config_write_json(&odd, &text);
    assert_null(strchr(text.data, '\n'));
    parse(text.data, NULL);
    assert_memory_equal(&run, &odd, sizeof odd);
    Error err = {0};
    assert_true(set_defaults(&standard, &err));
    for (int i = 0; i < NUM_KNOBS; i++) { // the test itself: every knob was told from its default
        size_t size = knobs[i].type == KNOB_BOOL ? 1 : sizeof(int);
        assert_memory_not_equal((char*)&odd + knobs[i].offset, (char*)&standard + knobs[i].offset, size);
    }
    free(text.data);
}

static void printed_configs_hold_every_knob(void** state) {
    (void)state;
    char* text = NULL;
    size_t size = 0;
    parse(good, NULL);
    FILE* out = open_memstream(&text, &size);
    config_print(&run, out);
    fclose(out);
    for (int i = 0; i < NUM_KNOBS; i++) {
        char label[80];
        snprintf(label, sizeof label, "%s%s%s%s", knobs[i].section, knobs[i].section[0] != '\0' ? "." : "",
                 knobs[i].key, knobs[i].type == KNOB_MODEL ? "." : " ");
        if (strstr(text, label) == NULL) fail_msg("%s is not printed", label);
    }
    assert_non_null(strstr(text, "\nmodel.hidden_size                48\n"));
    assert_non_null(strstr(text, "\nschedule.type                    \"cosine\"\n"));
    free(text);
}

static void readme_has_the_reference(void** state) {
    (void)state;
    char* reference = NULL;
    size_t size = 0, readme_size = 0;
    Error err = {0};
    FILE* out = open_memstream(&reference, &size);
    config_print_reference(out);
    fclose(out);
    char* readme = read_file("README.md", 1 << 20, &readme_size, &err);
    if (readme == NULL) fail_msg("%s", err.text);
    if (strstr(readme, reference) == NULL)
        fail_msg("README.md does not hold what `train_gpt_cpu help config` prints: put it there");
    free(readme);
    free(reference);
}

// ----------------------------------------------------------------------------
// Hugging Face's config.json

static bool from_text(ModelConfig* c, const char* json, String* notes, Error* err) {
    char* text = strdup_check(json);
    JsonSource source = {"config.json", text, strlen(text), "", 0, NULL};
    cJSON* root = json_parse_object(text, &source, err);
    bool ok = root != NULL && model_config_from_json(c, root, &source, "", notes, err);
    cJSON_Delete(root);
    free(text);
    return ok;
}

// What the hub has: openai-community/gpt2
static const char gpt2_json[] =
    "{\"activation_function\": \"gelu_new\", \"architectures\": [\"GPT2LMHeadModel\"], \"attn_pdrop\": 0.1,"
    "\"bos_token_id\": 50256, \"embd_pdrop\": 0.1, \"eos_token_id\": 50256, \"initializer_range\": 0.02,"
    "\"layer_norm_epsilon\": 1e-05, \"model_type\": \"gpt2\", \"n_ctx\": 1024, \"n_embd\": 768, "
    "\"n_head\": 12,"
    "\"n_layer\": 12, \"n_positions\": 1024, \"resid_pdrop\": 0.1, \"summary_activation\": null,"
    "\"summary_first_dropout\": 0.1, \"summary_proj_to_labels\": true, \"summary_type\": \"cls_index\","
    "\"summary_use_proj\": true, \"task_specific_params\": {\"text-generation\": {\"do_sample\": true,"
    "\"max_length\": 50}}, \"vocab_size\": 50257}";

// the shape of meta-llama/Llama-3.1-8B-Instruct, whose texts end with any of three tokens
static const char llama31_json[] =
    "{\"architectures\": [\"LlamaForCausalLM\"], \"attention_bias\": false, \"attention_dropout\": 0.0,"
    "\"bos_token_id\": 128000, \"eos_token_id\": [128001, 128008, 128009], \"hidden_act\": \"silu\","
    "\"hidden_size\": 4096, \"initializer_range\": 0.02, \"intermediate_size\": 14336,"
    "\"max_position_embeddings\": 131072, \"mlp_bias\": false, \"model_type\": \"llama\","
    "\"num_attention_heads\": 32, \"num_hidden_layers\": 32, \"num_key_value_heads\": 8, "
    "\"pretraining_tp\": 1,"
    "\"rms_norm_eps\": 1e-05, \"rope_scaling\": {\"factor\": 8.0, \"low_freq_factor\": 1.0, "
    "\"high_freq_factor\":"
    "4.0, \"original_max_position_embeddings\": 8192, \"rope_type\": \"llama3\"}, \"rope_theta\": 500000.0,"
    "\"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\", \"transformers_version\": \"4.42.3\","
    "\"use_cache\": true, \"vocab_size\": 128256, \"head_dim\": null}";

// meta-llama/Llama-3.2-1B, whose head is tied and whose positions are stretched by 32
static const char llama32_json[] =
    "{\"architectures\": [\"LlamaForCausalLM\"], \"attention_bias\": false, \"attention_dropout\": 0.0,"
    "\"bos_token_id\": 128000, \"eos_token_id\": 128001, \"head_dim\": 64, \"hidden_act\": \"silu\","
    "\"hidden_size\": 2048, \"initializer_range\": 0.02, \"intermediate_size\": 8192,"
    "\"max_position_embeddings\": 131072, \"mlp_bias\": false, \"model_type\": \"llama\","
    "\"num_attention_heads\": 32, \"num_hidden_layers\": 16, \"num_key_value_heads\": 8, \"pretraining_tp\": 1,"
    "\"rms_norm_eps\": 1e-05, \"rope_scaling\": {\"factor\": 32.0, \"high_freq_factor\": 4.0,"
    "\"low_freq_factor\": 1.0, \"original_max_position_embeddings\": 8192, \"rope_type\": \"llama3\"},"
    "\"rope_theta\": 500000.0, \"tie_word_embeddings\": true, \"torch_dtype\": \"bfloat16\","
    "\"transformers_version\": \"4.45.0.dev0\", \"use_cache\": true, \"vocab_size\": 128256}";

// the same as transformers 5 writes it
static const char llama32_v5_json[] =
    "{\"architectures\": [\"LlamaForCausalLM\"], \"attention_bias\": false, \"attention_dropout\": 0.0,"
    "\"bos_token_id\": 128000, \"dtype\": \"bfloat16\", \"eos_token_id\": 128001, \"head_dim\": 64,"
    "\"hidden_act\": \"silu\", \"hidden_size\": 2048, \"initializer_range\": 0.02, \"intermediate_size\": 8192,"
    "\"max_position_embeddings\": 131072, \"mlp_bias\": false, \"model_type\": \"llama\","
    "\"num_attention_heads\": 32, \"num_hidden_layers\": 16, \"num_key_value_heads\": 8, \"pad_token_id\": null,"
    "\"pretraining_tp\": 1, \"rms_norm_eps\": 1e-05, \"rope_parameters\": {\"factor\": 32.0,"
    "\"high_freq_factor\": 4.0, \"low_freq_factor\": 1.0, \"original_max_position_embeddings\": 8192,"
    "\"rope_theta\": 500000.0, \"rope_type\": \"llama3\"}, \"tie_word_embeddings\": true,"
    "\"transformers_version\": \"5.0.0\", \"use_cache\": true, \"vocab_size\": 128256}";

// the shape of mistralai/Mistral-7B-v0.1
static const char mistral_json[] =
    "{\"model_type\": \"mistral\", \"hidden_size\": 4096, \"intermediate_size\": 14336,"
    "\"max_position_embeddings\": 32768, \"num_attention_heads\": 32, \"num_hidden_layers\": 32,"
    "\"num_key_value_heads\": 8, \"rms_norm_eps\": 1e-05, \"rope_theta\": 10000.0, \"sliding_window\": 4096,"
    "\"vocab_size\": 32000}";

// the shape of Qwen/Qwen2-0.5B, as transformers 5 writes it
static const char qwen2_json[] =
    "{\"model_type\": \"qwen2\", \"dtype\": \"bfloat16\", \"hidden_act\": \"silu\", \"hidden_size\": 896,"
    "\"intermediate_size\": 4864, \"layer_types\": [\"full_attention\", \"full_attention\"], "
    "\"max_position_embeddings\":"
    "131072, \"max_window_layers\": 24, \"num_attention_heads\": 14, \"num_hidden_layers\": 2,"
    "\"num_key_value_heads\": 2, \"rms_norm_eps\": 1e-06, \"rope_parameters\": {\"rope_theta\": 1000000.0,"
    "\"rope_type\": \"default\"}, \"sliding_window\": 32768, \"tie_word_embeddings\": true,"
    "\"use_sliding_window\": false, \"vocab_size\": 151936, \"brand_new\": 1, \"other_new\": [2]}";

static void published_models_are_read(void** state) {
    (void)state;
    ModelConfig c;
    Error err = {0};
    String notes = {NULL, 0, 0};
    if (!from_text(&c, gpt2_json, &notes, &err)) fail_msg("%s", err.text);
    assert_int_equal(notes.size, 0);
    assert_int_equal(model_num_parameters(&c), 124439808);
    assert_int_equal(c.intermediate_size, 3072);
    assert_true(c.attention_bias && c.attention_output_bias && c.mlp_bias && c.norm_bias &&
                c.tie_word_embeddings);

    if (!from_text(&c, llama31_json, &notes, &err)) fail_msg("%s", err.text);
    assert_string_equal(notes.data,
                        "note: config.json:1: eos_token_id: only the first token of the list is used\n");
    assert_int_equal(c.eos_token_id, 128001);
    assert_int_equal(c.head_dim, 128);
    assert_int_equal(c.rope.scaling, ROPE_SCALING_LLAMA3);
    assert_true(c.rope.theta == 500000 && c.rope.factor == 8 && c.rope.low_freq_factor == 1);
    assert_true(c.rope.high_freq_factor == 4 && c.rope.original_max_position_embeddings == 8192);
    assert_int_equal(model_num_parameters(&c), 8030261248);

    ModelConfig llama32;
    notes.size = 0;
    if (!from_text(&c, llama32_json, &notes, &err)) fail_msg("%s", err.text);
    assert_int_equal(model_num_parameters(&c), 1235814400);
    assert_true(c.tie_word_embeddings && c.rope.factor == 32 && c.norm_eps == 1e-5);
    assert_true(c.head_dim == 64 && c.num_key_value_heads == 8 && c.max_position_embeddings == 131072);
    assert_true(c.bos_token_id == 128000 && c.eos_token_id == 128001);
    if (!from_text(&llama32, llama32_v5_json, &notes, &err)) fail_msg("%s", err.text);
    assert_memory_equal(&llama32, &c, sizeof c);
    if (!config_load(&run, "configs/llama3.2_1B.json", 0, NULL, &err)) fail_msg("%s", err.text);
    assert_memory_equal(&run.model, &c, sizeof c);
    assert_int_equal(notes.size, 0);

    if (!from_text(&c, mistral_json, &notes, &err)) fail_msg("%s", err.text);
    assert_int_equal(c.max_position_embeddings, 4096);
    assert_non_null(strstr(notes.data, "note: config.json:1: sliding_window: attention here has no window"));
    assert_int_equal(model_num_parameters(&c), 7241732096);

    notes.size = 0;
    if (!from_text(&c, qwen2_json, &notes, &err)) fail_msg("%s", err.text);
    assert_string_equal(notes.data, "note: config.json: unknown keys, ignored: brand_new, other_new\n");
    assert_int_equal(c.max_position_embeddings, 131072);
    assert_true(c.rope.theta == 1e6 && c.rope.scaling == ROPE_SCALING_NONE);
    assert_true(c.attention_bias && !c.attention_output_bias && !c.mlp_bias && !c.norm_bias);

    notes.size = 0;
    assert_true(from_text(
        &c,
        "{\"model_type\": \"gpt2\", \"vocab_size\": 9, \"n_embd\": 8, \"n_layer\": 1, \"n_head\": 2,"
        "\"\\u001b[2J\": 1, \"eos_token_id\": [3, 4]}",
        &notes, &err));
    assert_string_equal(notes.data,
                        "note: config.json: unknown keys, ignored: ?[2J\n"
                        "note: config.json:1: eos_token_id: only the first token of the list is used\n");
    assert_int_equal(c.eos_token_id, 3);
    free(notes.data);
}

static void families_have_their_defaults(void** state) {
    (void)state;
    ModelConfig c;
    Error err = {0};
    assert_true(from_text(&c,
                          "{\"model_type\": \"gpt2\", \"vocab_size\": 9, \"hidden_size\": 8, \"bias\": false,"
                          "\"num_hidden_layers\": 1, \"n_head\": 2, \"hidden_act\": \"gelu_pytorch_tanh\"}",
                          NULL, &err));
    assert_int_equal(c.max_position_embeddings, 1024);
    assert_int_equal(c.intermediate_size, 32);
    assert_true(!c.attention_bias && !c.attention_output_bias && !c.mlp_bias && !c.norm_bias &&
                c.norm_eps == 1e-5);
    assert_true(from_text(&c,
                          "{\"model_type\": \"llama\", \"vocab_size\": 9, \"hidden_size\": 8,"
                          "\"num_hidden_layers\": 1, \"num_attention_heads\": 2, \"intermediate_size\": 7,"
                          "\"attention_bias\": true}",
                          NULL, &err));
    assert_int_equal(c.max_position_embeddings, 2048);
    assert_int_equal(c.num_key_value_heads, 2);
    assert_int_equal(c.head_dim, 4);
    assert_true(c.attention_bias && c.attention_output_bias && !c.mlp_bias && !c.tie_word_embeddings);
    assert_true(c.rope.theta == 10000 && c.bos_token_id == -1 && c.eos_token_id == -1);
}

static void wrong_models_are_refused(void** state) {
    (void)state;
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"{\"model_type\": \"gpt2\", \"vocab_size\": 9, \"hidden_size\": 8, \"n_embd\": 8}",
         "config.json:1: hidden_size and n_embd are two names of one thing; give one"},
        {"{\"model_type\": \"gpt2\", \"vocab_size\": 9, \"n_embd\": 9, \"n_layer\": 1, \"n_head\": 2}",
         "config.json:1: n_embd is 9; it must be a multiple of num_attention_heads, 2"},
        {"{\"model_type\": \"gpt2\", \"vocab_size\": 9, \"n_embd\": 8, \"n_layer\": 1, \"n_head\": 2,\n"
         "\"scale_attn_by_inverse_layer_idx\": true}",
         "config.json:2: scale_attn_by_inverse_layer_idx is true; only false is implemented"},
        {"{\"model_type\": \"gpt2\", \"vocab_size\": 9, \"n_embd\": 8, \"n_layer\": 1, \"n_head\": 2,\n"
         "\"activation_function\": \"gelu\"}",
         "config.json:2: activation_function is \"gelu\"; a gpt2 model has \"gelu_new\""},
        {"{\"model_type\": \"gpt2\", \"vocab_size\": 9, \"n_embd\": 8, \"n_layer\": 1, \"n_head\": 2,\n"
         "\"quantization_config\": {\"bits\": 4}}",
         "config.json:2: quantization_config is {\"bits\":4}; only null is implemented"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ModelConfig c;
        Error err = {0};
        String notes = {NULL, 0, 0};
        assert_false(from_text(&c, cases[i].text, &notes, &err));
        assert_string_equal(err.text, cases[i].message);
        free(notes.data);
    }
}

static void fixtures_load(void** state) {
    (void)state;
    glob_t files;
    assert_int_equal(glob("dev/test/fixtures/*/config.json", 0, NULL, &files), 0);
    for (size_t i = 0; i < files.gl_pathc; i++) {
        ModelConfig c;
        Error err = {0};
        if (!model_config_load(&c, files.gl_pathv[i], &err)) fail_msg("%s", err.text);
    }
    assert_true(files.gl_pathc >= 5);
    globfree(&files);
}

// ----------------------------------------------------------------------------
// a run config whose model is a file

static char directory[] = "/tmp/test_config.XXXXXX", model_path[64];

static int make_model_file(void** state) {
    (void)state;
    Error err = {0};
    if (mkdtemp(directory) == NULL) return -1;
    snprintf(model_path, sizeof model_path, "%s/config.json", directory);
    static const char text[] =
        "{\n\"model_type\": \"gpt2\",\n\"vocab_size\": 50,\n\"n_embd\": 8,\n\"n_layer\": 1,\n"
        "\"n_head\": 2,\n\"n_positions\": 64,\n\"attn_pdrop\": 0.1\n}\n";
    return replace_file(model_path, text, sizeof text - 1, &err) ? 0 : -1;
}

static int remove_model_file(void** state) {
    (void)state;
    return unlink(model_path) == 0 && rmdir(directory) == 0 ? 0 : -1;
}

static void a_model_file_is_read_and_overridden(void** state) {
    (void)state;
    Error err = {0};
    char named[128], message[256];
    snprintf(named, sizeof named, "model=%s", model_path);
    parse(good, named);
    assert_int_equal(run.model.hidden_size, 8);
    char* smaller[] = {named, "model.hidden_size=4",
                       "model.max_position_embeddings=32"}; // not n_embd, n_positions
    assert_true(config_parse(&run, good, strlen(good), "run.json", 3, smaller, &err));
    assert_int_equal(run.model.hidden_size, 4);
    assert_int_equal(run.model.max_position_embeddings, 32);
    assert_int_equal(run.model.num_hidden_layers, 1);

    char* reversed[] = {"model.n_embd=4", named}; // the file is the ground, in whichever order
    assert_true(config_parse(&run, good, strlen(good), "run.json", 2, reversed, &err));
    assert_int_equal(run.model.hidden_size, 4);

    static const struct {
        char* override;
        const char* message; // %s: the path
    } cases[] = {
        {"model.n_embed=4",
         "command line: model.n_embed: unknown key for a gpt2 model; did you mean n_embd?"},
        {"model.attn_pdrop=0.2", "command line: model.attn_pdrop is 0.2; only 0 is implemented"},
        {"model.n_head=3", "%s:4: n_embd is 8; it must be a multiple of num_attention_heads, 3"},
        {"model=nowhere.json",
         "command line: model is \"nowhere.json\"; cannot open nowhere.json: No such file or "
         "directory"},
        {"model.n_layer=0", "command line: model.n_layer is 0; a whole number from 1 to 4096 is wanted"},
        {"batch.sequence_length=65",
         "command line: batch.sequence_length is 65; at most model.max_position_embeddings, 64, is possible"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char* both[] = {named, cases[i].override};
        memset(&err, 0, sizeof err);
        assert_false(config_parse(&run, good, strlen(good), "run.json", 2, both, &err));
        const char* path = strstr(cases[i].message, "%s") != NULL ? model_path : "";
        snprintf(message, sizeof message, "%s%s", path, cases[i].message + (path[0] != '\0' ? 2 : 0));
        assert_string_equal(err.text, message);
    }
}

// A window shorter than the positions shortens those of a file (with a note), but not those the user asked for.
static void a_window_does_not_change_an_override(void** state) {
    (void)state;
    static const char text[] =
        "{\"model_type\": \"mistral\", \"vocab_size\": 100, \"hidden_size\": 8,\n"
        "\"num_hidden_layers\": 1, \"num_attention_heads\": 2, \"intermediate_size\": 9,\n"
        "\"sliding_window\": 40}";
    Error err = {0};
    char path[128], named[160], message[256];
    snprintf(path, sizeof path, "%s/window.json", directory);
    snprintf(named, sizeof named, "model=%s", path);
    assert_true(replace_file(path, text, sizeof text - 1, &err));
    for (int positions = 40; positions <= 41; positions++) {
        char asked[] = "model.max_position_embeddings=40";
        asked[sizeof asked - 2] = (char)('0' + positions % 10);
        char* both[] = {named, asked};
        assert_int_equal(config_parse(&run, good, strlen(good), "run.json", 2, both, &err), positions == 40);
    }
    snprintf(message, sizeof message,
             "%s:3: sliding_window is 40; attention here has no window: set it to null, or "
             "max_position_embeddings to it",
             path);
    assert_string_equal(err.text, message);
    assert_int_equal(unlink(path), 0);
}

static void a_damaged_model_file_is_named(void** state) {
    (void)state;
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"{\n\"n_embd\": 8,\n\"n_embd\": 9}", ":2: n_embd is given twice, again in line 3"},
        {"{\n\"n_embd\" 8}", ":2: not JSON from here on: 8}"},
        {"", " is empty; an object, { ... }, is wanted"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Error err = {0};
        char path[128], named[160], message[256];
        snprintf(path, sizeof path, "%s/bad.json", directory);
        snprintf(named, sizeof named, "model=%s", path);
        snprintf(message, sizeof message, "%s%s", path, cases[i].message);
        assert_true(replace_file(path, cases[i].text, strlen(cases[i].text), &err));
        expect(good, strlen(good), named, message);
        assert_int_equal(unlink(path), 0);
    }
}

// ----------------------------------------------------------------------------
// writing JSON

static void numbers_keep_every_bit(void** state) {
    (void)state;
    const double values[] = {0,   -0.0, 1, 8, 0.1, 1.0 / 3, 1e-8, 6e-4, 1e300, 4.9e-324, 123456789012345678.0,
                             -2.5};
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
        String text = {NULL, 0, 0};
        json_append_number(&text, values[i]);
        double again = strtod(text.data, NULL);
        assert_memory_equal(&again, &values[i], sizeof again);
        assert_non_null(strpbrk(text.data, ".e"));
        free(text.data);
    }
    String text = {NULL, 0, 0};
    json_append_number(&text, 0.1);
    assert_string_equal(text.data, "0.1");
    free(text.data);
}

static void lines_are_found(void** state) {
    (void)state;
    const char text[] = "{\"a\": \"b\",\n\"b\": {\"a\":\n{\"b\": 1},\n\"c\": [{\"a\": 1}],\n\"c\" : 2}}";
    assert_int_equal(json_line_of(text, sizeof text - 1, "a", 1), 1);
    assert_int_equal(json_line_of(text, sizeof text - 1, "b", 1), 2);
    assert_int_equal(json_line_of(text, sizeof text - 1, "b.a", 1), 2);
    assert_int_equal(json_line_of(text, sizeof text - 1, "b.a.b", 1), 3);
    assert_int_equal(json_line_of(text, sizeof text - 1, "b.c", 1), 4);
    assert_int_equal(json_line_of(text, sizeof text - 1, "b.c", 2), 5);
    assert_int_equal(json_line_of(text, sizeof text - 1, "a.b", 1), 0);
    assert_int_equal(json_line_of(text, sizeof text - 1, "c", 1), 0);
    assert_int_equal(json_line_of(text, sizeof text - 1, "", 1), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_wrong_value_is_named),
        cmocka_unit_test(other_texts_are_not_configs),
        cmocka_unit_test(size_and_nesting_are_limited),
        cmocka_unit_test(models_of_absurd_size_are_refused),
        cmocka_unit_test(wrong_overrides_are_named),
        cmocka_unit_test(overrides_win),
        cmocka_unit_test(comments_and_line_ends_are_free),
        cmocka_unit_test(sources_are_read),
        cmocka_unit_test(defaults_are_the_tables),
        cmocka_unit_test(fused_gelu_excludes_its_recompute),
        cmocka_unit_test(every_committed_config_loads),
        cmocka_unit_test(published_sizes_are_met),
        cmocka_unit_test(written_models_read_back),
        cmocka_unit_test(resolved_configs_read_back),
        cmocka_unit_test(printed_configs_hold_every_knob),
        cmocka_unit_test(readme_has_the_reference),
        cmocka_unit_test(published_models_are_read),
        cmocka_unit_test(families_have_their_defaults),
        cmocka_unit_test(wrong_models_are_refused),
        cmocka_unit_test(fixtures_load),
        cmocka_unit_test_setup_teardown(a_model_file_is_read_and_overridden, make_model_file, NULL),
        cmocka_unit_test(a_window_does_not_change_an_override),
        cmocka_unit_test_setup_teardown(a_damaged_model_file_is_named, NULL, remove_model_file),
        cmocka_unit_test(numbers_keep_every_bit),
        cmocka_unit_test(lines_are_found),
    };
    return cmocka_run_group_tests_name("config", tests, NULL, NULL);
}
