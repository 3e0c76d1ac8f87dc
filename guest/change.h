/* One run: the medium's entries bound to the guest's directories. */
#ifndef CHANGE_H
#define CHANGE_H

#include "medium.h"
#include "tree.h"

#include <sys/stat.h>

#define STATE_DIR "/var/lib/ouassister"
#define RESERVED ".ouassister-"
#define RESERVED_SIZE sizeof(RESERVED "0123456789ab-4294967295")
#define MAX_FILE_SYSTEMS 64
#define MAX_LOCKS 64

enum op {
    OP_INSIDE,  /* below a new directory, which brings it along */
    OP_NEW,     /* reserved name -> path, nothing was there */
    OP_REPLACE, /* reserved name <-> path */
    OP_DELETE,  /* path -> reserved name */
    OP_META,    /* a directory that stays gets other attributes */
    OP_TIME,    /* a file or symbolic link that stays gets another time */
};

struct item;

struct dir {
    const char *path;
    int fd;             /* -1 while closed */
    struct item *maker; /* the new directory's entry; NULL when the guest has the directory */
    struct status status;
    uint32_t fs;      /* index in file_systems; of guest directories only */
    bool default_acl; /* what is created here inherits an ACL, acl(5) */
    bool missing;     /* a conflict, and told */
};

/* What stood at the path; all of it is put back in a directory that OP_META changed. */
struct old_meta {
    uint32_t mode;
    uint32_t uid;
    uint32_t gid;
    uint32_t zero;
    int64_t mtime_ns;
};

struct item {
    const struct entry_record *record;
    const char *path;
    const char *name; /* its last component */
    struct dir *dir;
    struct dir *own; /* the directory record of the same path, or NULL */
    enum op op;
    bool staged;
    uint64_t inode; /* of what was staged */
    int meta_fd;    /* of OP_META */
    struct old_meta old;
    const uint8_t *old_xattrs; /* of OP_META, in the journal's form */
    bool left;         /* of a rollback: it is not as it was left, and stays so */
    bool time_changed; /* of a rollback and OP_META: names came or went since */
};

/* Path to item, open addressing. */
struct index {
    struct item **slots;
    uint64_t mask;
};

/* Where old files stay after an update, keep.c. */
struct kept {
    int fd;
    uint32_t fs;
};

struct file_system {
    int fd; /* some directory on it; not owned */
    uint32_t major;
    uint32_t minor;
    uint64_t bytes; /* needed */
    uint64_t inodes;
    const char *path;
};

struct change {
    struct medium medium;
    int root;
    int state; /* STATE_DIR */
    char id[65];
    struct dir *dirs;
    struct item *items;
    uint32_t n_items;
    struct item **order; /* all but OP_INSIDE, as they are committed */
    uint32_t n_order;
    struct file_system file_systems[MAX_FILE_SYSTEMS];
    uint32_t n_file_systems;
    uint32_t state_fs; /* the index of STATE_DIR's */
    struct index index;
    struct kept kept[MAX_FILE_SYSTEMS];
    uint32_t n_kept;
    bool kept_in_state; /* one of them is in STATE_DIR */
    uint64_t plan_end; /* of the journal: marks follow */
    uint64_t journal_end;
};

/* The entry changes a directory that stays. */
static inline bool changes_directory(const struct entry_record *entry)
{
    return entry->kind == KIND_DIRECTORY && entry->has_expected && S_ISDIR(entry->expected.mode);
}

/* Entries to operations, and their order. Reads nothing of the guest. */
int change_plan(struct change *change);

/* The item of a path, or NULL. */
struct item *change_find(const struct change *change, const char *path);

/* The name beside the target under which an item is staged, and its old inode kept. */
void reserved_name(const struct change *change, const struct item *item,
                   char name[RESERVED_SIZE]);

/* Opens every directory that the guest has. With telling, one that it has not any more is a
 * conflict, check() tells of the others, and then it fails. */
int change_open_dirs(struct change *change, bool telling);

