/* What an update replaced or deleted stays in a folder of each file system, under the number of
 * its entry, until the next one: renamed there, so that it costs no copy.
 *
 * On STATE_DIR's own file system the folder is in there. Where nothing else can be reached by
 * rename(2), it is at the top of the mount, and its path is in a file of STATE_DIR before it is
 * made, so that whatever comes next finds it.
 */
#include "change.h"
#include "report.h"
#include "steps.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FOLDER "old-"
#define FOLDER_SIZE sizeof(FOLDER "0123456789ab")
#define ELSEWHERE "kept-"
#define UNDO "undo-"
#define AT_TOP_SIZE sizeof(RESERVED "0123456789ab-undo")
#define PATH_SIZE 4096
#define MAX_LIST (MAX_FILE_SYSTEMS * PATH_SIZE)

void kept_name(const struct change *change, const struct item *item, char name[KEPT_SIZE])
{
    snprintf(name, KEPT_SIZE, "%u", (unsigned)(item - change->items));
}

static int add_folder(struct change *change, int fd, uint32_t fs)
{
    if (fd < 0)
        return -1;
    if (change->n_kept == MAX_FILE_SYSTEMS) {
        close(fd);
        errno = ENOSPC;
        return -1;
    }
    change->kept[change->n_kept++] = (struct kept){.fd = fd, .fs = fs};
    return 0;
}

