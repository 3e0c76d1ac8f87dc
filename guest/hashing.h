/* SHA-256 of what is staged, by a thread of its own beside the writing. */
#ifndef HASHING_H
#define HASHING_H

#include "change.h"

/* Pieces of the layer lie in one of these; it stays as it is until its pieces are hashed. */
#define WINDOW (256u << 10)
#define WINDOWS 4

/* Starts the thread where it helps: with two processors, and bytes that are worth it. */
void hashing_start(uint64_t bytes);

/* The next window, once nothing of it waits to be hashed. */
uint8_t *hashing_window(void);

/* The next piece of a file, in the latest window. The last one is compared with the record. */
void hashing_add(const struct item *item, const uint8_t *bytes, uint64_t size, bool last);

/* A file of which the bytes are not those of its record, or NULL. Those of the latest pieces are
 * known at the end only. */
const struct item *hashing_damaged(void);

/* Waits until all is hashed, and ends the thread. */
const struct item *hashing_end(void);

#endif
