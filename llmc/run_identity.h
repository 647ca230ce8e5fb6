// Which run a directory is of: RUN_DIR/run_id, one line, "ID PAST START PATH", three times 32 random hexadecimal digits:
//   ID     of the directory, while it is at PATH; one that was copied or moved gets another
//   PAST   of what the run has gone on from; fast tiers keep checkpoints by that name (fast_tier.h)
//   START  of the newest start of training
// Rank 0 writes it at each start, under the directory's lock, and every other rank must find it there before anything
// else is read: where a file system is not mounted, good checkpoints look damaged and a run looks new.
#pragma once
#include "llmc/control.h"     // defines: Control, control_broadcast, control_gather
#include "llmc/hashed_file.h" // defines: directory_sync
#include "llmc/launch.h"      // defines: node_name

enum { RUN_ID_IDS = 3 * (ID_DIGITS + 1), RUN_ID_TEXT = RUN_ID_IDS + PATH_MAX + 2 };

typedef struct {
    char id[ID_DIGITS + 1], past[ID_DIGITS + 1], start[ID_DIGITS + 1];
    bool known;               // rank 0: the run was here before this start
    bool foreign;             // rank 0: another directory's run_id was here
    char directory[PATH_MAX]; // RUN_DIR
    char path[PATH_MAX];      // its real path on rank 0's node
} RunIdentity;

static inline void run_identity_text(const RunIdentity* identity, char text[RUN_ID_TEXT]) {
    snprintf(text, RUN_ID_TEXT, "%s %s %s %s\n", identity->id, identity->past, identity->start,
             identity->path);
}

// What a text says of id, past and start; false: it is none.
static inline bool run_identity_parse(RunIdentity* identity, const char* text) {
    char* const fields[] = {identity->id, identity->past, identity->start};
    for (int i = 0; i < 3; i++, text += ID_DIGITS + 1) {
        if (strspn(text, "0123456789abcdef") != ID_DIGITS || text[ID_DIGITS] != ' ') return false;
        memcpy(fields[i], text, ID_DIGITS), fields[i][ID_DIGITS] = '\0';
    }
    return true;
}

static inline bool run_identity_write(const RunIdentity* identity, Error* err) {
    char file[PATH_MAX], text[RUN_ID_TEXT];
    run_identity_text(identity, text);
    return path_join(file, identity->directory, "run_id", err) &&
           replace_file(file, text, strlen(text), err) && directory_sync(identity->directory, err);
}

// Rank 0, which has the directory's lock: of a new start.
static inline bool run_identity_begin(RunIdentity* identity, const char* run_dir, Error* err) {
    char file[PATH_MAX], expected[RUN_ID_TEXT];
    size_t size;
    Error why = {0, {0}};
    memset(identity, 0, sizeof *identity);
    snprintf(identity->directory, sizeof identity->directory, "%s", run_dir);
    if (!path_join(file, run_dir, "run_id", err)) return false;
    if (realpath(run_dir, identity->path) == NULL)
        return fail(err, EXIT_CANNOT_WRITE, "cannot resolve %s: %s", run_dir, strerror(errno));
    bool missing = access(file, F_OK) != 0 && errno == ENOENT;
    char* text = missing ? NULL : read_file(file, RUN_ID_TEXT, &size, &why);
    if (!missing && text == NULL)
        return fail(err, why.code, "%s; remove it to give up what checkpoint.fast_dir has", why.text);
    bool parsed = text != NULL && run_identity_parse(identity, text);
    run_identity_text(identity, expected);
    identity->known = parsed && strcmp(text, expected) == 0;
    identity->foreign = text != NULL && !identity->known;
    free(text);
    return (identity->known || (draw_id(identity->id, err) && draw_id(identity->past, err))) &&
           draw_id(identity->start, err) && run_identity_write(identity, err);
}

// Where ranks do not see the same directory, one that was no run's is none behind it.
static inline void run_identity_undo(const RunIdentity* identity) {
    char file[PATH_MAX];
    Error ignored = {0, {0}};
    if (path_join(file, identity->directory, "run_id", &ignored)) unlink(file);
}

// All processes: what fast tiers have is of a past that the run does not go on from.
static inline bool run_identity_new_past(RunIdentity* identity, Control* control, Error* err) {
    if (control->rank == 0 && draw_id(identity->past, err)) run_identity_write(identity, err);
    return control_agree(control, err) &&
           control_broadcast(control, identity->past, sizeof identity->past, err);
}

// ----------------------------------------------------------------------------
// do all ranks see the same directory?

typedef struct {
    char node[64];
    char ids[RUN_ID_IDS]; // what is in run_id there; "": nothing that can be read
    char why[240];        // "": why
} RankView;

