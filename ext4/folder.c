/* Folders: read once, then found by hash. libext2fs looks at each name for each lookup. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "view.h"

#define MOST_NAMES ((uint32_t)1 << 22)
#define MOST_TEXT ((size_t)1 << 28)

static struct cache folders;

struct reading {
	struct name *names;
	char *text;
	uint32_t count, room;
	size_t size, space;
	int failed;
};

static uint32_t hash_of(const char *text, size_t length)
{
	uint32_t hash = 2166136261u; /* FNV-1a */

	for (size_t at = 0; at < length; at++)
		hash = (hash ^ (unsigned char)text[at]) * 16777619u;
	return hash;
}

static bool make_room(struct reading *reading, size_t length)
{
	if (reading->count == reading->room) {
		const uint32_t room = reading->room ? 2 * reading->room : 64;
		struct name *names = room > MOST_NAMES ? NULL : realloc(reading->names, room * sizeof *names);

		if (names == NULL)
			return false;
		reading->names = names;
		reading->room = room;
	}
	if (reading->size + length > reading->space) {
		const size_t space = reading->space ? 2 * reading->space : 2048;
		char *text = space > MOST_TEXT ? NULL : realloc(reading->text, space);

		if (text == NULL)
			return false;
		reading->text = text;
		reading->space = space;
	}
	return true;
}

static int take_name(ext2_ino_t folder, int entry, struct ext2_dir_entry *found, int offset,
                     int block_size, char *block, void *data)
{
	struct reading *reading = data;
	const size_t length = (size_t)ext2fs_dirent_name_len(found);

	(void)folder;
	(void)entry;
	(void)offset;
	(void)block_size;
	(void)block;
	if (length == 0 || memchr(found->name, '/', length) || memchr(found->name, '\0', length)) {
		reading->failed = EIO;
		return DIRENT_ABORT;
	}
	if (!make_room(reading, length + 1)) {
		reading->failed = ENOMEM;
		return DIRENT_ABORT;
	}
	reading->names[reading->count++] = (struct name){
		.number = found->inode,
		.at = (uint32_t)reading->size,
		.length = (uint8_t)length,
		.type = (uint8_t)ext2fs_dirent_file_type(found),
	};
	memcpy(reading->text + reading->size, found->name, length);
	reading->text[reading->size + length] = '\0';
	reading->size += length + 1;
	return 0;
}

/* One block of memory: buckets, names, text. */
static struct folder *put_together(const struct reading *reading, size_t *bytes)
{
	uint32_t buckets = 1;
	struct folder *folder;
	struct name *names;
	size_t names_at, text_at;

	while (buckets < reading->count)
		buckets *= 2;
	names_at = sizeof *folder + buckets * sizeof folder->first[0];
	text_at = names_at + reading->count * sizeof *names;
	*bytes = text_at + reading->size;
	folder = calloc(1, *bytes);
	if (folder == NULL)
		return NULL;
	folder->count = reading->count;
	folder->buckets = buckets;
	folder->names_at = names_at;
	folder->text_at = text_at;
	names = (struct name *)(void *)((char *)folder + names_at);
	if (reading->count > 0) {
		memcpy(names, reading->names, reading->count * sizeof *names);
		memcpy((char *)folder + text_at, reading->text, reading->size);
	}
	for (uint32_t place = reading->count; place-- > 0;) { /* of two, the first is found */
		const char *text = (char *)folder + text_at + names[place].at;
		uint32_t *first = &folder->first[hash_of(text, names[place].length) & (buckets - 1)];

		names[place].next = *first;
		*first = place + 1;
	}
	return folder;
}

int open_folder(struct view *view, ext2_ino_t number, const struct folder **folder)
{
	struct reading reading = {0};
	struct ext2_inode_large *inode;
	struct folder *made = cache_find(&folders, number);
	size_t bytes = 0;
	errcode_t error;

	*folder = made;
	if (made != NULL)
		return 0;
	reading.failed = read_inode(view, number, &inode);
	if (reading.failed)
		return reading.failed;
	if (!LINUX_S_ISDIR(inode->i_mode))
		return ENOTDIR;
	error = ext2fs_dir_iterate2(view->fs, number, 0, NULL, take_name, &reading);
	if (error && !reading.failed)
		reading.failed = error_number(error);
	if (!reading.failed) {
		made = put_together(&reading, &bytes);
		reading.failed = made == NULL ? ENOMEM : 0;
	}
	free(reading.names);
	free(reading.text);
	if (reading.failed)
		return reading.failed;
	cache_keep(&folders, number, made, bytes);
	*folder = made;
	return 0;
}

const char *name_at(const struct folder *folder, uint32_t place, const struct name **name)
{
	*name = (const struct name *)(const void *)((const char *)folder + folder->names_at) + place;
	return (const char *)folder + folder->text_at + (*name)->at;
}

int find_name(const struct folder *folder, const char *text, ext2_ino_t *number)
{
	const size_t length = strlen(text);
	uint32_t next = folder->first[hash_of(text, length) & (folder->buckets - 1)];

	while (next != 0) {
		const struct name *name;
		const char *found = name_at(folder, next - 1, &name);

		if (name->length == length && memcmp(found, text, length) == 0) {
			*number = name->number;
			return 0;
		}
		next = name->next;
	}
	return ENOENT;
}
