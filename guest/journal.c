/* The journal is a file: empty while staging, then the plan with its hash, then perhaps marks.
 *
 * A plan that was torn by a power cut fails its hash and counts as none: renames start only after
 * the syncfs that makes it durable.
 */
#include "journal.h"

#include "report.h"
#include "sha256.h"
#include "steps.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define JOURNAL_PREFIX "journal-"
#define KEPT_PREFIX "undo-"
#define JOURNAL_NAME_SIZE sizeof(JOURNAL_PREFIX "0123456789ab")
#define MAX_JOURNAL (256 << 20)
#define PLAN_MAGIC "OUAPLAN1"

struct plan_header {
    char magic[8];
    uint64_t size; /* of the plan, without its hash */
    uint8_t changeset_id[32];
    uint64_t items;
};

struct mark {
    char magic[8];
    char code[24]; /* the failure that was met first */
};

static const struct {
    char magic[9];
    enum journal_state state;
} marks[] = {
    {"OUAUNDO1", JOURNAL_UNDOING},
    {"OUAROLL1", JOURNAL_ROLLING},
    {"OUASTAY1", JOURNAL_STAYING},
};

struct plan {
    uint8_t *bytes;
    size_t size;
    size_t capacity;
};

static void journal_name(const struct change *change, const char *prefix,
                         char name[JOURNAL_NAME_SIZE])
{
    snprintf(name, JOURNAL_NAME_SIZE, "%s%.12s", prefix, change->id);
}

static int open_journal(const struct change *change, const char *prefix, int flags)
{
    char name[JOURNAL_NAME_SIZE];

    journal_name(change, prefix, name);
    return openat(change->state, name, flags | O_NOFOLLOW | O_CLOEXEC, 0600);
}

int journal_create(const struct change *change)
{
    int fd = step(JOURNAL_CREATE) ? -1 : open_journal(change, JOURNAL_PREFIX,
                                                       O_WRONLY | O_CREAT | O_TRUNC);
    int result = 0;

    if (fd < 0)
        return fail_errno(STATE_DIR, "making the journal");
    /* On one file system the journal's name is durable before the names staged after it. */
    if (change->n_file_systems > 1 && (fsync(fd) < 0 || fsync(change->state) < 0))
        result = fail_errno(STATE_DIR, "writing the journal out");
    close(fd);
    return result;
}

static int append(struct plan *plan, const void *bytes, size_t size)
{
    if (plan->capacity - plan->size < size) {
        size_t capacity = (plan->size + size) * 2;
        uint8_t *grown = realloc(plan->bytes, capacity);

        if (!grown)
            return fail_errno("", "reserving memory for the journal");
        plan->bytes = grown;
        plan->capacity = capacity;
    }
    memcpy(plan->bytes + plan->size, bytes, size);
    plan->size += size;
    return 0;
}

static int append_meta(const struct change *change, const struct item *item, struct plan *plan)
{
    static uint8_t value[MAX_XATTR];
    const struct medium *medium = &change->medium;

    if (append(plan, &item->old, sizeof item->old) < 0)
        return -1;
    for (uint32_t i = 0; i < item->record->xattrs; i++) {
        const char *name = text(medium, medium->xattrs[item->record->first_xattr + i].name);
        ssize_t size = fgetxattr(item->meta_fd, name, value, sizeof value);
        uint32_t length = size < 0 ? NONE : (uint32_t)size;

        if (size < 0 && errno != ENODATA)
            return fail_errno(item->path, "reading an extended attribute");
        if (append(plan, &length, sizeof length) < 0 ||
            (size > 0 && append(plan, value, (size_t)size) < 0))
            return -1;
    }
    return 0;
}

/* Points the items at their part of the plan. Returns -1 when the plan is not of their shape. */
static int read_plan(struct change *change, const uint8_t *bytes, size_t size)
{
    const uint8_t *at = bytes + sizeof(struct plan_header), *end = bytes + size;

    if ((size_t)(end - at) / sizeof(uint64_t) < change->n_items)
        return -1;
    for (uint32_t i = 0; i < change->n_items; i++, at += sizeof(uint64_t))
        memcpy(&change->items[i].inode, at, sizeof(uint64_t));
    for (uint32_t i = 0; i < change->n_items; i++) {
        struct item *item = &change->items[i];

        if (item->op != OP_META)
            continue;
        if ((size_t)(end - at) < sizeof item->old)
            return -1;
        memcpy(&item->old, at, sizeof item->old);
        at += sizeof item->old;
        item->old_xattrs = at;
        for (uint32_t k = 0; k < item->record->xattrs; k++) {
            uint32_t length;

            if ((size_t)(end - at) < sizeof length)
                return -1;
            memcpy(&length, at, sizeof length);
            at += sizeof length;
            if (length != NONE && (size_t)(end - at) < length)
                return -1;
            at += length == NONE ? 0 : length;
        }
    }
    return at == end ? 0 : -1;
}

