/* Runs programs for the host, through a virtio port: docs/design/0025-channels.md.
 *
 *     ouassister-port /dev/virtio-ports/org.ouassister.0
 *
 * It takes (see port.h; ID is of a program, or of a question):
 *     ask ID                        -> here ID PROTOCOL ID...          the programs that run
 *     part ID OFFSET BASE64         of what the program gets: its words, a null byte behind
 *                                   each, then its standard input
 *     run ID WORDS INPUT SIZE       -> not ID ERRNO                    it did not start
 *                                      out|err ID NUMBER BASE64        what it writes
 *                                      end ID NUMBER exit|signal VALUE and its streams are closed
 * INPUT is where the input begins; NUMBER counts the lines of a program, so that a lost one is
 * noticed. A helper that was started anew knows none of the programs of the one before.
 *
 * Programs that nobody hears any more, since the host hung up, run on; what they write is lost.
 * Source: Linux v6.1 drivers/char/virtio_console.c (port_fops_read: no bytes and no error while
 * nobody is connected; port_fops_poll: POLLHUP then; its wait queue is woken by each change).
 */
#include "port.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define JOBS 8
#define MAX_WORDS 4096u

struct job {
    char id[ID_SIZE];
    bool used, heard, exited;
    pid_t pid;
    int in, out, err, status;
    uint8_t *input;
    size_t size, at;
    unsigned long number; /* of its next line */
};

static struct job jobs[JOBS];
static struct line line;
static struct reader reader;
static struct {
    char id[ID_SIZE];
    uint8_t bytes[REQUEST_SIZE];
    size_t size;
} request;
static int port, changes, children;
static bool gone; /* nobody is connected */

static _Noreturn void give_up(const char *what)
{
    fprintf(stderr, "ouassister-port: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void shut(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static bool number_of(const char *text, size_t most, size_t *number)
{
    char *end;

    if (*text < '0' || *text > '9')
        return false;
    errno = 0;
    *number = strtoul(text, &end, 10);
    return !errno && !*end && *number <= most;
}

/* In the child: never returns. */
static _Noreturn void become(char **words, int in, int out, int err, int told)
{
    sigset_t none;
    int error;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    if (dup2(in, 0) == 0 && dup2(out, 1) == 1 && dup2(err, 2) == 2)
        execvp(words[0], words);
    error = errno;
    if (write(told, &error, sizeof(error)) < 0)
        _exit(126);
    _exit(127);
}

/* 0, or why it did not start. */
static int start(struct job *job, char **words)
{
    int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1}, told[2] = {-1, -1}, error = 0;

    if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC) ||
        pipe2(told, O_CLOEXEC) || (job->pid = fork()) < 0) {
        error = errno;
    } else if (!job->pid) {
        become(words, in[0], out[1], err[1], told[1]);
    } else {
        ssize_t got;

        shut(&told[1]);
        do
            got = read(told[0], &error, sizeof(error));
        while (got < 0 && errno == EINTR);
        if (got != sizeof(error))
            error = 0; /* it runs */
        else
            waitpid(job->pid, NULL, 0);
    }
    shut(&in[0]);
    shut(&out[1]);
    shut(&err[1]);
    shut(&told[0]);
    shut(&told[1]);
    if (error) {
        shut(&in[1]);
        shut(&out[0]);
        shut(&err[0]);
        return error;
    }
    job->in = in[1];
    job->out = out[0];
    job->err = err[0];
    fcntl(job->in, F_SETFL, O_NONBLOCK);
    fcntl(job->out, F_SETFL, O_NONBLOCK);
    fcntl(job->err, F_SETFL, O_NONBLOCK);
    return 0;
}

