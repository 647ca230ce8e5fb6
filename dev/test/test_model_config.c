// The model of a run: Hugging Face's config.json, alone and as a run config names it.
#include "dev/test/good_config.h" // defines: good, run, parse, expect
#include <glob.h>

// ----------------------------------------------------------------------------
// as the hub has it

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

static char directory[] = "/tmp/test_model_config.XXXXXX", model_path[64];

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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(published_models_are_read),
        cmocka_unit_test(families_have_their_defaults),
        cmocka_unit_test(wrong_models_are_refused),
        cmocka_unit_test(fixtures_load),
        cmocka_unit_test_setup_teardown(a_model_file_is_read_and_overridden, make_model_file, NULL),
        cmocka_unit_test(a_window_does_not_change_an_override),
        cmocka_unit_test_setup_teardown(a_damaged_model_file_is_named, NULL, remove_model_file),
    };
    return cmocka_run_group_tests_name("model_config", tests, NULL, NULL);
}
