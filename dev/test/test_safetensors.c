// The safetensors header: what is read, what must be refused, what is written; and half precision.
#include "llmc/safetensors.h"    // defines: safetensors_parse, safetensors_header_*
#include "llmc/stored_tensors.h" // defines: float_from_f16, transpose
// cmocka's macro fail() would hide ours, so its header comes last
#include <setjmp.h>
#include <cmocka.h>

static bool parse(Safetensors* s, const char* json, uint64_t data_bytes, Error* err) {
    memset(err, 0, sizeof *err);
    return safetensors_parse(s, json, strlen(json), data_bytes, "x.safetensors", err);
}

// ----------------------------------------------------------------------------
// headers that are right

static void test_good_header(void** state) {
    (void)state;
    Safetensors s;
    Error err;
    // Out of order, a scalar, an empty tensor, metadata in the middle, spaces behind.
    assert_true(parse(&s,
                      "{\"b\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[24,36]},"
                      "\"__metadata__\":{\"format\":\"pt\"},"
                      "\"none\":{\"dtype\":\"F32\",\"shape\":[7,0],\"data_offsets\":[24,24]},"
                      "\"a\":{\"data_offsets\":[0,16],\"shape\":[4],\"dtype\":\"F32\"},"
                      "\"scalar\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[16,24]}}   ",
                      36, &err));
    assert_int_equal(s.count, 4);
    static const char* const order[] = {"a", "scalar", "none", "b"};
    for (int i = 0; i < 4; i++) assert_string_equal(s.tensors[i].name, order[i]);
    assert_int_equal(s.tensors[1].num_dims, 0);
    assert_int_equal(s.tensors[1].count, 1);
    assert_int_equal(s.tensors[2].count, 0);
    assert_int_equal(s.tensors[3].dims[1], 3);
    assert_int_equal(s.tensors[3].begin, 24);
    assert_string_equal(s.tensors[3].type->name, "BF16");
    safetensors_free(&s);

    assert_true(parse(&s, "{}", 0, &err));
    assert_int_equal(s.count, 0);
    safetensors_free(&s);
}

// ----------------------------------------------------------------------------
// headers that are wrong: each must be refused, with these words

#define T(dtype, shape, offsets) "{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}"
#define A4 "\"a\":" T("\"F32\"", "[1]", "[0,4]")

