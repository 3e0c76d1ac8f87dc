#include "change.h"

#include "report.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/xattr.h>

static uint64_t hash(const char *path, size_t length)
{
    uint64_t value = 0xcbf29ce484222325; /* FNV-1a */

    for (size_t i = 0; i < length; i++)
        value = (value ^ (uint8_t)path[i]) * 0x100000001b3;
    return value ^ value >> 32;
}

static struct item **slot(const struct index *index, const char *path, size_t length)
{
    uint64_t i = hash(path, length) & index->mask;

    while (index->slots[i] && (index->slots[i]->record->path.length != length ||
                               memcmp(index->slots[i]->path, path, length) != 0))
        i = (i + 1) & index->mask;
    return &index->slots[i];
}

/* The entry that makes this directory or replaces one above it, NULL when the guest has all. */
static int find_maker(const struct index *index, struct dir *dir)
{
    size_t length = strlen(dir->path);

    dir->maker = NULL;
    for (size_t end = length; end > 1;) {
        struct item *item = *slot(index, dir->path, end);

        if (item && end == length && item->record->kind == KIND_DIRECTORY) {
            item->own = dir;
            if (!changes_directory(item->record))
                dir->maker = item;
        } else if (item && !changes_directory(item->record) && !dir->maker) {
            return fail("medium", dir->path, "an entry above this directory takes it away");
        }
        while (end > 1 && dir->path[--end] != '/') {
        }
    }
    return 0;
}

/* New things first, deletions last: what runs meanwhile finds its files for as long as it can. */
static int commit_class(const struct item *item)
{
    static const int classes[] = {
        [OP_NEW] = 0, [OP_META] = 1, [OP_REPLACE] = 1, [OP_TIME] = 1, [OP_DELETE] = 2,
    };

    return classes[item->op] + 3 * item->record->late;
}

static int plan_item(struct change *change, uint32_t i, const struct index *index)
{
    struct item *item = &change->items[i];
    const struct entry_record *record = item->record;

    item->meta_fd = -1;
    item->inode = record->same ? record->expected.inode : 0;
    if (*slot(index, item->path, record->path.length))
        return fail("medium", item->path, "the path is in the change set twice");
    *slot(index, item->path, record->path.length) = item;
    item->name = strrchr(item->path, '/') + 1;
    item->dir = &change->dirs[record->dir];
    if (record->kind == KIND_DELETE)
        item->op = OP_DELETE;
    else if (changes_directory(record))
        item->op = OP_META;
    else if (record->same)
        item->op = OP_TIME;
    else
        item->op = record->has_expected ? OP_REPLACE : OP_NEW;
    return 0;
}

static int plan_order(struct change *change)
{
    for (uint32_t i = 0; i < change->n_items; i++) {
        struct item *item = &change->items[i];
        struct item *maker = item->dir->maker;

        if (!maker)
            continue;
        if (item->record->has_expected || maker > item)
            return fail("medium", item->path, "the entry contradicts the one of its directory");
        item->op = OP_INSIDE;
    }
    for (int class = 0; class < 6; class++)
        for (uint32_t i = 0; i < change->n_items; i++) {
            struct item *item = &change->items[i];

            if (item->op != OP_INSIDE && commit_class(item) == class)
                change->order[change->n_order++] = item;
        }
    return 0;
}

int change_plan(struct change *change)
{
    const struct medium *medium = &change->medium;
    uint32_t n_dirs = medium->counts->dirs;
    struct index index = {.mask = 16};
    int result = 0;

    for (int i = 0; i < 32; i++)
        sprintf(change->id + 2 * i, "%02x", medium->header.changeset_id[i]);
    change->n_items = medium->counts->entries;
    while (index.mask < 2 * (uint64_t)change->n_items)
        index.mask *= 2;
    index.slots = calloc(index.mask--, sizeof *index.slots);
    change->dirs = calloc(n_dirs + 1, sizeof *change->dirs);
    change->items = calloc(change->n_items + 1, sizeof *change->items);
    change->order = calloc(change->n_items + 1, sizeof(struct item *));
    if (!index.slots || !change->dirs || !change->items || !change->order)
        result = fail_errno("", "reserving memory for the change set");
    for (uint32_t i = 0; !result && i < change->n_items; i++) {
        change->items[i].record = &medium->entries[i];
        change->items[i].path = text(medium, medium->entries[i].path);
        result = plan_item(change, i, &index);
    }
    for (uint32_t i = 0; !result && i < n_dirs; i++) {
        change->dirs[i].fd = -1;
        change->dirs[i].path = text(medium, medium->dirs[i].path);
        result = find_maker(&index, &change->dirs[i]);
    }
    if (!result)
        result = plan_order(change);
    change->index = index;
    return result;
}

