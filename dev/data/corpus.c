// corpus: from raw text to a tokenizer and token shards.
//
//   corpus bpe      trains a byte-level BPE tokenizer: tokenizer.json
//   corpus encode   turns text into token shards: DIR/train_000000.bin, ..., DIR/val_000000.bin, ...
//   corpus info     prints what shards hold
//   corpus verify   checks shards to the last token
//   corpus decode   turns tokens back into text
//   corpus convert  makes shards of nanoGPT's and Megatron's token files
//
// Every output is the same for any number of threads and gets its name only when it is complete.
// Exit codes: sysexits (llmc/utils.h). Formats: llmc/shard.h.
#include "llmc/utils.h"         // defines: Error, fail, exit_with, make_directories, path_join
#include "dev/data/bpe_train.h" // defines: PieceCounter, piece_counter_*, bpe_train
#include "dev/data/convert.h"   // defines: TokenSpan, convert_nanogpt, convert_megatron, megatron_index_parse
#include "dev/data/encode.h"    // defines: EncodeJob, encode_all, find_shards, Pipeline, pipeline_run
#include "dev/data/inspect.h"   // defines: print_shard, verify_shard, find_document, print_tokens
#include "dev/data/options.h"   // defines: Option, OPTION_*, parse_options, print_options, StringList
#include "llmc/tokenizer_files.h" // defines: tokenizer_load
#include "llmc/tokenizer_json.h"  // defines: tokenizer_save_json

#define COUNT_OF(array) ((int)(sizeof(array) / sizeof((array)[0])))
enum { BATCH_BYTES = 32 << 20, UNIT_BYTES = 256 << 10 };

// ----------------------------------------------------------------------------
// options: one value for each, whichever commands take it

enum { BPE = 1, ENCODE = 2, INFO = 4, VERIFY = 8, DECODE = 16, CONVERT = 32 };
#define NOT_GIVEN UINT64_MAX

static struct {
    uint64_t vocab_size, threads, seed, shard_tokens, document, start, count, eot;
    const char *pattern, *out, *tokenizer, *out_dir, *width, *separator, *field, *from, *dtype;
    double val_fraction;
    bool force;
    StringList specials;
} given = {.shard_tokens = 100000000,
           .document = NOT_GIVEN,
           .start = NOT_GIVEN,
           .count = 256,
           .eot = NOT_GIVEN,
           .pattern = "gpt2",
           .width = "auto",
           .field = "text",
           .dtype = "u16",
           .val_fraction = 0.01};

static const Option OPTIONS[] = {
    {"--tokenizer", OPTION_STRING, &given.tokenizer, "FILE",
     "tokenizer.json, tiktoken ranks, vocab.bpe, or a folder with one", 0, 0,
     ENCODE | VERIFY | DECODE | CONVERT},
    {"--vocab-size", OPTION_NUMBER, &given.vocab_size, "N", "tokens, special ones included", 1,
     SHARD_MAX_VOCAB, BPE | CONVERT},
    {"--pattern", OPTION_STRING, &given.pattern, "NAME",
     "how text splits into words: gpt2 (default), cl100k, llama3, qwen2", 0, 0, BPE},
    {"--special", OPTION_STRINGS, &given.specials, "TEXT",
     "a special token, may be given again (default <|endoftext|>)", 0, 0, BPE},
    {"--out", OPTION_STRING, &given.out, "FILE", "what to write", 0, 0, BPE | CONVERT},
    {"--out-dir", OPTION_STRING, &given.out_dir, "DIR", "where the shards go", 0, 0, ENCODE},
    {"--val-fraction", OPTION_FRACTION, &given.val_fraction, "F",
     "part of the documents for validation (0.01), chosen by hash", 0, 0, ENCODE},
    {"--seed", OPTION_NUMBER, &given.seed, "N", "of that choice (0)", 0, UINT64_MAX, ENCODE},
    {"--shard-tokens", OPTION_NUMBER, &given.shard_tokens, "N",
     "a shard ends with the document that fills it (1e8)", 1, UINT64_MAX, ENCODE},
    {"--width", OPTION_STRING, &given.width, "BITS",
     "of a token: 16, 32 or auto, which goes by the vocabulary (auto)", 0, 0, ENCODE},
    {"--force", OPTION_FLAG, &given.force, "", "replace the shards that are there", 0, 0, ENCODE | CONVERT},
    {"--document-separator", OPTION_STRING, &given.separator, "STRING",
     "what lies between documents in a text file, \\n is a line end (none)", 0, 0, BPE | ENCODE},
    {"--field", OPTION_STRING, &given.field, "NAME", "of JSONL: where the text is (text)", 0, 0,
     BPE | ENCODE},
    {"--threads", OPTION_NUMBER, &given.threads, "N", "how many work (one a core)", 1, 1024, BPE | ENCODE},
    {"--document", OPTION_NUMBER, &given.document, "N", "which document, from 0", 0, UINT64_MAX - 1, DECODE},
    {"--start", OPTION_NUMBER, &given.start, "N", "or: from which token on, and", 0, UINT64_MAX - 1, DECODE},
    {"--count", OPTION_NUMBER, &given.count, "N", "how many (256)", 0, UINT64_MAX - 1, DECODE},
    {"--from", OPTION_STRING, &given.from, "FORMAT", "nanogpt or megatron", 0, 0, CONVERT},
    {"--dtype", OPTION_STRING, &given.dtype, "TYPE", "of nanogpt's tokens: u16 (default) or u32", 0, 0,
     CONVERT},
    {"--eot", OPTION_NUMBER, &given.eot, "ID", "the end-of-text token (the tokenizer's, else unknown)", 0,
     SHARD_MAX_VOCAB - 1, CONVERT},
};

