/* The disk is found by the serial that its driver shows in sysfs (drivers/block/virtio_blk.c,
 * serial_show): udev's links come later, and some guests have no udev. */
#include "disk.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char prefix[] = "serial:";
static const long first_pause_ns = 2000000, last_pause_ns = 20000000, limit_s = 30;

static int has_serial(int blocks, const char *name, const char *serial)
{
    char path[300], found[64];
    ssize_t size;
    int fd;

    snprintf(path, sizeof path, "%s/serial", name);
    fd = openat(blocks, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    size = read(fd, found, sizeof found - 1);
    close(fd);
    if (size <= 0)
        return 0;
    found[size] = 0;
    found[strcspn(found, "\n")] = 0;
    return strcmp(found, serial) == 0;
}

/* One look at all disks. The node in /dev can come a moment after the entry in sysfs. */
static int look(const char *serial)
{
    DIR *blocks = opendir("/sys/block");
    const struct dirent *entry;
    char path[300];
    int fd = -1;

    if (!blocks)
        return -1;
    while (fd < 0 && (entry = readdir(blocks))) {
        if (entry->d_name[0] == '.' || !has_serial(dirfd(blocks), entry->d_name, serial))
            continue;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        fd = open(path, O_RDONLY | O_CLOEXEC);
    }
    closedir(blocks);
    return fd;
}

int disk_open(const char *device)
{
    struct timespec pause = {0, first_pause_ns}, start, now;
    int fd;

    if (strncmp(device, prefix, sizeof prefix - 1) != 0)
        return open(device, O_RDONLY | O_CLOEXEC);
    clock_gettime(CLOCK_MONOTONIC, &start);
    while ((fd = look(device + sizeof prefix - 1)) < 0) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec - start.tv_sec >= limit_s) {
            errno = ETIME;
            return -1;
        }
        nanosleep(&pause, NULL);
        if (pause.tv_nsec < last_pause_ns)
            pause.tv_nsec += first_pause_ns;
    }
    return fd;
}
