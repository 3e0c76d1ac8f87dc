/* Operations on names, attributes and what keeps an inode alive. */
#include "workload.h"
#include "workload_data.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/xattr.h>
#include <unistd.h>

/* linux/fs.h, linux/capability.h, linux/posix_acl_xattr.h */
#define RENAME_EXCHANGE_ 2u
#define RENAME_WHITEOUT_ 4u
#define GET_FLAGS _IOR('f', 1, long)
#define SET_FLAGS _IOW('f', 2, long)
#define CAP_REVISION_2 0x02000001u
#define ACL_VERSION 2u
#define ACL_NO_ID 0xffffffffu

#define CROWD 2000

static int make_folder(void)
{
    char path[NAME_SIZE];

    if (mkdir(fresh(path, "d"), (mode_t)(0700 | chance(0100))) != 0)
        return -1;
    add(path, DIR_NODE);
    return 0;
}

static int remove_folder(void)
{
    const char *path = pick(DIR_NODE);

    if (path == NULL || rmdir(path) != 0)
        return -1;
    forget(path);
    return 0;
}

static int remove_file(void)
{
    const char *path = pick((enum kind)(one_in(4) ? LINK_NODE + chance(2) : FILE_NODE));

    if (path == NULL || unlink(path) != 0)
        return -1;
    forget(path);
    return 0;
}

static int rename_away(void)
{
    char to[NAME_SIZE];
    const char *from = pick_any();

    if (rename(from, fresh(to, "m")) != 0)
        return -1;
    moved(from, to);
    return 0;
}

static int rename_over(void)
{
    const char *from = pick(FILE_NODE), *to = pick(FILE_NODE);

    if (from == NULL || strcmp(from, to) == 0 || rename(from, to) != 0)
        return -1;
    /* Of two links to one inode, rename(2) removes none. */
    if (kind_of(from) == KINDS)
        moved(from, to);
    return 0;
}

static int rename_exchange(void)
{
    const char *one = pick_any(), *other = pick_any();

    if (strcmp(one, other) == 0 ||
        syscall(SYS_renameat2, AT_FDCWD, one, AT_FDCWD, other, RENAME_EXCHANGE_) != 0)
        return -1;
    swapped(one, other);
    return 0;
}

static int rename_whiteout(void)
{
    char to[NAME_SIZE], from[NAME_SIZE];
    const char *path = pick(FILE_NODE);

    if (path == NULL)
        return -1;
    snprintf(from, sizeof from, "%s", path);
    fresh(to, "w");
    if (syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, RENAME_WHITEOUT_) != 0)
        return -1;
    moved(from, to);
    add(from, OTHER_NODE);
    return 0;
}

static int hard_link(void)
{
    char to[NAME_SIZE];
    const char *from = pick((enum kind)(one_in(5) ? LINK_NODE + chance(2) : FILE_NODE));

    if (from == NULL || link(from, fresh(to, "h")) != 0)
        return -1;
    add(to, kind_of(to));
    return 0;
}

static int symbolic_link(void)
{
    char path[NAME_SIZE], target[1000];
    /* At 60 bytes a target leaves the inode for a block of its own. */
    size_t size = one_in(2) ? 1 + chance(62) : 1 + chance(sizeof target - 1);

    memset(target, 'l', size);
    target[size - 1] = '\0';
    if (symlink(size > 1 ? target : ".", fresh(path, "l")) != 0)
        return -1;
    add(path, LINK_NODE);
    return 0;
}

static int special(void)
{
    static const mode_t types[] = {S_IFIFO, S_IFCHR, S_IFBLK};
    char path[NAME_SIZE];
    mode_t mode = types[chance(3)] | (mode_t)chance(01000);

    if (mknod(fresh(path, "n"), mode, makedev(chance(4000), chance(1 << 19))) != 0)
        return -1;
    add(path, OTHER_NODE);
    return 0;
}

static int bind_socket(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char path[NAME_SIZE];
    int fd, result;

    fresh(path, "s");
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address.sun_path, path);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    result = bind(fd, (const struct sockaddr *)&address, sizeof address);
    close(fd);
    if (result == 0)
        add(path, OTHER_NODE);
    return result;
}

