/* workload SEED OPERATIONS DIRECTORY...: operations on each directory in turn, by chance.
 *
 * A child does the work and stays behind, with files that are mapped and dirty, open and unlinked,
 * or of O_TMPFILE. Another one writes all the time and is stopped at the end, so that nothing
 * changes from then on. The parent prints how often each operation succeeded and failed, and ends.
 */
#include "workload.h"

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_NODES 65536
#define MAX_DEPTH 7
#define MAX_TREES 8
#define MAX_WALK 64

struct tree {
    struct node nodes[MAX_NODES];
    size_t count;
};

uint64_t budget = 64 << 20;
bool may_sync = true;
static struct tree trees[MAX_TREES];
static struct tree *tree;
static uint64_t state;

uint64_t chance(uint64_t below)
{
    /* splitmix64 */
    uint64_t z = (state += 0x9e3779b97f4a7c15);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    z ^= z >> 31;
    return below == 0 ? z : z % below;
}

bool one_in(uint64_t n)
{
    return chance(n) == 0;
}

size_t random_bytes(void *to, size_t size)
{
    unsigned char *at = to;

    for (size_t i = 0; i < size; i += 8) {
        uint64_t word = chance(0);

        memcpy(at + i, &word, size - i < 8 ? size - i : 8);
    }
    return size;
}

static size_t find(const char *path)
{
    for (size_t i = 0; i < tree->count; i++)
        if (strcmp(tree->nodes[i].path, path) == 0)
            return i;
    return tree->count;
}

const char *pick(enum kind kind)
{
    size_t start = tree->count == 0 ? 0 : chance(tree->count);

    for (size_t i = 0; i < tree->count; i++) {
        const struct node *node = &tree->nodes[(start + i) % tree->count];

        if (node->kind == kind)
            return node->path;
    }
    return NULL;
}

const char *pick_any(void)
{
    return tree->nodes[chance(tree->count)].path;
}

enum kind kind_of(const char *path)
{
    struct stat status;

    if (lstat(path, &status) != 0)
        return KINDS;
    return S_ISREG(status.st_mode)   ? FILE_NODE
           : S_ISDIR(status.st_mode) ? DIR_NODE
           : S_ISLNK(status.st_mode) ? LINK_NODE
                                     : OTHER_NODE;
}

static size_t depth(const char *path)
{
    size_t slashes = 0;

    while ((path = strchr(path, '/')) != NULL) {
        slashes++;
        path++;
    }
    return slashes;
}

const char *fresh(char out[NAME_SIZE], const char *prefix)
{
    static unsigned number;
    const char *folder = pick(DIR_NODE);
    char tail[200] = "";

    for (int i = 0; i < 4 && folder != NULL && depth(folder) > MAX_DEPTH; i++)
        folder = pick(DIR_NODE);
    if (folder == NULL || strlen(folder) > NAME_SIZE / 2)
        folder = ".";
    /* Long names split the blocks of a folder sooner. */
    if (one_in(6))
        memset(tail, 'a' + (int)chance(26), chance(sizeof tail - 1));
    snprintf(out, NAME_SIZE, "%s/%s%u%s", folder, prefix, number++, tail);
    return out;
}

void add(const char *path, enum kind kind)
{
    size_t at = find(path);

    if (at < tree->count) {
        tree->nodes[at].kind = kind;
        return;
    }
    if (tree->count == MAX_NODES)
        return;
    tree->nodes[tree->count].path = strdup(path);
    tree->nodes[tree->count++].kind = kind;
}

static bool below(const char *path, const char *top)
{
    size_t size = strlen(top);

    return strncmp(path, top, size) == 0 && (path[size] == '\0' || path[size] == '/');
}

void forget(const char *path)
{
    char *top = strdup(path);

    for (size_t i = 0; i < tree->count;) {
        if (!below(tree->nodes[i].path, top)) {
            i++;
            continue;
        }
        free(tree->nodes[i].path);
        tree->nodes[i] = tree->nodes[--tree->count];
    }
    free(top);
}

static void rebase(const char *from, const char *to)
{
    for (size_t i = 0; i < tree->count; i++) {
        struct node *node = &tree->nodes[i];
        char *path;

        if (!below(node->path, from))
            continue;
        if (asprintf(&path, "%s%s", to, node->path + strlen(from)) < 0)
            err(1, "asprintf");
        free(node->path);
        node->path = path;
    }
}

void moved(const char *from, const char *to)
{
    char *old = strdup(from), *new = strdup(to);

    forget(new);
    rebase(old, new);
    free(old);
    free(new);
}

void swapped(const char *one, const char *other)
{
    char *first = strdup(one), *second = strdup(other);

    rebase(first, "\n");
    rebase(second, first);
    rebase("\n", second);
    free(first);
    free(second);
}

