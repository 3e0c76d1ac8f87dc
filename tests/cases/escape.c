/* escape TARGETS: tries to leave the sandbox in every way that a script of root's could think of.
 *
 * TARGETS is a file of lines: "file PATH" (a file of the host), "tcp ADDRESS PORT", "unix PATH",
 * "abstract NAME", "pid NUMBER". Each attempt is one line: its name, and what came of it: an errno's
 * name, or "ok" with what was got. "REACHED" marks what must never happen. Whether the host saw
 * something, its canaries tell; this program is not asked.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/if_packet.h>
#include <linux/io_uring.h>
#include <linux/keyctl.h>
#include <linux/kexec.h>
#include <linux/perf_event.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/timex.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define CANARY "oua-canary"
#define PLACE "/var/tmp/oua-escape"

static void told(const char *name, const char *detail, long result)
{
    if (result < 0)
        printf("%s %s: %s\n", name, detail, strerrorname_np(errno));
    else
        printf("%s %s: ok %ld\n", name, detail, result);
    fflush(stdout);
}

static void reached(const char *name, const char *detail)
{
    printf("REACHED %s %s\n", name, detail);
    fflush(stdout);
}

/* A file of the host, by a way that might lead to it. */
static void touch_file(const char *name, const char *path)
{
    char buffer[64] = "";
    int fd = open(path, O_RDWR | O_CLOEXEC);

    if (fd < 0)
        fd = open(path, O_RDONLY | O_CLOEXEC);
    told(name, path, fd);
    if (fd < 0)
        return;
    if (read(fd, buffer, sizeof buffer - 1) > 0 && strstr(buffer, CANARY) != NULL)
        reached(name, path);
    if (pwrite(fd, "escaped", 7, 0) == 7)
        told("write", path, 7);
    close(fd);
}

static void host_files(const char *path)
{
    static const char *const doors[] = {
        "", "/proc/1/root", "/proc/1/cwd", "/proc/self/root/../../../../../../../..",
        "/proc/self/cwd/../../../../../../../../..", "/../../../../../../../../../../..",
        "/proc/1/root/proc/1/root", "/proc/1/task/1/root", "/dev/fd/../../..", "/mnt/../..",
        "/run/ouassister/..", "/run/ouassister/bin/../../../..",
    };
    char way[8192];

    for (size_t i = 0; i < sizeof doors / sizeof *doors; i++) {
        snprintf(way, sizeof way, "%s%s", doors[i], path);
        touch_file("file", way);
    }
    for (int fd = 0; fd < 256; fd++) { /* descriptors that somebody forgot to close */
        snprintf(way, sizeof way, "/proc/self/fd/%d/..%s", fd, path);
        int found = open(way, O_RDONLY | O_CLOEXEC);

        if (found >= 0 || errno != ENOENT) {
            snprintf(way, sizeof way, "/proc/self/fd/%d/../../../../../../../..%s", fd, path);
            touch_file("descriptor", way);
        }
    }
}

/* chroot(2) does not change the working directory: the classic way out of a chroot. */
static void out_of_chroot(const char *path)
{
    char way[8192] = "";
    pid_t child = fork();

    if (child == 0) {
        mkdir(PLACE "/cell", 0755);
        told("chroot", "cell", chroot(PLACE "/cell"));
        for (int i = 0; i < 64; i++)
            if (chdir("..") != 0)
                break;
        told("chroot", ".", chroot("."));
        snprintf(way, sizeof way, "%s", path);
        touch_file("chroot", way);
        _exit(0);
    }
    waitpid(child, NULL, 0);
}

static void processes(pid_t host)
{
    static const pid_t some[] = {1, 2, 0};
    char byte, way[64];
    struct iovec here = {&byte, 1}, there = {(void *)0x400000, 1};

    for (int i = 0; i < 3; i++) {
        pid_t pid = some[i] ? some[i] : host;
        char name[16];

        snprintf(name, sizeof name, "%d", pid);
        told("ptrace", name, ptrace(PTRACE_SEIZE, pid, NULL, NULL));
        told("process_vm_readv", name, process_vm_readv(pid, &here, 1, &there, 1, 0));
        told("process_vm_writev", name, process_vm_writev(pid, &here, 1, &there, 1, 0));
        told("kcmp", name, syscall(SYS_kcmp, getpid(), pid, 0, 0, 0));
        snprintf(way, sizeof way, "/proc/%d/mem", pid);
        touch_file("memory", way);
        snprintf(way, sizeof way, "/proc/%d/environ", pid);
        touch_file("environ", way);
    }
    told("kill", "of the host", kill(host, SIGKILL));
    told("pidfd_open", "of the host", syscall(SYS_pidfd_open, host, 0));
}