static const struct {
    const char* json;
    uint64_t data_bytes;
    const char* message;
} bad_headers[] = {
    {"", 0, "not a JSON object"},
    {"[]", 0, "not a JSON object"},
    {" {}", 0, "not a JSON object"},
    {"{", 0, "not a JSON object"},
    {"{}x", 0, "not a JSON object"},
    {"{}{}", 0, "not a JSON object"},
    {"{\"a\":1}", 0, "must have dtype, shape and data_offsets"},
    {"{\"a\":null}", 0, "must have dtype, shape and data_offsets"},
    {"{\"a\":[1,2]}", 0, "must have dtype, shape and data_offsets"},
    {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "must have dtype, shape and data_offsets"},
    {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "must have dtype, shape and data_offsets"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "must have dtype, shape and data_offsets"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":1}}", 4, "data_offsets alone"},
    {"{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
     "data_offsets alone"},
    {"{\"a\":" T("1", "[1]", "[0,4]") "}", 4, "must have dtype"},
    {"{\"a\":" T("\"F33\"", "[1]", "[0,4]") "}", 4, "unknown dtype"},
    {"{\"a\":" T("\"f32\"", "[1]", "[0,4]") "}", 4, "unknown dtype"},
    {"{\"a\":" T("\"F32\"", "1", "[0,4]") "}", 4, "must have dtype, shape"},
    {"{\"a\":" T("\"F32\"", "[-1]", "[0,4]") "}", 4, "impossible shape"},
    {"{\"a\":" T("\"F32\"", "[1.5]", "[0,4]") "}", 4, "impossible shape"},
    {"{\"a\":" T("\"F32\"", "[\"1\"]", "[0,4]") "}", 4, "impossible shape"},
    {"{\"a\":" T("\"F32\"", "[1e400]", "[0,4]") "}", 4, "impossible shape"},
    {"{\"a\":" T("\"F32\"", "[9007199254740993]", "[0,4]") "}", 4, "impossible shape"},
    {"{\"a\":" T("\"F32\"", "[4294967296,4294967296]", "[0,0]") "}", 0, "impossible shape"},
    {"{\"a\":" T("\"F32\"", "[4294967296,1073741824]", "[0,0]") "}", 0, "impossible shape"}, // 2^64 bytes
    {"{\"a\":" T("\"U8\"", "[2147483648,2147483648,4]", "[0,0]") "}", 0, "impossible shape"},
    {"{\"a\":" T("\"F32\"", "[1,1,1,1,1,1,1,1,1]", "[0,4]") "}", 4, "9 dimensions"},
    {"{\"a\":" T("\"F32\"", "[1]", "[0]") "}", 4, "impossible data_offsets"},
    {"{\"a\":" T("\"F32\"", "[1]", "[0,4,8]") "}", 4, "impossible data_offsets"},
    {"{\"a\":" T("\"F32\"", "[1]", "[4,0]") "}", 4, "impossible data_offsets"},
    {"{\"a\":" T("\"F32\"", "[1]", "[-4,0]") "}", 4, "impossible data_offsets"},
    {"{\"a\":" T("\"F32\"", "[1]", "[0,null]") "}", 4, "impossible data_offsets"},
    {"{\"a\":" T("\"F32\"", "[1]", "[0,1e300]") "}", 4, "impossible data_offsets"},
    {"{\"a\":" T("\"F32\"", "[2]", "[0,4]") "}", 4, "need 8"},
    {"{\"a\":" T("\"F64\"", "[1]", "[0,4]") "}", 4, "need 8"},
    {"{\"a\":" T("\"F4\"", "[3]", "[0,1]") "}", 1, "need 1"}, // 12 bits are no whole number of bytes
    {"{" A4 "," A4 "}", 4, "listed twice"},
    {"{" A4 ",\"b\":" T("\"F32\"", "[1]", "[0,4]") "}", 4, "the one before ends at 4"},
    {"{" A4 ",\"b\":" T("\"F32\"", "[1]", "[2,6]") "}", 6, "the one before ends at 4"},
    {"{" A4 ",\"b\":" T("\"F32\"", "[1]", "[8,12]") "}", 12, "the one before ends at 4"},
    {"{\"a\":" T("\"F32\"", "[1]", "[4,8]") "}", 8, "the one before ends at 0"},
    {"{" A4 "}", 3, "has 3 bytes of data"},
    {"{" A4 "}", 5, "has 5 bytes of data"},
    {"{}", 1, "has 1 bytes of data"},
    {"{\"a\\nb\":" T("\"F32\"", "[1]", "[0,4]") "}", 4, "not printable"},
    {"{\"a\\u001b[2Jb\":" T("\"F32\"", "[1]", "[0,4]") "}", 4, "not printable"},
    {"{\"__metadata__\":{\"format\":1}}", 0, "__metadata__"},
    {"{\"__metadata__\":[]}", 0, "__metadata__"},
    {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "__metadata__"},
};

static void test_bad_headers(void** state) {
    (void)state;
    for (size_t i = 0; i < sizeof bad_headers / sizeof bad_headers[0]; i++) {
        Safetensors s;
        Error err;
        bool ok = parse(&s, bad_headers[i].json, bad_headers[i].data_bytes, &err);
        if (ok || strstr(err.text, bad_headers[i].message) == NULL)
            fail_msg("%s: %s", bad_headers[i].json, ok ? "was accepted" : err.text);
        assert_int_equal(err.code, EXIT_BAD_DATA);
        assert_null(s.tensors); // nothing left to free
        assert_null(s.json);
    }
}

