// A run config that is wrong: what and where is named in one exact sentence.
#include "dev/test/good_config.h" // defines: good, run, replaced, expect

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

// ----------------------------------------------------------------------------
// settings that are good one by one

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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_wrong_value_is_named),    cmocka_unit_test(other_texts_are_not_configs),
        cmocka_unit_test(size_and_nesting_are_limited), cmocka_unit_test(models_of_absurd_size_are_refused),
        cmocka_unit_test(wrong_overrides_are_named),    cmocka_unit_test(fused_gelu_excludes_its_recompute),
    };
    return cmocka_run_group_tests_name("config_errors", tests, NULL, NULL);
}
