/* Renames: the old inode stays under the reserved name until the end, and that is the undo. */
#include "change.h"
#include "report.h"
#include "steps.h"

#include <errno.h>

/* What the inode numbers at the path and at the reserved name say of an item. */
struct names {
    uint64_t at_path;
    uint64_t at_reserved;
};

static int look_at_names(const struct change *change, const struct item *item, struct names *names)
{
    char reserved[RESERVED_SIZE];

    reserved_name(change, item, reserved);
    if (inode_at(item->dir->fd, item->name, &names->at_path) < 0 ||
        inode_at(item->dir->fd, reserved, &names->at_reserved) < 0)
        return -1;
    return 0;
}

static bool is_done(const struct item *item, const struct names *names)
{
    if (item->op == OP_DELETE)
        return !names->at_path;
    return names->at_path == item->inode;
}

static int rename_item(const struct change *change, const struct item *item)
{
    char reserved[RESERVED_SIZE];
    int dir = item->dir->fd;

    reserved_name(change, item, reserved);
    if (item->op == OP_DELETE)
        return rename_within(dir, item->name, reserved, NO_REPLACE);
    return rename_within(dir, reserved, item->name, item->op == OP_NEW ? NO_REPLACE : EXCHANGE);
}

static int commit_item(const struct change *change, const struct item *item)
{
    if (item->op == OP_META)
        return meta_apply(change, item);
    if (item->op == OP_TIME)
        return same_commit(item, false);
    if (!step(COMMIT_RENAME) && !rename_item(change, item))
        return 0;
    if (errno == EEXIST || errno == ENOENT)
        return fail("conflict", item->path, "it changed while the update was staged");
    if (errno == EINVAL || errno == ENOSYS)
        return fail("unsupported", item->path, "the file system cannot exchange two names");
    return fail_errno(item->path, "renaming");
}

/* The guest may have run for long since the applier was killed. */
static int commit_again(const struct change *change, const struct item *item)
{
    struct names names;

    if (item->op == OP_META)
        return commit_item(change, item);
    if (item->op == OP_TIME)
        return same_commit(item, true);
    if (look_at_names(change, item, &names) < 0)
        return fail_errno(item->path, "looking at the path");
    if (is_done(item, &names))
        return 0;
    if (names.at_path != (item->record->has_expected ? item->record->expected.inode : 0))
        return fail("conflict", item->path, "it changed since the applier was interrupted");
    return commit_item(change, item);
}

int commit(struct change *change, bool recovering)
{
    for (uint32_t i = 0; i < change->n_order; i++)
        if ((recovering ? commit_again : commit_item)(change, change->order[i]) < 0)
            return -1;
    return 0;
}

int commit_began(struct change *change, bool *began)
{
    *began = false;
    for (uint32_t i = 0; i < change->n_order && !*began; i++) {
        const struct item *item = change->order[i];
        struct names names;
        unsigned times;

        if (item->op == OP_META)
            continue;
        if (item->op == OP_TIME) {
            if (same_look(item, &times) < 0)
                return fail_errno(item->path, "looking at the path");
            *began = times == NEW_TIME;
            continue;
        }
        if (look_at_names(change, item, &names) < 0)
            return fail_errno(item->path, "looking at the path");
        /* A name that the guest itself took away since then is no rename of ours. */
        *began = is_done(item, &names) && (item->op != OP_DELETE || names.at_reserved);
    }
    return 0;
}

static int bad(const struct item *item, const char *what)
{
    return fail("verify", item->path, "%s", what);
}

/* The old inode must be the one that was checked: nothing locks the guest's other programs out. */
static int verify_old(const struct change *change, const struct item *item, bool recovering)
{
    const struct state_record *expected = &item->record->expected;
    char reserved[RESERVED_SIZE];
    struct status status;

    reserved_name(change, item, reserved);
    if (look(item->dir->fd, reserved, &status) < 0)
        return errno == ENOENT && recovering ? 0 : fail_errno(item->path, "looking at the old file");
    if (status.inode != expected->inode)
        return fail("conflict", item->path, "it was replaced while the update was staged");
    if (recovering)
        return 0;
    if (mtime_of(&status) != item->old.mtime_ns ||
        (!S_ISDIR(expected->mode) && status.size != expected->size))
        return fail("conflict", item->path, "it was written while the update was staged");
    return 0;
}