/* The directory's descriptor; a new one is opened at its final path when it is not open. */
int dir_fd(struct change *change, struct dir *dir);

/* guest.c: is this the guest, what time is it, who holds the package manager. */
int guest_is_machine(const struct change *change);
int guest_is_boot(const struct change *change);
int guest_set_time(const char *seconds);
/* Takes 64 bytes from standard input. */
int guest_seed(void);
int guest_lock(const struct change *change);

/* check.c: compares every path with what the entry expects, and counts the room. Tells of each
 * path that is not as expected before it fails. */
int check(struct change *change);
/* Tells of one. The database is the package manager's. */
void conflict(const char *path, const char *how, bool database);
/* After check. */
int check_space(const struct change *change);

/* boot.c: a unit that ends what a power cut interrupts; without one the next resume does. */
void boot_leave(const struct change *change, bool written_out);
int boot_remove(const struct change *change);
/* Bytes that boot_leave needs. */
uint64_t boot_room(const struct change *change);

/* stage.c */
int stage(struct change *change);
enum staged_by {
    STAGED_HERE,        /* by this process: item->staged tells */
    STAGED_BEFORE_KILL, /* unknown how far: every reserved name that is there */
    STAGED_AS_PLANNED,  /* the journal has the inode numbers: those and no other */
};
int unstage(struct change *change, enum staged_by by);
/* syncfs of each file system touched, or of all but the journal's. */
int sync_file_systems(const struct change *change, bool all);

/* attributes.c */
struct place {
    int dir;
    const char *name;
    int fd; /* of the file itself, or -1: by name then, not following */
};
int set_attributes(const struct change *change, const struct item *item, const struct place *place,
                   const struct status *now, bool inherits_acl);
int set_mtime(const struct place *place, int64_t mtime_ns);
int meta_apply(const struct change *change, const struct item *item);
int meta_restore(const struct change *change, const struct item *item);

/* same.c: OP_TIME. */
#define OLD_TIME 1u
#define NEW_TIME 2u
/* Some file systems keep whole seconds. */
bool same_time(int64_t found, int64_t wanted);
/* Which of its two times stands at the path; 0 when it is not the file that was checked. */
int same_look(const struct item *item, unsigned *times);
int same_set(const struct item *item, bool old);
int same_commit(const struct item *item, bool recovering);
int same_verify(const struct item *item);
int same_undo(const struct item *item);
int same_turn(const struct item *item, bool back);

/* commit.c */
int commit(struct change *change, bool recovering);
int verify(struct change *change, bool recovering);
int undo(struct change *change);
/* After a kill: whether any rename was done. */
int commit_began(struct change *change, bool *began);
int cleanup(struct change *change);
/* Directory times, last of all: every rename in a directory changes them. */
int set_directory_times(struct change *change, bool old);

/* keep.c: old files after an update, so that it can be taken back. */
#define KEPT_SIZE sizeof "4294967295"
void kept_name(const struct change *change, const struct item *item, char name[KEPT_SIZE]);
/* Moves every old file from its reserved name to where it stays. Returns -1 when one cannot be. */
int keep(struct change *change);
/* Opens the folders that keep made. Returns -1 with errno. */
int kept_open(struct change *change);
/* The folder which has the item's name, and the inode of that; -1 as a folder for none. */
int kept_at(const struct change *change, const struct item *item, uint64_t *inode);
/* Renames a name of the item's directory to where old files stay. */
int kept_move(const struct change *change, const struct item *item, const char *from);
/* Removes everything that earlier change sets and this one kept, except the journal. */
int prune(struct change *change);

/* rollback.c: top_of is the item that is renamed when this one is. */
struct item *top_of(struct item *item);
/* Is everything as the update left it? Tells of each path that is not; those stay with leave. */
int check_back(struct change *change, bool recovering, bool leave);
/* Every path to what it was, or with back unset to what the update made of it. */
int turn(struct change *change, bool back);
int verify_back(struct change *change, bool recovering);
/* Removes what the update had made. */
int remove_new(struct change *change);

#endif
