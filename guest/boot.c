/* A unit of the guest's service manager that ends what a power cut has interrupted, left for as
 * long as there is something to end: docs/design/0022-power-cuts.md.
 *
 * The applier and the medium without its layer lie in STATE_DIR: once everything is staged nothing
 * of the layer is read. The unit lies where no package has files (systemd.unit(5),
 * system.control).
 *
 * All of it is written out with what is staged. Until then nothing was renamed, and what a power cut
 * has torn does not start: an empty unit is none, and the unit asks for the applier's hash before.
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
#include <sys/statvfs.h>
#include <unistd.h>

#define APPLIER "boot-applier"
#define MEDIUM "boot-medium"
#define SYSTEMD "/etc/systemd"
#define CONTROL "system.control"
#define WANTS "sysinit.target.wants"
#define UNIT "ouassister-finish.service"

static const char unit[] =
    "# Left by OUassister while it changes this machine's files, and removed by it.\n"
    "[Unit]\n"
    "Description=Finish or undo the update that OUassister had begun\n"
    "DefaultDependencies=no\n"
    "After=local-fs.target\n"
    "Wants=network-pre.target\n"
    "Before=sysinit.target network-pre.target shutdown.target\n"
    "Conflicts=shutdown.target\n"
    "ConditionPathExists=" STATE_DIR "/" APPLIER "\n"
    "[Service]\n"
    "Type=oneshot\n"
    "ExecCondition=/bin/sh -c 'echo \"%s  " STATE_DIR "/" APPLIER "\" | sha256sum -c --status'\n"
    "ExecStart=" STATE_DIR "/" APPLIER " finish " STATE_DIR "/" MEDIUM " --medium-sha256 %s\n"
    "ExecStartPost=-/bin/systemctl daemon-reload\n"
    "SuccessExitStatus=40\n";

/* Of the medium, what memory has: everything behind the header and before the layer. */
static uint64_t area_size(const struct medium *medium)
{
    return medium->header.table_offset + medium->header.table_size - BLOCK;
}

uint64_t boot_room(const struct change *change)
{
    return change->medium.header.applier_size + area_size(&change->medium) + 8 * BLOCK;
}

static int put(int fd, const void *bytes, uint64_t size)
{
    const uint8_t *at = bytes;

    while (size) {
        ssize_t n = write(fd, at, size);

        if (n < 0 && errno != EINTR)
            return -1;
        if (n > 0) {
            at += n;
            size -= (uint64_t)n;
        }
    }
    return 0;
}

