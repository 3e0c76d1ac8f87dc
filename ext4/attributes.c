/* Inodes: what stat(2) tells of them, and extended attributes. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "view.h"

#define LARGEST_LIST 65536 /* XATTR_LIST_MAX */

int error_number(errcode_t error)
{
	if (error >= 0 && error < 256)
		return (int)error;
	switch (error) {
	case EXT2_ET_NO_MEMORY:
		return ENOMEM;
	case EXT2_ET_FILE_NOT_FOUND:
		return ENOENT;
	case EXT2_ET_NO_DIRECTORY:
		return ENOTDIR;
	case EXT2_ET_EA_KEY_NOT_FOUND:
		return ENODATA;
	default:
		return EIO;
	}
}

int read_inode(struct view *view, ext2_ino_t number, struct ext2_inode_large **inode)
{
	static struct ext2_inode_large *space;
	const int size = EXT2_INODE_SIZE(view->fs->super);

	if (space == NULL) {
		const size_t room = (size_t)size > sizeof *space ? (size_t)size : sizeof *space;

		space = calloc(1, room);
		if (space == NULL)
			return ENOMEM;
	}
	if (number != EXT2_ROOT_INO && number < EXT2_FIRST_INODE(view->fs->super))
		return EIO; /* the journal and others that are in no folder */
	*inode = space;
	return error_number(ext2fs_read_inode_full(view->fs, number, (struct ext2_inode *)space, size));
}

/* A time: 32 bits with a sign, of which two more bits stand before the nanoseconds. */
static struct timespec time_of(uint32_t seconds, const uint32_t *extra)
{
	struct timespec time = {(int32_t)seconds, 0};

	if (extra != NULL) {
		time.tv_sec += (int64_t)(*extra & 3) << 32;
		time.tv_nsec = *extra >> 2;
		if (time.tv_nsec > 999999999)
			time.tv_nsec = 0;
	}
	return time;
}

void fill_stat(struct view *view, ext2_ino_t number, const struct ext2_inode_large *inode,
               struct stat *st)
{
	const size_t size = EXT2_INODE_SIZE(view->fs->super);
	const size_t used =
		size > EXT2_GOOD_OLD_INODE_SIZE ? EXT2_GOOD_OLD_INODE_SIZE + (size_t)inode->i_extra_isize
						: size;
#define EXTRA(field)                                                                              \
	(offsetof(struct ext2_inode_large, field) + sizeof inode->field <= used &&                 \
			 offsetof(struct ext2_inode_large, field) + sizeof inode->field <= size    \
		 ? &inode->field                                                                   \
		 : NULL)

	*st = (struct stat){
		.st_ino = number,
		.st_mode = inode->i_mode,
		.st_nlink = inode->i_links_count,
		.st_uid = inode_uid(*inode),
		.st_gid = inode_gid(*inode),
		.st_size = (off_t)EXT2_I_SIZE(inode),
		.st_blksize = (blksize_t)view->fs->blocksize,
		.st_blocks = (blkcnt_t)ext2fs_get_stat_i_blocks(view->fs, (struct ext2_inode *)inode),
		.st_atim = time_of(inode->i_atime, EXTRA(i_atime_extra)),
		.st_mtim = time_of(inode->i_mtime, EXTRA(i_mtime_extra)),
		.st_ctim = time_of(inode->i_ctime, EXTRA(i_ctime_extra)),
	};
	if (S_ISREG(st->st_mode) && inode->i_flags & EXT4_INLINE_DATA_FL)
		st->st_blocks += (st->st_size + 511) >> 9; /* fs/ext4/inode.c, ext4_file_getattr */
	if (S_ISCHR(st->st_mode) || S_ISBLK(st->st_mode)) {
		/* fs/ext4/inode.c, ext4_iget: old_decode_dev, new_decode_dev */
		const uint32_t old = inode->i_block[0], new = inode->i_block[1];

		st->st_rdev = old != 0 ? makedev(old >> 8 & 0xff, old & 0xff)
				       : makedev((new & 0xfff00) >> 8, (new & 0xff) | (new >> 12 & 0xfff00));
	}
}

/* Most have none, and who asks need not wait for libext2fs to look for them. */
static bool has_attributes(struct view *view, const struct ext2_inode_large *inode)
{
	const size_t size = EXT2_INODE_SIZE(view->fs->super);
	const size_t at = EXT2_GOOD_OLD_INODE_SIZE + (size_t)inode->i_extra_isize;
	uint32_t magic = 0;

	if (inode->i_file_acl != 0 || inode->osd2.linux2.l_i_file_acl_high != 0)
		return true;
	if (size > EXT2_GOOD_OLD_INODE_SIZE && at + sizeof magic <= size)
		memcpy(&magic, (const char *)inode + at, sizeof magic);
	return magic == EXT2_EXT_ATTR_MAGIC;
}

static int open_attributes(struct view *view, ext2_ino_t number, struct ext2_xattr_handle **handle)
{
	struct ext2_inode_large *inode;
	errcode_t error;
	const int failed = read_inode(view, number, &inode);

	if (failed)
		return failed;
	if (!has_attributes(view, inode))
		return ENODATA;
	error = ext2fs_xattrs_open(view->fs, number, handle);
	if (error)
		return error_number(error);
	error = ext2fs_xattrs_read(*handle);
	if (error)
		ext2fs_xattrs_close(handle);
	return error_number(error);
}

/*
 * The content of small files, which the kernel does not show; and labels of SELinux, which the root of
 * a user namespace may not set: overlayfs would fail to copy up whatever has one (Linux v6.1
 * security/commoncap.c, cap_inode_setxattr). The guest's policy says what they are.
 */
static bool is_hidden(const char *name)
{
	return strcmp(name, "system.data") == 0 || strcmp(name, "security.selinux") == 0;
}

int get_attribute(struct view *view, ext2_ino_t number, const char *name, void **value,
                  size_t *size)
{
	struct ext2_xattr_handle *handle;
	void *found = NULL;
	int failed = open_attributes(view, number, &handle);

	if (failed)
		return failed;
	failed = is_hidden(name) ? ENODATA : error_number(ext2fs_xattr_get(handle, name, &found, size));
	ext2fs_xattrs_close(&handle);
	*value = found;
	return failed;
}

struct list {
	char *names;
	size_t size;
};

static int add_name(char *name, char *value, size_t value_size, void *data)
{
	struct list *list = data;
	const size_t length = strlen(name) + 1;

	(void)value;
	(void)value_size;
	if (is_hidden(name))
		return 0;
	if (list->size + length > LARGEST_LIST)
		return XATTR_ABORT;
	memcpy(list->names + list->size, name, length);
	list->size += length;
	return 0;
}

int list_attributes(struct view *view, ext2_ino_t number, char **names, size_t *size)
{
	struct ext2_xattr_handle *handle;
	struct list list = {NULL, 0};
	int failed = open_attributes(view, number, &handle);

	*names = NULL;
	*size = 0;
	if (failed)
		return failed == ENODATA ? 0 : failed;
	list.names = malloc(LARGEST_LIST);
	failed = list.names == NULL ? ENOMEM
				    : error_number(ext2fs_xattrs_iterate(handle, add_name, &list));
	ext2fs_xattrs_close(&handle);
	if (failed) {
		free(list.names);
		return failed;
	}
	*names = list.names;
	*size = list.size;
	return 0;
}
