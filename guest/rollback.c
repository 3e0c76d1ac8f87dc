/* Takes a whole update back: every path is as the update left it, and gets what it had before.
 *
 * New files go to their reserved names, replaced ones change places with the old ones of keep.c.
 * Where a path is told by inode numbers alone, so that whoever comes after a kill can tell too.
 */
#include "change.h"
#include "report.h"
#include "sha256.h"
#include "steps.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

enum where {
    AS_LEFT,
    PUT_BACK,
    ELSEWHERE,
    NO_OLD, /* what it had before is gone */
};

struct look_back {
    struct change *change;
    struct item *directory;
    char path[4096];
    bool recovering;
    uint32_t differ;
    bool database;
    const char *first;
};

/* Of a hard link, the entry that has its content and attributes. */
static const struct entry_record *shape(const struct change *change, const struct item *item)
{
    if (item->record->kind == KIND_HARDLINK)
        return change->items[item->record->link].record;
    return item->record;
}

struct item *top_of(struct item *item)
{
    while (item->op == OP_INSIDE)
        item = item->dir->maker;
    return item;
}

static int find(const struct change *change, const struct item *item, enum where *where)
{
    uint64_t at_path, other, old = item->record->expected.inode;
    char reserved[RESERVED_SIZE];

    if (inode_at(item->dir->fd, item->name, &at_path) < 0)
        return -1;
    *where = ELSEWHERE;
    if (item->op == OP_NEW) {
        reserved_name(change, item, reserved);
        if (inode_at(item->dir->fd, reserved, &other) < 0)
            return -1;
        if (at_path == item->inode)
            *where = AS_LEFT;
        else if (other == item->inode) /* what stands there since is the guest's own */
            *where = PUT_BACK;
        return 0;
    }
    kept_at(change, item, &other);
    if (at_path == old && other == (item->op == OP_REPLACE ? item->inode : 0))
        *where = PUT_BACK;
    else if (other != old)
        *where = NO_OLD;
    else if (at_path == (item->op == OP_REPLACE ? item->inode : 0))
        *where = AS_LEFT;
    return 0;
}

static bool same_content(int dir, const char *name, const struct entry_record *record,
                         uint64_t inode)
{
    static uint8_t buffer[64 << 10];
    struct sha256 hash;
    struct status status;
    uint8_t digest[32];
    ssize_t size = -1;
    int fd = openat(dir, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);

    sha256_init(&hash);
    if (fd >= 0 && !look(fd, "", &status) && status.inode == inode)
        while ((size = read(fd, buffer, sizeof buffer)) > 0)
            sha256_update(&hash, buffer, (size_t)size);
    if (fd >= 0)
        close(fd);
    sha256_final(&hash, digest);
    return !size && !memcmp(digest, record->sha256, sizeof digest);
}

/* Attributes that the update set; others may have come, and go with the file. */
static bool same_xattrs(const struct change *change, const struct item *item, int dir,
                        const char *name)
{
    static uint8_t value[MAX_XATTR];
    const struct medium *medium = &change->medium;
    const struct entry_record *record = shape(change, item);
    char path[300];

    snprintf(path, sizeof path, "/proc/self/fd/%d/%s", dir, name);
    for (uint32_t i = 0; i < record->xattrs; i++) {
        const struct xattr_record *xattr = &medium->xattrs[record->first_xattr + i];
        ssize_t size = lgetxattr(path, text(medium, xattr->name), value, sizeof value);

        if (size != (ssize_t)xattr->value.length ||
            memcmp(value, text(medium, xattr->value), xattr->value.length))
            return false;
    }
    return true;
}

/* What is not as the update left it, or NULL. */
static const char *differs(const struct change *change, const struct item *item, int dir,
                           const char *name, bool content)
{
    static const mode_t types[] = {
        [KIND_FILE] = S_IFREG,   [KIND_DIRECTORY] = S_IFDIR, [KIND_SYMLINK] = S_IFLNK,
        [KIND_FIFO] = S_IFIFO,   [KIND_CHAR] = S_IFCHR,      [KIND_BLOCK] = S_IFBLK,
        [KIND_HARDLINK] = 0,     [KIND_DELETE] = 0,
    };
    const struct entry_record *record = shape(change, item);
    struct status status, parent;

    if (dir < 0 || look(dir, name, &status) < 0)
        return "it is gone";
    if (status.inode != (item->op == OP_META ? record->expected.inode : item->inode) ||
        (status.mode & S_IFMT) != types[record->kind])
        return "it was replaced";
    if (*name && (look(dir, "", &parent) < 0 || is_mount(&status, &parent) ||
                  status.dev_major != parent.dev_major || status.dev_minor != parent.dev_minor))
        return "something is mounted there";
    if (status.uid != record->uid || status.gid != record->gid ||
        (record->kind != KIND_SYMLINK && (status.mode & 07777u) != record->mode))
        return "its owner or mode changed";
    if (record->kind == KIND_FILE && status.size != record->size)
        return "it was written";
    if ((record->kind == KIND_FILE || record->kind == KIND_SYMLINK) &&
        !same_time(mtime_of(&status), record->mtime_ns))
        return "it was written";
    if (!content)
        return NULL;
    /* What stays in its inode is not taken back: nothing of it can be lost. */
    if (item->op != OP_TIME && record->kind == KIND_FILE &&
        !same_content(dir, name, record, status.inode))
        return "its content changed";
    return same_xattrs(change, item, dir, name) ? NULL : "an extended attribute changed";
}

