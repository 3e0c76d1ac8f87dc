/* Usage: ext4-view IMAGE FOLDER; returns when the file system is there.
 *
 * FUSE calls the root 1 and ext4 calls it 2; all other numbers are the inodes' own.
 */
#define FUSE_USE_VERSION 35
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse_lowlevel.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "view.h"

#define FOR_EVER 86400.0
#define WHAT "ext4-view"
#define OPTIONS "ro,suid,dev,default_permissions,fsname=" WHAT ",subtype=ext4"

static struct view view;

static ext2_ino_t inode_of(fuse_ino_t node)
{
	if (node == FUSE_ROOT_ID)
		return EXT2_ROOT_INO;
	return node > UINT32_MAX ? 0 : (ext2_ino_t)node;
}

static void on_init(void *data, struct fuse_conn_info *connection)
{
	(void)data;
	connection->want |= connection->capable &
			    (FUSE_CAP_CACHE_SYMLINKS | FUSE_CAP_NO_OPEN_SUPPORT |
			     FUSE_CAP_NO_OPENDIR_SUPPORT | FUSE_CAP_READDIRPLUS |
			     FUSE_CAP_READDIRPLUS_AUTO | FUSE_CAP_PARALLEL_DIROPS |
			     FUSE_CAP_POSIX_ACL);
}

/* What is told of a name; the same for lookups and folders. */
static int entry_of(ext2_ino_t number, struct fuse_entry_param *entry)
{
	struct ext2_inode_large *inode;
	const int failed = read_inode(&view, number, &inode);

	if (failed)
		return failed;
	*entry = (struct fuse_entry_param){
		.ino = number == EXT2_ROOT_INO ? FUSE_ROOT_ID : number,
		.attr_timeout = FOR_EVER,
		.entry_timeout = FOR_EVER,
	};
	fill_stat(&view, number, inode, &entry->attr);
	return 0;
}

static void on_lookup(fuse_req_t request, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry = {.entry_timeout = FOR_EVER};
	const struct folder *folder;
	ext2_ino_t number = 0;
	int failed = open_folder(&view, inode_of(parent), &folder);

	if (!failed) {
		failed = find_name(folder, name, &number);
		if (failed == ENOENT) { /* a name that is not there is kept, too */
			fuse_reply_entry(request, &entry);
			return;
		}
	}
	if (!failed)
		failed = entry_of(number, &entry);
	if (failed)
		fuse_reply_err(request, failed);
	else
		fuse_reply_entry(request, &entry);
}

static void on_getattr(fuse_req_t request, fuse_ino_t node, struct fuse_file_info *file)
{
	struct fuse_entry_param entry;
	const int failed = entry_of(inode_of(node), &entry);

	(void)file;
	if (failed)
		fuse_reply_err(request, failed);
	else
		fuse_reply_attr(request, &entry.attr, FOR_EVER);
}

static void on_readlink(fuse_req_t request, fuse_ino_t node)
{
	struct ext2_inode_large *inode;
	char target[PATH_MAX];
	int failed = read_inode(&view, inode_of(node), &inode);

	if (!failed)
		failed = read_target(&view, inode_of(node), inode, target);
	if (failed)
		fuse_reply_err(request, failed);
	else
		fuse_reply_readlink(request, target);
}

/* From then on the kernel opens by itself (fs/fuse/file.c, fuse_file_open). */
static void on_open(fuse_req_t request, fuse_ino_t node, struct fuse_file_info *file)
{
	(void)node;
	(void)file;
	fuse_reply_err(request, ENOSYS);
}

static void on_read(fuse_req_t request, fuse_ino_t node, size_t size, off_t at,
                    struct fuse_file_info *file)
{
	static char *data;
	static size_t room;
	struct ext2_inode_large *inode;
	size_t got = 0;
	int failed = at < 0 ? EINVAL : read_inode(&view, inode_of(node), &inode);

