/* Everything new is made beside its target under a reserved name, with all its attributes. */
#include "change.h"
#include "hashing.h"
#include "journal.h"
#include "report.h"
#include "steps.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* Each page of it is a fault on first use, which costs more than another read under emulation. */
#define JUMP (64u << 10)

/* The last piece of the layer that was read: small files that follow each other share one read.
 * The table is in the layer's order; should it not be, a jump reads little more than the file. */
static uint8_t *window;
static uint64_t window_start, window_size;

/* Returns the bytes at an offset of the layer; *size shrinks to what is at hand. */
static const uint8_t *layer_bytes(const struct medium *medium, uint64_t offset, uint64_t *size)
{
    if (offset < window_start || offset >= window_start + window_size) {
        uint64_t left = medium->header.layer_size - offset, end = window_start + window_size;
        uint64_t wanted = WINDOW;

        if (offset < end || offset - end > JUMP)
            wanted = *size < JUMP ? JUMP : *size < WINDOW ? *size : WINDOW;
        window_size = left < wanted ? left : wanted;
        window_start = offset;
        window = hashing_window();
        if (medium_read(medium, window, window_size, medium->header.layer_offset + offset) < 0) {
            window_size = 0;
            return NULL;
        }
    }
    if (*size > window_start + window_size - offset)
        *size = window_start + window_size - offset;
    return window + (offset - window_start);
}

static int write_all(int fd, const uint8_t *bytes, uint64_t size, uint64_t position)
{
    while (size) {
        ssize_t n = pwrite(fd, bytes, size, (off_t)position);

        if (n < 0 && errno != EINTR)
            return -1;
        if (n > 0) {
            bytes += n;
            size -= (uint64_t)n;
            position += (uint64_t)n;
        }
    }
    return 0;
}

static bool is_zero(const uint8_t *bytes, uint64_t size)
{
    return !bytes[0] && !memcmp(bytes, bytes + 1, size - 1);
}

/* The same, but for blocks of zeros: a file that was just made has them there unwritten. */
static int write_sparse(int fd, const uint8_t *bytes, uint64_t size, uint64_t position)
{
    uint64_t done = 0, from = 0; /* bytes from there on are not written yet */

    while (done < size) {
        uint64_t piece = BLOCK - (position + done) % BLOCK; /* up to a block of the file */

        if (piece > size - done)
            piece = size - done;
        if (is_zero(bytes + done, piece)) {
            if (write_all(fd, bytes + from, done - from, position + from) < 0)
                return -1;
            from = done + piece;
        }
        done += piece;
    }
    return write_all(fd, bytes + from, done - from, position + from);
}

static int write_content(const struct change *change, const struct item *item, int fd)
{
    const struct entry_record *record = item->record;
    uint64_t offset = record->offset, left = record->size;
    int (*put)(int, const uint8_t *, uint64_t, uint64_t) =
        record->holes ? write_sparse : write_all;

    if (!left)
        hashing_add(item, (const uint8_t *)"", 0, true);
    while (left) {
        uint64_t size = left;
        const uint8_t *bytes = layer_bytes(&change->medium, offset, &size);

        if (!bytes)
            return -1;
        hashing_add(item, bytes, size, size == left);
        if (step(STAGE_WRITE) || put(fd, bytes, size, record->size - left) < 0)
            return fail_errno(item->path, "writing the new content");
        offset += size;
        left -= size;
    }
    if (record->holes && ftruncate(fd, (off_t)record->size) < 0)
        return fail_errno(item->path, "ending the new content");
    return 0;
}

static int check_hashes(const struct item *damaged)
{
    return damaged ? fail("medium", damaged->path, "the content on the medium is damaged") : 0;
}

static int stage_file(const struct change *change, struct item *item, const char *name)
{
    struct place place = {.dir = item->dir->fd, .name = name};
    struct status now;
    int result;

    place.fd = openat(place.dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
                      item->record->mode & 0777);
    if (place.fd < 0)
        return fail_errno(item->path, "making the new file");
    item->staged = true;
    result = look(place.fd, "", &now);
    if (result < 0)
        fail_errno(item->path, "looking at the new file");
    item->inode = now.inode;
    if (!result)
        result = write_content(change, item, place.fd);
    if (!result)
        result = set_attributes(change, item, &place, &now, item->dir->default_acl);
    if (close(place.fd) < 0 && !result) /* some file systems tell of a full disk here */
        result = fail_errno(item->path, "closing the new file");
    return result;
}