/* 0, or why it did not start. */
static int run(const char *id, size_t count, size_t input, size_t size)
{
    char *words[MAX_WORDS + 1];
    struct job *job = NULL;
    size_t at = 0;
    int error;

    if (strcmp(request.id, id) || request.size != size || input > size || !count)
        return EBADMSG;
    for (size_t i = 0; i < count; i++) {
        words[i] = (char *)request.bytes + at;
        at += strnlen(words[i], input - at) + 1;
        if (at > input)
            return EBADMSG;
    }
    words[count] = NULL;
    for (size_t i = 0; i < JOBS && !job; i++)
        job = jobs[i].used ? NULL : &jobs[i];
    if (at != input)
        return EBADMSG;
    if (!job)
        return EAGAIN;
    memset(job, 0, sizeof(*job));
    job->size = size - input;
    if (job->size && !(job->input = malloc(job->size)))
        return ENOMEM;
    if (job->size)
        memcpy(job->input, request.bytes + input, job->size);
    error = start(job, words);
    if (error) {
        free(job->input);
        return error;
    }
    request.id[0] = '\0'; /* it is run once */
    memcpy(job->id, id, ID_SIZE);
    job->used = job->heard = true;
    return 0;
}

static void take_part(const char *id, const char *offset, const char *data)
{
    size_t at;
    long size;

    if (!number_of(offset, REQUEST_SIZE, &at))
        return;
    if (!at) {
        memcpy(request.id, id, ID_SIZE);
        request.size = 0;
    }
    if (strcmp(request.id, id) || at != request.size)
        return; /* a part is lost: the size will not fit */
    size = decode(data, request.bytes + at, REQUEST_SIZE - at);
    if (size > 0)
        request.size += (size_t)size;
}

static void answer(const char *id)
{
    char running[JOBS * ID_SIZE + 1] = "";

    for (size_t i = 0; i < JOBS; i++)
        if (jobs[i].used && jobs[i].heard) {
            strcat(running, " ");
            strcat(running, jobs[i].id);
        }
    line_make(&line, "here %s " PROTOCOL "%s", id, running);
}

/* Do what a line says; whatever is no request of this protocol is none. */
static void obey(char *text)
{
    char *words[6], *rest = text;
    size_t count = 0, number[3];

    while (count < 6 && (words[count] = strsep(&rest, " ")))
        count++;
    if (count < 2 || rest || !is_id(words[1]))
        return;
    if (count == 2 && !strcmp(words[0], "ask")) {
        answer(words[1]);
    } else if (count == 4 && !strcmp(words[0], "part")) {
        take_part(words[1], words[2], words[3]);
    } else if (count == 5 && !strcmp(words[0], "run") &&
               number_of(words[2], MAX_WORDS, &number[0]) &&
               number_of(words[3], REQUEST_SIZE, &number[1]) &&
               number_of(words[4], REQUEST_SIZE, &number[2])) {
        int error = run(words[1], number[0], number[1], number[2]);

        if (error)
            line_make(&line, "not %s %d", words[1], error);
    }
}

/* Whoever comes next begins anew. */
static void forget(void)
{
    line.size = line.at = 0;
    reader.size = 0;
    reader.skip = false;
    for (size_t i = 0; i < JOBS; i++)
        jobs[i].heard = false;
}

static bool send_line(void)
{
    ssize_t n;

    if (!line_pending(&line))
        return false;
    n = write(port, line.text + line.at, line.size - line.at);
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        give_up("the port");
    if (n > 0)
        line.at += (size_t)n;
    return n > 0;
}

static bool take_lines(void)
{
    bool moved = false;
    size_t taken;
    ssize_t n;
    char *text;

    if (line_pending(&line))
        return false; /* its answer would have no place */
    n = read(port, reader.text + reader.size, sizeof(reader.text) - reader.size);
    if (n < 0 && errno != EAGAIN && errno != EINTR && errno != EIO)
        give_up("the port");
    if (n > 0) {
        reader.size += (size_t)n;
        moved = true;
    }
    while (!line_pending(&line) && (text = reader_next(&reader, &taken))) {
        obey(text);
        reader_drop(&reader, taken);
        moved = true;
    }
    if (!line_pending(&line))
        reader_drop(&reader, taken);
    return moved;
}

/* Pass on what a program has written; true when there was something to do. */
static bool pass(struct job *job, int *fd, const char *word)
{
    static uint8_t data[PART];
    char head[64];
    ssize_t n;

    if (*fd < 0 || line_pending(&line))
        return false;
    n = read(*fd, data, sizeof(data));
    if (n < 0)
        return false;
    if (!n)
        shut(fd);
    else if (job->heard) {
        snprintf(head, sizeof(head), "%s %s %lu ", word, job->id, job->number++);
        line_make_data(&line, head, data, (size_t)n);
    }
    return true;
}

