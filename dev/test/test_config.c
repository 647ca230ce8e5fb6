// The run config: what is right is read as it stands, and what is written reads back. What is wrong is in
// test_config_errors.c.
#include "llmc/config_print.h"    // defines: config_write_json, config_print_reference
#include "dev/test/good_config.h" // defines: good, run, replaced, parse, expect
#include <glob.h>

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
        cmocka_unit_test(comments_and_line_ends_are_free), cmocka_unit_test(sources_are_read),
        cmocka_unit_test(defaults_are_the_tables),         cmocka_unit_test(overrides_win),
        cmocka_unit_test(every_committed_config_loads),    cmocka_unit_test(published_sizes_are_met),
        cmocka_unit_test(written_models_read_back),        cmocka_unit_test(resolved_configs_read_back),
        cmocka_unit_test(printed_configs_hold_every_knob), cmocka_unit_test(readme_has_the_reference),
        cmocka_unit_test(numbers_keep_every_bit),          cmocka_unit_test(lines_are_found),
    };
    return cmocka_run_group_tests_name("config", tests, NULL, NULL);
}
