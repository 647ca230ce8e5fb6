// Fuzzes manifest.json, state.json and the index of a sharded model: the first byte says which. A manifest is
// also tried with the hash that belongs to it, for a forger can compute hashes too.
#include "llmc/checkpoint.h" // defines: manifest_parse, train_state_parse, model_index_parse

static void manifest_input(const char* text, size_t size) {
    Manifest m;
    Error err = {0, {0}};
    if (!manifest_parse(&m, text, size, "input", &err)) {
        CHECK(err.code == EXIT_BAD_DATA);
        return;
    }
    for (int i = 0; i < m.count; i++) CHECK(plain_file_name(m.files[i].name));
    String again = {NULL, 0, 0};
    Manifest copy;
    manifest_write(&m, &again);
    CHECK(manifest_parse(&copy, again.data, again.size, "written", &err) && copy.count == m.count);
    CHECK(memcmp(copy.files, m.files, (size_t)m.count * sizeof *m.files) == 0);
    manifest_free(&copy);
    manifest_free(&m);
    free(again.data);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    Error err = {0, {0}};
    TrainState state;
    Manifest files = {NULL, 0};
    String text = {NULL, 0, 0};
    string_append_bytes(&text, data + 1, size - 1);
    switch (data[0]) {
    case 'i':
        if (model_index_parse(&files, text.data, "input", &err)) manifest_free(&files);
        break;
    case 's':
        if (train_state_parse(&state, text.data, "input", &err)) CHECK(state.step < 1ull << 53);
        break;
    case 'f': { // the body of a manifest, to which its hash is added
        char hex[MANIFEST_DIGITS + 1];
        string_append(&text, "%s", manifest_hash_key);
        hash_to_hex(hex, XXH3_128bits(text.data, text.size));
        string_append(&text, "%s%s", hex, manifest_end);
        manifest_input(text.data, text.size);
        break;
    }
    default:
        manifest_input(text.data, text.size);
    }
    free(text.data);
    return 0;
}