static bool feed(struct job *job)
{
    ssize_t n;

    if (job->in < 0)
        return false;
    n = job->at < job->size ? write(job->in, job->input + job->at, job->size - job->at) : 0;
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (n > 0)
        job->at += (size_t)n;
    if (n <= 0 || job->at == job->size) { /* all of it, or nobody reads it */
        shut(&job->in);
        free(job->input);
        job->input = NULL;
    }
    return true;
}

static bool attend(struct job *job)
{
    bool moved;

    if (!job->used)
        return false;
    moved = feed(job);
    if (!job->exited && waitpid(job->pid, &job->status, WNOHANG) == job->pid)
        job->exited = moved = true;
    moved |= pass(job, &job->out, "out");
    moved |= pass(job, &job->err, "err");
    if (!job->exited || job->out >= 0 || job->err >= 0 || line_pending(&line))
        return moved;
    if (job->heard)
        line_make(&line, "end %s %lu %s %d", job->id, job->number,
                  WIFSIGNALED(job->status) ? "signal" : "exit",
                  WIFSIGNALED(job->status) ? WTERMSIG(job->status) : WEXITSTATUS(job->status));
    shut(&job->in);
    free(job->input);
    job->used = false;
    return true;
}

/* Wait until something can be done. */
static void pause_until_changed(void)
{
    struct pollfd waiting[2 + 3 * JOBS] = {{changes, POLLIN, 0}, {children, POLLIN, 0}};
    struct signalfd_siginfo signals[JOBS];
    struct epoll_event event;
    nfds_t count = 2;

    for (size_t i = 0; i < JOBS; i++) {
        if (!jobs[i].used)
            continue;
        waiting[count++] = (struct pollfd){jobs[i].in, POLLOUT, 0};
        if (line_pending(&line))
            continue; /* what they write has to wait */
        waiting[count++] = (struct pollfd){jobs[i].out, POLLIN, 0};
        waiting[count++] = (struct pollfd){jobs[i].err, POLLIN, 0};
    }
    if (poll(waiting, count, -1) < 0 && errno != EINTR)
        give_up("poll");
    if (waiting[0].revents && epoll_wait(changes, &event, 1, 0) < 0 && errno != EINTR)
        give_up("epoll");
    if (waiting[1].revents && read(children, signals, sizeof(signals)) < 0 && errno != EAGAIN)
        give_up("signalfd");
}

static void open_port(const char *path)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET};
    struct stat found;
    sigset_t ended;

    port = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    if (port < 0 || fstat(port, &found))
        give_up(path);
    if (!S_ISCHR(found.st_mode) || found.st_uid != geteuid() || found.st_mode & 077) {
        fprintf(stderr, "ouassister-port: %s: others than its owner may use it\n", path);
        exit(1);
    }
    sigemptyset(&ended);
    sigaddset(&ended, SIGCHLD);
    sigprocmask(SIG_BLOCK, &ended, NULL);
    signal(SIGPIPE, SIG_IGN);
    children = signalfd(-1, &ended, SFD_NONBLOCK | SFD_CLOEXEC);
    changes = epoll_create1(EPOLL_CLOEXEC);
    if (children < 0 || changes < 0 || epoll_ctl(changes, EPOLL_CTL_ADD, port, &event))
        give_up("epoll");
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: ouassister-port PORT (" PROTOCOL_NAME ")\n");
        return 2;
    }
    open_port(argv[1]);
    for (;;) {
        struct pollfd host = {port, POLLIN | POLLOUT, 0};
        bool moved = false;

        if (poll(&host, 1, 0) < 0 && errno != EINTR)
            give_up("poll");
        if (host.revents & POLLHUP && !gone)
            forget();
        gone = host.revents & POLLHUP;
        if (!gone) {
            moved = send_line();
            moved |= take_lines();
        }
        for (size_t i = 0; i < JOBS; i++)
            moved |= attend(&jobs[i]);
        if (!moved)
            pause_until_changed();
    }
}
