#include "tree.h"

#include "steps.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_DEPTH 256 /* each level costs a descriptor */

/* uapi/linux/openat2.h and stat.h: kernel headers are not on musl-gcc's path. */
struct how {
    uint64_t flags;
    uint64_t mode;
    uint64_t resolve;
};
#define RESOLVE_NO_MAGICLINKS 0x02u
#define RESOLVE_NO_SYMLINKS 0x04u
#define RESOLVE_IN_ROOT 0x10u
#define BASIC_STATS 0x7ffu
#define ATTR_MOUNT_ROOT 0x2000u
#ifndef SYS_openat2
#define SYS_openat2 437
#endif

/* The same for kernels before 5.6: one component at a time. Paths have no "..": table.c. */
static int walk(int root, const char *path, int flags, mode_t mode)
{
    int at = fcntl(root, F_DUPFD_CLOEXEC, 0);

    while (at >= 0) {
        char name[256];
        size_t length;
        bool last;
        int next;

        path += strspn(path, "/");
        length = strcspn(path, "/");
        if (length >= sizeof name) {
            close(at);
            errno = ENAMETOOLONG;
            return -1;
        }
        memcpy(name, path, length);
        name[length] = 0;
        last = !path[length];
        next = openat(at, length ? name : ".",
                      (last ? flags : O_PATH | O_DIRECTORY) | O_NOFOLLOW | O_CLOEXEC, mode);
        close(at);
        if (last)
            return next;
        at = next;
        path += length;
    }
    return -1;
}

int tree_open(int root, const char *path, int flags, mode_t mode)
{
    struct how how = {
        .flags = (uint64_t)(flags | O_CLOEXEC | O_NOFOLLOW),
        .mode = mode,
        .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS,
    };
    long fd = -1;

    errno = ENOSYS;
    /* EAGAIN: a rename elsewhere raced with the walk, openat2(2). */
    for (int tries = 0; !no_openat2() && tries < 16; tries++) {
        fd = syscall(SYS_openat2, root, path, &how, sizeof how);
        if (fd >= 0 || errno != EAGAIN)
            break;
    }
    if (fd < 0 && errno == ENOSYS)
        return walk(root, path, flags, mode);
    return (int)fd;
}

int look(int dir, const char *name, struct status *status)
{
    int flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | (*name ? 0 : AT_EMPTY_PATH);

    return (int)syscall(SYS_statx, dir, name, flags, BASIC_STATS, status);
}

int inode_at(int dir, const char *name, uint64_t *inode)
{
    struct status status;

    *inode = 0;
    if (look(dir, name, &status) < 0)
        return errno == ENOENT ? 0 : -1;
    *inode = status.inode;
    return 0;
}

/* A time that int64 nanoseconds cannot hold compares as none that an entry can name. */
static int64_t nanoseconds(int64_t seconds, uint32_t rest)
{
    int64_t result;

    if (__builtin_mul_overflow(seconds, 1000000000, &result) ||
        __builtin_add_overflow(result, rest, &result))
        return INT64_MIN;
    return result;
}

int64_t mtime_of(const struct status *status)
{
    return nanoseconds(status->mtime.seconds, status->mtime.nanoseconds);
}

bool is_mount(const struct status *status, const struct status *dir)
{
    if (status->attributes_mask & ATTR_MOUNT_ROOT)
        return status->attributes & ATTR_MOUNT_ROOT;
    return status->dev_major != dir->dev_major || status->dev_minor != dir->dev_minor;
}

bool state_matches(const struct status *status, const struct state_record *wanted, bool loose)
{
    if (status->inode != wanted->inode || status->mode != wanted->mode)
        return false;
    return loose || (status->size == wanted->size && mtime_of(status) == wanted->mtime_ns &&
                     nanoseconds(status->ctime.seconds, status->ctime.nanoseconds) ==
                         wanted->ctime_ns);
}

int for_each_name(int dir, int (*visit)(void *context, int dir, const char *name), void *context)
{
    int copy = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *stream = copy < 0 ? NULL : fdopendir(copy);
    int result = 0;

    if (!stream) {
        if (copy >= 0)
            close(copy);
        return -1;
    }
    while (!result) {
        struct dirent *entry;

        errno = 0;
        entry = readdir(stream);
        if (!entry) {
            result = errno ? -1 : 0;
            break;
        }
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
            result = visit(context, dir, entry->d_name);
    }
    int kept = errno;
    closedir(stream);
    errno = kept;
    return result;
}

struct removal {
    struct status dir;
    int depth;
};

static int remove_visit(void *context, int dir, const char *name)
{
    const struct removal *above = context;
    struct removal here = {.depth = above->depth + 1};
    int fd, result;

    if (!unlinkat(dir, name, 0) || errno == ENOENT)
        return 0;
    if (errno != EISDIR)
        return -1;
    fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return -1;
    result = look(fd, "", &here.dir);
    if (!result && (is_mount(&here.dir, &above->dir) || here.depth > MAX_DEPTH)) {
        errno = EBUSY;
        result = -1;
    }
    if (!result)
        result = for_each_name(fd, remove_visit, &here);
    int kept = errno;
    close(fd);
    errno = kept;
    return result ? -1 : unlinkat(dir, name, AT_REMOVEDIR);
}

int remove_tree(int dir, const char *name)
{
    struct removal above = {.depth = 0};

    /* Usually a file: only a directory needs to know what it is in. */
    if (!unlinkat(dir, name, 0) || errno == ENOENT)
        return 0;
    if (errno != EISDIR || look(dir, "", &above.dir) < 0)
        return -1;
    return remove_visit(&above, dir, name);
}

int rename_within(int dir, const char *from, const char *to, unsigned flags)
{
    return rename_between(dir, from, dir, to, flags);
}

int rename_between(int from_dir, const char *from, int to_dir, const char *to, unsigned flags)
{
    return (int)syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
}
