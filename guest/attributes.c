/* Owner, mode, extended attributes and times of what was staged, and of directories that stay. */
#include "change.h"
#include "report.h"
#include "steps.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/xattr.h>
#include <unistd.h>

#define ACL_ACCESS "system.posix_acl_access"
#define ACL_DEFAULT "system.posix_acl_default"

/* There is no lsetxattr beside a directory descriptor before Linux 6.13 (setxattrat). */
static void proc_path(const struct place *place, char path[300])
{
    snprintf(path, 300, "/proc/self/fd/%d/%s", place->dir, place->name);
}

static int set_xattr(const struct place *place, const char *name, const void *value, size_t size)
{
    char path[300];

    if (place->fd >= 0)
        return fsetxattr(place->fd, name, value, size, 0);
    proc_path(place, path);
    return lsetxattr(path, name, value, size, 0);
}

static int remove_xattr(const struct place *place, const char *name)
{
    char path[300];
    int result;

    if (place->fd >= 0) {
        result = fremovexattr(place->fd, name);
    } else {
        proc_path(place, path);
        result = lremovexattr(path, name);
    }
    return result < 0 && errno != ENODATA && errno != EOPNOTSUPP ? -1 : 0;
}

static int set_owner(const struct place *place, uint32_t uid, uint32_t gid)
{
    if (place->fd >= 0)
        return fchown(place->fd, uid, gid);
    return fchownat(place->dir, place->name, uid, gid, AT_SYMLINK_NOFOLLOW);
}

static int set_mode(const struct place *place, uint32_t mode)
{
    if (place->fd >= 0)
        return fchmod(place->fd, mode);
    /* Never a symbolic link: fifos and devices, at a name that we just made. */
    return fchmodat(place->dir, place->name, mode, 0);
}

int set_mtime(const struct place *place, int64_t mtime_ns)
{
    int64_t seconds = mtime_ns / 1000000000, rest = mtime_ns % 1000000000;
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {0}};

    if (rest < 0) {
        seconds--;
        rest += 1000000000;
    }
    times[1].tv_sec = seconds;
    times[1].tv_nsec = (long)rest;
    if (place->fd >= 0)
        return futimens(place->fd, times);
    return utimensat(place->dir, place->name, times, AT_SYMLINK_NOFOLLOW);
}

/* Mode last: chown clears setuid and setgid, of root's files too (fs/open.c, chown_common). */
static int set_owner_and_mode(const struct item *item, const struct place *place,
                              const struct status *now)
{
    const struct entry_record *record = item->record;

    if ((now->uid != record->uid || now->gid != record->gid) &&
        set_owner(place, record->uid, record->gid) < 0)
        return fail_errno(item->path, "setting the owner");
    /* Made without those bits, so that a mode which wants them differs here. */
    if ((now->mode & 07777u) != record->mode && record->kind != KIND_SYMLINK &&
        set_mode(place, record->mode) < 0)
        return fail_errno(item->path, "setting the mode");
    return 0;
}

static int set_xattrs(const struct change *change, const struct item *item,
                      const struct place *place)
{
    const struct medium *medium = &change->medium;

    for (uint32_t i = 0; i < item->record->xattrs; i++) {
        const struct xattr_record *xattr = &medium->xattrs[item->record->first_xattr + i];

        if (set_xattr(place, text(medium, xattr->name), text(medium, xattr->value),
                      xattr->value.length) < 0)
            return fail_errno(item->path, "setting an extended attribute");
    }
    return 0;
}

int set_attributes(const struct change *change, const struct item *item, const struct place *place,
                   const struct status *now, bool inherits_acl)
{
    bool has_acl = inherits_acl && item->record->kind != KIND_SYMLINK;

    if (step(STAGE_ATTRIBUTES))
        return fail_errno(item->path, "setting attributes");
    /* With an inherited ACL, chmod would set its mask and not the group's bits. */
    if (has_acl && remove_xattr(place, ACL_ACCESS) < 0)
        return fail_errno(item->path, "removing an inherited ACL");
    if (has_acl && item->record->kind == KIND_DIRECTORY && remove_xattr(place, ACL_DEFAULT) < 0)
        return fail_errno(item->path, "removing an inherited ACL");
    /* security.capability last of all: chown drops it as well. */
    if (set_owner_and_mode(item, place, now) < 0 || set_xattrs(change, item, place) < 0)
        return -1;
    if (set_mtime(place, item->record->mtime_ns) < 0)
        return fail_errno(item->path, "setting the time");
    return 0;
}

int meta_apply(const struct change *change, const struct item *item)
{
    struct place place = {.fd = item->meta_fd};
    struct status now;

    if (step(COMMIT_DIRECTORY) || look(item->meta_fd, "", &now) < 0)
        return fail_errno(item->path, "changing the directory");
    if (set_owner_and_mode(item, &place, &now) < 0)
        return -1;
    return set_xattrs(change, item, &place);
}

/* Puts back what the journal kept. Returns -1 with errno. */
int meta_restore(const struct change *change, const struct item *item)
{
    const struct medium *medium = &change->medium;
    struct place place = {.fd = item->meta_fd};
    const uint8_t *at = item->old_xattrs;

    if (step(UNDO_DIRECTORY) || fchown(item->meta_fd, item->old.uid, item->old.gid) < 0 ||
        fchmod(item->meta_fd, item->old.mode) < 0)
        return -1;
    for (uint32_t i = 0; i < item->record->xattrs; i++) {
        const char *name = text(medium, medium->xattrs[item->record->first_xattr + i].name);
        uint32_t length;

        memcpy(&length, at, sizeof length);
        at += sizeof length;
        if (length == NONE) {
            if (remove_xattr(&place, name) < 0)
                return -1;
        } else {
            if (set_xattr(&place, name, at, length) < 0)
                return -1;
            at += length;
        }
    }
    return 0;
}
