// What `plan` prints, and the table of what GPUs could reach.
#include "llmc/gpu_peaks.h" // defines: gpu_peak_flops
#include "llmc/planner.h"   // defines: plan_print, with_commas
// cmocka's macro fail() would hide ours, so its header comes last
#include <setjmp.h>
#include <cmocka.h>

static RunConfig run; // too large for a stack
static const MemoryLine memory[] = {{"weights", 273920}, {"scratch", 1000000}};

static Plan plan_of(const char* config) {
    Error err = {0};
    Plan plan = {&run, 2, memory, 0, NULL, 0, 0, 0, 0};
    if (!config_load(&run, config, 0, NULL, &err)) fail_msg("%s", err.text);
    return plan;
}

// What plan_print writes, without runs of spaces and line ends; valid until the next call.
static const char* printed(const Plan* plan) {
    static char text[8192];
    FILE* out = tmpfile();
    size_t size = 0;
    assert_non_null(out);
    plan_print(plan, out);
    rewind(out);
    for (int c; (c = getc(out)) != EOF && size < sizeof text - 1;) {
        if (c == '\n') c = ' ';
        if (c != ' ' || size == 0 || text[size - 1] != ' ') text[size++] = (char)c;
    }
    text[size] = '\0';
    fclose(out);
    return text;
}

static void expect(const Plan* plan, const char* wanted) {
    const char* text = printed(plan);
    if (strstr(text, wanted) == NULL) fail_msg("no \"%s\" in: %s", wanted, text);
}

static void expect_none(const Plan* plan, const char* unwanted) {
    const char* text = printed(plan);
    if (strstr(text, unwanted) != NULL) fail_msg("\"%s\" in: %s", unwanted, text);
}

static void numbers_have_commas(void** state) {
    (void)state;
    char out[32];
    assert_string_equal(with_commas(out, 0), "0");
    assert_string_equal(with_commas(out, 999), "999");
    assert_string_equal(with_commas(out, 1000), "1,000");
    assert_string_equal(with_commas(out, 12345678), "12,345,678");
    assert_string_equal(with_commas(out, UINT64_MAX), "18,446,744,073,709,551,615");
}

// C 64, L 2, FF 256, V 512, T 64, tied: a layer has 4 C C + 2 C FF weights in matmuls, the head V C.
static void model_and_flops(void** state) {
    (void)state;
    Plan plan = plan_of("configs/tiny_gpt2.json");
    double N = 2 * (4 * 64 * 64 + 2 * 64 * 256) + 512 * 64, attention = 2.0 * 64 * 64;
    char wanted[128];
    expect(&plan, "parameters 136,960, of which 131,072 take part in matmuls (N)");
    expect(&plan,
           "8 sequences of 64 = 512 tokens a step, in 1 micro-batches of 8; 20,480 tokens in 40 steps");
    snprintf(wanted, sizeof wanted, "compute %.4g FLOP a token counting causal", 6 * N + 6 * attention);
    expect(&plan, wanted);
    snprintf(wanted, sizeof wanted, "%.4g by PaLM's convention", 6 * N + 12 * attention);
    expect(&plan, wanted);
    expect(&plan, "checkpoint 1,643,520 bytes each"); // 12 bytes a parameter
    expect_none(&plan, "epochs");
    plan.train_tokens = 10240;
    expect(&plan, "data 10,240 tokens: 2.00 epochs");
}

static void memory_adds_up(void** state) {
    (void)state;
    Plan plan = plan_of("configs/tiny_gpt2.json");
    expect(&plan, "weights 273,920 2.00 a parameter");
    expect(&plan, "total 1,273,920 9.30 a parameter, 0.00 GB; what there is for it is not known here");
    plan.memory_limit = 1273920;
    expect(&plan, "there are 0.00 GB: it fits");
    expect_none(&plan, "smaller");
    plan.memory_limit--;
    expect(&plan, "IT DOES NOT FIT take a smaller model");
    plan.memory_advice = "batch.recompute=block";
    expect(&plan, "IT DOES NOT FIT it would with batch.recompute=block");
}

