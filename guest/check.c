/* Before anything is written: does every path look as the change set expects, and is there room. */
#include "change.h"
#include "report.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define MAX_DEPTH 256
#define JOURNAL_ROOM (64u << 10)

/* All that differs, and what the result names: the first, but rather of the package database. */
static struct {
    uint32_t count;
    bool database;
    char path[4096];
    const char *how;
} conflicts;

void conflict(const char *path, const char *how, bool database)
{
    tell_path("conflict", path, how);
    if (!conflicts.count++ || (database && !conflicts.database)) {
        snprintf(conflicts.path, sizeof conflicts.path, "%s", path);
        conflicts.how = how;
    }
    conflicts.database = conflicts.database || database;
}

/* Not an error yet: the others are looked at, too. */
static int differs(const struct item *item, const char *path, const char *how)
{
    conflict(path, how, item->record->late);
    return 0;
}

/* The walk through a directory that goes. */
struct walk {
    const struct medium *medium;
    const struct item *item;
    uint32_t seen;
    bool whole; /* every directory was looked into */
    int depth;
    size_t length; /* of path */
    struct status dir;
    char path[4096];
};

static const struct below_record *find_below(const struct walk *walk)
{
    const struct entry_record *record = walk->item->record;
    uint32_t low = record->first_below, high = low + record->below;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const struct below_record *below = &walk->medium->below[middle];
        int order = strcmp(text(walk->medium, below->path), walk->path);

        if (!order)
            return below;
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return NULL;
}

static int check_below(void *context, int dir, const char *name);

static int descend(struct walk *walk, int dir, const char *name, const struct status *status)
{
    struct status above = walk->dir;
    int fd, result;

    if (walk->depth == MAX_DEPTH) {
        walk->whole = false;
        return differs(walk->item, walk->path, "the directory that goes is too deep");
    }
    fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return fail_errno(walk->path, "opening a directory that goes");
    walk->dir = *status;
    walk->depth++;
    errno = 0;
    result = for_each_name(fd, check_below, walk);
    if (result)
        result = fail_errno(walk->path, "listing a directory that goes"); /* keeps an earlier one */
    walk->depth--;
    walk->dir = above;
    close(fd);
    return result;
}

static int check_below(void *context, int dir, const char *name)
{
    struct walk *walk = context;
    size_t length = walk->length, more = strlen(name) + 1;
    const struct below_record *below;
    struct status status;
    int result = 0;

    if (length + more >= sizeof walk->path)
        return differs(walk->item, walk->path, "the directory that goes has too long a path below");
    walk->path[length] = '/';
    memcpy(walk->path + length + 1, name, more);
    walk->length += more;
    below = find_below(walk);
    if (below && look(dir, name, &status) < 0)
        return fail_errno(walk->path, "looking at what goes");
    walk->seen += !!below;
    if (!below)
        differs(walk->item, walk->path, "it is new in a directory that goes");
    else if (is_mount(&status, &walk->dir))
        differs(walk->item, walk->path, "something is mounted in a directory that goes");
    else if (!state_matches(&status, &below->state, false))
        differs(walk->item, walk->path, "it changed in a directory that goes");
    if (below && S_ISDIR(status.mode) && is_mount(&status, &walk->dir))
        walk->whole = false;
    else if (below && S_ISDIR(status.mode))
        result = descend(walk, dir, name, &status);
    walk->length = length;
    walk->path[length] = 0;
    return result;
}

static int check_goes(const struct change *change, const struct item *item,
                      const struct status *status)
{
    struct walk walk = {.medium = &change->medium, .item = item, .whole = true};

    walk.length = item->record->path.length;
    memcpy(walk.path, item->path, walk.length + 1);
    if (descend(&walk, item->dir->fd, item->name, status) < 0)
        return -1;
    if (walk.whole && walk.seen != item->record->below)
        return differs(item, item->path, "something is gone from a directory that goes");
    return 0;
}