static bool required(const char* option, bool is_given, Error* err) {
    return is_given || fail(err, EXIT_USAGE, "%s is required (see --help)", option);
}

// \n, \t, \r and \\ as in C; other bytes stand for themselves.
static bool unescape_separator(char* out, size_t capacity, const char* text, Error* err) {
    static const char escapes[] = "ntr\\", values[] = "\n\t\r\\";
    size_t n = 0;
    for (; *text != '\0' && n + 1 < capacity; text++) {
        const char* escape = text[0] == '\\' && text[1] != '\0' ? strchr(escapes, text[1]) : NULL;
        out[n++] = escape != NULL ? values[escape - escapes] : *text;
        text += escape != NULL;
    }
    out[n] = '\0';
    return (n > 0 && *text == '\0') ||
           fail(err, EXIT_USAGE, "--document-separator must have 1 to %zu characters", capacity - 1);
}

// A pipeline that reads the operands and does nothing with them yet. `files` and `separator` (1 KiB) must
// outlive it.
static bool open_pipeline(Pipeline* p, const StringList* operands, StringList* files, char* separator,
                          Error* err) {
    memset(p, 0, sizeof *p);
    if (!find_files(operands, files, err)) return false;
    if (given.separator != NULL) {
        if (!unescape_separator(separator, 1024, given.separator, err)) return false;
        p->reader.separator = separator;
    }
    p->reader.files = files;
    p->reader.field = given.field;
    p->reader.batch_bytes = BATCH_BYTES;
    p->unit_bytes = UNIT_BYTES;
    p->threads = given.threads != 0 ? (int)given.threads : omp_get_max_threads();
    return true;
}

// ----------------------------------------------------------------------------
// corpus bpe

typedef struct {
    PieceCounter counter;
    String decoded, scratch;
} CountThread;

static bool count_unit(void* context, int thread_index, const Batch* batch, WorkUnit* unit, Error* err) {
    CountThread* thread = (CountThread*)context + thread_index;
    for (size_t i = unit->first; i < unit->first + unit->count; i++) {
        const char* text;
        size_t size;
        if (!document_text(batch, &batch->documents[i], given.field, &thread->decoded, &thread->scratch,
                           &text, &size, err))
            return false;
        piece_counter_add_document(&thread->counter, text, size);
    }
    return true;
}

static bool count_all(Pipeline* p, CountThread* threads, Error* err) {
    p->context = threads;
    p->work = count_unit;
    for (int i = 0; i < p->threads; i++)
        if (!piece_counter_init(&threads[i].counter, given.pattern, err)) return false;
    if (!pipeline_run(p, err)) return false;
    for (int i = 1; i < p->threads; i++) piece_counter_merge(&threads[0].counter, &threads[i].counter);
    return p->documents > 0 ||
           fail(err, EXIT_BAD_DATA, "the input has no document: nothing but white space in it");
}