static int open_folder(int dir, const char *name)
{
    return openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

static int make_folder(int dir, const char *name)
{
    if (step(KEEP_FOLDER) || (mkdirat(dir, name, 0700) < 0 && errno != EEXIST))
        return -1;
    return open_folder(dir, name);
}

static int add_state_folder(struct change *change, bool make)
{
    char name[FOLDER_SIZE];
    int fd;

    snprintf(name, sizeof name, FOLDER "%.12s", change->id);
    fd = make ? make_folder(change->state, name) : open_folder(change->state, name);
    if (add_folder(change, fd, change->state_fs) < 0)
        return -1;
    change->kept_in_state = true;
    return 0;
}

/* The path of the topmost directory that is on the same mount; its descriptor is the result. */
static int mount_top(const struct change *change, const struct dir *dir, char path[PATH_SIZE])
{
    int fd = fcntl(dir->fd, F_DUPFD_CLOEXEC, 0);
    struct status here = dir->status, above;

    snprintf(path, PATH_SIZE, "%s", dir->path);
    while (fd >= 0 && path[1]) {
        char *slash = strrchr(path, '/');
        char kept = slash[slash == path];
        int up;

        slash[slash == path] = 0;
        up = tree_open(change->root, path, O_RDONLY | O_DIRECTORY, 0);
        if (up < 0 || look(up, "", &above) < 0) {
            close(fd);
            return -1;
        }
        if (is_mount(&here, &above) || here.dev_major != above.dev_major ||
            here.dev_minor != above.dev_minor) {
            slash[slash == path] = kept;
            close(up);
            break;
        }
        close(fd);
        fd = up;
        here = above;
    }
    return fd;
}

static int list_path(const struct change *change, const char *path)
{
    char name[FOLDER_SIZE + 1];
    size_t size = strlen(path) + 1;
    int fd, result;

    snprintf(name, sizeof name, ELSEWHERE "%.12s", change->id);
    fd = openat(change->state, name, O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return -1;
    result = write(fd, path, size) != (ssize_t)size || fsync(fd) < 0 || fsync(change->state) < 0;
    close(fd);
    return result ? -1 : 0;
}

static int add_top_folder(struct change *change, const struct dir *dir)
{
    char path[PATH_SIZE + AT_TOP_SIZE], name[AT_TOP_SIZE];
    int top = mount_top(change, dir, path), result = -1;

    if (top < 0)
        return -1;
    snprintf(name, sizeof name, RESERVED "%.12s-undo", change->id);
    snprintf(path + strlen(path), AT_TOP_SIZE + 1, "%s%s", path[1] ? "/" : "", name);
    if (strlen(path) >= PATH_SIZE)
        errno = ENAMETOOLONG;
    else if (!list_path(change, path))
        result = add_folder(change, make_folder(top, name), dir->fs);
    close(top);
    return result;
}

/* Renames to each folder of the file system; two mounts of one cannot exchange names. */
int kept_move(const struct change *change, const struct item *item, const char *from)
{
    char name[KEPT_SIZE];

    kept_name(change, item, name);
    for (uint32_t i = 0; i < change->n_kept; i++) {
        if (change->kept[i].fs != item->dir->fs)
            continue;
        if (!rename_between(item->dir->fd, from, change->kept[i].fd, name, NO_REPLACE))
            return 0;
        if (errno != EXDEV)
            return -1;
    }
    errno = EXDEV; /* or there is none yet */
    return -1;
}

static int keep_item(struct change *change, const struct item *item)
{
    char reserved[RESERVED_SIZE];
    uint64_t inode;
    int result;

    reserved_name(change, item, reserved);
    if (step(KEEP_RENAME))
        return -1;
    result = kept_move(change, item, reserved);
    if (result < 0 && errno == EXDEV && item->dir->fs == change->state_fs &&
        !change->kept_in_state && !add_state_folder(change, true))
        result = kept_move(change, item, reserved);
    if (result < 0 && errno == EXDEV && !add_top_folder(change, item->dir))
        result = kept_move(change, item, reserved);
    if (result < 0 && errno == ENOENT) { /* an earlier run did it */
        result = kept_at(change, item, &inode) < 0 || inode != item->record->expected.inode;
        errno = ENOENT;
    }
    return result ? -1 : 0;
}

int keep(struct change *change)
{
    /* What an earlier run, which was killed, has made; there may be none. */
    if (kept_open(change) < 0) {
        complain("no-undo", STATE_DIR, "opening the old files");
        return -1;
    }
    for (uint32_t i = 0; i < change->n_order; i++) {
        const struct item *item = change->order[i];

        if (item->op != OP_REPLACE && item->op != OP_DELETE)
            continue;
        if (keep_item(change, item) < 0) {
            complain("no-undo", item->path, "keeping the old file");
            return -1;
        }
    }
    return 0;
}

/* Calls visit for each path that a list has; what a power cut tore is left out. */
static int for_each_path(int state, const char *list, int (*visit)(void *context, char *path),
                         void *context)
{
    int fd = openat(state, list, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    char *bytes = fd < 0 ? NULL : malloc(MAX_LIST);
    ssize_t size = bytes ? read(fd, bytes, MAX_LIST) : -1;
    int result = 0;

    if (fd < 0)
        return errno == ENOENT ? 0 : -1;
    close(fd);
    for (ssize_t at = 0; !result && at < size;) {
        char *path = bytes + at;
        const char *end = memchr(path, 0, (size_t)(size - at));

        if (!end)
            break;
        at += end - path + 1;
        if (path[0] == '/')
            result = visit(context, path);
    }
    free(bytes);
    return size < 0 ? -1 : result;
}

static int open_listed(void *context, char *path)
{
    struct change *change = context;
    struct status status;
    uint32_t fs = 0;
    int fd = tree_open(change->root, path, O_RDONLY | O_DIRECTORY, 0);

    if (fd < 0)
        return errno == ENOENT ? 0 : -1; /* named, and then not made */
    if (look(fd, "", &status) < 0) {
        close(fd);
        return -1;
    }
    while (fs < change->n_file_systems && (change->file_systems[fs].major != status.dev_major ||
                                           change->file_systems[fs].minor != status.dev_minor))
        fs++;
    return add_folder(change, fd, fs);
}

int kept_open(struct change *change)
{
    char list[FOLDER_SIZE + 1];

    for (uint32_t i = 0; i < change->n_kept; i++)
        close(change->kept[i].fd);
    change->n_kept = 0;
    change->kept_in_state = false;
    if (add_state_folder(change, false) < 0 && errno != ENOENT)
        return -1;
    snprintf(list, sizeof list, ELSEWHERE "%.12s", change->id);
    return for_each_path(change->state, list, open_listed, change);
}

int kept_at(const struct change *change, const struct item *item, uint64_t *inode)
{
    char name[KEPT_SIZE];

    kept_name(change, item, name);
    *inode = 0;
    for (uint32_t i = 0; i < change->n_kept; i++) {
        if (change->kept[i].fs != item->dir->fs ||
            inode_at(change->kept[i].fd, name, inode) < 0 || !*inode)
            continue;
        return change->kept[i].fd;
    }
    return -1;
}

static int remove_listed(void *context, char *path)
{
    const struct change *change = context;
    char *slash = strrchr(path, '/');
    const char *name = slash + 1;
    int parent, result;

    if (strncmp(name, RESERVED, sizeof RESERVED - 1) || strchr(name, '/'))
        return 0;
    *slash = 0;
    parent = tree_open(change->root, *path ? path : "/", O_RDONLY | O_DIRECTORY, 0);
    if (parent < 0) /* nothing is mounted there any more */
        return 0;
    result = remove_tree(parent, name);
    close(parent);
    return result;
}

struct pruning {
    const struct change *change;
    const char *prefix;
    int result;
};

static int prune_visit(void *context, int state, const char *name)
{
    struct pruning *pruning = context;
    const struct change *change = pruning->change;
    int result = 0;

    if (strncmp(name, pruning->prefix, strlen(pruning->prefix)))
        return 0;
    if (step(PRUNE_REMOVE))
        result = -1;
    else if (!strcmp(pruning->prefix, ELSEWHERE))
        result = for_each_path(state, name, remove_listed, (void *)(uintptr_t)change);
    if (result || remove_tree(state, name) < 0) {
        complain("leftover", STATE_DIR, "removing old files");
        pruning->result = -1;
    }
    return 0;
}

int prune(struct change *change)
{
    /* The record first: without it nothing can be taken back. The list after what it names. */
    static const char *const prefixes[] = {UNDO, ELSEWHERE, FOLDER};
    struct pruning pruning = {.change = change};

    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++) {
        pruning.prefix = prefixes[i];
        if (for_each_name(change->state, prune_visit, &pruning) < 0) {
            complain("leftover", STATE_DIR, "listing old files");
            return -1;
        }
    }
    return pruning.result;
}