static int verify_item(struct change *change, const struct item *item, bool recovering)
{
    const struct entry_record *record = item->record;
    struct status status;

    if (item->op == OP_TIME)
        return same_verify(item);
    if (item->op == OP_META) {
        if (look(item->meta_fd, "", &status) < 0)
            return fail_errno(item->path, "looking at the directory");
    } else {
        if (look(dir_fd(change, item->dir), item->name, &status) < 0) {
            if (errno != ENOENT)
                return fail_errno(item->path, "looking at the path");
            return item->op == OP_DELETE ? verify_old(change, item, recovering)
                                         : bad(item, "it is not there");
        }
        if (item->op == OP_DELETE)
            return bad(item, "it is there again");
        if (status.inode != item->inode)
            return bad(item, "it is not what was staged");
    }
    if (record->kind == KIND_FILE && status.size != record->size)
        return bad(item, "it has another size than was staged");
    if (record->kind != KIND_SYMLINK && record->kind != KIND_HARDLINK &&
        ((status.mode & 07777u) != record->mode || status.uid != record->uid ||
         status.gid != record->gid))
        return bad(item, "it has another mode or owner than was staged");
    return item->op == OP_REPLACE ? verify_old(change, item, recovering) : 0;
}

int verify(struct change *change, bool recovering)
{
    if (step(VERIFY))
        return fail_errno("", "verifying");
    for (uint32_t i = 0; i < change->n_items; i++)
        if (verify_item(change, &change->items[i], recovering) < 0)
            return -1;
    return 0;
}

/* Returns -1 with errno when the path cannot be put back. */
static int undo_item(const struct change *change, const struct item *item)
{
    char reserved[RESERVED_SIZE];
    struct names names;
    int dir = item->dir->fd;

    if (item->op == OP_META)
        return meta_restore(change, item);
    if (item->op == OP_TIME)
        return same_undo(item);
    if (look_at_names(change, item, &names) < 0)
        return -1;
    reserved_name(change, item, reserved);
    if (item->op == OP_DELETE) {
        if (!names.at_reserved)
            return 0; /* never renamed */
        return step(UNDO_RENAME) ? -1 : rename_within(dir, reserved, item->name, NO_REPLACE);
    }
    if (names.at_path != item->inode) {
        if (item->op == OP_NEW || names.at_reserved != item->record->expected.inode)
            return 0; /* never renamed */
        /* Renamed, and then the guest took the new file away: the old one goes back. */
        return step(UNDO_RENAME) ? -1 : rename_within(dir, reserved, item->name, NO_REPLACE);
    }
    if (step(UNDO_RENAME))
        return -1;
    return rename_within(dir, item->name, reserved, item->op == OP_NEW ? NO_REPLACE : EXCHANGE);
}

int undo(struct change *change)
{
    int result = 0;

    for (uint32_t i = change->n_order; i-- > 0;)
        if (undo_item(change, change->order[i]) < 0) {
            complain("undo-failed", change->order[i]->path, "putting back");
            result = -1;
        }
    return result;
}

int set_directory_times(struct change *change, bool old)
{
    int result = 0;

    for (uint32_t i = 0; i < change->n_items; i++) {
        const struct item *item = &change->items[i];
        struct place place = {.fd = item->meta_fd};

        if (item->op != OP_META || item->left || item->time_changed)
            continue;
        if (step(DIRECTORY_TIME) ||
            set_mtime(&place, old ? item->old.mtime_ns : item->record->mtime_ns) < 0) {
            complain(old ? "undo-failed" : "leftover", item->path, "setting the directory's time");
            result = -1;
        }
    }
    return result;
}

int cleanup(struct change *change)
{
    int result = 0;

    for (uint32_t i = 0; i < change->n_order; i++) {
        const struct item *item = change->order[i];
        char reserved[RESERVED_SIZE];

        if (item->op != OP_REPLACE && item->op != OP_DELETE)
            continue;
        reserved_name(change, item, reserved);
        if (step(CLEANUP_REMOVE) || remove_tree(item->dir->fd, reserved) < 0) {
            complain("leftover", item->path, "removing the old file");
            result = -1;
        }
    }
    return result;
}
