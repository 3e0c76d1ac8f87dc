/* applier apply DEVICE --medium-sha256 HEX [--root DIR] [--set-time SECONDS.NANOSECONDS]
 *               [--seed stdin]
 * applier rollback DEVICE --medium-sha256 HEX [--root DIR] [--leave-diverged yes]
 * applier forget DEVICE --medium-sha256 HEX [--root DIR]
 * applier finish DEVICE --medium-sha256 HEX [--root DIR]
 *
 * Makes the guest's tree what the change set on the medium says, or leaves it as it was; or takes
 * that back; or removes what was kept for that; or ends, while the guest boots, what of these a
 * power cut has interrupted. What it promises, the medium and the output are in
 * docs/design/0003-applier.md, 0020-rollback.md and 0022-power-cuts.md.
 */
#include "change.h"
#include "journal.h"
#include "report.h"
#include "steps.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char usage[] =
    "usage: applier apply DEVICE --medium-sha256 HEX [--root DIR] [--set-time SECONDS.NANOS]\n"
    "                     [--seed stdin]\n"
    "       applier rollback DEVICE --medium-sha256 HEX [--root DIR] [--leave-diverged yes]\n"
    "       applier forget|finish DEVICE --medium-sha256 HEX [--root DIR]\n"
    "DEVICE is a path, or serial:TEXT to wait for that disk\n";

enum mode { APPLY, ROLLBACK, FORGET, FINISH };

struct options {
    const char *device;
    const char *root;
    const char *set_time;
    enum mode mode;
    bool leave_diverged;
    bool seed;
    uint8_t sha256[32];
};

static struct change change;

static int conclude(const char *result, int status)
{
    uint64_t bytes = 0;
    uint32_t files = 0;

    for (uint32_t i = 0; status == EXIT_APPLIED && i < change.n_items; i++) {
        files += !top_of(&change.items[i])->left;
        if (change.items[i].record->kind == KIND_FILE && !change.items[i].record->same)
            bytes += change.items[i].record->size;
    }
    report_result(result, files, bytes);
    return status;
}

static int refused(void)
{
    return conclude("refused", EXIT_REFUSED);
}

static int needs_person(const char *code, const char *what)
{
    fail(code, "", "%s", what); /* the first failure stays, when there was one */
    return conclude("needs-person", EXIT_NEEDS_PERSON);
}

/* Nothing is left to be ended at a boot once the journal has gone. */
static int journal_ends(int (*way)(const struct change *))
{
    int result = way(&change);

    if (!result)
        boot_remove(&change);
    return result;
}

/* The tree never changed but for reserved names: they go, and it is a refusal. */
static int give_up_staging(void)
{
    int result;

    phase("unstage");
    result = unstage(&change, STAGED_HERE);
    if (set_directory_times(&change, true) < 0 || result < 0)
        return needs_person("undo", "what was staged could not be removed");
    if (journal_ends(journal_remove) < 0)
        return needs_person("undo", "the journal could not be removed");
    return refused();
}

static int go_back(bool marked)
{
    phase("undo");
    /* Without the mark a kill from here on would end in going forward: whole as well. */
    if (!marked && journal_mark_undo(&change) < 0)
        complain("undo-failed", STATE_DIR, "marking the journal");
    if (undo(&change) < 0)
        return needs_person("undo", "not everything could be put back");
    if (unstage(&change, STAGED_AS_PLANNED) < 0 || set_directory_times(&change, true) < 0)
        return needs_person("undo", "what was staged could not be removed");
    if (step(UNDO_SYNC) || sync_file_systems(&change, true) < 0)
        return needs_person("undo", "what was put back could not be written out");
    if (journal_ends(journal_remove) < 0)
        return needs_person("undo", "the journal could not be removed");
    return conclude("undone", EXIT_UNDONE);
}

/* The old files go out of the way, with the journal that tells of them; or they go altogether. */
static int put_away(void)
{
    int result = 0;
    bool kept = !keep(&change);

    if (!kept) {
        result = prune(&change);
        if (cleanup(&change) < 0)
            result = -1;
    }
    if (set_directory_times(&change, false) < 0 || sync_file_systems(&change, false) < 0 ||
        result < 0 || journal_ends(kept ? journal_keep : journal_remove) < 0)
        return -1;
    return 0;
}

