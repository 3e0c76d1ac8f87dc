/* syscall_threads: what a C library does. Threads that ask for names and signal processes of the guest all at once, children by vfork and fork that do the
 * same, and one thread that changes an argument in memory while another calls. Prints a word for each, and fails by itself when an answer is wrong. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 8, ROUNDS = 50, RACES = 200 };

static void expect(int holds, const char *what)
{
    if (!holds) {
        printf("wrong: %s (errno %d)\n", what, errno);
        fflush(stdout);
        _exit(1);
    }
}

static void ask(void)
{
    struct utsname name;
    expect(uname(&name) == 0 && !strcmp(name.nodename, "web1"), "uname");
    expect(kill(571, 0) == 0, "kill 571 0");
    expect(kill(572, 0) == -1 && errno == ESRCH, "kill 572 0");
    expect(kill(getpid(), 0) == 0, "kill self 0");
    expect(syscall(SYS_tgkill, getpid(), gettid(), 0) == 0, "tgkill self 0");
}

static void *worker(void *unused)
{
    for (int i = 0; i < ROUNDS; i++)
        ask();
    return unused;
}

static char path[64];
static volatile int stop;

static void *swapper(void *unused)
{
    while (!stop) {
        memcpy(path, "/tmp/good/node", 15);
        memcpy(path, "/tmp/evil/node", 15);
    }
    return unused;
}

int main(void)
{
    pthread_t threads[THREADS];
    int status;

    for (int i = 0; i < THREADS; i++)
        expect(pthread_create(&threads[i], NULL, worker, NULL) == 0, "pthread_create");
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    puts("threads");

    pid_t child = vfork();
    if (child == 0) {
        struct utsname name;
        _exit(uname(&name) == 0 && !strcmp(name.release, "6.1.0-56-cloud-amd64") && kill(571, SIGHUP) == 0 ? 0 : 1);
    }
    expect(waitpid(child, &status, 0) == child && status == 0, "vfork");
    puts("vfork");

    child = fork();
    if (child == 0) {
        ask();
        _exit(0);
    }
    expect(waitpid(child, &status, 0) == child && status == 0, "fork");
    puts("fork");

    /* A child that is killed while it waits for an answer harms nobody. */
    for (int i = 0; i < 20; i++) {
        child = fork();
        if (child == 0)
            for (struct utsname name;;)
                uname(&name);
        kill(child, SIGKILL);
        expect(waitpid(child, &status, 0) == child && WIFSIGNALED(status), "killed");
    }
    puts("killed");

    /* Whichever path is copied, one node comes of a call that succeeds, and its record names that one. */
    mkdir("/tmp/good", 0755);
    mkdir("/tmp/evil", 0755);
    expect(pthread_create(&threads[0], NULL, swapper, NULL) == 0, "pthread_create");
    int made = 0, found = 0;
    for (int i = 0; i < RACES; i++) {
        made += mknod(path, S_IFCHR | 0600, makedev(1, 3)) == 0;
        found += (unlink("/tmp/good/node") == 0) + (unlink("/tmp/evil/node") == 0);
    }
    stop = 1;
    pthread_join(threads[0], NULL);
    expect(made == found && made > 0, "race");
    printf("race %d\n", made);

    /* In a pid namespace of their own, processes have small pids too, and mean each other. */
    expect(unshare(CLONE_NEWPID) == 0, "unshare CLONE_NEWPID");
    child = fork();
    if (child == 0) {
        expect(getpid() == 1 && kill(1, 0) == 0, "kill 1 0");
        expect(kill(571, 0) == -1 && errno == ESRCH, "kill 571 0 in a namespace");
        _exit(0);
    }
    expect(waitpid(child, &status, 0) == child && status == 0, "nested");
    puts("nested");
    return 0;
}
