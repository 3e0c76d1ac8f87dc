/* Every step that leaves a trace on disk, by name, so that a test build can die or fail at each.
 *
 * With -DOUA_FAULTS (never in the shipped program):
 *   OUA_KILL_AT=step[:n]         SIGKILL to itself before the nth time (from 1) of that step
 *   OUA_STOP_AT=step[:n]         SIGSTOP to itself there; a test changes the tree and continues it
 *   OUA_FAIL_AT=step:errno[:n],...  the steps fail with that errno; n 0 means every time
 *   OUA_TRACE=file               appends the name of each step that is reached
 */
#ifndef STEPS_H
#define STEPS_H

#define STEPS(X)                                  \
    X(BOOT_LEAVE, "boot-leave")                   \
    X(BOOT_SYNC, "boot-sync")                     \
    X(BOOT_REMOVE, "boot-remove")                 \
    X(JOURNAL_CREATE, "journal-create")           \
    X(STAGE_CREATE, "stage-create")               \
    X(STAGE_WRITE, "stage-write")                 \
    X(STAGE_ATTRIBUTES, "stage-attributes")       \
    X(STAGE_DIRECTORY, "stage-directory")         \
    X(JOURNAL_PLAN, "journal-plan")               \
    X(STAGE_SYNC, "stage-sync")                   \
    X(COMMIT_RENAME, "commit-rename")             \
    X(COMMIT_DIRECTORY, "commit-directory")       \
    X(COMMIT_TIME, "commit-time")                 \
    X(VERIFY, "verify")                           \
    X(ATTEST_WRITE, "attest-write")               \
    X(MARKER_WRITE, "marker-write")               \
    X(MARKER_RENAME, "marker-rename")             \
    X(ATTEST_RENAME, "attest-rename")             \
    X(MARKER_SYNC, "marker-sync")                 \
    X(KEEP_FOLDER, "keep-folder")                 \
    X(KEEP_RENAME, "keep-rename")                 \
    X(CLEANUP_REMOVE, "cleanup-remove")           \
    X(DIRECTORY_TIME, "directory-time")           \
    X(JOURNAL_KEEP, "journal-keep")               \
    X(JOURNAL_REMOVE, "journal-remove")           \
    X(PRUNE_REMOVE, "prune-remove")               \
    X(END, "end")                                 \
    X(UNDO_MARK, "undo-mark")                     \
    X(UNDO_RENAME, "undo-rename")                 \
    X(UNDO_DIRECTORY, "undo-directory")           \
    X(UNDO_TIME, "undo-time")                     \
    X(UNDO_REMOVE, "undo-remove")                 \
    X(UNDO_SYNC, "undo-sync")                     \
    X(ROLLBACK_BEGIN, "rollback-begin")           \
    X(ROLLBACK_MARK, "rollback-mark")             \
    X(ROLLBACK_RENAME, "rollback-rename")         \
    X(ROLLBACK_TIME, "rollback-time")             \
    X(ROLLBACK_VERIFY, "rollback-verify")         \
    X(ROLLBACK_REMOVE, "rollback-remove")         \
    X(STAY_MARK, "stay-mark")                     \
    X(STAY_RENAME, "stay-rename")                 \
    X(STAY_TIME, "stay-time")                     \
    X(STAY_SYNC, "stay-sync")

#ifdef OUA_FAULTS

enum step_name {
#define X(name, text) STEP_##name,
    STEPS(X)
#undef X
        STEP_COUNT
};

/* Returns 0, or -1 with errno when the step shall fail. */
int step_reached(enum step_name name);
void steps_list(void);
/* OUA_NO_OPENAT2: behave as a kernel before 5.6 would. */
int no_openat2(void);

#define step(name) step_reached(STEP_##name)

#else

#define step(name) 0
#define no_openat2() 0

#endif
#endif
