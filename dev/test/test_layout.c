// The division of a model: every element has exactly one place in every layout.
#include "llmc/layout_resolve.h" // defines: Layout, model_part, tensor_parts, tensors_owned ...
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

static ModelConfig model(const char* family, int heads, int kv_heads, int layers, int vocabulary, bool tied) {
    ModelConfig c;
    memset(&c, 0, sizeof c);
    for (int i = 0; i < NUM_MODEL_FAMILIES; i++)
        if (strcmp(model_families[i].model_type, family) == 0) c.family = &model_families[i];
    c.vocab_size = vocabulary, c.hidden_size = 8 * heads, c.num_hidden_layers = layers;
    c.num_attention_heads = heads, c.num_key_value_heads = kv_heads, c.head_dim = 8;
    c.intermediate_size = 128, c.max_position_embeddings = 16, c.tie_word_embeddings = tied;
    c.attention_bias = c.attention_output_bias = c.mlp_bias = c.norm_bias = c.family->conv1d;
    return c;
}

static Layout layout(int tp, int dp, int pp, int chunks) {
    Layout l = layout_single();
    l.size = tp * dp * pp, l.tp_size = tp, l.dp_size = dp, l.pp_size = pp, l.num_chunks = chunks;
    return layout_at(l, 0);
}

static void ranks_have_one_place(void** state) {
    (void)state;
    Layout l = layout(2, 3, 4, 1);
    for (int r = 0; r < l.size; r++) {
        Layout at = layout_at(l, r);
        assert_int_equal(layout_rank(&l, at.tp, at.dp, at.pp), r);
        assert_int_equal(r, at.tp + 2 * (at.dp + 3 * at.pp));
    }
    l = layout(2, 6, 2, 1);
    l.cp_size = 3;
    assert_int_equal(num_replicas(&l), 2);
    for (int r = 0; r < l.size; r++) {
        Layout at = layout_at(l, r);
        assert_int_equal(r, at.tp + 2 * (at.cp + 3 * (replica(&at) + 2 * at.pp)));
        assert_true(at.cp < 3 && replica(&at) < 2);
    }
}

// Adds one for each element of the whole model that this rank counts.
static void count_elements(int* times, const ModelConfig* c, const Layout* l, int chunk) {
    ParameterLayout whole = parameter_layout(c);
    ModelConfig part = model_part(c, l);
    ParameterLayout mine = layout_parameters(&part, l);
    int first, end, global;
    chunk_layers(l, c, chunk, &first, &end, &global);
    for (int i = 0; i < NUM_TENSORS; i++) {
        TensorPart parts[3];
        int place = tensor_table[i].place, count = tensor_parts(parts, c, l, (enum TensorId)i);
        bool here =
            place == PER_LAYER || (chunk == 0 && (place == BEFORE_LAYERS ? has_embedding(l) : has_head(l)));
        if (whole.size[i] == 0 || !here) continue;
        assert_true(mine.size[i] > 0);
        for (int local = place == PER_LAYER ? first : 0; local < (place == PER_LAYER ? end : 1); local++) {
            size_t at = tensor_offset(&whole, (enum TensorId)i, global + local - first);
            if (place != PER_LAYER) at = whole.offset[i];
            for (int k = 0; k < count; k++) {
                assert_int_equal(parts[k].cols, mine.cols[i]);
                assert_true(parts[k].local_row + parts[k].rows <= mine.rows[i]);
                for (size_t row = 0; row < parts[k].rows && parts[k].counted; row++)
                    for (size_t col = 0; col < parts[k].cols; col++)
                        times[at + (parts[k].row + row) * whole.cols[i] + parts[k].col + col]++;
            }
        }
    }
}

static void every_element_counts_once(void** state) {
    const int layouts[][3] = {{1, 1, 1}, {2, 1, 1}, {4, 1, 1}, {8, 1, 1}, {1, 2, 1},
                              {1, 3, 1}, {2, 2, 1}, {4, 2, 2}, {1, 4, 1}, {8, 5, 1}};
    const ModelConfig models[] = {model("gpt2", 8, 8, 5, 300, true), model("llama", 8, 2, 5, 517, false),
                                  model("qwen2", 8, 4, 6, 129, true), model("llama", 8, 1, 10, 2000, false)};
    (void)state;
    for (size_t m = 0; m < 4; m++)
        for (size_t k = 0; k < sizeof layouts / sizeof layouts[0]; k++) {
            const ModelConfig* c = &models[m];
            Layout l = layout(layouts[k][0], 2, layouts[k][1], layouts[k][2]);
            if (num_virtual_stages(&l) > c->num_hidden_layers) continue;
            ParameterLayout whole = parameter_layout(c);
            int* times = (int*)calloc_check(whole.num_parameters, sizeof *times);
            for (int r = 0; r < l.size; r++) {
                Layout at = layout_at(l, r);
                for (int chunk = 0; at.dp == 0 && chunk < l.num_chunks; chunk++)
                    count_elements(times, c, &at, chunk);
            }
            for (int i = 0; i < NUM_TENSORS; i++)
                for (int layer = 0; layer < tensor_copies(c, (enum TensorId)i) && whole.size[i] != 0;
                     layer++) {
                    size_t rows = tensor_table[i].rows == DIM_VOCAB ? (size_t)c->vocab_size : whole.rows[i];
                    size_t at = tensor_offset(&whole, (enum TensorId)i, layer);
                    for (size_t e = 0; e < rows * whole.cols[i]; e++)
                        if (times[at + e] != 1)
                            fail_msg("model %zu, layout %zu: element %zu of %s, layer %d counts %d times", m,
                                     k, e, tensor_table[i].name, layer, times[at + e]);
                }
            free(times);
        }
}

