// From files and folders to documents, in batches: the reading side of `corpus bpe` and `corpus encode`.
//
//   NAME.txt            one document, or several where --document-separator cuts it
//   NAME.jsonl          a document in each line, in one field of its object
//   NAME.*.gz, .zst     both, compressed
//
// A document of nothing but white space is none. A file named by the user is text unless it is JSONL by name;
// in folders (walked in byte order of their names) only the endings above count, and no hidden file does.
// Memory: a batch of text, or one document where that is larger.
#pragma once
#include "dev/data/byte_stream.h" // defines: ByteStream, byte_stream_open, _read, _close, ends_with
#include "dev/data/json_line.h"   // defines: json_line_field
#include "dev/data/options.h"     // defines: StringList, string_list_add
#include "llmc/utils.h"           // defines: Error, fail, EXIT_*, String, realloc_check
#include <fts.h>

// ----------------------------------------------------------------------------
// which files

static inline bool is_jsonl(const char* path) {
    return ends_with(path, ".jsonl") || ends_with(path, ".jsonl.gz") || ends_with(path, ".jsonl.zst");
}

static inline bool is_text(const char* path) {
    return ends_with(path, ".txt") || ends_with(path, ".txt.gz") || ends_with(path, ".txt.zst");
}

static inline int compare_names(const FTSENT** a, const FTSENT** b) {
    return strcmp((*a)->fts_name, (*b)->fts_name);
}

static inline bool find_files_in(FTS* walk, StringList* files, Error* err) {
    FTSENT* entry;
    while ((entry = fts_read(walk)) != NULL) {
        bool named = entry->fts_level == FTS_ROOTLEVEL;
        if (!named && entry->fts_name[0] == '.')
            fts_set(walk, entry, FTS_SKIP);
        else if (entry->fts_info == FTS_DNR || entry->fts_info == FTS_ERR || entry->fts_info == FTS_NS)
            return fail(err, EXIT_NO_INPUT, "cannot read %s: %s", entry->fts_path,
                        strerror(entry->fts_errno));
        else if (entry->fts_info == FTS_F && (named || is_text(entry->fts_path) || is_jsonl(entry->fts_path)))
            string_list_add(files, entry->fts_path);
        else if (entry->fts_info == FTS_SLNONE || (named && entry->fts_info == FTS_DEFAULT))
            return fail(err, EXIT_NO_INPUT, "%s is neither a file nor a folder", entry->fts_path);
    }
    return true;
}

// The files that the operands stand for, in the operands' order. Links are followed, circles recognised.
static inline bool find_files(const StringList* operands, StringList* files, Error* err) {
    if (operands->count == 0)
        return fail(err, EXIT_USAGE,
                    "no input: name text files (.txt, .jsonl, also .gz or .zst) or folders of them");
    for (size_t i = 0; i < operands->count; i++) {
        char* roots[2] = {operands->items[i], NULL};
        size_t before = files->count;
        FTS* walk = fts_open(roots, FTS_LOGICAL | FTS_NOCHDIR, compare_names);
        if (walk == NULL) return fail(err, EXIT_NO_INPUT, "cannot open %s: %s", roots[0], strerror(errno));
        bool ok = find_files_in(walk, files, err);
        fts_close(walk);
        if (!ok) return false;
        if (files->count == before)
            return fail(err, EXIT_NO_INPUT,
                        "folder %s has no .txt or .jsonl file (also .gz or .zst); name files of other "
                        "endings one by one",
                        roots[0]);
    }
    return true;
}

// ----------------------------------------------------------------------------
// documents in batches

// A document as it lies in the file: text, or a line of JSONL.
typedef struct {
    size_t offset, size; // in Batch.bytes
    const char* path;
    uint64_t number; // in its file, from 1: the line, or the piece between separators
    bool jsonl;
} RawDocument;

typedef struct {
    String bytes;
    RawDocument* documents;
    size_t count, capacity;
} Batch;

typedef struct {
    const StringList* files;
    const char* separator; // between documents of plain text; NULL: none
    const char* field;     // of JSONL
    size_t batch_bytes;    // a batch ends with the document that fills it
    // private
    size_t next_file;
    ByteStream stream;
    bool is_open;
    uint64_t number;  // documents or lines cut from this file
    String rest;      // read, but not yet a whole document
    uint64_t empties; // documents that were only white space
} TextReader;

static inline void batch_free(Batch* batch) {
    free(batch->bytes.data);
    free(batch->documents);
    memset(batch, 0, sizeof *batch);
}