static void devices(void)
{
    static const struct {
        const char *name;
        mode_t type;
        int major, minor;
    } made[] = {
        {"mem", S_IFCHR, 1, 1}, {"port", S_IFCHR, 1, 4}, {"kmsg", S_IFCHR, 1, 11},
        {"sda", S_IFBLK, 8, 0}, {"vda", S_IFBLK, 254, 0}, {"loop0", S_IFBLK, 7, 0},
        {"nvme", S_IFBLK, 259, 0}, {"fuse", S_IFCHR, 10, 229}, {"kvm", S_IFCHR, 10, 232},
        {"tun", S_IFCHR, 10, 200}, {"loop-control", S_IFCHR, 10, 237}, {"null", S_IFCHR, 1, 3},
    };
    static const char *const standing[] = {
        "/dev/mem", "/dev/kmem", "/dev/port", "/dev/kmsg", "/dev/sda", "/dev/vda", "/dev/loop0",
        "/dev/kvm", "/dev/fuse", "/dev/net/tun", "/dev/tty0", "/dev/console", "/dev/cpu/0/msr",
    };
    char way[128], buffer[512];

    for (size_t i = 0; i < sizeof made / sizeof *made; i++) {
        snprintf(way, sizeof way, PLACE "/%s", made[i].name);
        told("mknod", made[i].name, mknod(way, made[i].type | 0600, makedev(made[i].major, made[i].minor)));
        int fd = open(way, O_RDWR | O_NONBLOCK | O_CLOEXEC);

        if (fd >= 0 && read(fd, buffer, sizeof buffer) > 0)
            reached("device", way);
        if (fd >= 0)
            close(fd);
        unlink(way);
    }
    for (size_t i = 0; i < sizeof standing / sizeof *standing; i++) {
        int fd = open(standing[i], O_RDWR | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);

        told("device", standing[i], fd);
        if (fd >= 0 && read(fd, buffer, sizeof buffer) > 0)
            reached("device", standing[i]);
        if (fd >= 0)
            close(fd);
    }
}

static void mounts(void)
{
    static const char *const kinds[] = {
        "sysfs", "proc", "cgroup", "cgroup2", "devtmpfs", "debugfs", "tracefs", "securityfs", "bpf",
        "configfs", "binfmt_misc", "efivarfs", "ext4", "xfs", "fuse", "9p", "nfs", "overlay",
    };
    static const char *const doors[] = {
        "/proc/1/root", "/proc/1/cwd", "/proc/self/exe", "/", "/dev", "/run/ouassister/bin",
    };
    static const char *const writes[] = {
        "proc/sys/kernel/core_pattern", "proc/sys/kernel/modprobe", "proc/sysrq-trigger",
        "release_agent", "cgroup.procs", "kernel/uevent_helper", "power/state", "proc/sys/vm/drop_caches",
    };
    char way[256];

    mkdir(PLACE "/mount", 0755);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        const char *source = kinds[i][0] == 'e' || kinds[i][0] == 'x' ? "/dev/sda" : "none";

        int done = mount(source, PLACE "/mount", kinds[i], 0, NULL);
        told("mount", kinds[i], done);
        if (done != 0)
            continue;
        for (size_t k = 0; k < sizeof writes / sizeof *writes; k++) {
            snprintf(way, sizeof way, PLACE "/mount/%s", writes[k]);
            int fd = open(way, O_WRONLY | O_CLOEXEC);

            if (fd >= 0) {
                told("write", way, write(fd, "|/escaped", 9));
                close(fd);
            }
        }
        umount2(PLACE "/mount", MNT_DETACH);
    }
    for (size_t i = 0; i < sizeof doors / sizeof *doors; i++) {
        told("bind", doors[i], mount(doors[i], PLACE "/mount", NULL, MS_BIND | MS_REC, NULL));
        umount2(PLACE "/mount", MNT_DETACH);
    }
    told("remount", "/", mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL));
    told("shared", "/", mount(NULL, "/", NULL, MS_SHARED | MS_REC, NULL));
    told("umount", "/run/ouassister/bin", umount2("/run/ouassister/bin", MNT_DETACH));
    told("umount", "/proc", umount2("/proc", MNT_DETACH));
    told("umount", "/", umount2("/", MNT_DETACH));
    for (size_t k = 0; k < sizeof writes / sizeof *writes; k++) {
        snprintf(way, sizeof way, "/%s", writes[k]);
        int fd = open(way, O_WRONLY | O_CLOEXEC);

        told("open", way, fd);
        if (fd >= 0) {
            told("write", way, write(fd, "|/escaped", 9));
            close(fd);
        }
    }
}

static void namespaces(void)
{
    static const char *const kinds[] = {"mnt", "net", "pid", "user", "uts", "ipc", "cgroup", "time"};
    char way[64], stack[65536];
    (void)stack;

    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        snprintf(way, sizeof way, "/proc/1/ns/%s", kinds[i]);
        int fd = open(way, O_RDONLY | O_CLOEXEC);

        told("namespace", way, fd);
        told("setns", kinds[i], setns(fd < 0 ? 0 : fd, 0));
        if (fd >= 0)
            close(fd);
    }
    told("unshare", "user", unshare(CLONE_NEWUSER));
    told("pivot_root", ".", syscall(SYS_pivot_root, ".", "."));
    told("open_by_handle_at", "2", syscall(SYS_open_by_handle_at, AT_FDCWD, &(struct {
                                               unsigned size;
                                               int type;
                                               unsigned char data[8];
                                           }){8, 1, {2}}, O_RDONLY));
}