/* A folder that grows an index, and loses most of its names again. The first is a large one. */
static int crowd(void)
{
    static unsigned most = CROWD;
    char folder[NAME_SIZE], name[NAME_SIZE + 64];
    unsigned count = most + (unsigned)chance(most), keep = (unsigned)chance(4);

    most = CROWD / 16;
    if (mkdir(fresh(folder, "crowd"), 0755) != 0)
        return -1;
    for (unsigned i = 0; i < count; i++) {
        snprintf(name, sizeof name, "%s/a-rather-long-name-%u", folder, i);
        if ((i % 64 == 0 ? symlink("x", name) : mknod(name, S_IFREG | 0644, 0)) != 0)
            return -1;
    }
    for (unsigned i = 0; i < count; i++) {
        snprintf(name, sizeof name, "%s/a-rather-long-name-%u", folder, i);
        /* all stay, half, few, none */
        if (keep == 0 || (keep == 1 && i % 2) || (keep == 2 && i % 100 == 0))
            continue;
        if (unlink(name) != 0)
            return -1;
    }
    add(folder, DIR_NODE);
    return 0;
}

static int change_mode(void)
{
    const char *path = pick_any();

    if (kind_of(path) == LINK_NODE) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return chmod(path, (mode_t)(chance(010000) | 0700));
}

static int change_owner(void)
{
    /* Above 16 bits the ids are in two places of the inode. */
    unsigned limit = one_in(3) ? 1u << 31 : 2000;

    return lchown(pick_any(), (uid_t)chance(limit), (gid_t)chance(limit));
}

static int change_times(void)
{
    /* Before 1970 and after 2038: ext4 holds 34 bits of seconds. */
    struct timespec times[2] = {{0, UTIME_OMIT}, {0, 0}};

    times[1].tv_sec = (time_t)chance(1ull << (one_in(4) ? 33 : 31)) - (one_in(5) ? 1 << 30 : 0);
    times[1].tv_nsec = (long)chance(1000000000);
    if (times[1].tv_sec < -(1ll << 31))
        times[1].tv_sec = 0;
    return utimensat(AT_FDCWD, pick_any(), times, AT_SYMLINK_NOFOLLOW);
}

static const char *attribute(char name[64])
{
    static const char *const spaces[] = {"user", "trusted", "security"};

    snprintf(name, 64, "%s.a%u", spaces[chance(3)], (unsigned)chance(6));
    return name;
}

static int set_attribute(void)
{
    char name[64], value[4096];
    size_t size = one_in(4) ? 200 + chance(3700) : chance(120);

    random_bytes(value, size);
    return lsetxattr(pick_any(), attribute(name), value, size, 0);
}

static int remove_attribute(void)
{
    char name[64];

    for (int i = 0; i < 100; i++)
        if (lremovexattr(pick_any(), attribute(name)) == 0)
            return 0;
    return -1;
}

static int set_acl(void)
{
    struct {
        uint32_t version;
        struct {
            uint16_t tag, perm;
            uint32_t id;
        } entries[6];
    } acl = {ACL_VERSION,
             {{0x01, 7, ACL_NO_ID},
              {0x02, (uint16_t)chance(8), (uint32_t)chance(1000)},
              {0x04, (uint16_t)chance(8), ACL_NO_ID},
              {0x08, (uint16_t)chance(8), (uint32_t)chance(1000)},
              {0x10, (uint16_t)chance(8), ACL_NO_ID},
              {0x20, (uint16_t)chance(8), ACL_NO_ID}}};
    bool folder = one_in(3);
    const char *path = pick(folder ? DIR_NODE : FILE_NODE);
    const char *name =
        folder && one_in(2) ? "system.posix_acl_default" : "system.posix_acl_access";

    if (path == NULL)
        return -1;
    return one_in(8) ? removexattr(path, name) : setxattr(path, name, &acl, sizeof acl, 0);
}

static int set_capability(void)
{
    uint32_t value[5] = {CAP_REVISION_2, (uint32_t)chance(1 << 20), 0, 0, 0};
    const char *path = pick(FILE_NODE);

    return path == NULL ? -1 : setxattr(path, "security.capability", value, sizeof value, 0);
}