static inline void reader_close(TextReader* reader) {
    if (reader->is_open) byte_stream_close(&reader->stream);
    reader->is_open = false;
    free(reader->rest.data);
    memset(&reader->rest, 0, sizeof reader->rest);
}

static inline bool is_blank(const char* text, size_t size) {
    for (size_t i = 0; i < size; i++)
        if (text[i] == '\0' || strchr(" \t\r\n\f\v", text[i]) == NULL) return false;
    return true;
}

// Adds bytes [begin, end) of the batch as a document of the file being read.
static inline void batch_add(Batch* batch, TextReader* reader, size_t begin, size_t end) {
    reader->number++;
    if (is_blank(batch->bytes.data + begin, end - begin)) {
        reader->empties += !is_jsonl(reader->stream.path);
        return;
    }
    if (batch->count == batch->capacity) {
        batch->capacity = batch->capacity * 2 + 1024;
        batch->documents =
            (RawDocument*)realloc_check(batch->documents, batch->capacity * sizeof *batch->documents);
    }
    RawDocument document = {begin, end - begin, reader->stream.path, reader->number,
                            is_jsonl(reader->stream.path)};
    batch->documents[batch->count++] = document;
}

// Cuts off the documents that end in bytes [*begin, size), where a separator cannot begin before `search`.
static inline void cut_documents(Batch* batch, TextReader* reader, size_t* begin, size_t search) {
    const char* separator = is_jsonl(reader->stream.path) ? "\n" : reader->separator;
    if (separator == NULL) return;
    size_t length = strlen(separator);
    const char *data = batch->bytes.data, *found;
    while ((found = (const char*)memmem(data + search, batch->bytes.size - search, separator, length)) !=
           NULL) {
        batch_add(batch, reader, *begin, (size_t)(found - data));
        *begin = search = (size_t)(found - data) + length;
    }
}

// Appends up to n bytes of the stream to the batch; *got is 0 at the end of the file.
static inline bool batch_read(Batch* batch, ByteStream* stream, size_t n, size_t* got, Error* err) {
    String* bytes = &batch->bytes;
    if (bytes->size + n + 1 > bytes->capacity) {
        bytes->capacity = (bytes->size + n + 1) * 2;
        bytes->data = (char*)realloc_check(bytes->data, bytes->capacity);
    }
    if (!byte_stream_read(stream, bytes->data + bytes->size, n, got, err)) return false;
    bytes->size += *got;
    return true;
}

// Replaces the batch by the next documents; one of no documents is the end. Which documents fall into which
// batch depends on the files alone.
static inline bool reader_next(TextReader* reader, Batch* batch, Error* err) {
    enum { CHUNK = 1 << 20 };
    batch->bytes.size = batch->count = 0;
    string_append_bytes(&batch->bytes, reader->rest.data, reader->rest.size);
    size_t begin = 0, got; // begin: of the document that has not ended yet
    while (begin < reader->batch_bytes || batch->count == 0) {
        if (!reader->is_open) {
            if (reader->next_file == reader->files->count) break;
            if (!byte_stream_open(&reader->stream, reader->files->items[reader->next_file++], err))
                return false;
            reader->is_open = true;
            reader->number = 0;
        }
        size_t end = batch->bytes.size,
               overlap = reader->separator != NULL ? strlen(reader->separator) - 1 : 0;
        if (!batch_read(batch, &reader->stream, CHUNK, &got, err)) return false;
        cut_documents(batch, reader, &begin, end - begin > overlap ? end - overlap : begin);
        if (got != 0) continue;
        if (batch->bytes.size > begin) batch_add(batch, reader, begin, batch->bytes.size);
        begin = batch->bytes.size;
        byte_stream_close(&reader->stream);
        reader->is_open = false;
    }
    reader->rest.size = 0;
    string_append_bytes(&reader->rest, batch->bytes.data + begin, batch->bytes.size - begin);
    return true;
}

// The text of a document: where it lies, or decoded from its line into `decoded`.
static inline bool document_text(const Batch* batch, const RawDocument* document, const char* field,
                                 String* decoded, String* scratch, const char** text, size_t* size,
                                 Error* err) {
    const char* problem;
    *text = batch->bytes.data + document->offset;
    *size = document->size;
    if (!document->jsonl) return true;
    if (!json_line_field(*text, *size, field, decoded, scratch, &problem))
        return fail(err, EXIT_BAD_DATA, "%s line %llu: %s (the text is expected under \"%s\", see --field)",
                    document->path, (unsigned long long)document->number, problem, field);
    *text = decoded->data;
    *size = decoded->size;
    return true;
}