static void tell(struct look_back *back, struct item *item, const char *path, const char *why)
{
    tell_path("diverged", path, why);
    back->differ++;
    if (!back->first)
        back->first = item->path;
    back->database = back->database || item->record->late;
    top_of(item)->left = true;
}

/* A name in a directory that the update made, and that is not the update's. */
static int is_unknown(void *context, int dir, const char *name)
{
    struct look_back *back = context;
    const struct item *item;
    size_t size;

    (void)dir;
    size = (size_t)snprintf(back->path, sizeof back->path, "%s/%s", back->directory->path, name);
    item = size < sizeof back->path ? change_find(back->change, back->path) : NULL;
    return !item || item->op != OP_INSIDE;
}

static int tell_unknown(void *context, int dir, const char *name)
{
    struct look_back *back = context;

    if (is_unknown(context, dir, name))
        tell(back, back->directory, back->path, "it is new in a directory that goes");
    return 0;
}

/* With entries it is open, at whatever name it is by now. */
static int for_new_names(struct look_back *back, struct item *item, int dir, const char *name,
                         int (*visit)(void *context, int dir, const char *name))
{
    int fd = item->own ? dir_fd(back->change, item->own)
                       : openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int result;

    back->directory = item;
    result = fd < 0 ? -1 : for_each_name(fd, visit, back);
    if (fd >= 0 && !item->own)
        close(fd);
    return result;
}

/* After a kill, each attribute of a directory that stays may be the old or the new one. */
static bool is_between(const struct item *item)
{
    const struct entry_record *record = item->record;
    const struct old_meta *old = &item->old;
    struct status status;
    uint32_t mode;

    if (look(item->meta_fd, "", &status) < 0 || status.inode != record->expected.inode)
        return false;
    mode = status.mode & 07777u;
    return (mode == record->mode || mode == old->mode) &&
           (status.uid == record->uid || status.uid == old->uid) &&
           (status.gid == record->gid || status.gid == old->gid);
}

static int check_back_time(struct look_back *back, struct item *item)
{
    const char *why;
    unsigned times;

    if (same_look(item, &times) < 0)
        return fail_errno(item->path, "looking at the path");
    if (back->recovering && times & OLD_TIME)
        return 0;
    why = differs(back->change, item, item->dir->fd, item->name, true);
    if (why)
        tell(back, item, item->path, why);
    return 0;
}

static int check_back_item(struct look_back *back, struct item *item)
{
    struct change *change = back->change;
    const struct item *top = top_of(item);
    enum where where = AS_LEFT;
    const char *why;

    if (item->op == OP_META) {
        struct status status;

        why = differs(change, item, item->meta_fd, "", true);
        if (why && back->recovering && is_between(item))
            return 0;
        if (why)
            tell(back, item, item->path, why);
        else if (!back->recovering && !look(item->meta_fd, "", &status))
            item->time_changed = !same_time(mtime_of(&status), item->record->mtime_ns);
        return 0;
    }
    if (item->op == OP_TIME)
        return check_back_time(back, item);
    if (find(change, top, &where) < 0)
        return fail_errno(top->path, "looking at the path");
    if (where == NO_OLD)
        return fail("no-undo", top->path, "what it was before is not there any more");
    if ((where == PUT_BACK && back->recovering) || (where != AS_LEFT && item != top))
        return 0; /* the topmost one is told, with all that it has */
    if (item->op == OP_DELETE) {
        if (where != AS_LEFT)
            tell(back, item, item->path, "it is there again");
        return 0;
    }
    why = differs(change, item, dir_fd(change, item->dir), item->name, true);
    if (why)
        tell(back, item, item->path, why);
    else if (item->record->kind == KIND_DIRECTORY &&
             for_new_names(back, item, item->dir->fd, item->name, tell_unknown))
        tell(back, item, item->path, "it cannot be listed");
    return 0;
}