/* chattr(1): d A j t T; of files also S, and i or a for a while. D, and S of a folder, go down to
 * all below and would flush each step. */
static int change_flags(void)
{
    static const long harmless[] = {0x40, 0x80, 0x4000, 0x8000, 0x20000};
    bool folder = one_in(4);
    const char *path = pick(folder ? DIR_NODE : FILE_NODE);
    long flags;
    int fd, result;

    if (path == NULL || (fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)) < 0)
        return -1;
    result = ioctl(fd, GET_FLAGS, &flags);
    if (result == 0) {
        if (!folder && one_in(4))
            flags ^= one_in(8) ? 0x8 : one_in(2) ? 0x10 : 0x20;
        else
            flags ^= harmless[chance(sizeof harmless / sizeof *harmless)];
        result = ioctl(fd, SET_FLAGS, &flags);
    }
    close(fd);
    return result;
}

/* Given a name, or kept open without one until the end. */
static int unnamed(void)
{
    char path[NAME_SIZE], self[64];
    const char *folder = pick(DIR_NODE);
    int fd = folder == NULL ? -1 : open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

    if (fd < 0 || append(fd, chance(20000)) != 0)
        return -1;
    if (one_in(2))
        return 0;
    snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
    if (linkat(AT_FDCWD, self, AT_FDCWD, fresh(path, "t"), AT_SYMLINK_FOLLOW) != 0)
        return -1;
    add(path, FILE_NODE);
    return close(fd);
}

static int hold_unlinked(void)
{
    const char *path = pick(FILE_NODE);
    int fd = path == NULL ? -1 : open(path, O_RDWR | O_APPEND | O_CLOEXEC);

    if (fd < 0 || unlink(path) != 0)
        return -1;
    forget(path);
    return append(fd, chance(9000));
}

static int flush(void)
{
    const char *path = pick(FILE_NODE);
    int fd, result;

    if (!may_sync || path == NULL) {
        errno = ECANCELED;
        return -1;
    }
    if (one_in(20)) {
        sync();
        return 0;
    }
    fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -1;
    result = one_in(10)  ? syncfs(fd)
             : one_in(2) ? fsync(fd)
             : one_in(2) ? fdatasync(fd)
                         : sync_file_range(fd, 0, 0, 3);
    close(fd);
    return result;
}

static int drop_caches(void)
{
    int fd = open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC);
    int result = fd < 0 || write(fd, "1\n2\n3\n" + 2 * chance(3), 2) != 2 ? -1 : 0;

    close(fd);
    return result;
}

const struct operation operations[] = {
    {"create", 60, create_file},
    {"append", 40, append_file},
    {"overwrite", 40, overwrite_file},
    {"sparse", 12, write_far},
    {"direct", 6, write_direct},
    {"truncate", 30, truncate_file},
    {"allocate", 20, allocate},
    {"zero-range", 12, zero_range},
    {"punch-hole", 15, punch_hole},
    {"collapse", 8, collapse},
    {"insert", 8, insert_range},
    {"map", 20, write_mapped},
    {"copy-range", 10, copy_range},
    {"mkdir", 25, make_folder},
    {"rmdir", 12, remove_folder},
    {"unlink", 35, remove_file},
    {"rename", 30, rename_away},
    {"rename-over", 15, rename_over},
    {"exchange", 10, rename_exchange},
    {"whiteout", 3, rename_whiteout},
    {"link", 20, hard_link},
    {"symlink", 20, symbolic_link},
    {"mknod", 6, special},
    {"socket", 4, bind_socket},
    {"crowd", 2, crowd},
    {"chmod", 20, change_mode},
    {"chown", 20, change_owner},
    {"utimens", 20, change_times},
    {"setxattr", 30, set_attribute},
    {"removexattr", 10, remove_attribute},
    {"acl", 15, set_acl},
    {"capability", 5, set_capability},
    {"flags", 12, change_flags},
    {"tmpfile", 5, unnamed},
    {"hold", 5, hold_unlinked},
    {"sync", 6, flush},
    {"drop-caches", 1, drop_caches},
};
const size_t operation_count = sizeof operations / sizeof *operations;