	(void)file;
	if (!failed && size > room) {
		free(data);
		data = malloc(size);
		room = data != NULL ? size : 0;
		failed = data != NULL ? 0 : ENOMEM;
	}
	if (!failed)
		failed = read_content(&view, inode_of(node), inode, data, size, (uint64_t)at, &got);
	if (failed)
		fuse_reply_err(request, failed);
	else
		fuse_reply_buf(request, data, got);
}

static mode_t kind_of(uint8_t type)
{
	static const mode_t kinds[EXT2_FT_MAX] = {
		[EXT2_FT_REG_FILE] = S_IFREG, [EXT2_FT_DIR] = S_IFDIR, [EXT2_FT_CHRDEV] = S_IFCHR,
		[EXT2_FT_BLKDEV] = S_IFBLK,   [EXT2_FT_FIFO] = S_IFIFO, [EXT2_FT_SOCK] = S_IFSOCK,
		[EXT2_FT_SYMLINK] = S_IFLNK,
	};

	return type < EXT2_FT_MAX ? kinds[type] : 0;
}

static size_t add_entry(fuse_req_t request, char *data, size_t room, const char *text,
                        const struct name *name, uint32_t place, bool plus)
{
	struct fuse_entry_param entry = {.attr = {.st_ino = name->number, .st_mode = kind_of(name->type)}};

	if (!plus)
		return fuse_add_direntry(request, data, room, text, &entry.attr, place + 1);
	/* Node 0: the kernel asks when it needs it. It looks neither of the two up. */
	if (strcmp(text, ".") != 0 && strcmp(text, "..") != 0 && entry_of(name->number, &entry))
		entry = (struct fuse_entry_param){
			.attr = {.st_ino = name->number, .st_mode = kind_of(name->type)}};
	return fuse_add_direntry_plus(request, data, room, text, &entry, place + 1);
}

static void list(fuse_req_t request, fuse_ino_t node, size_t size, off_t at, bool plus)
{
	static char data[1 << 17];
	const size_t room = size < sizeof data ? size : sizeof data;
	const struct folder *folder;
	const int failed = open_folder(&view, inode_of(node), &folder);
	size_t filled = 0;

	if (failed || at < 0) {
		fuse_reply_err(request, failed ? failed : EINVAL);
		return;
	}
	for (uint64_t place = (uint64_t)at; place < folder->count; place++) {
		const struct name *name;
		const char *text = name_at(folder, (uint32_t)place, &name);
		const size_t needed = add_entry(request, data + filled, room - filled, text, name,
						(uint32_t)place, plus);

		if (needed > room - filled)
			break;
		filled += needed;
	}
	fuse_reply_buf(request, data, filled);
}

static void on_readdir(fuse_req_t request, fuse_ino_t node, size_t size, off_t at,
                       struct fuse_file_info *file)
{
	(void)file;
	list(request, node, size, at, false);
}

static void on_readdirplus(fuse_req_t request, fuse_ino_t node, size_t size, off_t at,
                           struct fuse_file_info *file)
{
	(void)file;
	list(request, node, size, at, true);
}

/* As getxattr(2) answers: how much there is, or all of it. */
static void reply_bytes(fuse_req_t request, int failed, char *bytes, size_t length, size_t room)
{
	if (failed)
		fuse_reply_err(request, failed);
	else if (room == 0)
		fuse_reply_xattr(request, length);
	else if (length > room)
		fuse_reply_err(request, ERANGE);
	else
		fuse_reply_buf(request, bytes, length);
}

static void on_getxattr(fuse_req_t request, fuse_ino_t node, const char *name, size_t size)
{
	void *value = NULL;
	size_t length = 0;
	const int failed = get_attribute(&view, inode_of(node), name, &value, &length);

	reply_bytes(request, failed, value, length, size);
	ext2fs_free_mem(&value);
}

static void on_listxattr(fuse_req_t request, fuse_ino_t node, size_t size)
{
	char *names = NULL;
	size_t length = 0;
	const int failed = list_attributes(&view, inode_of(node), &names, &length);

	reply_bytes(request, failed, names, length, size);
	free(names);
}