static void test_header_with_nul(void** state) {
    (void)state;
    Safetensors s;
    Error err = {0, {0}};
    assert_false(safetensors_parse(&s, "{}\0\0", 4, 0, "x", &err));
}

static void test_header_size(void** state) {
    (void)state;
    static const struct {
        uint64_t size, file_size;
        bool ok;
    } cases[] = {
        {2, 10, true},
        {0, 100, false},
        {1, 100, false},
        {92, 100, true},
        {93, 100, false},
        {100000000, 1u << 30, true},
        {100000001, 1u << 30, false},
        {UINT64_MAX, 100, false},
        {UINT64_MAX - 7, 100, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        unsigned char first[8];
        uint64_t size;
        Error err = {0, {0}};
        memcpy(first, &cases[i].size, 8);
        assert_int_equal(safetensors_header_size(first, cases[i].file_size, "x", &size, &err), cases[i].ok);
        assert_int_equal(err.code, cases[i].ok ? 0 : EXIT_BAD_DATA);
    }
}

// ----------------------------------------------------------------------------
// writing

static void test_written_header(void** state) {
    (void)state;
    static const uint64_t dims[2] = {3, 5};
    String text = {NULL, 0, 0};
    uint64_t end = 0, size;
    safetensors_header_begin(&text);
    safetensors_header_add(&text, &end, "w", 2, dims);
    safetensors_header_add(&text, &end, "exp_avg.h.0.qkvw[0:3]", 1, dims);
    safetensors_header_finish(&text);
    assert_int_equal(end, 4 * (15 + 3));
    assert_int_equal(text.size % 8, 0);
    memcpy(&size, text.data, 8);
    assert_int_equal(size, text.size - 8);
    static const char start[] = "{\"__metadata__\":{\"format\":\"pt\"},\"w\":{\"dtype\":\"F32\"";
    assert_memory_equal(text.data + 8, start, strlen(start));
    Safetensors s;
    Error err = {0, {0}};
    assert_true(safetensors_parse(&s, text.data + 8, size, end, "x", &err));
    assert_int_equal(s.count, 2);
    assert_string_equal(s.tensors[1].name, "exp_avg.h.0.qkvw[0:3]");
    assert_int_equal(s.data_begin, text.size);
    safetensors_free(&s);
    free(text.data);
}

// ----------------------------------------------------------------------------
// numbers

static void test_half_precision(void** state) {
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        int exponent = (h >> 10) & 31, mantissa = h & 1023;
        double value = exponent == 0    ? ldexp(mantissa, -24)
                       : exponent == 31 ? (mantissa == 0 ? INFINITY : NAN)
                                        : ldexp(1024 + mantissa, exponent - 25);
        float expected = (float)(h & 0x8000 ? -value : value), got = float_from_f16((uint16_t)h);
        assert_true(isnan(expected) ? isnan(got) : memcmp(&expected, &got, 4) == 0);
    }
}

static void test_transpose(void** state) {
    (void)state;
    enum { ROWS = 35, COLS = 19, IN_STRIDE = 23, OUT_STRIDE = 40 };
    float in[ROWS * IN_STRIDE], out[COLS * OUT_STRIDE];
    for (int i = 0; i < ROWS * IN_STRIDE; i++) in[i] = (float)i;
    for (int i = 0; i < COLS * OUT_STRIDE; i++) out[i] = -1;
    transpose(out, OUT_STRIDE, in, IN_STRIDE, ROWS, COLS);
    for (int c = 0; c < COLS; c++)
        for (int r = 0; r < OUT_STRIDE; r++)
            assert_true(out[c * OUT_STRIDE + r] == (r < ROWS ? in[r * IN_STRIDE + c] : -1));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good_header),     cmocka_unit_test(test_bad_headers),
        cmocka_unit_test(test_header_with_nul), cmocka_unit_test(test_header_size),
        cmocka_unit_test(test_written_header),  cmocka_unit_test(test_half_precision),
        cmocka_unit_test(test_transpose),
    };
    return cmocka_run_group_tests_name("safetensors", tests, NULL, NULL);
}
