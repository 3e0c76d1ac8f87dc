"""What is decided for each system call; `table` makes rows of it.

Each group is: the answer, the note, the names. An answer may have an error (``denied EPERM``)
and conditions (``recorded if pid 0 or ...``), of which one must hold; otherwise the call goes to
the host's kernel:

    pid N       argument N is the pid of a guest's process
    group N     the same, or a process group of the guest, or -1
    is N V      argument N is V
    flag N V    argument N has the bit V
    type N V    argument N is a file mode of type V

Why a call stands where it does is told in docs/design/0012-system-calls.md.
"""

from __future__ import annotations

from typing import Final

_FILES = "the union layer and the shadow's own mounts"
_OWN = "processes of the shadow"
_NEW_MOUNT = "its callers fall back to mount(2), which is looked at"
_HARDWARE = "would reach the host's kernel or its hardware"
_GONE = "no kernel has it any more, or nobody calls it"
_PEEK = "would look into a process of the guest, or out of the shadow"

GROUPS: Final[tuple[tuple[str, str, str], ...]] = (
    # --- answered from the guest's kernel, or kept for it -----------------------------------
    ("emulated", "the guest's struct new_utsname", "uname"),
    ("emulated", "memory, swap, load, processes and uptime of the guest at suspend", "sysinfo"),
    ("emulated", "as many processors as the guest has", "sched_getaffinity"),
    ("emulated", "/proc is procfs; else sizes and kinds of the host's file systems below the tree",
     "statfs fstatfs statfs64 fstatfs64"),
    ("emulated if pid 1", "nice value of a guest's process", "getpriority"),
    ("emulated if pid 1", "I/O priority of a guest's process: that of its nice value",
     "ioprio_get"),
    ("emulated if pid 0", "policy and priority of a guest's process",
     "sched_getscheduler sched_getparam sched_getattr"),
    ("emulated if pid 0", "session and group of a guest's process", "getpgid getsid"),
    ("emulated if pid 0", "a guest's process: limits as at suspend; setting them is recorded",
     "prlimit64"),
    ("emulated if pid 0", "a guest's process: descriptor of an inert stand-in", "pidfd_open"),
    ("recorded", "a stand-in of a guest's process: recorded; others get the signal",
     "pidfd_send_signal"),
    ("recorded if group 0", "a guest's process: recorded, 0; signal 0 asks whether it exists",
     "kill"),
    ("recorded if pid 0", "a guest's process: recorded, 0; signal 0 asks whether it exists",
     "tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo"),
    ("recorded if pid 1", "a guest's process keeps its priority until the guest runs",
     "setpriority ioprio_set"),
    ("recorded if pid 0", "a guest's process keeps its scheduling until the guest runs",
     "sched_setscheduler sched_setparam sched_setattr sched_setaffinity"),
    ("recorded", "returns 0; uname tells the new name for the rest of the run",
     "sethostname setdomainname"),
    ("recorded", "returns 0; the clock is the host's",
     "settimeofday stime clock_settime clock_settime64"),
    ("recorded", "returns 0; asking alone goes to the host's kernel",
     "adjtimex clock_adjtime clock_adjtime64"),
    ("recorded", "returns 0, and the program goes on", "reboot"),
    ("recorded", "returns 0; the name or path of the module is kept",
     "init_module finit_module delete_module"),
    ("recorded", "returns 0", "swapon swapoff acct"),
    ("recorded", "changes: 0; questions: ESRCH, no quota", "quotactl quotactl_fd"),
    ("recorded", "console level and clearing: 0; reading the log: EPERM", "syslog"),
    ("recorded", "bind, move, remount, tmpfs, proc, devpts, mqueue and overlay are mounted in the"
     " shadow; other file systems of the kernel: 0; a device: EPERM", "mount"),
    ("recorded", "done in the shadow; a file system of the guest: EBUSY", "umount umount2"),
    ("emulated if type 1 0o020000 or type 1 0o060000",
     "a device node: an empty file in its place, marked for the change set; stat(2) shows a file",
     "mknod"),
    ("emulated if type 2 0o020000 or type 2 0o060000",
     "a device node: an empty file in its place, marked for the change set; stat(2) shows a file",
     "mknodat"),
    ("recorded", "trusted.* and security.* but security.capability: EPERM, and the name is kept",
     "setxattr lsetxattr fsetxattr"),
    ("elided", "the union layer is thrown away or extracted, which syncs by itself",
     "sync fsync fdatasync msync sync_file_range syncfs"),
    # --- kept away --------------------------------------------------------------------------
    ("denied ENOSYS", "bypasses system call filters",
     "io_uring_setup io_uring_enter io_uring_register"),
    ("denied ENOSYS", _HARDWARE, "bpf perf_event_open userfaultfd uprobe uretprobe"),
    ("denied ENOSYS", "keys have no namespace of their own", "add_key request_key keyctl"),
    ("denied EPERM", _HARDWARE, "kexec_load kexec_file_load iopl ioperm vm86 vm86old"),
    ("denied EPERM", "names files beside the tree", "open_by_handle_at"),
    ("denied EPERM", "leads out of the shadow's namespaces", "setns pivot_root"),
    ("denied EPERM if flag 0 0x10000000", "a user namespace (CLONE_NEWUSER)", "clone unshare"),
    ("denied EPERM if pid 1", _PEEK, "ptrace"),
    ("denied EPERM if pid 0", _PEEK,
     "process_vm_readv process_vm_writev move_pages migrate_pages get_robust_list"),
    ("denied EPERM if pid 0 or pid 1", _PEEK, "kcmp"),
    ("denied EAFNOSUPPORT if is 0 40 or is 0 38 or is 0 44 or is 2 4",
     "AF_VSOCK, AF_ALG, AF_XDP: in no network namespace; NETLINK_SOCK_DIAG: EPROTONOSUPPORT, its"
     " callers fall back to /proc/net", "socket"),
    ("emulated", "in the shadow's network namespace; a daemon of the guest answers nobody, and who"
     " calls it is named", "connect"),
    ("emulated if is 0 1", "a new socket is made for the caller; the same are denied",
     "socketcall"),
    # --- not there --------------------------------------------------------------------------
    ("absent", "its flags lie in memory; C libraries fall back to clone", "clone3"),
    ("absent", _NEW_MOUNT,
     "open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick mount_setattr"),
    ("absent", "its callers fall back to /proc", "statmount listmount listns"),
    ("absent", "its callers fall back to chroot", "fchroot"),
    ("absent", "its callers fall back to setxattr, which is looked at", "setxattrat"),
    ("absent", "the host's file systems and devices", "ustat sysfs"),
    ("absent", "obsolete struct; no program found", "olduname oldolduname"),
    ("absent", _GONE,
     "uselib _sysctl create_module get_kernel_syms query_module nfsservctl getpmsg putpmsg"
     " afs_syscall tuxcall security vserver epoll_ctl_old epoll_wait_old lookup_dcookie break"
     " stty gtty ftime prof lock mpx ulimit profil idle bdflush"),
    # --- the host's kernel ------------------------------------------------------------------
    ("full", _FILES,
     "open openat openat2 creat close read write readv writev pread64 pwrite64 preadv pwritev"
     " preadv2 pwritev2 lseek _llseek stat fstat lstat newfstatat statx stat64 lstat64 fstat64"
     " fstatat64 oldstat oldfstat oldlstat access faccessat faccessat2 getdents getdents64"
     " readdir getcwd chdir fchdir chroot rename renameat renameat2 mkdir mkdirat rmdir link"
     " linkat unlink unlinkat symlink symlinkat readlink readlinkat chmod fchmod fchmodat"
     " fchmodat2 chown fchown lchown fchownat chown32 fchown32 lchown32 umask utime utimes"
     " futimesat utimensat utimensat_time64 truncate ftruncate truncate64 ftruncate64 fallocate"
     " flock readahead fadvise64 fadvise64_64 sendfile sendfile64 copy_file_range splice tee"
     " vmsplice getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr"
     " lremovexattr fremovexattr getxattrat listxattrat removexattrat file_getattr file_setattr"
     " name_to_handle_at cachestat vhangup"),
    ("full", "descriptors",
     "dup dup2 dup3 fcntl fcntl64 ioctl pipe pipe2 poll ppoll ppoll_time64 select _newselect"
     " pselect6 pselect6_time64 close_range epoll_create epoll_create1 epoll_ctl epoll_wait"
     " epoll_pwait epoll_pwait2 eventfd eventfd2 signalfd signalfd4 timerfd_create"
     " timerfd_settime timerfd_gettime timerfd_settime64 timerfd_gettime64 inotify_init"
     " inotify_init1 inotify_add_watch inotify_rm_watch fanotify_init fanotify_mark io_setup"
     " io_destroy io_getevents io_submit io_cancel io_pgetevents io_pgetevents_time64"
     " memfd_create memfd_secret"),
    ("full", "memory of the caller",
     "mmap mmap2 munmap mremap mprotect brk madvise mincore mlock mlock2 mlockall munlock"
     " munlockall remap_file_pages pkey_alloc pkey_free pkey_mprotect mseal map_shadow_stack"
     " membarrier mbind set_mempolicy get_mempolicy set_mempolicy_home_node process_madvise"
     " process_mrelease modify_ldt set_thread_area get_thread_area arch_prctl"),
    ("full", _OWN,
     "fork vfork execve execveat exit exit_group wait4 waitid waitpid getpid getppid gettid"
     " getpgrp setpgid setsid prctl seccomp set_tid_address set_robust_list rseq"
     " rseq_slice_yield personality pidfd_getfd futex futex_time64 futex_waitv futex_wake"
     " futex_wait futex_requeue sched_yield sched_get_priority_max sched_get_priority_min"
     " sched_rr_get_interval sched_rr_get_interval_time64 nice restart_syscall"
     " landlock_create_ruleset landlock_add_rule landlock_restrict_self lsm_get_self_attr"
     " lsm_set_self_attr"),
    ("partial", "the host's", "getcpu lsm_list_modules"),
    ("partial", "limits and usage of the shadow's processes, which the host's user sets",
     "getrlimit ugetrlimit setrlimit getrusage"),
    ("full", "signals among processes of the shadow",
     "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait"
     " rt_sigtimedwait_time64 rt_sigsuspend sigaltstack pause signal sigaction sgetmask ssetmask"
     " sigsuspend sigpending sigreturn sigprocmask"),
    ("full", "owners and capabilities inside of the shadow's user namespace",
     "getuid getgid geteuid getegid setuid setgid setreuid setregid getgroups setgroups setresuid"
     " getresuid setresgid getresgid setfsuid setfsgid getuid32 getgid32 geteuid32 getegid32"
     " setreuid32 setregid32 getgroups32 setgroups32 setresuid32 getresuid32 setresgid32"
     " getresgid32 setuid32 setgid32 setfsuid32 setfsgid32 capget capset"),
    ("partial", "the host's time is the guest's now; the clocks since boot are the host's",
     "time gettimeofday times clock_gettime clock_gettime64 clock_getres clock_getres_time64"),
    ("full", "timers",
     "alarm getitimer setitimer nanosleep clock_nanosleep clock_nanosleep_time64 timer_create"
     " timer_settime timer_gettime timer_getoverrun timer_delete timer_gettime64"
     " timer_settime64"),
    ("full", "sockets of the shadow's network namespace",
     "socketpair bind listen accept accept4 getsockname getpeername sendto recvfrom"
     " sendmsg recvmsg sendmmsg recvmmsg recvmmsg_time64 shutdown setsockopt getsockopt"),
    ("full", "in an IPC namespace of the run",
     "shmget shmat shmctl shmdt semget semop semtimedop semtimedop_time64 semctl msgget msgsnd"
     " msgrcv msgctl ipc mq_open mq_unlink mq_timedsend mq_timedreceive mq_timedsend_time64"
     " mq_timedreceive_time64 mq_notify mq_getsetattr"),
    ("full", "random bytes", "getrandom"),
)  # fmt: skip