static bool command_bpe(const StringList* operands, Error* err) {
    Pipeline pipeline;
    StringList files = {0};
    Tokenizer tokenizer = {0};
    char separator[1024];
    double started = seconds_now();
    if (!required("--vocab-size", given.vocab_size != 0, err) || !required("--out", given.out != NULL, err))
        return false;
    if (given.specials.count == 0) string_list_add(&given.specials, "<|endoftext|>");
    if (!open_pipeline(&pipeline, operands, &files, separator, err)) return false;

    CountThread* threads = (CountThread*)calloc_check((size_t)pipeline.threads, sizeof *threads);
    bool ok = count_all(&pipeline, threads, err);
    double counted = seconds_now();
    uint32_t pieces = threads[0].counter.num_pieces;
    ok = ok && bpe_train(&tokenizer, &threads[0].counter, (uint32_t)given.vocab_size,
                         (const char* const*)given.specials.items, (int)given.specials.count, err);
    double trained = seconds_now();
    ok = ok && tokenizer_save_json(&tokenizer, given.out, err);
    if (ok)
        printf("%s: %u tokens from %llu documents of %.1f MB, %u different words; counted in %.2f s, "
               "merged in %.2f s\n",
               given.out, tokenizer.vocab_size, (unsigned long long)pipeline.documents,
               (double)pipeline.bytes * 1e-6, pieces, counted - started, trained - counted);
    tokenizer_free(&tokenizer);
    for (int i = 0; i < pipeline.threads; i++) {
        piece_counter_free(&threads[i].counter);
        free(threads[i].decoded.data);
        free(threads[i].scratch.data);
    }
    free(threads);
    string_list_free(&files);
    return ok;
}

// ----------------------------------------------------------------------------
// corpus encode

static bool choose_width(const Tokenizer* tokenizer, int* token_bytes, Error* err) {
    bool fits = tokenizer->vocab_size <= 65536;
    if (strcmp(given.width, "auto") == 0)
        *token_bytes = fits ? 2 : 4;
    else if (strcmp(given.width, "16") == 0)
        *token_bytes = 2;
    else if (strcmp(given.width, "32") == 0)
        *token_bytes = 4;
    else
        return fail(err, EXIT_USAGE, "--width %s: must be 16, 32 or auto", given.width);
    return fits || *token_bytes == 4 ||
           fail(err, EXIT_USAGE, "--width 16: the vocabulary of %u does not fit 16 bits; use auto",
                tokenizer->vocab_size);
}

// The folder, and that it has no shards which a training run could mix up with the new ones.
static bool prepare_out_dir(Error* err) {
    StringList old = {0};
    if (!make_directories(given.out_dir, err) || !find_shards(given.out_dir, &old, err)) return false;
    if (old.count > 0 && !given.force)
        fail(err, EXIT_USAGE,
             "%s is there already; choose another --out-dir, or replace its shards with --force",
             old.items[0]);
    string_list_free(&old);
    return err->code == 0;
}

static void print_encode_summary(const EncodeJob* job, const Pipeline* p, double seconds) {
    double megabytes = (double)p->bytes * 1e-6;
    for (int split = 0; split < NUM_SPLITS; split++) {
        const ShardSeries* s = &job->series[split];
        if (s->documents == 0) continue;
        printf("%s/%s_*.bin: %llu documents, %llu tokens of %d bits, %.3f bytes a token, %zu shard(s)\n",
               given.out_dir, SPLIT_NAMES[split], (unsigned long long)s->documents,
               (unsigned long long)s->tokens, 8 * job->token_bytes,
               (double)s->source_bytes / (double)s->tokens, s->paths.count);
    }
    if (p->reader.empties > 0)
        printf("left out: %llu documents of white space\n", (unsigned long long)p->reader.empties);
    printf("%.1f MB in %.2f s: %.1f MB/s with %d thread(s)\n", megabytes, seconds, megabytes / seconds,
           p->threads);
}

