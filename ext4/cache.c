/* What was worked out for an inode; at most 256, and 128 MiB of them. */
#include <stdlib.h>

#include "view.h"

#define SLOTS (sizeof ((struct cache *)0)->slots / sizeof(struct cached))
#define MOST_BYTES ((size_t)128 << 20)

void *cache_find(struct cache *cache, ext2_ino_t number)
{
	for (size_t slot = 0; slot < SLOTS; slot++) {
		struct cached *one = &cache->slots[slot];

		if (one->value != NULL && one->number == number) {
			one->used = ++cache->now;
			return one->value;
		}
	}
	return NULL;
}

static void drop(struct cache *cache, struct cached *one)
{
	cache->bytes -= one->bytes;
	free(one->value);
	one->value = NULL;
}

static struct cached *oldest(struct cache *cache)
{
	struct cached *found = NULL;

	for (size_t slot = 0; slot < SLOTS; slot++) {
		struct cached *one = &cache->slots[slot];

		if (one->value != NULL && (found == NULL || one->used < found->used))
			found = one;
	}
	return found;
}

void cache_keep(struct cache *cache, ext2_ino_t number, void *value, size_t bytes)
{
	struct cached *place = NULL;

	while (cache->bytes > MOST_BYTES - (bytes < MOST_BYTES ? bytes : MOST_BYTES) &&
	       oldest(cache) != NULL)
		drop(cache, oldest(cache));
	for (size_t slot = 0; slot < SLOTS && place == NULL; slot++)
		if (cache->slots[slot].value == NULL)
			place = &cache->slots[slot];
	if (place == NULL) {
		place = oldest(cache);
		drop(cache, place);
	}
	*place = (struct cached){number, ++cache->now, bytes, value};
	cache->bytes += bytes;
}
