/* manifest [-s SECONDS] ROOT [PREFIX...]: one line for each path of the file system that ROOT is the top of.
 *
 * The same program runs in the guest, as the oracle, and on the mounted view. Columns, by tabs:
 * path, mode, uid, gid, size, mtime, ctime, links, inode, device, flags, link target, attributes,
 * digest. Bytes that are not plain are written as \xNN.
 *
 * The digest is the SHA-256 of all blocks of 4 KiB that are not zero, each after its number, and
 * of the size: how holes lie is not content. With prefixes, files elsewhere get a sum of 64 bits
 * in its place: an emulated guest hashes 15 MB/s. With -s, files whose inode has not changed since
 * that time get "-", and are not read. Access times are neither changed nor told.
 */
#include "../../guest/sha256.h"

#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#define BLOCK 4096
#define CHUNK (64 * BLOCK)
/* Below this everything is read; above, holes are skipped by the kernel's word. */
#define DENSE (8 << 20)
#define MAX_PATH_SIZE 65536
#define MAX_XATTR 65536
#define GET_FLAGS _IOR('f', 1, long)

static char path[MAX_PATH_SIZE];
static char **prefixes;
static dev_t device;
static long long since;

/* The one or the other. */
struct digest {
    struct sha256 hash;
    uint64_t sum;
    int quick;
};

static void put(const char *text, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        unsigned char c = (unsigned char)text[i];

        if (c > ' ' && c < 127 && c != '\\')
            putchar(c);
        else
            printf("\\x%02x", c);
    }
}

static void put_hex(const unsigned char *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++)
        printf("%02x", bytes[i]);
}

static int by_name(const void *one, const void *other)
{
    return strcmp(*(char *const *)one, *(char *const *)other);
}

/* Through the parent's descriptor: paths may be longer than PATH_MAX, and links are not followed. */
static void put_xattrs(const char *place)
{
    static char list[MAX_XATTR];
    static unsigned char value[MAX_XATTR];
    char *names[1024];
    size_t count = 0;
    ssize_t size = llistxattr(place, list, sizeof list);

    if (size < 0)
        err(1, "llistxattr %s", path);
    for (char *at = list; at < list + size; at += strlen(at) + 1) {
        if (count == sizeof names / sizeof *names)
            errx(1, "%s has too many attributes", path);
        names[count++] = at;
    }
    qsort(names, count, sizeof *names, by_name);
    for (size_t i = 0; i < count; i++) {
        ssize_t length = lgetxattr(place, names[i], value, sizeof value);

        if (length < 0)
            err(1, "lgetxattr %s %s", path, names[i]);
        if (i > 0)
            putchar(',');
        put(names[i], strlen(names[i]));
        putchar('=');
        put_hex(value, (size_t)length);
    }
}

static int is_quick(void)
{
    for (char **prefix = prefixes; *prefix != NULL; prefix++)
        if (strncmp(path, *prefix, strlen(*prefix)) == 0)
            return 0;
    return *prefixes != NULL;
}

static void add_block(struct digest *digest, uint64_t number, const unsigned char *data, size_t size)
{
    uint64_t word = 0, sum = (digest->sum ^ number) * 0x9e3779b97f4a7c15;

    if (!digest->quick) {
        sha256_update(&digest->hash, &number, sizeof number);
        sha256_update(&digest->hash, data, size);
        return;
    }
    for (size_t i = 0; i < size; i += 8) {
        memcpy(&word, data + i, size - i < 8 ? size - i : 8);
        sum = (sum ^ word) * 0xbf58476d1ce4e5b9;
        sum ^= sum >> 29;
    }
    digest->sum = sum;
}

static void add_range(struct digest *digest, int fd, off_t start, off_t end)
{
    static unsigned char buffer[CHUNK];
    static const unsigned char zeros[BLOCK];

    for (off_t at = start; at < end; at += CHUNK) {
        ssize_t size = pread(fd, buffer, end - at < CHUNK ? (size_t)(end - at) : CHUNK, at);

        if (size < 0)
            err(1, "read %s", path);
        for (ssize_t i = 0; i < size; i += BLOCK) {
            size_t part = size - i < BLOCK ? (size_t)(size - i) : BLOCK;
            uint64_t number = (uint64_t)(at + i) / BLOCK;

            if (memcmp(buffer + i, zeros, part) == 0)
                continue;
            add_block(digest, number, buffer + i, part);
        }
    }
}