/* After the marker: an error takes nothing back from here on. */
static int clean_up(void)
{
    phase("cleanup");
    if (put_away() < 0 || step(END))
        fail("leftover", STATE_DIR, "old files or the journal are still there");
    return conclude("applied", EXIT_APPLIED);
}

static int go_forward(bool recovering)
{
    time_t now = time(NULL);
    /* A run that takes up another one has not seen every byte. */
    bool attests = attestation(&change.medium) && !recovering;

    phase("commit");
    if (commit(&change, recovering) < 0)
        return go_back(false);
    phase("verify");
    if (verify(&change, recovering) < 0)
        return go_back(false);
    if (attests) {
        phase("attest");
        if (attestation_draft(&change, now) < 0)
            return go_back(false);
    }
    phase("marker");
    if (marker_write(&change, MARKER_APPLIED, now) < 0)
        return go_back(false);
    if ((attests && attestation_set(&change) < 0) || step(MARKER_SYNC) ||
        syncfs(change.state) < 0) {
        fail_errno(STATE_DIR, "writing the marker out");
        return needs_person("io", "the marker could not be written out");
    }
    return clean_up();
}

/* Returns -1 when staging has to start (again), or the exit status. */
static int recover(enum journal_state state)
{
    bool began = true;

    phase("recover");
    if (state == JOURNAL_UNDOING)
        return go_back(true);
    if (state == JOURNAL_PLANNED) {
        if (commit_began(&change, &began) < 0)
            return needs_person("undo", "the state of an interrupted run is unknown");
        /* A rename is proof that everything staged is durable; without one, it may not be. */
        if (began)
            return go_forward(true);
        if (undo(&change) < 0 || unstage(&change, STAGED_AS_PLANNED) < 0 ||
            set_directory_times(&change, true) < 0)
            return needs_person("undo", "an interrupted run could not be undone");
    } else if (unstage(&change, STAGED_BEFORE_KILL) < 0) {
        return needs_person("undo", "what was staged could not be removed");
    }
    if (journal_ends(journal_remove) < 0)
        return needs_person("undo", "the journal could not be removed");
    return -1;
}

