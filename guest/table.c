/* The table's own rules. What is past this file may trust every index, length and path. */
#include "change.h"
#include "medium.h"
#include "report.h"

#include <string.h>
#include <sys/stat.h>

#define MAX_PATH_LENGTH 4095u /* PATH_MAX without its NUL */
#define MAX_NAME 255u

static int bad(const char *what, uint32_t index)
{
    return fail("medium", "", "record %u of the table is malformed: %s", index, what);
}

/* A text in bounds, ended by a NUL. */
static bool text_ok(const struct medium *medium, struct text ref)
{
    uint64_t end = (uint64_t)ref.offset + ref.length;

    return end < medium->counts->strings && !medium->strings[end];
}

static bool plain_name(const char *name, size_t length)
{
    if (!length || length > MAX_NAME || (name[0] == '.' && length == 1) ||
        (name[0] == '.' && name[1] == '.' && length == 2))
        return false;
    return length < sizeof RESERVED - 1 || memcmp(name, RESERVED, sizeof RESERVED - 1) != 0;
}

/* Absolute, with no empty, ".", ".." or reserved component, not the root, not ours. */
static bool path_ok(const struct medium *medium, struct text ref)
{
    const char *path, *at, *slash;

    if (!text_ok(medium, ref) || ref.length < 2 || ref.length > MAX_PATH_LENGTH)
        return false;
    path = text(medium, ref);
    if (strlen(path) != ref.length || path[0] != '/')
        return false;
    for (at = path + 1;; at = slash + 1) {
        slash = strchr(at, '/');
        if (!plain_name(at, slash ? (size_t)(slash - at) : strlen(at)))
            return false;
        if (!slash)
            break;
    }
    if (strncmp(path, STATE_DIR, sizeof STATE_DIR - 1))
        return true;
    at = path + sizeof STATE_DIR - 1;
    return *at && *at != '/';
}

static bool dir_ok(const struct medium *medium, struct text ref)
{
    if (text_ok(medium, ref) && ref.length == 1 && text(medium, ref)[0] == '/')
        return true;
    return path_ok(medium, ref);
}

static int order(const struct medium *medium, struct text a, struct text b)
{
    return strcmp(text(medium, a), text(medium, b));
}

static bool is_child(const char *path, const char *dir, size_t dir_length)
{
    if (dir_length == 1) /* the root */
        return !strchr(path + 1, '/');
    return !strncmp(path, dir, dir_length) && path[dir_length] == '/' &&
           !strchr(path + dir_length + 1, '/');
}

/* Nothing but the time may differ: all else of it is not touched. */
static bool same_ok(const struct entry_record *entry)
{
    const struct state_record *expected = &entry->expected;

    if (!entry->has_expected || entry->xattrs || entry->mtime_ns == expected->mtime_ns)
        return false;
    if (entry->kind == KIND_SYMLINK)
        return S_ISLNK(expected->mode);
    return entry->kind == KIND_FILE && expected->mode == (S_IFREG | entry->mode) &&
           expected->size == entry->size;
}

static int check_kind(const struct medium *medium, const struct entry_record *entry, uint32_t i)
{
    uint8_t kind;

    switch (entry->kind) {
    case KIND_FILE:
        if (entry->holes > entry->size || entry->holes % BLOCK)
            return bad("it has more holes than bytes", i);
        if (!entry->same && (entry->offset > medium->header.layer_size ||
             entry->size > medium->header.layer_size - entry->offset))
            return bad("its content is outside the layer", i);
        break;
    case KIND_SYMLINK:
        if (!entry->target.length || entry->target.length > MAX_PATH_LENGTH ||
            !text_ok(medium, entry->target) ||
            strlen(text(medium, entry->target)) != entry->target.length)
            return bad("its target is no text", i);
        break;
    case KIND_HARDLINK:
        if (entry->link >= i)
            return bad("it links to a later entry", i);
        kind = medium->entries[entry->link].kind;
        if (kind == KIND_DIRECTORY || kind == KIND_DELETE || kind == KIND_HARDLINK ||
            medium->entries[entry->link].same)
            return bad("it links to what cannot be linked", i);
        break;
    case KIND_DELETE:
        if (!entry->has_expected)
            return bad("it deletes nothing", i);
        break;
    case KIND_DIRECTORY:
    case KIND_FIFO:
    case KIND_CHAR:
    case KIND_BLOCK:
        break;
    default:
        return bad("its kind is unknown", i);
    }
    if (entry->same && !same_ok(entry))
        return bad("more than its time would change", i);
    if ((entry->kind == KIND_DELETE || entry->kind == KIND_HARDLINK) && entry->xattrs)
        return bad("its kind has no attributes", i);
    return 0;
}