struct item *change_find(const struct change *change, const char *path)
{
    return *slot(&change->index, path, strlen(path));
}

void reserved_name(const struct change *change, const struct item *item, char name[RESERVED_SIZE])
{
    snprintf(name, RESERVED_SIZE, RESERVED "%.12s-%u", change->id,
             (unsigned)(item - change->items));
}

static int find_file_system(struct change *change, int fd, const char *path,
                            const struct status *status, uint32_t *found)
{
    struct file_system *fs = change->file_systems;
    uint32_t i;

    for (i = 0; i < change->n_file_systems; i++)
        if (fs[i].major == status->dev_major && fs[i].minor == status->dev_minor)
            break;
    if (i == MAX_FILE_SYSTEMS)
        return fail("system", path, "the change set touches more than %d file systems",
                    MAX_FILE_SYSTEMS);
    if (i == change->n_file_systems) {
        fs[i] = (struct file_system){
            .fd = fd, .major = status->dev_major, .minor = status->dev_minor, .path = path};
        change->n_file_systems++;
    }
    *found = i;
    return 0;
}

/* Every directory stays open, so that what was checked is what is changed. */
static int reserve_descriptors(uint64_t wanted)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return fail_errno("", "asking for the limit of open files");
    if (limit.rlim_cur >= wanted)
        return 0;
    limit.rlim_cur = wanted;
    if (limit.rlim_max < wanted)
        limit.rlim_max = wanted;
    if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
        return fail_errno("", "raising the limit of open files");
    return 0;
}

static int open_dir(struct change *change, struct dir *dir, bool telling)
{
    dir->fd = tree_open(change->root, dir->path, O_RDONLY | O_DIRECTORY, 0);
    if (dir->fd < 0 && (errno == ENOENT || errno == ENOTDIR || errno == ELOOP)) {
        if (!telling)
            return fail("conflict", dir->path, "the guest has no such directory");
        conflict(dir->path, "the guest has no such directory", false);
        dir->missing = true;
        return 0;
    }
    if (dir->fd < 0 || look(dir->fd, "", &dir->status) < 0)
        return fail_errno(dir->path, "opening the directory");
    dir->default_acl = fgetxattr(dir->fd, "system.posix_acl_default", NULL, 0) >= 0;
    return find_file_system(change, dir->fd, dir->path, &dir->status, &dir->fs);
}

int change_open_dirs(struct change *change, bool telling)
{
    uint32_t n_dirs = change->medium.counts->dirs;
    struct status status;
    uint64_t meta = 0;

    for (uint32_t i = 0; i < change->n_items; i++)
        meta += change->items[i].op == OP_META && !change->items[i].own;
    if (reserve_descriptors(n_dirs + meta + 320) < 0) /* 256 levels of a deletion, and some */
        return -1;
    if (look(change->state, "", &status) < 0)
        return fail_errno(STATE_DIR, "looking at the directory");
    if (find_file_system(change, change->state, STATE_DIR, &status, &change->state_fs) < 0)
        return -1;
    for (uint32_t i = 0; i < n_dirs; i++)
        if (!change->dirs[i].maker && open_dir(change, &change->dirs[i], telling) < 0)
            return -1;
    for (uint32_t i = 0; i < change->n_items; i++) {
        struct item *item = &change->items[i];

        if (item->op != OP_META || item->dir->missing)
            continue;
        item->meta_fd = item->own ? item->own->fd
                                  : openat(item->dir->fd, item->name,
                                           O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (item->meta_fd < 0 && !telling) /* else check() tells what is there */
            return fail("conflict", item->path, "the guest has no such directory");
    }
    return 0;
}

int dir_fd(struct change *change, struct dir *dir)
{
    if (dir->fd < 0)
        dir->fd = tree_open(change->root, dir->path, O_RDONLY | O_DIRECTORY, 0);
    return dir->fd;
}
