#include "workload_data.h"
#include "workload.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define BLOCK 4096
#define LARGE (512 << 10)
#define FAR (1ull << 31)
/* linux/falloc.h */
#define KEEP_SIZE 0x01
#define PUNCH_HOLE 0x02
#define COLLAPSE 0x08
#define ZERO 0x10
#define INSERT 0x20

static unsigned char buffer[LARGE + 8];

static size_t spend(size_t size)
{
    size = size < budget ? size : (size_t)budget;
    budget -= size;
    return size;
}

/* Small files are most, as on a real system. */
static size_t some_size(void)
{
    switch (chance(8)) {
    case 0:
        return chance(LARGE);
    case 1:
        return BLOCK * chance(17);
    case 2:
        return chance(120);
    default:
        return chance(3 * BLOCK);
    }
}

static int write_all(int fd, size_t size, off_t at)
{
    size = random_bytes(buffer, spend(size));
    return pwrite(fd, buffer, size, at) == (ssize_t)size ? 0 : -1;
}

int append(int fd, size_t size)
{
    struct stat status;

    return fstat(fd, &status) != 0 ? -1 : write_all(fd, size, status.st_size);
}

static int done(int fd, int result)
{
    int cause = errno;

    close(fd);
    errno = cause;
    return result;
}

/* A known file and its size. */
static int some_file(off_t *size, int flags)
{
    const char *path = pick(FILE_NODE);
    struct stat status;
    int fd = path == NULL ? -1 : open(path, flags | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);

    if (fd < 0)
        return -1;
    if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode))
        return done(fd, -1);
    *size = status.st_size;
    return fd;
}

int create_file(void)
{
    char path[NAME_SIZE];
    int fd = open(fresh(path, "f"), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666 & (int)chance(01000));

    if (fd < 0)
        return -1;
    add(path, FILE_NODE);
    return done(fd, one_in(8) ? 0 : write_all(fd, some_size(), 0));
}

int append_file(void)
{
    off_t size;
    int fd = some_file(&size, O_WRONLY | O_APPEND);

    return fd < 0 ? -1 : done(fd, write_all(fd, some_size(), size));
}

int overwrite_file(void)
{
    off_t size;
    int fd = some_file(&size, one_in(6) ? O_WRONLY | O_TRUNC : O_WRONLY);

    return fd < 0 ? -1 : done(fd, write_all(fd, some_size(), (off_t)chance((uint64_t)size + 1)));
}

int write_far(void)
{
    off_t size;
    int fd = some_file(&size, O_WRONLY);

    return fd < 0 ? -1 : done(fd, write_all(fd, some_size(), (off_t)chance(FAR)));
}

int write_direct(void)
{
    static void *aligned;
    off_t size;
    int fd;
    size_t length = BLOCK * (1 + chance(16));

    if (aligned == NULL && posix_memalign(&aligned, BLOCK, 16 * BLOCK) != 0)
        return -1;
    if ((fd = some_file(&size, O_WRONLY | O_DIRECT)) < 0)
        return -1;
    random_bytes(aligned, length);
    spend(length);
    size = (off_t)chance((uint64_t)size / BLOCK + 2) * BLOCK;
    return done(fd, pwrite(fd, aligned, length, size) == (ssize_t)length ? 0 : -1);
}

int truncate_file(void)
{
    off_t size;
    int fd = some_file(&size, O_WRONLY);
    uint64_t grown = one_in(5) ? FAR : (uint64_t)size + 3 * BLOCK;

    if (fd < 0)
        return -1;
    return done(fd, ftruncate(fd, (off_t)chance(one_in(3) ? grown : (uint64_t)size + 1)));
}

static int change_range(int mode, bool aligned)
{
    off_t size, start, length;
    int fd = some_file(&size, O_RDWR);

    if (fd < 0)
        return -1;
    start = (off_t)chance((uint64_t)size + BLOCK);
    length = (off_t)(1 + chance(24 * BLOCK));
    if (aligned) {
        start -= start % BLOCK;
        length += BLOCK - length % BLOCK;
    }
    return done(fd, fallocate(fd, mode, start, length));
}

int allocate(void)
{
    return change_range(one_in(2) ? KEEP_SIZE : 0, false);
}

int zero_range(void)
{
    return change_range(ZERO | (one_in(2) ? KEEP_SIZE : 0), false);
}

int punch_hole(void)
{
    return change_range(PUNCH_HOLE | KEEP_SIZE, one_in(2));
}

int collapse(void)
{
    return change_range(COLLAPSE, true);
}

int insert_range(void)
{
    return change_range(INSERT, true);
}

/* Through memory: flushed, given back, or left mapped until the end. */
int write_mapped(void)
{
    off_t size;
    size_t length, end;
    unsigned char *memory;
    int fd = some_file(&size, O_RDWR), result = 0;

    if (fd < 0)
        return -1;
    length = (size_t)size < LARGE ? (size_t)size : LARGE;
    if (length == 0) {
        errno = ENODATA;
        return done(fd, -1);
    }
    memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        return done(fd, -1);
    for (unsigned i = 0; i < 6; i++) {
        size_t at = chance(length);

        end = at + 1 + chance(3000);
        if (end > length)
            end = length;
        random_bytes(memory + at, end - at);
    }
    if (may_sync && one_in(6))
        result = msync(memory, length, one_in(2) ? MS_SYNC : MS_ASYNC);
    if (one_in(2))
        munmap(memory, length);
    return done(fd, result);
}

int copy_range(void)
{
    off_t size, other;
    int from = some_file(&size, O_RDONLY), to, result;

    if (from < 0)
        return -1;
    if ((to = some_file(&other, O_RDWR)) < 0)
        return done(from, -1);
    size = (off_t)chance((uint64_t)size + 1);
    result = copy_file_range(from, &size, to, NULL, spend(some_size()), 0) < 0 ? -1 : 0;
    close(to);
    return done(from, result);
}