static void on_statfs(fuse_req_t request, fuse_ino_t node)
{
	const struct ext2_super_block *super = view.fs->super;
	const uint64_t blocks = ext2fs_blocks_count(view.fs->super);
	const uint64_t overhead = view.fs->desc_blocks + (uint64_t)view.fs->group_desc_count *
								 (view.fs->inode_blocks_per_group + 2);
	const uint64_t unused = ext2fs_free_blocks_count(view.fs->super);
	const uint64_t reserved = ext2fs_r_blocks_count(view.fs->super);

	(void)node;
	fuse_reply_statfs(request, &(struct statvfs){
		.f_bsize = view.fs->blocksize,
		.f_frsize = view.fs->blocksize,
		.f_blocks = blocks > overhead ? blocks - overhead : 0,
		.f_bfree = unused,
		.f_bavail = unused > reserved ? unused - reserved : 0,
		.f_files = super->s_inodes_count,
		.f_ffree = super->s_free_inodes_count,
		.f_favail = super->s_free_inodes_count,
		.f_namemax = EXT2_NAME_LEN,
	});
}

/* FS_IOC_GETFLAGS alone: overlayfs asks for it when it copies a file up. */
static void on_ioctl(fuse_req_t request, fuse_ino_t node, unsigned int command, void *argument,
                     struct fuse_file_info *file, unsigned int flags, const void *in,
                     size_t in_size, size_t out_size)
{
	struct ext2_inode_large *inode;
	uint32_t told;
	int failed;

	(void)argument;
	(void)file;
	(void)flags;
	(void)in;
	(void)in_size;
	if (command != (unsigned int)EXT2_IOC_GETFLAGS || out_size < sizeof told) {
		fuse_reply_err(request, ENOTTY);
		return;
	}
	failed = read_inode(&view, inode_of(node), &inode);
	if (failed) {
		fuse_reply_err(request, failed);
		return;
	}
	told = inode->i_flags & EXT2_FL_USER_VISIBLE;
	fuse_reply_ioctl(request, 0, &told, sizeof told);
}

static const struct fuse_lowlevel_ops operations = {
	.init = on_init,
	.lookup = on_lookup,
	.getattr = on_getattr,
	.readlink = on_readlink,
	.open = on_open,
	.read = on_read,
	.opendir = on_open,
	.readdir = on_readdir,
	.readdirplus = on_readdirplus,
	.getxattr = on_getxattr,
	.listxattr = on_listxattr,
	.statfs = on_statfs,
	.ioctl = on_ioctl,
};

static int open_image(const char *path)
{
	const errcode_t error =
		ext2fs_open2(path, NULL, EXT2_FLAG_64BITS, 0, 0, unix_io_manager, &view.fs);

	if (error) {
		fprintf(stderr, "%s is no ext4 file system that can be shown: %s\n", path,
			error_message(error));
		return 1;
	}
	if (ext2fs_has_feature_journal_needs_recovery(view.fs->super)) {
		fprintf(stderr, "%s: its journal has to be replayed first\n", path);
		return 1;
	}
	view.image = open(path, O_RDONLY | O_CLOEXEC);
	if (view.image < 0) {
		perror(path);
		return 1;
	}
	return 0;
}

int main(int count, char **words)
{
	char program[] = WHAT, before[] = "-o", mount_options[] = OPTIONS;
	char *options[] = {program, before, mount_options, NULL};
	struct fuse_args arguments = FUSE_ARGS_INIT(3, options);
	struct fuse_session *session;
	int status = 1;

	if (count != 3) {
		fprintf(stderr, "usage: " WHAT " IMAGE FOLDER\n");
		return 2;
	}
	if (open_image(words[1]))
		return 1;
	session = fuse_session_new(&arguments, &operations, sizeof operations, NULL);
	if (session == NULL)
		return 1;
	if (fuse_session_mount(session, words[2]) == 0) {
		if (fuse_daemonize(0) == 0)
			status = fuse_session_loop(session) != 0;
		fuse_session_unmount(session);
	}
	fuse_session_destroy(session);
	return status;
}