static bool encode_with(const Tokenizer* tokenizer, Pipeline* pipeline, Error* err) {
    char path[PATH_MAX];
    EncodeJob job = {.tokenizer = tokenizer,
                     .out_dir = given.out_dir,
                     .field = given.field,
                     .val_fraction = given.val_fraction,
                     .seed = given.seed,
                     .shard_tokens = given.shard_tokens};
    if (tokenizer->eot_id < 0)
        return fail(err, EXIT_BAD_DATA,
                    "%s has no end-of-text token to put between documents; train one with --special",
                    given.tokenizer);
    double started = seconds_now();
    bool ok = choose_width(tokenizer, &job.token_bytes, err) && prepare_out_dir(err) &&
              encode_all(&job, pipeline, err) && path_join(path, given.out_dir, "tokenizer.json", err) &&
              tokenizer_save_json(tokenizer, path, err);
    if (ok) print_encode_summary(&job, pipeline, seconds_now() - started);
    for (int split = 0; split < NUM_SPLITS; split++) string_list_free(&job.series[split].paths);
    return ok;
}

static bool command_encode(const StringList* operands, Error* err) {
    Pipeline pipeline;
    StringList files = {0};
    Tokenizer tokenizer;
    char separator[1024];
    if (!required("--tokenizer", given.tokenizer != NULL, err) ||
        !required("--out-dir", given.out_dir != NULL, err) ||
        !open_pipeline(&pipeline, operands, &files, separator, err) ||
        !tokenizer_load(&tokenizer, given.tokenizer, err))
        return false;
    bool ok = encode_with(&tokenizer, &pipeline, err);
    tokenizer_free(&tokenizer);
    string_list_free(&files);
    return ok;
}

// ----------------------------------------------------------------------------
// corpus info, verify, decode

static bool command_info(const StringList* operands, Error* err) {
    uint64_t tokens = 0, bytes = 0;
    for (size_t i = 0; i < operands->count; i++) {
        Shard shard;
        if (!shard_open(&shard, operands->items[i], err)) return false;
        print_shard(&shard);
        tokens += shard.header.num_tokens;
        bytes += shard.header.source_bytes;
        shard_close(&shard);
    }
    if (operands->count > 1)
        printf("together: %llu tokens, %llu bytes of text\n", (unsigned long long)tokens,
               (unsigned long long)bytes);
    return required("a shard", operands->count > 0, err);
}

// The tokenizer that was named, or else the one that lies beside the shard, if any.
static bool load_tokenizer_of(const char* shard_path, Tokenizer* tokenizer, bool* found, Error* err) {
    const char* slash = strrchr(shard_path, '/');
    char path[PATH_MAX];
    int n = snprintf(path, sizeof path, "%.*s/tokenizer.json", slash != NULL ? (int)(slash - shard_path) : 1,
                     slash != NULL ? shard_path : ".");
    *found = given.tokenizer != NULL || (n > 0 && n < PATH_MAX && access(path, F_OK) == 0);
    return !*found || tokenizer_load(tokenizer, given.tokenizer != NULL ? given.tokenizer : path, err);
}

static bool command_verify(const StringList* operands, Error* err) {
    for (size_t i = 0; i < operands->count; i++) {
        Shard shard;
        Tokenizer tokenizer = {0};
        bool has_tokenizer;
        if (!shard_open(&shard, operands->items[i], err)) return false;
        bool ok = load_tokenizer_of(shard.path, &tokenizer, &has_tokenizer, err) &&
                  verify_shard(&shard, has_tokenizer ? &tokenizer : NULL, err);
        if (ok)
            printf("%s: %llu tokens, %llu documents: good%s\n", shard.path,
                   (unsigned long long)shard.header.num_tokens,
                   (unsigned long long)shard.header.num_documents,
                   has_tokenizer ? "" : " (no tokenizer to compare with)");
        tokenizer_free(&tokenizer);
        shard_close(&shard);
        if (!ok) return false;
    }
    return required("a shard", operands->count > 0, err);
}

static bool decode_from(const Shard* shard, const Tokenizer* tokenizer, Error* err) {
    uint64_t start = given.start, end = 0, num_tokens = shard->header.num_tokens;
    if (!same_tokenizer(shard, tokenizer, err)) return false;
    if (start == NOT_GIVEN) {
        if (!find_document(shard, given.document != NOT_GIVEN ? given.document : 0, &start, &end, err))
            return false;
    } else if (given.document != NOT_GIVEN) {
        return fail(err, EXIT_USAGE, "--document and --start exclude each other");
    } else if (start >= num_tokens) {
        return fail(err, EXIT_USAGE, "--start %llu: %s has %llu tokens", (unsigned long long)start,
                    shard->path, (unsigned long long)num_tokens);
    } else {
        end = given.count < num_tokens - start ? start + given.count : num_tokens;
    }
    return print_tokens(shard, tokenizer, start, end, err);
}