/* Attribute and below lists follow each other without gaps, so the work is bounded by the table. */
static int check_entry(const struct medium *medium, uint32_t i, uint32_t *xattrs, uint32_t *below)
{
    const struct entry_record *entry = &medium->entries[i];
    bool goes_dir = entry->has_expected && S_ISDIR(entry->expected.mode) &&
                    entry->kind != KIND_DIRECTORY;
    struct text dir;

    if (!path_ok(medium, entry->path))
        return bad("its path is not plain", i);
    if (entry->dir >= medium->counts->dirs)
        return bad("its directory is missing", i);
    dir = medium->dirs[entry->dir].path;
    if (!is_child(text(medium, entry->path), text(medium, dir), dir.length))
        return bad("it is not in its directory", i);
    if (entry->has_expected > 1 || entry->late > 1 || entry->same > 1 || entry->expected.zero ||
        entry->mode > 07777 || entry->expected.mode > UINT16_MAX)
        return bad("a field is out of range", i);
    if (!strncmp(STATE_DIR, text(medium, entry->path), entry->path.length) &&
        STATE_DIR[entry->path.length] == '/' && !changes_directory(entry))
        return bad("it replaces what holds the applier's journal", i);
    if (entry->first_xattr != *xattrs || entry->xattrs > medium->counts->xattrs - *xattrs ||
        entry->first_below != *below || entry->below > medium->counts->below - *below)
        return bad("its lists are out of order", i);
    if (entry->below && !goes_dir)
        return bad("it lists what is below, and replaces no directory", i);
    *xattrs += entry->xattrs;
    *below += entry->below;
    for (uint32_t k = 0; k < entry->below; k++) {
        const struct below_record *record = &medium->below[entry->first_below + k];

        if (!path_ok(medium, record->path) || record->state.zero ||
            strncmp(text(medium, record->path), text(medium, entry->path), entry->path.length) ||
            text(medium, record->path)[entry->path.length] != '/')
            return bad("what it lists is not below it", i);
        if (k && order(medium, record[-1].path, record->path) >= 0)
            return bad("what it lists is out of order", i);
    }
    return check_kind(medium, entry, i);
}

static int check_rest(const struct medium *medium)
{
    const struct table_header *counts = medium->counts;

    for (uint32_t i = 0; i < counts->dirs; i++) {
        if (!dir_ok(medium, medium->dirs[i].path))
            return bad("a directory's path is not plain", i);
        if (i && order(medium, medium->dirs[i - 1].path, medium->dirs[i].path) >= 0)
            return bad("directories are out of order", i);
    }
    for (uint32_t i = 0; i < counts->xattrs; i++) {
        const struct xattr_record *record = &medium->xattrs[i];

        if (!text_ok(medium, record->name) || !text_ok(medium, record->value) ||
            !record->name.length || record->name.length > MAX_NAME ||
            strlen(text(medium, record->name)) != record->name.length ||
            record->value.length > MAX_XATTR)
            return bad("an extended attribute is out of range", i);
    }
    for (uint32_t i = 0; i < counts->locks; i++)
        if (!path_ok(medium, medium->locks[i].path))
            return bad("a lock's path is not plain", i);
    if (counts->attestation && (!text_ok(medium, (struct text){0, counts->attestation}) ||
                                strlen(medium->strings) != counts->attestation))
        return bad("the attestation is no text", 0);
    return 0;
}

int table_check(struct medium *medium)
{
    const struct table_header *counts = medium->counts;
    const uint8_t *at = (const uint8_t *)(counts + 1);
    uint32_t xattrs = 0, below = 0;
    uint64_t size;

    if (counts->dirs > MAX_RECORDS || counts->entries > MAX_RECORDS ||
        counts->xattrs > MAX_RECORDS || counts->below > MAX_RECORDS ||
        counts->locks > MAX_LOCKS || counts->strings > MAX_TABLE || counts->attestation > MAX_ATTESTATION)
        return fail("medium", "", "the table counts more than can be");
    size = sizeof *counts + counts->dirs * sizeof(struct dir_record) +
           counts->entries * sizeof(struct entry_record) +
           counts->xattrs * sizeof(struct xattr_record) +
           counts->below * sizeof(struct below_record) +
           counts->locks * sizeof(struct lock_record) + counts->strings;
    if (size != medium->header.table_size)
        return fail("medium", "", "the table has %llu bytes where its counts need %llu",
                    (unsigned long long)medium->header.table_size, (unsigned long long)size);
    medium->dirs = (const void *)at;
    at += counts->dirs * sizeof(struct dir_record);
    medium->entries = (const void *)at;
    at += counts->entries * sizeof(struct entry_record);
    medium->xattrs = (const void *)at;
    at += counts->xattrs * sizeof(struct xattr_record);
    medium->below = (const void *)at;
    at += counts->below * sizeof(struct below_record);
    medium->locks = (const void *)at;
    at += counts->locks * sizeof(struct lock_record);
    medium->strings = (const char *)at;
    if (check_rest(medium) < 0)
        return -1;
    for (uint32_t i = 0; i < counts->entries; i++)
        if (check_entry(medium, i, &xattrs, &below) < 0)
            return -1;
    if (xattrs != counts->xattrs || below != counts->below)
        return fail("medium", "", "the table has records that belong to no entry");
    return 0;
}