// 512 tokens of 835,584 FLOP at 1 GFLOP/s, and 36 bytes for each of 136,960 parameters at 1 GB/s
static void time_is_estimated(void** state) {
    (void)state;
    Plan plan = plan_of("configs/tiny_gpt2.json");
    expect(&plan, "time not known: there is no device here to measure");
    plan.matmul_rate = 1e9;
    expect(&plan, "time not known");
    plan.copy_rate = 1e9;
    assert_float_equal(plan_step_seconds(&plan), 0.42781900 + 0.00493056, 1e-6);
    expect(&plan, "time about 433 ms a step, 1183 tokens/s");
    expect_none(&plan, "utilisation");
    plan.peak_flops = 2e9;
    expect(&plan, "utilisation of the data sheet's 0.0 TFLOP/s: 49.4 % counting causal attention, 52.3 % by");
}

static void peaks_go_by_whole_words(void** state) {
    (void)state;
    static const struct {
        const char* device;
        double bf16, tf32, fp32;
    } cases[] = {
        {"NVIDIA A100-SXM4-80GB", 312, 156, 19.5},
        {"NVIDIA A100-SXM4-40GB MIG 1g.5gb", 0, 0, 0},
        {"NVIDIA A10", 125, 62.5, 31.2},
        {"NVIDIA A10G", 0, 0, 0},
        {"NVIDIA RTX A4000", 0, 0, 0},
        {"NVIDIA RTX A6000", 154.8, 77.4, 38.7},
        {"NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9},
        {"NVIDIA H100 PCIe", 756, 378, 51},
        {"NVIDIA H100 NVL", 835.5, 417.5, 60},
        {"NVIDIA H200", 989.4, 494.7, 66.9},
        {"NVIDIA GH100", 0, 0, 0},
        {"NVIDIA GH200 480GB", 989.4, 494.7, 66.9},
        {"NVIDIA B200", 2250, 1125, 75},
        {"NVIDIA GB200", 2500, 1250, 80},
        {"NVIDIA L4", 121, 60, 30.3},
        {"NVIDIA L40S", 362, 183, 91.6},
        {"NVIDIA GeForce RTX 3090 Ti", 80, 40, 40},
        {"NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6},
        {"NVIDIA GeForce RTX 4090 D", 0, 0, 0},
        {"NVIDIA GeForce RTX 4090 Laptop GPU", 0, 0, 0},
        {"Emulated", 0, 0, 0},
        {"", 0, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char* device = cases[i].device;
        const double wanted[] = {cases[i].bf16, cases[i].tf32, cases[i].fp32};
        const int compute[] = {COMPUTE_BF16, COMPUTE_TF32, COMPUTE_FP32};
        for (int k = 0; k < 3; k++)
            if (gpu_peak_flops(device, compute[k]) != 1e12 * wanted[k])
                fail_msg("%s, type %d: %g FLOP/s, not %g", device, k, gpu_peak_flops(device, compute[k]),
                         1e12 * wanted[k]);
    }
}

// Each row can be reached by a card called just that, and half the width is at least as fast.
static void peaks_are_plausible(void** state) {
    (void)state;
    for (size_t i = 0; i < sizeof gpu_peaks / sizeof gpu_peaks[0]; i++) {
        const GpuPeak* p = &gpu_peaks[i];
        assert_true(p->bf16 >= p->tf32 && p->tf32 >= p->fp32 && p->fp32 >= 0);
        if (gpu_peak_flops(p->name, COMPUTE_BF16) != 1e12 * p->bf16) fail_msg("%s is hidden", p->name);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(numbers_have_commas),     cmocka_unit_test(model_and_flops),
        cmocka_unit_test(memory_adds_up),          cmocka_unit_test(time_is_estimated),
        cmocka_unit_test(peaks_go_by_whole_words), cmocka_unit_test(peaks_are_plausible),
    };
    return cmocka_run_group_tests_name("planner", tests, NULL, NULL);
}