static bool command_decode(const StringList* operands, Error* err) {
    Shard shard;
    Tokenizer tokenizer = {0};
    bool found;
    if (!required("one shard", operands->count == 1, err) || !shard_open(&shard, operands->items[0], err))
        return false;
    bool ok = load_tokenizer_of(shard.path, &tokenizer, &found, err) && required("--tokenizer", found, err) &&
              decode_from(&shard, &tokenizer, err);
    tokenizer_free(&tokenizer);
    shard_close(&shard);
    return ok;
}

// ----------------------------------------------------------------------------
// corpus convert

// IN stands for IN.bin and IN.idx, and so do these two.
static bool megatron_paths(const char* given_path, char bin[PATH_MAX], char idx[PATH_MAX], Error* err) {
    int stem = (int)strnlen(given_path, PATH_MAX);
    if (ends_with(given_path, ".bin") || ends_with(given_path, ".idx")) stem -= 4;
    return (snprintf(bin, PATH_MAX, "%.*s.bin", stem, given_path) < PATH_MAX &&
            snprintf(idx, PATH_MAX, "%.*s.idx", stem, given_path) < PATH_MAX) ||
           fail(err, EXIT_USAGE, "path %s is too long", given_path);
}

typedef struct {
    const void *payload, *index; // mappings
    size_t payload_bytes, index_bytes;
    TokenType type;
    MegatronIndex megatron; // where index is not NULL
} ConvertInput;

static bool open_convert_input(ConvertInput* in, const char* path, Error* err) {
    char bin[PATH_MAX], idx[PATH_MAX];
    memset(in, 0, sizeof *in);
    if (strcmp(given.from, "megatron") == 0) {
        if (!megatron_paths(path, bin, idx, err) ||
            !shard_map_file(bin, &in->payload, &in->payload_bytes, err) ||
            !shard_map_file(idx, &in->index, &in->index_bytes, err) ||
            !megatron_index_parse(&in->megatron, in->index, in->index_bytes, in->payload_bytes, idx, err))
            return false;
        in->type = in->megatron.type;
        return true;
    }
    if (strcmp(given.from, "nanogpt") != 0)
        return fail(err, EXIT_USAGE, "--from %s: must be nanogpt or megatron", given.from);
    if (strcmp(given.dtype, "u16") != 0 && strcmp(given.dtype, "u32") != 0)
        return fail(err, EXIT_USAGE, "--dtype %s: must be u16 or u32", given.dtype);
    in->type = strcmp(given.dtype, "u16") == 0 ? TOKEN_U16 : TOKEN_U32;
    if (!shard_map_file(path, &in->payload, &in->payload_bytes, err)) return false;
    return in->payload_bytes % (size_t)in->type.bytes == 0 ||
           fail(err, EXIT_BAD_DATA, "%s is %zu bytes: not a whole number of %s tokens", path,
                in->payload_bytes, given.dtype);
}

static bool convert_to(ShardWriter* writer, const ConvertInput* in, int eot, Error* err) {
    TokenSpan all = {in->payload, in->payload_bytes / (size_t)in->type.bytes, in->type};
    bool ok = in->index != NULL ? convert_megatron(writer, &in->megatron, in->payload, eot, err)
                                : convert_nanogpt(writer, &all, eot, err);
    if (ok)
        printf("%s: %llu tokens, %llu documents\n", given.out, (unsigned long long)writer->header.num_tokens,
               (unsigned long long)writer->header.num_documents);
    else
        shard_writer_free(writer);
    ok = ok && shard_writer_finish(writer, err) && shard_publish(given.out, err);
    if (!ok) shard_discard(given.out);
    return ok;
}

