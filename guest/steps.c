#include "steps.h"

#ifdef OUA_FAULTS

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const names[] = {
#define X(name, text) text,
    STEPS(X)
#undef X
};

static int hits[STEP_COUNT];

/* Finds "name:a:b" in a list with commas; returns whether it names this step. */
static int parse(const char *variable, const char *name, int *first, int *second)
{
    const char *value = getenv(variable);
    size_t length = strlen(name);

    for (; value && *value; value += strcspn(value, ","), value += *value == ',') {
        if (strncmp(value, name, length) || !strchr(":,", value[length]))
            continue;
        sscanf(value + length, ":%d:%d", first, second);
        return 1;
    }
    return 0;
}

static void trace(const char *name)
{
    const char *path = getenv("OUA_TRACE");
    int fd = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;

    if (fd >= 0) {
        dprintf(fd, "%s\n", name);
        close(fd);
    }
}

int step_reached(enum step_name step)
{
    const char *name = names[step];
    int count = ++hits[step];
    int nth = 1, unused = 0, number = EIO;

    trace(name);
    if (parse("OUA_KILL_AT", name, &nth, &unused) && count == nth)
        raise(SIGKILL);
    nth = 1;
    if (parse("OUA_STOP_AT", name, &nth, &unused) && count == nth)
        raise(SIGSTOP);
    nth = 1;
    if (parse("OUA_FAIL_AT", name, &number, &nth) && (nth == 0 || count == nth)) {
        errno = number;
        return -1;
    }
    return 0;
}

void steps_list(void)
{
    for (int i = 0; i < STEP_COUNT; i++)
        puts(names[i]);
}

int no_openat2(void)
{
    return getenv("OUA_NO_OPENAT2") != NULL;
}

#else

/* ISO C forbids an empty translation unit. */
typedef int steps_are_in_test_builds_only;

#endif