int journal_write_plan(struct change *change)
{
    struct plan_header header = {.items = change->n_items};
    struct plan plan = {0};
    uint8_t digest[32];
    ssize_t written;
    int fd, result;

    memcpy(header.magic, PLAN_MAGIC, sizeof header.magic);
    memcpy(header.changeset_id, change->medium.header.changeset_id, sizeof header.changeset_id);
    result = append(&plan, &header, sizeof header);
    for (uint32_t i = 0; !result && i < change->n_items; i++)
        result = append(&plan, &change->items[i].inode, sizeof(uint64_t));
    for (uint32_t i = 0; !result && i < change->n_items; i++)
        if (change->items[i].op == OP_META)
            result = append_meta(change, &change->items[i], &plan);
    if (result)
        return -1; /* plan.bytes lives as long as the process, as the items point into it */
    header.size = plan.size;
    memcpy(plan.bytes, &header, sizeof header);
    if (read_plan(change, plan.bytes, plan.size) < 0)
        return fail("internal", "", "the journal's plan contradicts the change set");
    sha256_of(plan.bytes, plan.size, digest);
    if (append(&plan, digest, sizeof digest) < 0)
        return -1;
    read_plan(change, plan.bytes, header.size); /* append may have moved it */
    change->plan_end = change->journal_end = plan.size;
    fd = step(JOURNAL_PLAN) ? -1 : open_journal(change, JOURNAL_PREFIX, O_WRONLY);
    if (fd < 0)
        return fail_errno(STATE_DIR, "opening the journal");
    written = write(fd, plan.bytes, plan.size);
    if (written >= 0 && (size_t)written != plan.size) {
        errno = ENOSPC;
        written = -1;
    }
    if (close(fd) < 0 || written < 0)
        return fail_errno(STATE_DIR, "writing the journal");
    return 0;
}

/* Behind the last whole mark: a power cut may have torn one. */
static int write_mark(struct change *change, enum journal_state state)
{
    struct mark mark = {0};
    int fd = open_journal(change, JOURNAL_PREFIX, O_WRONLY);
    int result = 0;

    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
        if (marks[i].state == state)
            memcpy(mark.magic, marks[i].magic, sizeof mark.magic);
    snprintf(mark.code, sizeof mark.code, "%s", failure_code());
    if (fd < 0)
        return -1;
    if (pwrite(fd, &mark, sizeof mark, (off_t)change->journal_end) != sizeof mark || fsync(fd) < 0)
        result = -1;
    close(fd);
    if (!result)
        change->journal_end += sizeof mark;
    return result;
}

int journal_mark_undo(struct change *change)
{
    return step(UNDO_MARK) ? -1 : write_mark(change, JOURNAL_UNDOING);
}

int journal_mark_stay(struct change *change)
{
    return step(STAY_MARK) ? -1 : write_mark(change, JOURNAL_STAYING);
}

static int rename_journal(const struct change *change, const char *from, const char *to)
{
    char old[JOURNAL_NAME_SIZE], new[JOURNAL_NAME_SIZE];

    journal_name(change, from, old);
    journal_name(change, to, new);
    return renameat(change->state, old, change->state, new);
}

int journal_keep(const struct change *change)
{
    return step(JOURNAL_KEEP) ? -1 : rename_journal(change, JOURNAL_PREFIX, KEPT_PREFIX);
}

int journal_begin_rollback(struct change *change)
{
    int fd = step(ROLLBACK_BEGIN) ? -1 : open_journal(change, KEPT_PREFIX, O_WRONLY);
    int result;

    if (fd < 0)
        return fail_errno(STATE_DIR, "opening the journal of the update");
    /* Marks of an earlier rollback, which failed, go while they mean nothing. */
    result = ftruncate(fd, (off_t)change->plan_end);
    close(fd);
    if (result < 0 || rename_journal(change, KEPT_PREFIX, JOURNAL_PREFIX) < 0)
        return fail_errno(STATE_DIR, "making it the journal again");
    change->journal_end = change->plan_end;
    if (!step(ROLLBACK_MARK) && !write_mark(change, JOURNAL_ROLLING) && !fsync(change->state))
        return 0;
    fail_errno(STATE_DIR, "marking the journal");
    /* A mark that is there, durable or not, would take the update back later on. */
    fd = open_journal(change, JOURNAL_PREFIX, O_WRONLY);
    if (fd < 0 || ftruncate(fd, (off_t)change->plan_end) < 0 || fsync(fd) < 0 ||
        rename_journal(change, JOURNAL_PREFIX, KEPT_PREFIX) < 0)
        complain("undo-failed", STATE_DIR, "taking the mark back");
    if (fd >= 0)
        close(fd);
    return -1;
}

