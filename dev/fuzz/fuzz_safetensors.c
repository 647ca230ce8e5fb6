// Fuzzes the safetensors header: the input is a whole file.
#include "llmc/safetensors.h" // defines: safetensors_header_size, safetensors_parse

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Safetensors s;
    Error err = {0, {0}};
    uint64_t header_size;
    if (size < 8 || !safetensors_header_size(data, size, "input", &header_size, &err)) return 0;
    char* json = (char*)malloc_check(header_size + 1);
    memcpy(json, data + 8, header_size);
    json[header_size] = '\0';
    if (safetensors_parse(&s, json, header_size, size - 8 - header_size, "input", &err)) {
        // What was accepted can be read: every tensor lies inside the file and its shape fits its bytes.
        for (int i = 0; i < s.count; i++) {
            const SafetensorsTensor* t = &s.tensors[i];
            CHECK(t->begin <= t->end && s.data_begin + t->end <= size);
            CHECK(t->count * t->type->bits == 8 * (t->end - t->begin));
        }
        safetensors_free(&s);
    } else {
        CHECK(err.code == EXIT_BAD_DATA && err.text[0] != '\0');
    }
    free(json);
    return 0;
}
