// How fast is the tokenizer: splitting, encoding, training?
// usage: bench_tokenizer [TEXT]      default ../shared/data/text/tinyshakespeare.txt
//
// A text of 30 MB or more trains 32,000 tokens, a smaller one 8,192. OMP_NUM_THREADS threads count pieces.
//
// The baseline of each row is PCRE2 (JIT) cutting the same text with the same pattern on one core in the
// same run: the speed that no tokenizer which splits by regex can exceed. Best of several rounds.
#include "dev/data/bpe_train.h" // defines: PieceCounter, piece_counter_*, bpe_train
#include "llmc/tokenizer.h"     // defines: Tokenizer, Encoder, encode
#include <omp.h>

enum { ROUNDS = 5 };

static double split_seconds(const Pattern* pattern, const char* text, size_t size) {
    Splitter s;
    splitter_init(&s, pattern);
    double best = 1e30;
    for (int round = 0; round < ROUNDS; round++) {
        const char* piece;
        double start = seconds_now();
        splitter_start(&s, text, size);
        while (splitter_next(&s, &piece) != 0) {
        }
        best = seconds_now() - start < best ? seconds_now() - start : best;
    }
    splitter_free(&s);
    return best;
}

static double encode_seconds(const Tokenizer* t, const char* text, size_t size, size_t* num_tokens) {
    Encoder e;
    encoder_init(&e, t);
    Tokens ids = {0};
    double best = 1e30;
    for (int round = 0; round < ROUNDS; round++) {
        ids.size = 0;
        double start = seconds_now();
        *num_tokens = encode(&e, text, size, &ids);
        best = seconds_now() - start < best ? seconds_now() - start : best;
    }
    free(ids.data);
    encoder_free(&e);
    return best;
}

// Counts with all threads, merges the counts, trains; what `corpus bpe` does once the text is in memory.
static bool train(Tokenizer* t, const char* pattern, const char* text, size_t size, uint32_t vocab_size,
                  double seconds[2], Error* err) {
    int threads = omp_get_max_threads();
    PieceCounter* counters = (PieceCounter*)calloc_check((size_t)threads, sizeof *counters);
    for (int i = 0; i < threads; i++)
        if (!piece_counter_init(&counters[i], pattern, err)) return false;
    double start = seconds_now();
#pragma omp parallel for schedule(dynamic)
    for (size_t part = 0; part < 64; part++) {
        size_t from = size * part / 64, to = size * (part + 1) / 64;
        piece_counter_add_document(&counters[omp_get_thread_num()], text + from, to - from);
    }
    for (int i = 1; i < threads; i++) piece_counter_merge(&counters[0], &counters[i]);
    seconds[0] = seconds_now() - start;
    bool ok = bpe_train(t, &counters[0], vocab_size, NULL, 0, err);
    seconds[1] = seconds_now() - start;
    for (int i = 0; i < threads; i++) piece_counter_free(&counters[i]);
    free(counters);
    return ok;
}

static void print_row(const char* pattern, const char* what, size_t size, double seconds, double baseline) {
    printf("%-8s %-28s %8.1f MB/s  %6.2f x PCRE2 split\n", pattern, what, (double)size / seconds / 1e6,
           baseline / seconds);
}

int main(int argc, char** argv) {
    const char* path = argc > 1 ? argv[1] : "../shared/data/text/tinyshakespeare.txt";
    Error err = {0};
    size_t size, num_tokens;
    char* text = read_file(path, (size_t)1 << 31, &size, &err);
    if (text == NULL) exit_with(&err);
    uint32_t vocab_size = size >= 30000000 ? 32000 : 8192;
    printf("%s: %.1f MB, %u tokens, %d threads count, one encodes\n", path, (double)size / 1e6, vocab_size,
           omp_get_max_threads());
    for (int i = 0; i < NUM_NAMED_PATTERNS; i++) {
        const char* name = named_patterns[i].name;
        Tokenizer t;
        double train_seconds[2];
        if (!train(&t, name, text, size, vocab_size, train_seconds, &err)) exit_with(&err);
        Pattern regex_only = t.pattern;
        regex_only.ascii = NULL;
        double baseline = split_seconds(&regex_only, text, size);
        print_row(name, "split, PCRE2 (baseline)", size, baseline, baseline);
        print_row(name, "split", size, split_seconds(&t.pattern, text, size), baseline);
        print_row(name, "encode", size, encode_seconds(&t, text, size, &num_tokens), baseline);
        print_row(name, "train: count", size, train_seconds[0], baseline);
        print_row(name, "train: count and merge", size, train_seconds[1], baseline);
        printf("%-8s %.2f bytes a token, trained in %.2f s\n", name, (double)size / (double)num_tokens,
               train_seconds[1]);
        tokenizer_free(&t);
    }
    free(text);
    return 0;
}