int journal_remove(const struct change *change)
{
    char name[JOURNAL_NAME_SIZE];

    journal_name(change, JOURNAL_PREFIX, name);
    if (step(JOURNAL_REMOVE) || (unlinkat(change->state, name, 0) < 0 && errno != ENOENT))
        return -1;
    return 0;
}

/* Returns whether the whole plan is there and of this change set. */
static bool plan_is_whole(struct change *change, const uint8_t *bytes, size_t size, size_t *end)
{
    struct plan_header header;
    uint8_t digest[32];

    if (size < sizeof header + sizeof digest)
        return false;
    memcpy(&header, bytes, sizeof header);
    if (memcmp(header.magic, PLAN_MAGIC, sizeof header.magic) != 0 ||
        header.size > size - sizeof digest || header.size < sizeof header ||
        header.items != change->n_items ||
        memcmp(header.changeset_id, change->medium.header.changeset_id,
               sizeof header.changeset_id) != 0)
        return false;
    sha256_of(bytes, header.size, digest);
    *end = header.size + sizeof digest;
    return !memcmp(digest, bytes + header.size, sizeof digest) &&
           !read_plan(change, bytes, header.size);
}

/* The last mark decides; of the first failure, its code. */
static void load_marks(struct change *change, const uint8_t *bytes, size_t size,
                       enum journal_state *state)
{
    static struct mark mark; /* fail() keeps the pointer to its code */

    *state = JOURNAL_PLANNED;
    while (size >= sizeof mark.magic) {
        size_t part = size < sizeof mark ? size : sizeof mark;
        enum journal_state found = JOURNAL_NONE;

        for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
            if (!memcmp(bytes, marks[i].magic, sizeof mark.magic))
                found = marks[i].state;
        if (found == JOURNAL_NONE)
            break;
        *state = found;
        mark = (struct mark){0};
        memcpy(&mark, bytes, part);
        change->journal_end += part == sizeof mark ? part : 0;
        bytes += part;
        size -= part;
    }
    if (*state != JOURNAL_UNDOING && *state != JOURNAL_STAYING)
        return;
    mark.code[sizeof mark.code - 1] = 0;
    mark.code[strspn(mark.code, "abcdefghijklmnopqrstuvwxyz-")] = 0;
    fail(*mark.code ? mark.code : "system", "", "an earlier run failed and did not end undoing");
}

static int other_journal(void *context, int dir, const char *name)
{
    (void)dir;
    if (strncmp(name, JOURNAL_PREFIX, sizeof JOURNAL_PREFIX - 1) || !strcmp(name, context))
        return 0;
    return fail("unfinished", STATE_DIR, "another change set is half applied: %.64s", name);
}

static int load(struct change *change, const char *prefix, enum journal_state *state)
{
    struct status status;
    uint8_t *bytes;
    size_t end;
    int fd;

    *state = JOURNAL_NONE;
    fd = open_journal(change, prefix, O_RDONLY);
    if (fd < 0)
        return errno == ENOENT ? 0 : fail_errno(STATE_DIR, "opening the journal");
    if (look(fd, "", &status) < 0 || status.size > MAX_JOURNAL)
        return fail("system", STATE_DIR, "the journal is larger than any");
    *state = JOURNAL_STAGING;
    bytes = malloc(status.size + 1);
    if (!bytes || read(fd, bytes, status.size) != (ssize_t)status.size)
        return fail_errno(STATE_DIR, "reading the journal");
    close(fd);
    if (!plan_is_whole(change, bytes, status.size, &end))
        return 0;
    change->plan_end = change->journal_end = end;
    if (strcmp(prefix, KEPT_PREFIX))
        load_marks(change, bytes + end, status.size - end, state);
    else
        *state = JOURNAL_PLANNED; /* its marks are of a rollback that failed */
    return 0;
}

int journal_load(struct change *change, enum journal_state *state)
{
    char name[JOURNAL_NAME_SIZE];

    *state = JOURNAL_NONE;
    journal_name(change, JOURNAL_PREFIX, name);
    if (for_each_name(change->state, other_journal, name) < 0)
        return fail_errno(STATE_DIR, "listing the journals");
    return load(change, JOURNAL_PREFIX, state);
}

int journal_load_kept(struct change *change, bool *found)
{
    enum journal_state state;

    if (load(change, KEPT_PREFIX, &state) < 0)
        return -1;
    *found = state == JOURNAL_PLANNED;
    return 0;
}