static int check_item(const struct change *change, struct item *item)
{
    const struct entry_record *record = item->record;
    struct status status;
    bool goes_dir;

    if (item->dir->missing || (item->own && item->own->missing)) /* told already */
        return record->late ? differs(item, item->path, "its directory is gone") : 0;
    if (look(item->dir->fd, item->name, &status) < 0) {
        if (errno != ENOENT)
            return fail_errno(item->path, "looking at the path");
        return record->has_expected ? differs(item, item->path, "it is gone from the guest") : 0;
    }
    if (!record->has_expected)
        return differs(item, item->path, "the guest has something at a path that was free");
    goes_dir = S_ISDIR(record->expected.mode) && item->op != OP_META;
    if (!state_matches(&status, &record->expected, S_ISDIR(record->expected.mode)))
        return differs(item, item->path, "it changed since the guest was suspended");
    item->old = (struct old_meta){.mode = status.mode & 07777u,
                                  .uid = status.uid,
                                  .gid = status.gid,
                                  .mtime_ns = mtime_of(&status)};
    if (item->op == OP_META) {
        struct status opened;

        /* The descriptor was opened by another walk than this look. */
        if (look(item->meta_fd, "", &opened) < 0 || opened.inode != status.inode)
            return differs(item, item->path, "it changes right now");
        return 0;
    }
    if (is_mount(&status, &item->dir->status))
        return differs(item, item->path, "something is mounted there");
    if (item->op == OP_TIME && status.nlink != 1)
        return differs(item, item->path, "it has another name, which would change with it");
    return goes_dir ? check_goes(change, item, &status) : 0;
}

/* Blocks that an item needs where its topmost new directory goes. */
static void count_room(struct change *change, const struct item *item)
{
    const struct entry_record *record = item->record;
    struct file_system *fs;
    const struct dir *dir = item->dir;

    if (item->op == OP_DELETE || item->op == OP_META || item->op == OP_TIME)
        return;
    while (dir->maker)
        dir = dir->maker->dir;
    fs = &change->file_systems[dir->fs];
    if (record->kind == KIND_HARDLINK)
        return;
    fs->inodes++;
    if (record->kind == KIND_FILE)
        fs->bytes += record->size + BLOCK - 1 - (record->size + BLOCK - 1) % BLOCK - record->holes;
    else if (record->kind == KIND_DIRECTORY)
        fs->bytes += BLOCK;
    for (uint32_t i = 0; i < record->xattrs; i++)
        fs->bytes += change->medium.xattrs[record->first_xattr + i].value.length;
}

static int check_room(const struct file_system *fs)
{
    struct statvfs room;

    if (fstatvfs(fs->fd, &room) < 0)
        return fail_errno(fs->path, "asking for the free space");
    if (room.f_flag & ST_RDONLY)
        return fail("read-only", fs->path, "the file system is mounted read-only");
    if (fs->bytes > (uint64_t)room.f_bavail * room.f_frsize)
        return fail("space", fs->path, "the file system has %llu bytes free and %llu are needed",
                    (unsigned long long)room.f_bavail * room.f_frsize,
                    (unsigned long long)fs->bytes);
    if (room.f_files && fs->inodes > room.f_favail) /* btrfs counts none: f_files is 0 */
        return fail("space", fs->path, "the file system has %llu inodes free and %llu are needed",
                    (unsigned long long)room.f_favail, (unsigned long long)fs->inodes);
    return 0;
}

int check(struct change *change)
{
    for (uint32_t i = 0; i < change->n_items; i++) {
        if (change->items[i].op != OP_INSIDE && check_item(change, &change->items[i]) < 0)
            return -1;
        if (!conflicts.count)
            count_room(change, &change->items[i]);
    }
    if (conflicts.count > 1)
        return fail("conflict", conflicts.path, "%s; %u paths are not as expected", conflicts.how,
                    conflicts.count);
    if (conflicts.count)
        return fail("conflict", conflicts.path, "%s", conflicts.how);
    change->file_systems[change->state_fs].bytes +=
        JOURNAL_ROOM + 8 * (uint64_t)change->n_items + boot_room(change) +
        change->medium.counts->attestation;
    change->file_systems[change->state_fs].inodes += 9; /* journal, marker, attestation, what boot.c leaves */
    return 0;
}

int check_space(const struct change *change)
{
    for (uint32_t i = 0; i < change->n_file_systems; i++)
        if (check_room(&change->file_systems[i]) < 0)
            return -1;
    return 0;
}
