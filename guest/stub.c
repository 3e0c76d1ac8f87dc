/* stub SERIAL BLOCKS FILE ARGUMENT...
 *
 * Takes the applier from the medium and becomes it. It is small enough to travel in the command
 * that starts it (reflect/bootstrap.py). Waits for the disk whose driver shows SERIAL, copies BLOCKS blocks of 4 KiB behind its first one into memory (where no mount is
 * noexec), removes FILE, its own, and executes the copy with ARGUMENTs. The applier checks itself
 * against the header's hash (guest/medium.c).
 *
 * No libc: system calls by number (Linux arch/x86/entry/syscalls/syscall_64.tbl; for arm64
 * include/uapi/asm-generic/unistd.h, which has no open(2) and no unlink(2)). Exit status 69: no such
 * disk within 30 s; 74: it could not be read or executed.
 */
#include <fcntl.h>
#include <linux/memfd.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>

enum { BLOCK = 4096, NO_DISK = 69, NO_APPLIER = 74, PAUSE_NS = 5000000, TRIES = 6000 };

struct entry { /* struct linux_dirent64 */
    uint64_t inode;
    int64_t offset;
    uint16_t length;
    uint8_t type;
    char name[];
};

static char buffer[16 * BLOCK] __attribute__((aligned(8)));

#if defined(__x86_64__)

__asm__(".globl _start\n_start:\n  mov %rsp, %rdi\n  and $-16, %rsp\n  call start\n");

static long call(long number, long a, long b, long c, long d, long e)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}

#elif defined(__aarch64__)

__asm__(".globl _start\n_start:\n  mov x0, sp\n  bl start\n"); /* sp is aligned, AAPCS64 6.4.5.1 */

static long call(long number, long a, long b, long c, long d, long e)
{
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;

    __asm__ volatile("svc 0"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
                     : "memory");
    return x0;
}

#endif

static long open_at(const char *path, int flags)
{
    return call(SYS_openat, AT_FDCWD, (long)path, flags, 0, 0);
}

static void leave(int status)
{
    for (;;)
        call(SYS_exit_group, status, 0, 0, 0, 0);
}

static char *append(char *to, const char *text, const char *end)
{
    while (*text && to < end)
        *to++ = *text++;
    *to = 0;
    return to;
}

static int has_serial(const char *name, const char *serial)
{
    char path[320], found[64], *at = append(path, "/sys/block/", path + 300);
    long fd, size, i;

    append(append(at, name, path + 300), "/serial", path + 319);
    fd = open_at(path, O_RDONLY);
    if (fd < 0)
        return 0;
    size = call(SYS_read, fd, (long)found, sizeof found - 1, 0, 0);
    call(SYS_close, fd, 0, 0, 0, 0);
    for (i = 0; i < size && serial[i] && found[i] == serial[i]; i++)
        ;
    return size > 0 && !serial[i] && (i == size || found[i] == '\n');
}

static long look(const char *serial)
{
    long blocks = open_at("/sys/block", O_RDONLY | O_DIRECTORY), size;
    long device = -1;

    while (device < 0 && (size = call(SYS_getdents64, blocks, (long)buffer, BLOCK, 0, 0)) > 0)
        for (long at = 0; device < 0 && at < size;) {
            const struct entry *entry = (const void *)(buffer + at);
            char path[320];

            if (entry->name[0] != '.' && has_serial(entry->name, serial)) {
                append(append(path, "/dev/", path + 300), entry->name, path + 319);
                device = open_at(path, O_RDONLY);
            }
            at += entry->length;
        }
    call(SYS_close, blocks, 0, 0, 0, 0);
    return device;
}

static long copy(long device, long blocks)
{
    long memory = call(SYS_memfd_create, (long)"applier", MFD_CLOEXEC, 0, 0, 0);
    long left = blocks * BLOCK, offset = BLOCK;

    if (memory < 0 || blocks <= 0 || blocks > 1024)
        return -1;
    while (left > 0) {
        long size = left < (long)sizeof buffer ? left : (long)sizeof buffer;

        size = call(SYS_pread64, device, (long)buffer, size, offset, 0);
        if (size <= 0 || call(SYS_write, memory, (long)buffer, size, 0, 0) != size)
            return -1;
        offset += size;
        left -= size;
    }
    /* The device stays open: its last close would drop what was read from memory (block/bdev.c). */
    return memory;
}

static long number(const char *text)
{
    long value = 0;

    while (*text >= '0' && *text <= '9' && value < 1 << 20)
        value = value * 10 + (*text++ - '0');
    return *text ? 0 : value;
}

__attribute__((used)) void start(long *stack)
{
    long argc = stack[0], device = -1, memory;
    char **argv = (char **)(stack + 1), **environment = argv + argc + 1;
    struct timespec pause = {0, PAUSE_NS};

    if (argc < 4)
        leave(2);
    call(SYS_unlinkat, AT_FDCWD, (long)argv[3], 0, 0, 0);
    for (int i = 0; i < TRIES && (device = look(argv[1])) < 0; i++)
        call(SYS_nanosleep, (long)&pause, 0, 0, 0, 0);
    if (device < 0)
        leave(NO_DISK);
    memory = copy(device, number(argv[2]));
    if (memory >= 0)
        call(SYS_execveat, memory, (long)"", (long)(argv + 3), (long)environment, AT_EMPTY_PATH);
    leave(NO_APPLIER);
}
