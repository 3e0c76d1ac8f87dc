/* STATE_DIR: the lock of the one applier, and the completion marker. */
#include "journal.h"
#include "report.h"
#include "steps.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MARKER "applied"
#define MARKER_NEW "applied.new"
#define ROLLED_BACK " rolled-back"
#define ATTESTATION "attestation.json"
#define ATTESTATION_NEW "attestation.new"

static int make_state_dir(int root)
{
    int parent = tree_open(root, "/var/lib", O_RDONLY | O_DIRECTORY, 0);
    int result = parent < 0 ? -1 : mkdirat(parent, strrchr(STATE_DIR, '/') + 1, 0700);

    if (parent >= 0)
        close(parent);
    return result < 0 && errno != EEXIST ? -1 : 0;
}

int state_open(struct change *change)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd;

    change->state = tree_open(change->root, STATE_DIR, O_RDONLY | O_DIRECTORY, 0);
    if (change->state < 0 && errno == ENOENT && !make_state_dir(change->root))
        change->state = tree_open(change->root, STATE_DIR, O_RDONLY | O_DIRECTORY, 0);
    if (change->state < 0)
        return fail_errno(STATE_DIR, "opening the directory");
    fd = openat(change->state, "lock", O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return fail_errno(STATE_DIR, "opening the lock");
    if (!fcntl(fd, F_SETLK, &lock))
        return 0; /* held until the process ends */
    if (errno != EACCES && errno != EAGAIN)
        return fail_errno(STATE_DIR, "taking the lock");
    return fail("busy", STATE_DIR, "another applier runs");
}

int marker_read(const struct change *change, enum marker *marker)
{
    char found[128];
    int fd = openat(change->state, MARKER, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    ssize_t size;

    *marker = MARKER_NONE;
    if (fd < 0)
        return errno == ENOENT ? 0 : fail_errno(STATE_DIR, "opening the marker");
    size = read(fd, found, sizeof found - 1);
    close(fd);
    if (size < 0)
        return fail_errno(STATE_DIR, "reading the marker");
    /* "<id> <seconds>\n"; one that a power cut tore is none. */
    if (size <= 66 || found[size - 1] != '\n' || found[64] != ' ' || memcmp(found, change->id, 64))
        return 0;
    found[size] = 0;
    *marker = strstr(found, ROLLED_BACK) ? MARKER_ROLLED_BACK : MARKER_APPLIED;
    return 0;
}

int marker_write(const struct change *change, enum marker marker, time_t now)
{
    int fd = step(MARKER_WRITE)
                 ? -1
                 : openat(change->state, MARKER_NEW,
                          O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    int length;

    if (fd < 0)
        return fail_errno(STATE_DIR, "making the marker");
    length = dprintf(fd, "%s %lld%s\n", change->id, (long long)now,
                     marker == MARKER_ROLLED_BACK ? ROLLED_BACK : "");
    if (close(fd) < 0 || length < 0)
        return fail_errno(STATE_DIR, "writing the marker");
    /* What other file systems hold must be durable before the marker says so. */
    if (sync_file_systems(change, false) < 0)
        return -1;
    if (step(MARKER_RENAME) || renameat(change->state, MARKER_NEW, change->state, MARKER) < 0)
        return fail_errno(STATE_DIR, "setting the marker");
    return 0;
}

/* Nothing is asked of the guest afterwards when the applier attests: reflect/verify.py. */
int attestation_draft(const struct change *change, time_t now)
{
    int fd = step(ATTEST_WRITE)
                 ? -1
                 : openat(change->state, ATTESTATION_NEW,
                          O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    int length;

    if (fd < 0)
        return fail_errno(STATE_DIR, "making the attestation");
    length = dprintf(fd,
                     "%s\"applied_at_s\":%lld,\"checks\":{\"files\":\"clean\",\"marker\":\"clean\","
                     "\"package_database\":\"clean\",\"units\":\"not asked\"},"
                     "\"result\":\"verified\"}\n",
                     attestation(&change->medium), (long long)now);
    if (close(fd) < 0 || length < 0)
        return fail_errno(STATE_DIR, "writing the attestation");
    return 0;
}

int attestation_set(const struct change *change)
{
    if (step(ATTEST_RENAME))
        return -1;
    return renameat(change->state, ATTESTATION_NEW, change->state, ATTESTATION);
}