static int adopt(const char *path, const struct stat *status, int type, struct FTW *place)
{
    (void)status;
    if (place->level > 0)
        add(path, type == FTW_SL ? LINK_NODE : type == FTW_D ? DIR_NODE : kind_of(path));
    return 0;
}

static void enter(const char *directory, struct tree *which)
{
    if (mkdir(directory, 0755) != 0 && errno != EEXIST)
        err(1, "%s", directory);
    if (chdir(directory) != 0)
        err(1, "%s", directory);
    tree = which;
}

/* Writes until it is stopped: appends, replaces by rename, removes. */
static void write_on(const char *directory)
{
    char name[64], line[512];
    unsigned turn = 0;

    if (chdir(directory) != 0)
        err(1, "%s", directory);
    for (;; turn++) {
        int fd = open("journal.log", O_WRONLY | O_CREAT | O_APPEND, 0640);
        int size = snprintf(line, sizeof line, "%u %0*d\n", turn, (int)(turn % 400), 0);

        if (fd < 0 || write(fd, line, (size_t)size) < 0)
            err(1, "writer");
        close(fd);
        snprintf(name, sizeof name, "status.%u", turn % 3);
        fd = open("status.part", O_WRONLY | O_CREAT | O_TRUNC, 0644);
        if (fd < 0 || write(fd, line, (size_t)size) < 0 || rename("status.part", name) != 0)
            err(1, "writer");
        close(fd);
        if (turn % 7 == 6)
            unlink(name);
        usleep(2000);
    }
}

static void stop(pid_t writer)
{
    int status;

    if (kill(writer, SIGSTOP) != 0 || waitpid(writer, &status, WUNTRACED) != writer ||
        !WIFSTOPPED(status))
        errx(1, "the writer ended by itself");
}

static void run(uint64_t seed, unsigned count, char **directories, size_t trees_used, int out)
{
    static unsigned long succeeded[128], failed[128];
    static int last[128];
    char home[4096];
    int total = 0;
    pid_t writer;

    state = seed;
    may_sync = seed % 3 != 0;
    for (size_t i = 0; i < trees_used; i++) {
        enter(directories[i], &trees[i]);
        if (nftw(".", adopt, MAX_WALK, FTW_PHYS) != 0)
            err(1, "%s", directories[i]);
        add(".", DIR_NODE);
    }
    if (snprintf(home, sizeof home, "%s/writer", directories[0]) < 0)
        err(1, "snprintf");
    if (mkdir(home, 0700) != 0 && errno != EEXIST)
        err(1, "%s", home);
    writer = fork();
    if (writer == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        write_on(home);
    }
    for (size_t i = 0; i < operation_count; i++)
        total += operations[i].weight;
    for (unsigned i = 0; i < count; i++) {
        int at = (int)chance((uint64_t)total);
        size_t which = 0, place = chance(trees_used);

        enter(directories[place], &trees[place]);
        while ((at -= operations[which].weight) >= 0)
            which++;
        errno = 0;
        if (operations[which].run() == 0) {
            succeeded[which]++;
        } else {
            failed[which]++;
            last[which] = errno;
        }
    }
    stop(writer);
    for (size_t i = 0; i < operation_count; i++)
        dprintf(out, "%s %lu %lu %s\n", operations[i].name, succeeded[i], failed[i],
                failed[i] ? strerror(last[i]) : "-");
    dprintf(out, "end\n");
    for (;;)
        pause();
}

int main(int argc, char **argv)
{
    int ends[2], silent;
    char line[256];
    FILE *from;

    if (argc < 4 || argc - 3 > MAX_TREES)
        errx(2, "usage: workload SEED OPERATIONS DIRECTORY...");
    if (pipe(ends) != 0)
        err(1, "pipe");
    if (fork() == 0) {
        close(ends[0]);
        setsid();
        umask(0);
        if (chdir("/") != 0 || (silent = open("/dev/null", O_RDWR)) < 0)
            err(1, "/dev/null");
        dup2(silent, 0);
        dup2(silent, 1);
        dup2(ends[1], 2); /* the last words of a failure */
        fcntl(ends[1], F_SETFD, FD_CLOEXEC);
        run(strtoull(argv[1], NULL, 10), (unsigned)atoi(argv[2]), argv + 3, (size_t)argc - 3, ends[1]);
    }
    close(ends[1]);
    from = fdopen(ends[0], "r");
    if (from == NULL)
        err(1, "fdopen");
    /* Children that stay hold the other end. */
    while (fgets(line, sizeof line, from) != NULL) {
        if (strcmp(line, "end\n") == 0)
            return fflush(stdout) == 0 ? 0 : 1;
        fputs(line, stdout);
    }
    return 1;
}
