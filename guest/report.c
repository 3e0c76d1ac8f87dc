#include "report.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX_PHASES 24
#define MAX_TOLD 1000
#define MAX_TOLD_BYTES (700u << 10) /* of the host's limit, applier_protocol.py */

static struct {
    const char *code;
    char path[4096];
    char reason[256];
} failure;

static struct {
    const char *name;
    int64_t start_us;
    int64_t end_us;
} phases[MAX_PHASES];
static int n_phases;

/* One line at most: a path of 4095 bytes may need five characters for each of them. */
static char line[24576];
static size_t used;

static int64_t now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static void add(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void add(const char *format, ...)
{
    va_list arguments;
    int length;

    va_start(arguments, format);
    length = vsnprintf(line + used, sizeof line - used, format, arguments);
    va_end(arguments);
    if (length > 0)
        used += (size_t)length < sizeof line - used ? (size_t)length : sizeof line - used - 1;
}

/* Plain ASCII stays; a backslash and all other bytes in the project's escapes (text.py), each
 * of whose backslashes JSON wants doubled. */
static void add_text(const char *raw)
{
    for (; *raw; raw++) {
        unsigned char byte = (unsigned char)*raw;

        if (byte == '\\')
            add("\\\\\\\\");
        else if (byte == '"')
            add("\\\"");
        else if (byte >= 0x20 && byte < 0x7f)
            add("%c", byte);
        else
            add("\\\\x%02x", byte);
    }
}

static void add_ms(const char *key, int64_t us)
{
    add("\"%s\":%lld.%03d", key, (long long)(us / 1000), (int)(us % 1000));
}

/* Whoever reads may be gone; that must not stop the work, so the return value is of no use. */
static void put_line(void)
{
    size_t done = 0;

    line[used++] = '\n';
    while (done < used) {
        ssize_t n = write(STDOUT_FILENO, line + done, used - done);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break;
        done += (size_t)n;
    }
    used = 0;
}

void phase(const char *name)
{
    int64_t now = now_us();

    if (n_phases)
        phases[n_phases - 1].end_us = now;
    if (n_phases < MAX_PHASES) {
        phases[n_phases].name = name;
        phases[n_phases++].start_us = now;
    }
    add("{\"event\":\"phase\",\"phase\":\"%s\",", name);
    add_ms("ms", now);
    add("}");
    put_line();
}

int fail(const char *code, const char *path, const char *format, ...)
{
    va_list arguments;

    if (failure.code)
        return -1;
    failure.code = code;
    snprintf(failure.path, sizeof failure.path, "%s", path);
    va_start(arguments, format);
    vsnprintf(failure.reason, sizeof failure.reason, format, arguments);
    va_end(arguments);
    return -1;
}

int fail_errno(const char *path, const char *doing)
{
    const char *code = "system";

    if (errno == ENOSPC || errno == EDQUOT)
        code = "space";
    else if (errno == EIO)
        code = "io";
    return fail(code, path, "%s: %s", doing, strerror(errno));
}

const char *failure_code(void)
{
    return failure.code ? failure.code : "";
}

void report_event(const char *event, const char *path, const char *reason)
{
    add("{\"event\":\"%s\",\"path\":\"", event);
    add_text(path);
    add("\",\"reason\":\"");
    add_text(reason);
    add("\",");
    add_ms("ms", now_us());
    add("}");
    put_line();
}

void tell_path(const char *event, const char *path, const char *why)
{
    static uint32_t lines;
    static size_t bytes; /* escaped */
    size_t size = 100 + strlen(why);

    for (const char *at = path; *at; at++)
        size += *at >= 0x20 && *at < 0x7f ? 1 : 5;
    if (lines == MAX_TOLD || bytes + size > MAX_TOLD_BYTES)
        return;
    report_event(event, path, why);
    lines++;
    bytes += size;
}

void complain(const char *event, const char *path, const char *doing)
{
    char reason[256];

    snprintf(reason, sizeof reason, "%s: %s", doing, strerror(errno));
    report_event(event, path, reason);
}

void report_result(const char *result, uint32_t files, uint64_t bytes)
{
    int64_t now = now_us();

    if (n_phases)
        phases[n_phases - 1].end_us = now;
    add("{\"event\":\"result\",\"result\":\"%s\",\"code\":\"%s\",\"path\":\"", result,
        failure_code());
    add_text(failure.path);
    add("\",\"reason\":\"");
    add_text(failure.reason);
    add("\",\"files\":%u,\"bytes\":%llu,\"phases\":{", files, (unsigned long long)bytes);
    for (int i = 0; i < n_phases; i++) {
        add("%s", i ? "," : "");
        add_ms(phases[i].name, phases[i].end_us - phases[i].start_us);
    }
    add("},");
    add_ms("ms", now);
    add("}");
    put_line();
}