static void layers_are_found_where_they_are(void** state) {
    (void)state;
    for (int pp = 1; pp <= 4; pp++)
        for (int chunks = 1; chunks <= 3; chunks++)
            for (int L = pp * chunks; L <= pp * chunks + 7; L++) {
                ModelConfig c = model("llama", 8, 2, L, 300, false);
                Layout l = layout(1, 1, pp, chunks);
                for (int r = 0; r < pp; r++) {
                    Layout at = layout_at(l, r);
                    for (int chunk = 0; chunk < chunks; chunk++) {
                        int first, end, global, stage, local;
                        chunk_layers(&at, &c, chunk, &first, &end, &global);
                        for (int k = first; k < end; k++) {
                            find_layer(&l, &c, global + k - first, &stage, &local);
                            assert_true(stage == r && local == k);
                        }
                    }
                }
            }
}

static void slices_and_owners_divide_everything(void** state) {
    (void)state;
    ModelConfig c = model("llama", 8, 2, 5, 517, false);
    ParameterLayout whole = parameter_layout(&c);
    for (int size = 1; size <= 70; size += size < 9 ? 1 : 20) {
        size_t next = 0;
        for (int r = 0; r < size; r++) {
            size_t begin, end;
            tensors_owned(&c, r, size, &begin, &end);
            if (begin == end) continue;
            assert_int_equal(begin, next);
            next = end;
            assert_int_equal(tensor_owner(&whole, begin, size), r);
            assert_int_equal(tensor_begin(&whole, end - 1) >= begin, 1);
            assert_int_equal(tensor_owner(&whole, tensor_begin(&whole, end - 1), size), r);
        }
        assert_int_equal(next, whole.num_parameters);
        Layout l = layout(1, size, 1, 1);
        ModelConfig part = model_part(&c, &l);
        ParameterLayout p = layout_parameters(&part, &l);
        for (int b = 0; b < 7; b++) {
            Bucket bucket = parameter_bucket(&p, 5, b), unpadded = parameter_bucket(&whole, 5, b);
            assert_true(bucket.size >= unpadded.size);
            assert_int_equal(size > 1 ? bucket.size % ((size_t)size * SLICE_ALIGN) : 0, 0);
        }
    }
}

static void sizes_that_do_not_divide_are_named(void** state) {
    static RunConfig run;
    (void)state;
    const struct {
        int size, tp, pp, dp, chunks, cp;
        const char* says;
    } cases[] = {
        {8, 2, 2, 0, 1, 1, NULL},
        {8, 2, 2, 2, 1, 1, NULL},
        {8, 2, 2, 4, 1, 1, "8 processes were started"},
        {8, 2, 2, 1, 1, 2, NULL},
        {8, 1, 1, 0, 1, 8, NULL},
        {8, 2, 2, 2, 1, 2, "8 processes were started"},
        {6, 4, 1, 0, 1, 1, "a multiple of 4"},
        {6, 1, 1, 0, 1, 4, "a multiple of 4"},
        {3, 1, 1, 0, 1, 3,
         "sequence_length 16: each rank has two parts of a sequence of equal length, so it must be "
         "a multiple of 6; 2 works"},
        {64, 4, 1, 0, 1, 8, "sequence_length / context_parallel_size 2: it must divide evenly"},
        {3, 3, 1, 0, 1, 1, "num_attention_heads 8: heads must divide evenly; 2 works"},
        {2, 1, 1, 0, 2, 1, "virtual_pipeline_size is 2 without a pipeline"},
        {16, 1, 16, 0, 1, 1, "needs a layer for each"},
        {5, 1, 1, 0, 1, 1, "20 is the nearest above"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Error err = {0, {0}};
        memset(&run, 0, sizeof run);
        run.model = model("llama", 8, 4, 6, 300, false);
        run.batch.global_batch_size = 16, run.batch.micro_batch_size = 4, run.batch.sequence_length = 16;
        if (cases[i].says == NULL) run.batch.micro_batch_size = 1;
        run.parallel.tensor_parallel_size = cases[i].tp, run.parallel.pipeline_parallel_size = cases[i].pp;
        run.parallel.data_parallel_size = cases[i].dp, run.parallel.virtual_pipeline_size = cases[i].chunks;
        run.parallel.pipeline_schedule = PIPELINE_1F1B, run.parallel.zero_stage = 1;
        run.parallel.context_parallel_size = cases[i].cp;
        bool ok = layout_resolve(&run, cases[i].size - 1, cases[i].size, &err);
        if (ok != (cases[i].says == NULL) || (!ok && strstr(err.text, cases[i].says) == NULL))
            fail_msg("case %zu: %s", i, ok ? "was accepted" : err.text);
        if (!ok) assert_int_equal(err.code, EXIT_CONFIG);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ranks_have_one_place),
        cmocka_unit_test(every_element_counts_once),
        cmocka_unit_test(layers_are_found_where_they_are),
        cmocka_unit_test(slices_and_owners_divide_everything),
        cmocka_unit_test(sizes_that_do_not_divide_are_named),
    };
    return cmocka_run_group_tests_name("layout", tests, NULL, NULL);
}