int check_back(struct change *change, bool recovering, bool leave)
{
    struct look_back back = {.change = change, .recovering = recovering};

    for (uint32_t i = 0; i < change->n_items; i++)
        if (check_back_item(&back, &change->items[i]) < 0)
            return -1;
    if (back.differ && (!leave || back.database))
        return fail("diverged", back.first,
                    back.database ? "%u paths are not as the update left them, some of the package "
                                    "database"
                                  : "%u paths are not as the update left them",
                    back.differ);
    return 0;
}

static int turn_item(const struct change *change, const struct item *item, bool back)
{
    char reserved[RESERVED_SIZE], name[KEPT_SIZE];
    int dir = item->dir->fd, folder;
    enum where where;
    uint64_t inode;

    if (item->left)
        return 0;
    if (item->op == OP_META) {
        if (!back)
            return meta_apply(change, item);
        return meta_restore(change, item) < 0 ? fail_errno(item->path, "putting back") : 0;
    }
    if (item->op == OP_TIME)
        return same_turn(item, back);
    if (find(change, item, &where) < 0)
        return fail_errno(item->path, "looking at the path");
    if (back ? where == PUT_BACK : where != PUT_BACK) /* what the guest made since is its own */
        return 0;
    if (back && where != AS_LEFT)
        return fail("conflict", item->path, "it changes right now");
    if (back ? step(ROLLBACK_RENAME) : step(STAY_RENAME))
        return fail_errno(item->path, "renaming");
    reserved_name(change, item, reserved);
    kept_name(change, item, name);
    folder = kept_at(change, item, &inode);
    if (item->op == OP_NEW ? rename_within(dir, back ? item->name : reserved,
                                           back ? reserved : item->name, NO_REPLACE)
        : item->op == OP_REPLACE
            ? rename_between(dir, item->name, folder, name, EXCHANGE)
        : back ? rename_between(folder, name, dir, item->name, NO_REPLACE)
               : kept_move(change, item, item->name))
        return fail_errno(item->path, "renaming");
    return 0;
}

/* The package database last, of either way. */
int turn(struct change *change, bool back)
{
    int result = 0;

    for (unsigned late = 0; late < 2; late++)
        for (uint32_t i = change->n_order; i-- > 0;) {
            const struct item *item = change->order[i];

            if (item->record->late != late || !turn_item(change, item, back))
                continue;
            if (back)
                return -1;
            complain("undo-failed", item->path, "making it the updated one again");
            result = -1;
        }
    return result;
}

/* What was new, where it is now: did somebody write to it meanwhile? */
static int verify_new(struct look_back *back, struct item *item)
{
    struct change *change = back->change;
    char reserved[RESERVED_SIZE], kept[KEPT_SIZE];
    const char *name = item->name, *why;
    int dir = item->dir->fd;
    uint64_t inode;

    if (item->op == OP_NEW) {
        reserved_name(change, item, reserved);
        name = reserved;
    } else if (item->op == OP_REPLACE) {
        kept_name(change, item, kept);
        name = kept;
        dir = kept_at(change, item, &inode);
    }
    why = differs(change, item, dir, name, false);
    if (!why && item->record->kind == KIND_DIRECTORY &&
        for_new_names(back, item, dir, name, is_unknown))
        why = "something is new in it";
    return why ? fail("conflict", item->path, "while it was taken back: %s", why) : 0;
}

int verify_back(struct change *change, bool recovering)
{
    struct look_back back = {.change = change};

    if (step(ROLLBACK_VERIFY))
        return fail_errno("", "verifying");
    for (uint32_t i = 0; i < change->n_items; i++) {
        struct item *item = &change->items[i];
        enum where where;
        unsigned times;

        if (item->op == OP_META || top_of(item)->left)
            continue;
        if (item->op == OP_TIME) {
            if (same_look(item, &times) < 0)
                return fail_errno(item->path, "looking at the path");
            if (!(times & OLD_TIME))
                return fail("conflict", item->path, "it changed while it was taken back");
            continue;
        }
        if (item->op != OP_INSIDE && find(change, item, &where) < 0)
            return fail_errno(item->path, "looking at the path");
        if (item->op != OP_INSIDE && where != PUT_BACK)
            return fail("conflict", item->path, "it changed while it was taken back");
        /* After a kill, directories that went are not open any more. */
        if (item->op != OP_DELETE && !recovering && verify_new(&back, item) < 0)
            return -1;
    }
    return 0;
}

int remove_new(struct change *change)
{
    int result = 0;

    for (uint32_t i = 0; i < change->n_order; i++) {
        const struct item *item = change->order[i];
        char reserved[RESERVED_SIZE];

        if (item->op != OP_NEW || item->left)
            continue;
        reserved_name(change, item, reserved);
        if (step(ROLLBACK_REMOVE) || remove_tree(item->dir->fd, reserved) < 0) {
            complain("leftover", item->path, "removing the new file");
            result = -1;
        }
    }
    return result;
}
