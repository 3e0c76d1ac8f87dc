/* Shows an ext4 file system that lies in a file, read-only, by FUSE: the lower tree of a shadow.
 *
 * It never changes, so the kernel may keep all that it was told: names and attributes, pages, what
 * a folder holds, where a link leads; and it need not say what it opens. What a guest's file
 * system says is checked before it is used; libext2fs does the same for what it reads.
 *
 * Source: Linux include/uapi/linux/fuse.h, fs/fuse/{dir,file,readdir}.c;
 * Documentation/filesystems/ext4; libext2fs(3), e2fsprogs 1.47, lib/ext2fs/ext2fs.h.
 */
#ifndef VIEW_H
#define VIEW_H

#include <ext2fs/ext2fs.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

struct view {
	ext2_filsys fs;
	int image; /* the same file, for data */
};

/* All return 0 or an errno. */

/* --- attributes.c --- */

/* An inode with all that lies in its space; valid until the next call. */
int read_inode(struct view *view, ext2_ino_t number, struct ext2_inode_large **inode);
void fill_stat(struct view *view, ext2_ino_t number, const struct ext2_inode_large *inode,
               struct stat *st);
/* The value of an extended attribute; the caller frees it. ENODATA when there is none. */
int get_attribute(struct view *view, ext2_ino_t number, const char *name, void **value,
                  size_t *size);
/* The names, each with its end; the caller frees them. */
int list_attributes(struct view *view, ext2_ino_t number, char **names, size_t *size);
int error_number(errcode_t error);

/* --- cache.c: what was worked out for an inode, the oldest goes first --- */

struct cached {
	ext2_ino_t number;
	uint64_t used;
	size_t bytes;
	void *value; /* one block of malloc */
};

struct cache {
	struct cached slots[256];
	uint64_t now;
	size_t bytes;
};

void *cache_find(struct cache *cache, ext2_ino_t number);
void cache_keep(struct cache *cache, ext2_ino_t number, void *value, size_t bytes);

/* --- folder.c --- */

struct name {
	ext2_ino_t number;
	uint32_t next; /* with the same hash; 0 is the end, else one more than its place */
	uint32_t at;   /* of the text */
	uint8_t length;
	uint8_t type; /* EXT2_FT_* */
};

struct folder {
	uint32_t count, buckets; /* the latter a power of two */
	size_t names_at, text_at;
	uint32_t first[]; /* of each bucket, as in struct name */
};

int open_folder(struct view *view, ext2_ino_t number, const struct folder **folder);
int find_name(const struct folder *folder, const char *text, ext2_ino_t *number);
/* The name at a place below folder->count; returns its text, which has an end. */
const char *name_at(const struct folder *folder, uint32_t place, const struct name **name);

/* --- content.c --- */

/* Read what is below the end of the file; `got` is less than `size` only there. */
int read_content(struct view *view, ext2_ino_t number, struct ext2_inode_large *inode, char *data,
                 size_t size, uint64_t at, size_t *got);
/* Where a symbolic link leads; `target` has room for PATH_MAX bytes and gets an end. */
int read_target(struct view *view, ext2_ino_t number, struct ext2_inode_large *inode,
                char *target);

#endif
