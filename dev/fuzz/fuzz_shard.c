// Fuzzes what reads token files. The first byte says which, what follows are the bytes:
//
//   0   a shard                                 1   a document index, for a shard of 3 documents, 10 tokens
//   2   a Megatron index, for 1000 bytes        3   a line of JSONL
//
// What is accepted is read to its end: every token, every document, every sequence.
#include "llmc/utils.h"         // defines: Error, CHECK
#include "dev/data/convert.h"   // defines: megatron_index_parse, megatron_sequence, span_token
#include "dev/data/json_line.h" // defines: json_line_field
#include "llmc/shard.h"         // defines: shard_parse, shard_index_parse, shard_copy, shard_token

static void read_shard(const void* bytes, size_t size) {
    Error err = {0};
    Shard shard;
    bool ok = shard_parse(&shard, bytes, size, "input", &err);
    CHECK(ok == (err.code == 0));
    if (!ok) return;
    uint64_t n = shard.header.num_tokens;
    int32_t* tokens = (int32_t*)malloc_check(n * sizeof *tokens);
    uint32_t largest = shard_copy(tokens, &shard, 0, n);
    for (uint64_t i = 0; i < n; i++)
        CHECK(shard_token(&shard, i) == (uint32_t)tokens[i] && (uint32_t)tokens[i] <= largest);
    free(tokens);
}

static void read_index(const void* bytes, size_t size) {
    Error err = {0};
    ShardIndex index;
    bool ok = shard_index_parse(&index, bytes, size, 3, 10, "input", &err);
    CHECK(ok == (err.code == 0));
    for (uint64_t i = 0; ok && i < index.num_documents; i++)
        CHECK(index.ends[i] > (i > 0 ? index.ends[i - 1] : 0));
    CHECK(!ok || index.ends[2] == 10);
}

static void read_megatron(const void* bytes, size_t size) {
    static const uint8_t payload[1000] = {1, 2, 3};
    Error err = {0};
    MegatronIndex index;
    bool ok = megatron_index_parse(&index, bytes, size, sizeof payload, "input", &err);
    CHECK(ok == (err.code == 0));
    for (uint64_t i = 0; ok && i < index.num_sequences; i++) {
        TokenSpan span = megatron_sequence(&index, payload, i);
        for (uint64_t k = 0; k < span.count; k++)
            CHECK(span_token(&span, k) >= 0 && span_token(&span, k) <= 0x030201);
    }
}

static void read_json_line(const void* bytes, size_t size) {
    String out = {0}, scratch = {0};
    const char* problem;
    bool ok = json_line_field((const char*)bytes, size, "text", &out, &scratch, &problem);
    CHECK(ok == (problem == NULL));
    CHECK(!ok || out.size < size);
    free(out.data);
    free(scratch.data);
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static void (*const readers[])(const void*, size_t) = {read_shard, read_index, read_megatron,
                                                           read_json_line};
    if (size == 0) return 0;
    void* aligned = malloc_check(size - 1); // and of this size exactly, so that reading on is seen
    memcpy(aligned, data + 1, size - 1);
    readers[data[0] % 4](aligned, size - 1);
    free(aligned);
    return 0;
}