static int make(int dir, const char *name, mode_t mode)
{
    if (step(BOOT_LEAVE))
        return -1;
    return openat(dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
}

static int end(int fd, int result)
{
    if (fd >= 0 && close(fd) < 0)
        return -1;
    return fd < 0 ? -1 : result;
}

static int leave_programs(const struct change *change)
{
    const struct medium *medium = &change->medium;
    int fd = make(change->state, APPLIER, 0700);

    if (end(fd, fd < 0 ? -1 : put(fd, medium->table, medium->header.applier_size)) < 0)
        return -1;
    fd = make(change->state, MEDIUM, 0600);
    return end(fd, fd < 0 || put(fd, &medium->header, sizeof medium->header) < 0 ||
                           put(fd, medium->table, area_size(medium)) < 0 ||
                           ftruncate(fd, (off_t)medium->header.medium_size) < 0
                       ? -1
                       : 0);
}

static int open_made(int dir, const char *name)
{
    if (step(BOOT_LEAVE) || (mkdirat(dir, name, 0755) < 0 && errno != EEXIST))
        return -1;
    return openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

/* What the staging writes out is not always all that there is. */
static int write_out(const struct change *change, int control, bool all)
{
    struct status here;

    if (step(BOOT_SYNC) || (all && syncfs(change->state) < 0) || look(control, "", &here) < 0)
        return -1;
    for (uint32_t i = 0; i < change->n_file_systems; i++) {
        const struct file_system *one = &change->file_systems[i];

        if ((!all || i == change->state_fs) && one->major == here.dev_major &&
            one->minor == here.dev_minor)
            return 0;
    }
    return syncfs(control);
}

static void to_hex(const uint8_t digest[32], char hex[65])
{
    for (int i = 0; i < 32; i++)
        sprintf(hex + 2 * i, "%02x", digest[i]);
}

static int leave_unit(const struct change *change, int systemd, bool all)
{
    int control = open_made(systemd, CONTROL), wants = -1, fd = -1, result = -1;
    char text[sizeof unit + 128], applier[65], header[65];
    uint8_t digest[32];

    sha256_of((const uint8_t *)&change->medium.header, sizeof change->medium.header, digest);
    to_hex(change->medium.header.applier_sha256, applier);
    to_hex(digest, header);
    snprintf(text, sizeof text, unit, applier, header);
    if (control >= 0)
        wants = open_made(control, WANTS);
    if (wants >= 0)
        fd = make(control, UNIT, 0644);
    if (fd >= 0)
        result = end(fd, put(fd, text, strlen(text)));
    if (!result && (step(BOOT_LEAVE) || symlinkat("../" UNIT, wants, UNIT) < 0))
        result = -1;
    if (!result)
        result = write_out(change, control, all);
    if (wants >= 0)
        close(wants);
    if (control >= 0)
        close(control);
    return result;
}

static int take(int dir, const char *name, int flags)
{
    if (step(BOOT_REMOVE))
        return -1;
    return unlinkat(dir, name, flags) < 0 && errno != ENOENT ? -1 : 0;
}

/* A folder that has something of somebody else stays. */
static int take_folder(int dir, const char *name)
{
    return take(dir, name, AT_REMOVEDIR) < 0 && errno != ENOTEMPTY ? -1 : 0;
}

static int open_in(int dir, const char *name)
{
    return openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

static int remove_unit(int systemd)
{
    int control = open_in(systemd, CONTROL), wants = -1, result = 0;

    if (control < 0)
        return errno == ENOENT ? 0 : -1;
    wants = open_in(control, WANTS);
    if (wants >= 0) {
        result = take(wants, UNIT, 0);
        close(wants);
        result |= take_folder(control, WANTS);
    }
    result |= take(control, UNIT, 0);
    close(control);
    return result | take_folder(systemd, CONTROL);
}

enum boot { LEAVE, LEAVE_WRITTEN_OUT, REMOVE };

/* The time of /etc/systemd stays: a change set may promise it. */
static int in_systemd(const struct change *change, enum boot todo)
{
    int fd = tree_open(change->root, SYSTEMD, O_RDONLY | O_DIRECTORY, 0), result;
    struct place place = {.fd = fd};
    struct status status;

    if (fd < 0)
        return errno == ENOENT && todo == REMOVE ? 0 : -1;
    result = look(fd, "", &status);
    if (!result)
        result = todo == REMOVE ? remove_unit(fd) : leave_unit(change, fd, todo == LEAVE_WRITTEN_OUT);
    if (!result)
        result = set_mtime(&place, mtime_of(&status));
    close(fd);
    return result;
}

/* As sd_booted(3) tells. */
static bool has_systemd(const struct change *change)
{
    int fd = tree_open(change->root, "/run/systemd/system", O_RDONLY | O_DIRECTORY, 0);

    if (fd >= 0)
        close(fd);
    return fd >= 0;
}

/* The applier is the first that comes and the last that goes. */
int boot_remove(const struct change *change)
{
    uint64_t inode;

    if (!inode_at(change->state, APPLIER, &inode) && !inode)
        return 0;
    if (!in_systemd(change, REMOVE) && !take(change->state, MEDIUM, 0) &&
        !take(change->state, APPLIER, 0))
        return 0;
    complain("leftover", STATE_DIR, "removing what is left for a boot");
    return -1;
}

void boot_leave(const struct change *change, bool written_out)
{
    struct statvfs room;

    if (!has_systemd(change) || boot_remove(change) < 0)
        return;
    if (!fstatvfs(change->state, &room) && room.f_flag & ST_NOEXEC) {
        report_event("no-boot-unit", STATE_DIR, "it is mounted noexec");
        return;
    }
    if (!leave_programs(change) && !in_systemd(change, written_out ? LEAVE_WRITTEN_OUT : LEAVE))
        return;
    complain("no-boot-unit", STATE_DIR, "leaving a unit for the next boot");
    boot_remove(change);
}