// To open a directory is to ask a file server what is in it: what a node remembers may be older than the run's.
static inline void directories_open(const char* path) {
    char partial[PATH_MAX];
    for (size_t i = 1; i < sizeof partial && path[i - 1] != '\0'; i++) {
        if (path[i] != '/' && path[i] != '\0') continue;
        memcpy(partial, path, i), partial[i] = '\0';
        int fd = open(partial, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (fd >= 0) close(fd);
    }
}

// Looks until it is what rank 0 has written, but not for longer than `patience` seconds.
static inline void run_identity_look(const char* run_dir, const char* expected, double patience,
                                     RankView* view) {
    double deadline = seconds_now() + patience;
    for (useconds_t pause = 10000;; pause = pause < 500000 ? 2 * pause : pause) {
        char file[PATH_MAX];
        size_t size;
        Error why = {0, {0}};
        directories_open(run_dir);
        char* text =
            path_join(file, run_dir, "run_id", &why) ? read_file(file, RUN_ID_TEXT, &size, &why) : NULL;
        snprintf(view->ids, sizeof view->ids, "%s", text != NULL ? text : "");
        snprintf(view->why, sizeof view->why, "%.239s", why.text);
        free(text);
        if (strncmp(view->ids, expected, sizeof view->ids - 1) == 0 || seconds_now() >= deadline) return;
        usleep(pause);
    }
}

static inline int ranks_that_see(const RankView* views, int size, const char* ids) {
    int count = 0;
    for (int r = 0; r < size; r++) count += strcmp(views[r].ids, ids) == 0;
    return count;
}

// The rank that does not see what the others see, -1: there is none. *bad: the fault is that of its node, because more
// ranks, or as many and with them a run that was there before, are on the other side.
static inline int odd_rank(const RankView* views, int size, bool known, bool* bad) {
    int own = ranks_that_see(views, size, views[0].ids), odd = 0;
    *bad = false;
    while (odd < size && strcmp(views[odd].ids, views[0].ids) == 0) odd++;
    if (odd == size) return -1;
    *bad = 2 * own > size || (2 * own == size && known && views[odd].ids[0] == '\0');
    for (int r = odd; !*bad && r < size; r++) {
        const char* ids = views[r].ids;
        // an earlier start of the same run: what that node remembers, or a copy, but nothing against rank 0
        bool another = ids[0] != '\0' && strncmp(ids, views[0].ids, ID_DIGITS) != 0;
        if (!another || strcmp(ids, views[r - 1].ids) == 0) continue;
        int theirs = ranks_that_see(views, size, ids);
        *bad = 2 * theirs > size || (2 * theirs == size && !known);
        if (*bad) return 0;
    }
    return odd;
}

// What is wrong, in one sentence; where a node is bad, or the run was there before, another start may help.
static inline bool run_identity_judge(const RunIdentity* identity, const RankView* views, int size,
                                      char bad_node[64], Error* err) {
    bool bad;
    int odd = odd_rank(views, size, identity->known, &bad);
    if (odd < 0) return true;
    const RankView* view = &views[odd];
    int code = bad || identity->known ? EXIT_IO : EXIT_NO_INPUT;
    if (bad) snprintf(bad_node, 64, "%s", view->node);
    if (odd == 0)
        return fail(err, code,
                    "rank 0: on its node, %s, log.run_dir, %s, is not the run that most of the %d ranks see "
                    "there: is its file system mounted there?",
                    view->node, identity->directory, size);
    if (view->ids[0] == '\0')
        return fail(err, code,
                    "rank %d: on its node, %s, log.run_dir, %s, is not what rank 0 sees on %s (%s): is its "
                    "file system mounted there?",
                    odd, view->node, identity->directory, views[0].node, view->why);
    bool another = strncmp(view->ids, identity->id, ID_DIGITS) != 0;
    return fail(err, code,
                "rank %d: on its node, %s, log.run_dir, %s, is %s, not what rank 0 sees on %s: is its file "
                "system mounted there?",
                odd, view->node, identity->directory,
                another ? "another run's" : "that of an earlier start, or a copy", views[0].node);
}

// All processes: the identity that rank 0 has begun, and whether each sees it. False on rank 0, with err, if one does
// not within `patience` seconds; bad_node is then the node whose fault that is, if that is known.
static inline bool run_identity_share(RunIdentity* identity, const char* run_dir, Control* control,
                                      double patience, char bad_node[64], Error* err) {
    RankView mine, *all = (RankView*)calloc_check((size_t)control->size, sizeof *all);
    char text[RUN_ID_TEXT] = "";
    if (control->rank == 0) run_identity_text(identity, text);
    bool ok = control_broadcast(control, text, sizeof text, err);
    memset(&mine, 0, sizeof mine);
    node_name(mine.node);
    if (ok && control->rank > 0) {
        snprintf(identity->directory, sizeof identity->directory, "%s", run_dir);
        CHECK(run_identity_parse(identity, text));
        run_identity_look(run_dir, text, patience, &mine);
    }
    if (control->rank == 0) memcpy(mine.ids, text, sizeof mine.ids - 1);
    ok = ok && control_gather(control, &mine, sizeof mine, all, err) &&
         (control->rank > 0 || run_identity_judge(identity, all, control->size, bad_node, err));
    free(all);
    if (!ok && control->rank == 0 && !identity->known) run_identity_undo(identity);
    return ok;
}