/* Medium, identity, marker and journal, for either way. */
static int begin(const struct options *options, enum marker *marker, enum journal_state *journal)
{
    phase("medium");
    change.root = open(options->root, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (change.root < 0)
        return fail_errno(options->root, "opening the root");
    if (medium_open(&change.medium, options->device, options->sha256) < 0 ||
        change_plan(&change) < 0)
        return -1;
    phase("lock");
    if (guest_is_machine(&change) < 0 || state_open(&change) < 0 ||
        marker_read(&change, marker) < 0 || journal_load(&change, journal) < 0)
        return -1;
    if (*journal == JOURNAL_NONE) /* nor of another change set: nothing is left to be ended */
        boot_remove(&change);
    return 0;
}

static int apply(const struct options *options)
{
    enum journal_state journal;
    enum marker marker;
    bool ours;
    int status;

    if ((options->seed && guest_seed() < 0) || begin(options, &marker, &journal) < 0)
        return refused();
    if (journal == JOURNAL_ROLLING || journal == JOURNAL_STAYING) {
        fail("unfinished", STATE_DIR, "this change set is half taken back");
        return refused();
    }
    ours = marker == MARKER_APPLIED;
    if (ours && journal == JOURNAL_NONE)
        return conclude("already-applied", EXIT_APPLIED);
    /* A journal of this change set proves the guest; a power cut changes its boot id. */
    if ((journal == JOURNAL_NONE && guest_is_boot(&change) < 0) || guest_lock(&change) < 0)
        return refused();
    phase("check");
    if (change_open_dirs(&change, journal == JOURNAL_NONE) < 0)
        return refused();
    if (ours)
        return clean_up();
    if (journal != JOURNAL_NONE) {
        status = recover(journal);
        if (status >= 0)
            return status;
        if (guest_is_boot(&change) < 0)
            return refused();
        phase("check");
    }
    if (check(&change) < 0)
        return refused();
    prune(&change); /* what stays is in the way of nothing but room */
    if (check_space(&change) < 0 || (options->set_time && guest_set_time(options->set_time) < 0))
        return refused();
    phase("boot-unit");
    boot_leave(&change, false); /* with what is staged */
    phase("stage");
    if (stage(&change) < 0 || journal_write_plan(&change) < 0)
        return give_up_staging();
    phase("sync");
    if (step(STAGE_SYNC) || sync_file_systems(&change, true) < 0) {
        fail_errno("", "writing what was staged out");
        return give_up_staging();
    }
    return go_forward(false);
}

/* The update stays: all that was taken back is made what it was. */
static int stay(bool marked)
{
    phase("undo");
    if (!marked && journal_mark_stay(&change) < 0)
        complain("undo-failed", STATE_DIR, "marking the journal");
    if (turn(&change, false) < 0)
        return needs_person("undo", "not everything could be made the updated one again");
    if (step(STAY_SYNC) || sync_file_systems(&change, true) < 0 || put_away() < 0)
        return needs_person("undo", "what was made the updated one again could not be put away");
    return conclude("undone", EXIT_UNDONE);
}

static int clean_up_back(void)
{
    int result;

    phase("cleanup");
    result = remove_new(&change);
    if (prune(&change) < 0 || set_directory_times(&change, true) < 0 ||
        sync_file_systems(&change, false) < 0 || result < 0 || journal_ends(journal_remove) < 0 ||
        step(END))
        fail("leftover", STATE_DIR, "new files or the journal are still there");
    return conclude("rolled-back", EXIT_APPLIED);
}

static int go_back_whole(bool recovering)
{
    phase("commit");
    if (turn(&change, true) < 0)
        return stay(false);
    phase("verify");
    if (verify_back(&change, recovering) < 0)
        return stay(false);
    phase("marker");
    if (marker_write(&change, MARKER_ROLLED_BACK, time(NULL)) < 0)
        return stay(false);
    if (step(MARKER_SYNC) || syncfs(change.state) < 0) {
        fail_errno(STATE_DIR, "writing the marker out");
        return needs_person("io", "the marker could not be written out");
    }
    return clean_up_back();
}

/* The update that is to be taken back: its journal, with the old files. */
static int find_update(enum marker marker, enum journal_state journal)
{
    bool found = false;

    if (marker != MARKER_APPLIED)
        return fail("no-undo", STATE_DIR, "another change set was the last one, or none");
    if (journal == JOURNAL_PLANNED && put_away() < 0)
        return fail("unfinished", STATE_DIR, "the update itself could not be finished");
    if (journal_load_kept(&change, &found) < 0)
        return -1;
    return found ? 0 : fail("no-undo", STATE_DIR, "nothing was kept of what it replaced");
}

/* With the locks held. */
static int take_back(enum marker marker, enum journal_state journal, bool leave_diverged)
{
    bool recovering = journal == JOURNAL_ROLLING || journal == JOURNAL_STAYING;

    phase("check");
    if (change_open_dirs(&change, false) < 0 ||
        (!recovering && find_update(marker, journal) < 0))
        return refused();
    if (kept_open(&change) < 0) {
        fail_errno(STATE_DIR, "opening the old files");
        return refused();
    }
    if (marker == MARKER_ROLLED_BACK)
        return clean_up_back();
    if (journal == JOURNAL_STAYING)
        return stay(true);
    if (check_back(&change, recovering, leave_diverged) < 0)
        return recovering ? stay(false) : refused();
    if (!recovering) {
        boot_leave(&change, true);
        if (journal_begin_rollback(&change) < 0) {
            boot_remove(&change);
            return refused();
        }
    }
    return go_back_whole(recovering);
}

static int rollback(const struct options *options)
{
    enum journal_state journal;
    enum marker marker;
    bool recovering;

    if (begin(options, &marker, &journal) < 0)
        return refused();
    recovering = journal == JOURNAL_ROLLING || journal == JOURNAL_STAYING;
    if (marker == MARKER_ROLLED_BACK && journal == JOURNAL_NONE)
        return conclude("already-rolled-back", EXIT_APPLIED);
    if (!recovering && journal != JOURNAL_NONE &&
        (journal != JOURNAL_PLANNED || marker != MARKER_APPLIED)) {
        fail("unfinished", STATE_DIR, "the change set is half applied");
        return refused();
    }
    return guest_lock(&change) < 0 ? refused()
                                   : take_back(marker, journal, options->leave_diverged);
}

/* What was kept goes, of whichever change set. */
static int forget(const struct options *options)
{
    enum journal_state journal;
    enum marker marker;

    if (begin(options, &marker, &journal) < 0)
        return refused();
    if (journal != JOURNAL_NONE) {
        fail("unfinished", STATE_DIR, "the change set is half applied, or half taken back");
        return refused();
    }
    phase("cleanup");
    if (prune(&change) < 0) {
        fail("leftover", STATE_DIR, "old files are still there");
        return refused();
    }
    return conclude("forgotten", EXIT_APPLIED);
}

static int nothing_of_it(void)
{
    fail("interrupted", "", "it was interrupted before anything was in its place");
    return conclude("undone", EXIT_UNDONE);
}

/* What the unit of boot.c does. There is no layer any more, so nothing is begun. */
static int finish(const struct options *options)
{
    enum journal_state journal;
    enum marker marker;
    int status;

    if (begin(options, &marker, &journal) < 0)
        return refused();
    if (journal == JOURNAL_NONE)
        return marker == MARKER_APPLIED       ? conclude("already-applied", EXIT_APPLIED)
               : marker == MARKER_ROLLED_BACK ? conclude("already-rolled-back", EXIT_APPLIED)
                                              : nothing_of_it();
    if (guest_lock(&change) < 0)
        return refused();
    if (journal == JOURNAL_ROLLING || journal == JOURNAL_STAYING)
        return take_back(marker, journal, false);
    phase("check");
    if (change_open_dirs(&change, false) < 0)
        return refused();
    if (marker == MARKER_APPLIED)
        return clean_up();
    status = recover(journal);
    return status >= 0 ? status : nothing_of_it();
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static bool parse_sha256(const char *hex, uint8_t digest[32])
{
    if (strlen(hex) != 64)
        return false;
    for (int i = 0; i < 32; i++) {
        int high = hex_digit(hex[2 * i]), low = hex_digit(hex[2 * i + 1]);

        if (high < 0 || low < 0)
            return false;
        digest[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}

static const struct {
    const char *name;
    int (*run)(const struct options *options);
} modes[] = {[APPLY] = {"apply", apply}, [ROLLBACK] = {"rollback", rollback},
             [FORGET] = {"forget", forget}, [FINISH] = {"finish", finish}};

static bool parse(int argc, char **argv, struct options *options)
{
    bool has_sha256 = false;

    if (argc < 3)
        return false;
    for (options->mode = APPLY; strcmp(argv[1], modes[options->mode].name); options->mode++)
        if (options->mode == FINISH)
            return false;
    options->device = argv[2];
    options->root = "/";
    for (int i = 3; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--medium-sha256"))
            has_sha256 = parse_sha256(argv[i + 1], options->sha256);
        else if (!strcmp(argv[i], "--root"))
            options->root = argv[i + 1];
        else if (options->mode == APPLY && !strcmp(argv[i], "--set-time"))
            options->set_time = argv[i + 1];
        else if (options->mode == APPLY && !strcmp(argv[i], "--seed") &&
                 !strcmp(argv[i + 1], "stdin"))
            options->seed = true;
        else if (options->mode == ROLLBACK && !strcmp(argv[i], "--leave-diverged") &&
                 !strcmp(argv[i + 1], "yes"))
            options->leave_diverged = true;
        else
            return false;
    }
    return argc % 2 == 1 && has_sha256;
}

int main(int argc, char **argv)
{
    static const int ignored[] = {SIGHUP, SIGINT, SIGTERM, SIGPIPE};
    struct options options = {0};

#ifdef OUA_FAULTS
    if (argc == 2 && !strcmp(argv[1], "steps")) {
        steps_list();
        return 0;
    }
#endif
    if (!parse(argc, argv, &options)) {
        fputs(usage, stderr);
        return EXIT_USAGE;
    }
    /* The agent that started us may be restarted by the update: only SIGKILL stops us. */
    for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++)
        signal(ignored[i], SIG_IGN);
    /* Everything in a guest that just woke up wants the processor; the gate waits for us. */
    setpriority(PRIO_PROCESS, 0, -20);
    umask(0);
    return modes[options.mode].run(&options);
}
