/* The medium: what lies where on the block device, little endian (docs/design/0003-applier.md).
 *
 * Everything here is what the host's encoder wrote; nothing is used before medium.c has checked it.
 */
#ifndef MEDIUM_H
#define MEDIUM_H

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>

#define MEDIUM_MAGIC "OUAMEDIA"
#define MEDIUM_VERSION 1u
#define BLOCK 4096u
#define NONE UINT32_MAX

/* Bounds of what is worth reading; a change set of 13,000 files has a table of 4 MB. */
#define MAX_APPLIER (16u << 20)
#define MAX_TABLE (512u << 20)
#define MAX_RECORDS (1u << 20)
#define MAX_ATTESTATION (4u << 20)
#define MAX_XATTR (64u << 10) /* XATTR_SIZE_MAX, uapi/linux/limits.h */

struct medium_header {
    char magic[8];
    uint32_t version;
    uint32_t header_size;
    uint64_t medium_size;
    uint64_t applier_offset;
    uint64_t applier_size;
    uint8_t applier_sha256[32];
    uint64_t table_offset;
    uint64_t table_size;
    uint8_t table_sha256[32];
    uint64_t layer_offset;
    uint64_t layer_size;
    uint8_t changeset_id[32];
    char boot_id[40];
    char machine_id[40];
    uint8_t zero[3848];
};

/* A string in the table's last section; a NUL follows it there and is not counted. */
struct text {
    uint32_t offset;
    uint32_t length;
};

struct table_header {
    uint32_t dirs;
    uint32_t entries;
    uint32_t xattrs;
    uint32_t below;
    uint32_t locks;
    uint32_t attestation; /* length of its beginning, the first string; 0: there is none */
    uint64_t strings;
};

struct state_record {
    uint64_t inode;
    uint64_t size;
    int64_t mtime_ns;
    int64_t ctime_ns;
    uint32_t mode; /* with the type */
    uint32_t zero;
};

/* A directory that holds entries; sorted, each path once. */
struct dir_record {
    struct text path;
};

enum kind {
    KIND_FILE = 1,
    KIND_DIRECTORY,
    KIND_SYMLINK,
    KIND_HARDLINK,
    KIND_FIFO,
    KIND_CHAR,
    KIND_BLOCK,
    KIND_DELETE,
};

struct entry_record {
    struct text path;
    struct text target; /* of a symlink */
    uint32_t dir;       /* index of the directory it is in */
    uint32_t link;      /* index of the entry that a hard link names, or NONE */
    uint8_t kind;
    uint8_t has_expected;
    uint8_t late; /* of the package database: committed last */
    uint8_t same; /* as the guest has it but for its time, and not in the layer */
    uint32_t mode; /* permission bits */
    uint32_t uid;
    uint32_t gid;
    uint32_t major;
    uint32_t minor;
    int64_t mtime_ns;
    uint64_t size;
    uint64_t offset; /* in the layer */
    uint64_t holes;  /* bytes of it in whole blocks of zeros; 0 unless it is sparse */
    uint8_t sha256[32];
    struct state_record expected;
    uint32_t first_xattr;
    uint32_t xattrs;
    uint32_t first_below;
    uint32_t below;
};

struct xattr_record {
    struct text name;
    struct text value;
};

/* What must be below a directory that goes; sorted by path within one entry. */
struct below_record {
    struct text path;
    struct state_record state;
};

struct lock_record {
    struct text path;
};

static_assert(sizeof(struct medium_header) == BLOCK, "medium_header");
static_assert(sizeof(struct table_header) == 32, "table_header");
static_assert(sizeof(struct state_record) == 40, "state_record");
static_assert(sizeof(struct entry_record) == 168, "entry_record");
static_assert(sizeof(struct xattr_record) == 16, "xattr_record");
static_assert(sizeof(struct below_record) == 48, "below_record");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the medium is little endian");

struct medium {
    int device;
    struct medium_header header;
    void *table; /* owns what the pointers below point into */
    const struct table_header *counts;
    const struct dir_record *dirs;
    const struct entry_record *entries;
    const struct xattr_record *xattrs;
    const struct below_record *below;
    const struct lock_record *locks;
    const char *strings;
};

/* The string itself; its bounds were checked by medium_open. */
static inline const char *text(const struct medium *medium, struct text ref)
{
    return medium->strings + ref.offset;
}

static inline const char *attestation(const struct medium *medium)
{
    return medium->counts->attestation ? medium->strings : 0;
}

/* Opens the device and checks header, applier area and table.
 *
 * header_sha256 is the one secret-free fact that comes by another way than the medium: with it, a
 * flipped bit anywhere is seen. Returns -1 after fail().
 */
int medium_open(struct medium *medium, const char *device, const uint8_t header_sha256[32]);

/* The table's own rules: every reference in bounds, every path plain. Called by medium_open. */
int table_check(struct medium *medium);

/* Reads exactly size bytes. Returns -1 after fail(). */
int medium_read(const struct medium *medium, void *buffer, uint64_t size, uint64_t offset);

#endif
