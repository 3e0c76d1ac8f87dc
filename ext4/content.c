/* What files hold: by their extents where they have them, else as libext2fs reads it. */
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "view.h"

#define MOST_RUNS ((size_t)1 << 20)
#define MOST_STEPS (4 * MOST_RUNS) /* a damaged tree may lead to the same blocks again and again */

struct run {
	uint64_t from, to, block; /* blocks of the file; where the first one lies */
};

struct runs {
	size_t count;
	struct run all[];
};

static struct cache known;

static int add_run(struct view *view, struct runs **runs, size_t *room,
                   const struct ext2fs_extent *extent)
{
	const struct run run = {extent->e_lblk, extent->e_lblk + extent->e_len, extent->e_pblk};
	const uint64_t end = ext2fs_blocks_count(view->fs->super);
	const size_t count = (*runs)->count;

	if (run.block > end || extent->e_len > end - run.block)
		return EIO;
	if (count > 0 && (*runs)->all[count - 1].to > run.from)
		return EIO;
	if (count == *room) {
		const size_t more = 2 * *room;
		struct runs *larger =
			more > MOST_RUNS ? NULL : realloc(*runs, sizeof **runs + more * sizeof run);

		if (larger == NULL)
			return EFBIG;
		*runs = larger;
		*room = more;
	}
	(*runs)->all[(*runs)->count++] = run;
	return 0;
}

static int gather(struct view *view, ext2_extent_handle_t handle, struct runs **runs, size_t *room)
{
	struct ext2fs_extent extent;
	errcode_t error = ext2fs_extent_get(handle, EXT2_EXTENT_ROOT, &extent);

	for (size_t step = 0; !error; step++) {
		int failed = step > MOST_STEPS ? EFBIG : 0;

		if (!failed && extent.e_flags & EXT2_EXTENT_FLAGS_LEAF &&
		    !(extent.e_flags & EXT2_EXTENT_FLAGS_UNINIT))
			failed = add_run(view, runs, room, &extent);
		if (failed)
			return failed;
		error = ext2fs_extent_get(handle, EXT2_EXTENT_NEXT, &extent);
	}
	if (error == EXT2_ET_EXTENT_NO_NEXT || error == EXT2_ET_NO_CURRENT_NODE)
		return 0;
	return error_number(error);
}

static int open_runs(struct view *view, ext2_ino_t number, struct ext2_inode_large *inode,
                     const struct runs **found)
{
	struct runs *runs = cache_find(&known, number);
	ext2_extent_handle_t handle;
	size_t room = 4;
	errcode_t error;
	int failed;

	*found = runs;
	if (runs != NULL)
		return 0;
	error = ext2fs_extent_open2(view->fs, number, (struct ext2_inode *)inode, &handle);
	if (error)
		return error_number(error);
	runs = calloc(1, sizeof *runs + room * sizeof runs->all[0]);
	failed = runs == NULL ? ENOMEM : gather(view, handle, &runs, &room);
	ext2fs_extent_free(handle);
	if (failed) {
		free(runs);
		return failed;
	}
	cache_keep(&known, number, runs, sizeof *runs + room * sizeof runs->all[0]);
	*found = runs;
	return 0;
}

static int read_image(const struct view *view, char *data, size_t size, uint64_t at)
{
	while (size > 0) {
		const ssize_t got = pread(view->image, data, size, (off_t)at);

		if (got <= 0)
			return got < 0 ? errno : EIO;
		data += got;
		at += (uint64_t)got;
		size -= (size_t)got;
	}
	return 0;
}

/* `size` bytes at `at` are below the end of the file. */
static int read_runs(struct view *view, const struct runs *runs, char *data, size_t size,
                     uint64_t at)
{
	const uint64_t block = view->fs->blocksize;
	size_t low = 0, high = runs->count;

	while (low < high) { /* the first run that ends behind `at` */
		const size_t middle = (low + high) / 2;

		if (runs->all[middle].to * block <= at)
			low = middle + 1;
		else
			high = middle;
	}
	memset(data, 0, size);
	for (; low < runs->count && runs->all[low].from * block < at + size; low++) {
		const struct run *run = &runs->all[low];
		const uint64_t from = run->from * block > at ? run->from * block : at;
		const uint64_t to = run->to * block < at + size ? run->to * block : at + size;
		const uint64_t place = run->block * block + (from - run->from * block);
		const int failed = read_image(view, data + (from - at), (size_t)(to - from), place);

		if (failed)
			return failed;
	}
	return 0;
}

static int read_by_library(struct view *view, ext2_ino_t number, struct ext2_inode_large *inode,
                           char *data, size_t size, uint64_t at)
{
	ext2_file_t file;
	unsigned int got = 0;
	errcode_t error =
		ext2fs_file_open2(view->fs, number, (struct ext2_inode *)inode, 0, &file);

	if (error)
		return error_number(error);
	error = ext2fs_file_llseek(file, at, EXT2_SEEK_SET, NULL);
	while (!error && size > 0) {
		error = ext2fs_file_read(file, data, (unsigned int)size, &got);
		if (!error && got == 0)
			error = EIO;
		data += got;
		size -= got;
	}
	ext2fs_file_close(file);
	return error_number(error);
}

int read_content(struct view *view, ext2_ino_t number, struct ext2_inode_large *inode, char *data,
                 size_t size, uint64_t at, size_t *got)
{
	const uint64_t end = EXT2_I_SIZE(inode);
	const struct runs *runs;
	int failed;

	*got = at >= end ? 0 : size < end - at ? size : (size_t)(end - at);
	if (*got == 0)
		return 0;
	if (!(inode->i_flags & EXT4_EXTENTS_FL) || inode->i_flags & EXT4_INLINE_DATA_FL)
		return read_by_library(view, number, inode, data, *got, at);
	failed = open_runs(view, number, inode, &runs);
	return failed ? failed : read_runs(view, runs, data, *got, at);
}

int read_target(struct view *view, ext2_ino_t number, struct ext2_inode_large *inode, char *target)
{
	const uint64_t length = EXT2_I_SIZE(inode);
	size_t got = 0;
	int failed = 0;

	if (!LINUX_S_ISLNK(inode->i_mode))
		return EINVAL;
	if (length == 0 || length >= PATH_MAX)
		return EIO;
	if (!(inode->i_flags & EXT4_INLINE_DATA_FL) &&
	    ext2fs_is_fast_symlink((struct ext2_inode *)inode)) {
		if (length > sizeof inode->i_block)
			return EIO;
		memcpy(target, inode->i_block, (size_t)length);
		got = (size_t)length;
	} else {
		failed = read_content(view, number, inode, target, (size_t)length, 0, &got);
	}
	target[got] = '\0';
	return failed;
}