static bool command_convert(const StringList* operands, Error* err) {
    ConvertInput in;
    Tokenizer tokenizer = {.eot_id = -1};
    ShardWriter writer;
    if (!required("one input", operands->count == 1, err) || !required("--from", given.from != NULL, err) ||
        !required("--out", given.out != NULL, err))
        return false;
    if (!given.force && access(given.out, F_OK) == 0)
        return fail(err, EXIT_USAGE, "%s is there already; choose another --out, or replace it with --force",
                    given.out);
    TokenizerHash hash = {0, 0};
    bool ok = given.tokenizer == NULL || tokenizer_load(&tokenizer, given.tokenizer, err);
    if (ok && given.tokenizer != NULL) hash = tokenizer_hash(&tokenizer);
    uint64_t words[2] = {hash.low, hash.high};
    uint32_t vocab_size = given.vocab_size != 0 ? (uint32_t)given.vocab_size : tokenizer.vocab_size;
    int eot = given.eot != NOT_GIVEN ? (int)given.eot : (int)tokenizer.eot_id;
    ok = ok && open_convert_input(&in, operands->items[0], err) &&
         shard_writer_open(&writer, given.out, in.type.bytes <= 2 ? 2 : 4, vocab_size, eot, words, err) &&
         convert_to(&writer, &in, eot, err);
    tokenizer_free(&tokenizer);
    return ok; // the mappings go with the program
}

// ----------------------------------------------------------------------------
// main

static const struct {
    const char* name;
    unsigned bit;
    bool (*run)(const StringList* operands, Error* err);
    const char *operands, *summary;
} COMMANDS[] = {
    {"bpe", BPE, command_bpe, "--vocab-size N --out tokenizer.json INPUT...",
     "train a byte-level BPE tokenizer"},
    {"encode", ENCODE, command_encode, "--tokenizer FILE --out-dir DIR INPUT...", "text to token shards"},
    {"info", INFO, command_info, "SHARD...", "what shards hold"},
    {"verify", VERIFY, command_verify, "SHARD...", "check shards to the last token"},
    {"decode", DECODE, command_decode, "[--tokenizer FILE] SHARD", "tokens back to text"},
    {"convert", CONVERT, command_convert, "--from FORMAT IN --out OUT.bin",
     "nanoGPT's or Megatron's files to a shard"},
};

static void print_commands(FILE* out) {
    fprintf(out, "usage: corpus COMMAND ...    (corpus COMMAND --help for its options)\n");
    for (int i = 0; i < COUNT_OF(COMMANDS); i++)
        fprintf(out, "  corpus %-8s %-44s %s\n", COMMANDS[i].name, COMMANDS[i].operands, COMMANDS[i].summary);
    fprintf(out, "INPUT: files or folders; .txt and .jsonl, also .gz or .zst\n");
}

static bool unknown_command(const char* name, Error* err) {
    const char* nearest = COMMANDS[0].name;
    for (int i = 1; i < COUNT_OF(COMMANDS); i++)
        if (edit_distance(name, COMMANDS[i].name) < edit_distance(name, nearest)) nearest = COMMANDS[i].name;
    return fail(err, EXIT_USAGE, "unknown command '%s'; the nearest valid one is '%s' (see corpus --help)",
                name, nearest);
}

static bool asks_for_help(int argc, char** argv) {
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return true;
    return false;
}

int main(int argc, char** argv) {
    Error err = {0, {0}};
    StringList operands = {0};
    bool help = asks_for_help(argc, argv);
    if (argc < 2 || argv[1][0] == '-') {
        print_commands(help ? stdout : stderr);
        return help ? EXIT_OK : EXIT_USAGE;
    }
    int k = 0;
    while (k < COUNT_OF(COMMANDS) && strcmp(argv[1], COMMANDS[k].name) != 0) k++;
    if (k == COUNT_OF(COMMANDS)) {
        unknown_command(argv[1], &err);
        exit_with(&err);
    }
    if (help) {
        printf("usage: corpus %s %s: %s\n", COMMANDS[k].name, COMMANDS[k].operands, COMMANDS[k].summary);
        print_options(OPTIONS, COUNT_OF(OPTIONS), COMMANDS[k].bit, stdout);
        return EXIT_OK;
    }
    bool ok =
        parse_options(OPTIONS, COUNT_OF(OPTIONS), COMMANDS[k].bit, argc - 2, argv + 2, &operands, &err) &&
        COMMANDS[k].run(&operands, &err);
    string_list_free(&operands);
    string_list_free(&given.specials);
    if (ok && fflush(stdout) != 0)
        ok = fail(&err, EXIT_IO, "cannot write to standard output: %s", strerror(errno));
    if (!ok) exit_with(&err);
    return EXIT_OK;
}