static void kernel(void)
{
    union bpf_attr attributes = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};
    struct io_uring_params ring = {0};
    struct perf_event_attr event = {.type = PERF_TYPE_SOFTWARE, .size = sizeof event};
    struct timex time = {.modes = ADJ_TICK, .tick = 10001};
    struct timeval now = {1, 0};

    told("bpf", "map", syscall(SYS_bpf, BPF_MAP_CREATE, &attributes, sizeof attributes));
    told("keyctl", "session", syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_USER_KEYRING, 1));
    told("add_key", "user", syscall(SYS_add_key, "user", "oua", "x", 1, KEY_SPEC_USER_KEYRING));
    told("request_key", "user", syscall(SYS_request_key, "user", "oua", NULL, 0));
    told("io_uring_setup", "8", syscall(SYS_io_uring_setup, 8, &ring));
    told("perf_event_open", "self", syscall(SYS_perf_event_open, &event, 0, -1, -1, 0));
    told("userfaultfd", "0", syscall(SYS_userfaultfd, 0));
    told("kexec_load", "nothing", syscall(SYS_kexec_load, 0, 0, NULL, KEXEC_ARCH_DEFAULT));
    told("init_module", "nothing", syscall(SYS_init_module, "x", 1, ""));
    told("delete_module", "none", syscall(SYS_delete_module, "oua-none", O_NONBLOCK));
    told("iopl", "3", iopl(3));
    told("ioperm", "0x80", ioperm(0x80, 1, 1));
    told("settimeofday", "1970", settimeofday(&now, NULL));
    told("adjtimex", "tick", adjtimex(&time));
    told("sethostname", "escaped", sethostname("escaped", 7));
    told("swapon", "file", syscall(SYS_swapon, PLACE, 0));
    told("acct", "file", acct(PLACE));
    told("syslog", "clear", syscall(SYS_syslog, 5, NULL, 0));
    told("quotactl", "on", syscall(SYS_quotactl, 0x80000200, "/dev/sda", 0, PLACE));
    told("reboot", "cad", reboot(RB_DISABLE_CAD));
    told("vhangup", "", vhangup());
    told("unknown", "999", syscall(999));
}

static void network(const char *address, int port)
{
    struct sockaddr_in there = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct sockaddr_ll link = {.sll_family = AF_PACKET, .sll_ifindex = 2};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    inet_pton(AF_INET, address, &there.sin_addr);
    told("connect", address, connect(fd, (struct sockaddr *)&there, sizeof there));
    close(fd);
    fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    told("sendto", address, sendto(fd, CANARY, 10, 0, (struct sockaddr *)&there, sizeof there));
    close(fd);
    fd = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_ICMP);
    told("raw", address, fd < 0 ? -1 : sendto(fd, "\010\0\367\377\0\0\0\0", 8, 0, (struct sockaddr *)&there, sizeof there));
    if (fd >= 0)
        close(fd);
    fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(ETH_P_ALL));
    told("packet", "2", fd < 0 ? -1 : sendto(fd, CANARY, 10, 0, (struct sockaddr *)&link, sizeof link));
    if (fd >= 0)
        close(fd);
    static const int families[] = {AF_VSOCK, AF_ALG, 44, AF_NETLINK, AF_BLUETOOTH, AF_CAN, AF_KEY};
    for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
        char name[8];

        snprintf(name, sizeof name, "%d", families[i]);
        fd = socket(families[i], SOCK_RAW | SOCK_CLOEXEC, 0);
        told("socket", name, fd);
        if (fd >= 0)
            close(fd);
    }
}

static void unix_socket(const char *name, int abstract)
{
    struct sockaddr_un there = {.sun_family = AF_UNIX};
    size_t size = strlen(name);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (size > sizeof there.sun_path - 1)
        size = sizeof there.sun_path - 1;
    memcpy(there.sun_path + abstract, name, size);
    told("unix", name, connect(fd, (struct sockaddr *)&there,
                               (socklen_t)(offsetof(struct sockaddr_un, sun_path) + size + (size_t)abstract)));
    close(fd);
}

int main(int argc, char **argv)
{
    char line[4096], path[4096], address[64];
    FILE *targets = fopen(argc > 1 ? argv[1] : "", "r");
    int port;
    pid_t pid;

    if (targets == NULL)
        return 2;
    mkdir(PLACE, 0755);
    while (fgets(line, sizeof line, targets) != NULL) {
        if (sscanf(line, "file %4095s", path) == 1) {
            host_files(path);
            out_of_chroot(path);
        } else if (sscanf(line, "tcp %63s %d", address, &port) == 2) {
            network(address, port);
        } else if (sscanf(line, "unix %4095s", path) == 1) {
            unix_socket(path, 0);
        } else if (sscanf(line, "abstract %4095s", path) == 1) {
            unix_socket(path, 1);
        } else if (sscanf(line, "pid %d", &pid) == 1) {
            processes(pid);
        }
    }
    fclose(targets);
    devices();
    namespaces();
    kernel();
    mounts(); /* last: it takes /proc away where it can */
    puts("escape: all was tried");
    return 0;
}