static void put_digest(int fd, off_t size)
{
    struct digest digest = {.quick = is_quick()};
    uint8_t bytes[32];
    uint64_t length = (uint64_t)size;

    sha256_init(&digest.hash);
    if (size <= DENSE) {
        add_range(&digest, fd, 0, size);
    } else {
        for (off_t end = 0;;) {
            off_t start = lseek(fd, end, SEEK_DATA);

            /* ENOENT: behind what lives in its inode (ext4_iomap_begin_report). */
            if (start < 0 && (errno == ENXIO || errno == ENOENT))
                break;
            if (start >= 0 && (end = lseek(fd, start, SEEK_HOLE)) < 0 && errno == ENOENT)
                end = size;
            if (start < 0 || end < 0)
                err(1, "lseek %s", path);
            start -= start % BLOCK;
            end += (BLOCK - end % BLOCK) % BLOCK;
            add_range(&digest, fd, start, end);
        }
    }
    if (digest.quick) {
        printf("%016" PRIx64, digest.sum);
        return;
    }
    sha256_update(&digest.hash, &length, sizeof length);
    sha256_final(&digest.hash, bytes);
    put_hex(bytes, sizeof bytes);
}

static void put_time(struct timespec time)
{
    printf("%" PRId64 ".%09ld\t", (int64_t)time.tv_sec, time.tv_nsec);
}

static void put_node(int parent, const char *name, const struct stat *status)
{
    char place[64 + 256], target[MAX_PATH_SIZE];
    int fd = -1;
    long flags = 0;

    put(path, strlen(path));
    printf("\t%o\t%u\t%u\t%" PRId64 "\t", status->st_mode, status->st_uid, status->st_gid,
           (int64_t)status->st_size);
    put_time(status->st_mtim);
    put_time(status->st_ctim);
    printf("%ju\t%ju\t%u:%u\t", (uintmax_t)status->st_nlink, (uintmax_t)status->st_ino,
           major(status->st_rdev), minor(status->st_rdev));
    if (S_ISREG(status->st_mode) || S_ISDIR(status->st_mode)) {
        fd = openat(parent, name, O_RDONLY | O_NOFOLLOW | O_NOATIME | O_NONBLOCK | O_CLOEXEC);
        if (fd < 0)
            err(1, "open %s", path);
        if (ioctl(fd, GET_FLAGS, &flags) != 0 && errno != ENOTTY && errno != ENOSYS)
            err(1, "flags of %s", path);
    }
    printf("%lx\t", flags & 0xffffffff);
    if (S_ISLNK(status->st_mode)) {
        ssize_t size = readlinkat(parent, name, target, sizeof target);

        if (size < 0)
            err(1, "readlink %s", path);
        put(target, (size_t)size);
    }
    putchar('\t');
    snprintf(place, sizeof place, "/proc/self/fd/%d/%s", parent, name);
    put_xattrs(place);
    putchar('\t');
    if (S_ISREG(status->st_mode) && status->st_ctim.tv_sec < since)
        putchar('-');
    else if (S_ISREG(status->st_mode))
        put_digest(fd, status->st_size);
    putchar('\n');
    if (fd >= 0)
        close(fd);
}

static void walk(int parent, const char *name, size_t length)
{
    struct stat status;
    struct dirent *entry;
    DIR *folder;
    int fd;

    if (fstatat(parent, name, &status, AT_SYMLINK_NOFOLLOW) != 0)
        err(1, "stat %s", path);
    if (status.st_dev != device)
        return;
    put_node(parent, name, &status);
    if (!S_ISDIR(status.st_mode))
        return;
    fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_NOATIME | O_CLOEXEC);
    if (fd < 0 || (folder = fdopendir(fd)) == NULL)
        err(1, "open %s", path);
    while (errno = 0, (entry = readdir(folder)) != NULL) {
        size_t size = strlen(entry->d_name);

        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (length + size + 2 > sizeof path)
            errx(1, "%s is too deep", path);
        path[length] = '/';
        memcpy(path + length + 1, entry->d_name, size + 1);
        walk(fd, entry->d_name, length + 1 + size);
        path[length] = '\0';
    }
    if (errno != 0)
        err(1, "readdir %s", path);
    closedir(folder);
}

int main(int argc, char **argv)
{
    struct stat status;
    int root;

    if (argc > 3 && strcmp(argv[1], "-s") == 0) {
        since = strtoll(argv[2], NULL, 10);
        argv += 2;
        argc -= 2;
    }
    if (argc < 2)
        errx(2, "usage: manifest [-s SECONDS] ROOT [PREFIX...]");
    prefixes = argv + 2;
    root = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (root < 0 || fstat(root, &status) != 0)
        err(1, "%s", argv[1]);
    device = status.st_dev;
    strcpy(path, ".");
    walk(root, ".", 1);
    return fflush(stdout) == 0 && !ferror(stdout) ? 0 : 1;
}
