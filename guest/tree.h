/* The guest's file tree below the root descriptor; no symbolic link is ever followed. */
#ifndef TREE_H
#define TREE_H

#include "medium.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* struct statx of uapi/linux/stat.h up to what we read; musl before 1.2.5 has none. */
struct status {
    uint32_t mask;
    uint32_t blksize;
    uint64_t attributes;
    uint32_t nlink;
    uint32_t uid;
    uint32_t gid;
    uint16_t mode;
    uint16_t pad;
    uint64_t inode;
    uint64_t size;
    uint64_t blocks;
    uint64_t attributes_mask;
    struct {
        int64_t seconds;
        uint32_t nanoseconds;
        int32_t pad;
    } atime, btime, ctime, mtime;
    uint32_t rdev_major;
    uint32_t rdev_minor;
    uint32_t dev_major;
    uint32_t dev_minor;
    uint64_t rest[14];
};

/* Opens an absolute path beneath root. */
int tree_open(int root, const char *path, int flags, mode_t mode);

/* statx without following; name "" looks at the descriptor itself. Returns -1 with errno. */
int look(int dir, const char *name, struct status *status);

/* The inode number at a name, 0 when nothing is there; -1 as an error with errno. */
int inode_at(int dir, const char *name, uint64_t *inode);

int64_t mtime_of(const struct status *status);

/* Something is mounted there (or it lies on another device than the directory's). */
bool is_mount(const struct status *status, const struct status *dir);

/* Compares type, permissions and inode, and unless loose also size and times. */
bool state_matches(const struct status *status, const struct state_record *wanted, bool loose);

/* Removes a name with all below it; absent is fine. Stops at mounts. Returns -1 with errno. */
int remove_tree(int dir, const char *name);

/* Calls visit for each name in the directory, "." and ".." left out, until it returns non-zero.
 * Returns that, or -1 with errno. The descriptor is not consumed. */
int for_each_name(int dir, int (*visit)(void *context, int dir, const char *name), void *context);

/* renameat2(2); musl before 1.2.5 has no wrapper. */
#define NO_REPLACE (1u << 0) /* RENAME_NOREPLACE, uapi/linux/fs.h */
#define EXCHANGE (1u << 1)   /* RENAME_EXCHANGE */
int rename_within(int dir, const char *from, const char *to, unsigned flags);
int rename_between(int from_dir, const char *from, int to_dir, const char *to, unsigned flags);

#endif
