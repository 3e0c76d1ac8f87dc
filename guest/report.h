/* Events and the result as JSON lines on stdout, and the first failure. */
#ifndef REPORT_H
#define REPORT_H

#include <stdint.h>

enum exit_status {
    EXIT_APPLIED = 0,
    EXIT_USAGE = 2,
    EXIT_REFUSED = 20,
    EXIT_UNDONE = 40,
    EXIT_NEEDS_PERSON = 41,
};

/* Ends the phase before it and says which one starts. */
void phase(const char *name);

/* Remembers the first failure: a stable code, the path it is about ("" for none), a sentence.
 * Always returns -1. */
int fail(const char *code, const char *path, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The same from errno; doing is what was tried. */
int fail_errno(const char *path, const char *doing);

const char *failure_code(void);

/* A line of its own for trouble after the first failure, or after success; uses errno. */
void complain(const char *event, const char *path, const char *doing);

/* The same with a reason that is no error of the kernel. */
void report_event(const char *event, const char *path, const char *reason);

/* Tells of a path that is not as it should be; of no more than the host reads. */
void tell_path(const char *event, const char *path, const char *why);

/* Prints the result line. */
void report_result(const char *result, uint32_t files, uint64_t bytes);

#endif
