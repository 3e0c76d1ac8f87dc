/* What the guest has but for its time: the inode stays, with its content, and utimensat(2) is all.
 *
 * That call is done or not done, and the time itself tells which; the old one is in the table. So
 * neither the journal nor the folders of old files hold anything of such an item.
 */
#include "change.h"
#include "report.h"
#include "steps.h"

#include <errno.h>
#include <sys/stat.h>

#define SECOND 1000000000

bool same_time(int64_t found, int64_t wanted)
{
    int64_t rest = wanted % SECOND;

    return found == wanted || found == wanted - (rest < 0 ? rest + SECOND : rest);
}

static unsigned times_of(const struct item *item, const struct status *status)
{
    const struct entry_record *record = item->record;
    int64_t found = mtime_of(status);

    if (status->inode != record->expected.inode ||
        (record->kind == KIND_FILE && status->size != record->size))
        return 0;
    /* The old one came from this very file system, so that it is whole. */
    return (found == record->expected.mtime_ns ? OLD_TIME : 0) |
           (same_time(found, record->mtime_ns) ? NEW_TIME : 0);
}

int same_look(const struct item *item, unsigned *times)
{
    struct status status;

    *times = 0;
    if (look(item->dir->fd, item->name, &status) < 0)
        return errno == ENOENT ? 0 : -1;
    *times = times_of(item, &status);
    return 0;
}

int same_set(const struct item *item, bool old)
{
    struct place place = {.dir = item->dir->fd, .name = item->name, .fd = -1};

    return set_mtime(&place, old ? item->record->expected.mtime_ns : item->record->mtime_ns);
}

/* Another look right before: the new time would hide what was written meanwhile. */
int same_commit(const struct item *item, bool recovering)
{
    const struct state_record *expected = &item->record->expected;
    struct status status;

    if (look(item->dir->fd, item->name, &status) < 0)
        return errno == ENOENT ? fail("conflict", item->path, "it is gone from the guest")
                               : fail_errno(item->path, "looking at the path");
    if (recovering && times_of(item, &status) & NEW_TIME)
        return 0;
    if (!state_matches(&status, expected, false) || status.nlink != 1)
        return fail("conflict", item->path, "it changed since the guest was suspended");
    if (step(COMMIT_TIME) || same_set(item, false) < 0)
        return fail_errno(item->path, "setting the time");
    return 0;
}

int same_verify(const struct item *item)
{
    const struct entry_record *record = item->record;
    struct status status;

    if (look(item->dir->fd, item->name, &status) < 0)
        return errno == ENOENT ? fail("conflict", item->path, "it is gone from the guest")
                               : fail_errno(item->path, "looking at the path");
    if (!(times_of(item, &status) & NEW_TIME) || status.mode != record->expected.mode ||
        status.uid != record->uid || status.gid != record->gid)
        return fail("conflict", item->path, "it changed while the update was staged");
    return 0;
}

/* Returns -1 with errno. What the guest made of it since is its own. */
int same_undo(const struct item *item)
{
    unsigned times;

    if (same_look(item, &times) < 0)
        return -1;
    if (times != NEW_TIME)
        return 0;
    return step(UNDO_TIME) ? -1 : same_set(item, true);
}

int same_turn(const struct item *item, bool back)
{
    unsigned times;

    if (same_look(item, &times) < 0)
        return fail_errno(item->path, "looking at the path");
    if (times & (back ? OLD_TIME : NEW_TIME))
        return 0;
    if (!times)
        return back ? fail("conflict", item->path, "it changes right now") : 0;
    if ((back ? step(ROLLBACK_TIME) : step(STAY_TIME)) || same_set(item, back) < 0)
        return fail_errno(item->path, "setting the time");
    return 0;
}