/* Its attributes wait until everything is in it: they would be inherited, and its time changed. */
static int stage_directory(const struct change *change, struct item *item, const char *name)
{
    struct place place = {.dir = item->dir->fd, .name = name};
    struct status now;
    int result;

    if (mkdirat(place.dir, name, 0700) < 0)
        return fail_errno(item->path, "making the new directory");
    item->staged = true;
    place.fd = openat(place.dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (place.fd < 0 || look(place.fd, "", &now) < 0)
        return fail_errno(item->path, "opening the new directory");
    item->inode = now.inode;
    if (item->own) {
        item->own->fd = place.fd;
        item->own->status = now;
        item->own->default_acl = item->dir->default_acl;
        return 0;
    }
    result = set_attributes(change, item, &place, &now, item->dir->default_acl);
    close(place.fd);
    return result;
}

static int make_node(const struct change *change, const struct item *item, const char *name)
{
    const struct entry_record *record = item->record;
    static const mode_t types[] = {
        [KIND_FIFO] = S_IFIFO, [KIND_CHAR] = S_IFCHR, [KIND_BLOCK] = S_IFBLK};

    if (record->kind == KIND_SYMLINK)
        return symlinkat(text(&change->medium, record->target), item->dir->fd, name);
    return mknodat(item->dir->fd, name, types[record->kind] | (record->mode & 0777),
                   makedev(record->major, record->minor));
}

static int stage_node(const struct change *change, struct item *item, const char *name)
{
    struct place place = {.dir = item->dir->fd, .name = name, .fd = -1};
    struct status now;

    if (make_node(change, item, name) < 0)
        return fail_errno(item->path, "making the new symbolic link or node");
    item->staged = true;
    if (look(place.dir, name, &now) < 0)
        return fail_errno(item->path, "looking at what was made");
    item->inode = now.inode;
    return set_attributes(change, item, &place, &now, item->dir->default_acl);
}

static const char *staged_name(const struct change *change, const struct item *item,
                               char buffer[RESERVED_SIZE])
{
    if (item->op == OP_INSIDE)
        return item->name;
    reserved_name(change, item, buffer);
    return buffer;
}

static int stage_link(const struct change *change, struct item *item, const char *name)
{
    const struct item *source = &change->items[item->record->link];
    char buffer[RESERVED_SIZE];

    if (linkat(source->dir->fd, staged_name(change, source, buffer), item->dir->fd, name, 0) < 0)
        return fail_errno(item->path, "making the hard link");
    item->staged = true;
    item->inode = source->inode;
    return 0;
}

static int stage_item(const struct change *change, struct item *item)
{
    char buffer[RESERVED_SIZE];
    const char *name = staged_name(change, item, buffer);

    if (step(STAGE_CREATE))
        return fail_errno(item->path, "staging");
    switch (item->record->kind) {
    case KIND_FILE:
        return stage_file(change, item, name);
    case KIND_DIRECTORY:
        return stage_directory(change, item, name);
    case KIND_HARDLINK:
        return stage_link(change, item, name);
    default:
        return stage_node(change, item, name);
    }
}

static int finish_directory(const struct change *change, const struct item *item)
{
    struct place place = {.fd = item->own->fd};

    if (step(STAGE_DIRECTORY))
        return fail_errno(item->path, "finishing the new directory");
    return set_attributes(change, item, &place, &item->own->status, item->own->default_acl);
}

int sync_file_systems(const struct change *change, bool all)
{
    for (uint32_t i = 0; i < change->n_file_systems; i++)
        if ((all || i != change->state_fs) && syncfs(change->file_systems[i].fd) < 0)
            return fail_errno(change->file_systems[i].path, "writing the file system out");
    return 0;
}

static bool is_staged_anew(const struct item *item)
{
    return item->op != OP_META && item->op != OP_TIME && item->op != OP_DELETE;
}

static int stage_items(struct change *change)
{
    uint64_t bytes = 0;
    int result = 0;

    for (uint32_t i = 0; i < change->n_items; i++)
        if (is_staged_anew(&change->items[i]) && change->items[i].record->kind == KIND_FILE)
            bytes += change->items[i].record->size;
    hashing_start(bytes);
    for (uint32_t i = 0; i < change->n_items && !result; i++)
        if (is_staged_anew(&change->items[i])) {
            result = stage_item(change, &change->items[i]);
            if (!result)
                result = check_hashes(hashing_damaged());
        }
    if (result) {
        hashing_end(); /* the first failure is the one to tell */
        return result;
    }
    return check_hashes(hashing_end());
}

int stage(struct change *change)
{
    if (journal_create(change) < 0 || stage_items(change) < 0)
        return -1;
    for (uint32_t i = change->n_items; i-- > 0;) {
        const struct item *item = &change->items[i];

        if (item->own && item->own->maker && finish_directory(change, item) < 0)
            return -1;
    }
    return 0;
}

static int unstage_item(const struct change *change, struct item *item, enum staged_by by)
{
    char name[RESERVED_SIZE];
    uint64_t inode;

    if (by == STAGED_HERE && !item->staged)
        return 0;
    reserved_name(change, item, name);
    if (by == STAGED_AS_PLANNED) {
        if (inode_at(item->dir->fd, name, &inode) < 0)
            return -1;
        if (inode != item->inode)
            return 0;
    }
    if (step(UNDO_REMOVE) || remove_tree(item->dir->fd, name) < 0)
        return -1;
    item->staged = false;
    return 0;
}

int unstage(struct change *change, enum staged_by by)
{
    int result = 0;

    for (uint32_t i = 0; i < change->n_order; i++) {
        struct item *item = change->order[i];

        if ((item->op == OP_NEW || item->op == OP_REPLACE) && unstage_item(change, item, by) < 0) {
            complain("undo-failed", item->path, "removing what was staged");
            result = -1;
        }
    }
    return result;
}
