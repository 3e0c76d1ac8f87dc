/* Is this the guest, what time is it, and who holds the package manager. */
#include "change.h"
#include "report.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

/* uapi/linux/random.h */
#define ADD_ENTROPY _IOW('R', 0x03, int[2])
#define RESEED _IO('R', 0x07)

/* Compares a one-line file with the wanted id; an empty id matches every guest. */
static int file_says(int root, const char *path, const char *wanted, const char *what)
{
    char found[64] = "";
    ssize_t n;
    int fd;

    if (!*wanted)
        return 0;
    fd = tree_open(root, path, O_RDONLY, 0);
    if (fd < 0)
        return fail("identity", path, "the guest does not tell its %s: %s", what, strerror(errno));
    n = read(fd, found, sizeof found - 1);
    close(fd);
    if (n < 0)
        return fail_errno(path, "reading the guest's identity");
    found[strcspn(found, "\n")] = 0;
    if (strcmp(found, wanted))
        return fail("identity", path, "the change set is for %s %s", what, wanted);
    return 0;
}

int guest_is_machine(const struct change *change)
{
    return file_says(change->root, "/etc/machine-id", change->medium.header.machine_id,
                     "machine id");
}

int guest_is_boot(const struct change *change)
{
    return file_says(change->root, "/proc/sys/kernel/random/boot_id",
                     change->medium.header.boot_id, "boot id");
}

/* SECONDS.NANOS, nine digits of nanoseconds. Sets the clock when it is off by over a second. */
int guest_set_time(const char *seconds)
{
    struct timespec wanted = {0}, now;
    char *end;
    long long off;

    errno = 0;
    wanted.tv_sec = strtoll(seconds, &end, 10);
    if (*end == '.' && strlen(end) == 10 && strspn(end + 1, "0123456789") == 9) {
        wanted.tv_nsec = strtol(end + 1, &end, 10);
    }
    if (errno || *end || end == seconds || wanted.tv_sec < 0)
        return fail("usage", "", "--set-time takes SECONDS.NANOSECONDS");
    clock_gettime(CLOCK_REALTIME, &now);
    off = ((long long)wanted.tv_sec - now.tv_sec) * 1000 + (wanted.tv_nsec - now.tv_nsec) / 1000000;
    if (off > 1000 || off < -1000)
        if (clock_settime(CLOCK_REALTIME, &wanted) < 0)
            return fail_errno("", "setting the clock");
    return 0;
}

/* From a pipe, since every process of the guest may read a command line. The generator takes the
 * bytes at once: two clones of one save draw different numbers from then on. */
int guest_seed(void)
{
    struct {
        int bits, size;
        uint8_t bytes[64];
    } seed = {.bits = 8 * sizeof seed.bytes, .size = sizeof seed.bytes};
    size_t size = 0;
    ssize_t n;
    int fd, result;

    while (size < sizeof seed.bytes &&
           (n = read(STDIN_FILENO, seed.bytes + size, sizeof seed.bytes - size)) > 0)
        size += (size_t)n;
    if (size < sizeof seed.bytes)
        return fail("usage", "", "--seed takes %zu bytes on standard input", sizeof seed.bytes);
    fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return fail_errno("/dev/urandom", "opening the random number generator");
    result = ioctl(fd, ADD_ENTROPY, &seed);
    if (!result)
        (void)ioctl(fd, RESEED); /* unknown before Linux 4.17, whose pool was read directly */
    close(fd);
    return result < 0 ? fail_errno("/dev/urandom", "seeding the random number generator") : 0;
}

/* dpkg's own protocol (lib/dpkg/file.c, file_lock): a write lock on the whole file by fcntl.
 * The locks live as long as the process: their descriptors stay open on purpose. */
static int take_lock(int root, const char *path)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = tree_open(root, path, O_RDWR | O_CREAT, 0640);

    if (fd < 0)
        return fail_errno(path, "opening the package manager's lock");
    if (!fcntl(fd, F_SETLK, &lock))
        return 0;
    if (errno != EACCES && errno != EAGAIN)
        return fail_errno(path, "taking the package manager's lock");
    if (fcntl(fd, F_GETLK, &lock) < 0 || lock.l_type == F_UNLCK)
        return fail("locked", path, "the package manager's lock was held a moment ago");
    return fail("locked", path, "process %ld holds the package manager's lock", (long)lock.l_pid);
}

int guest_lock(const struct change *change)
{
    const struct medium *medium = &change->medium;

    for (uint32_t i = 0; i < medium->counts->locks; i++)
        if (take_lock(change->root, text(medium, medium->locks[i].path)) < 0)
            return -1;
    return 0;
}
