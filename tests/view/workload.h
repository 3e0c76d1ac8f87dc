/* A seeded workload of file operations: the tree that it knows of, and chance. */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NAME_SIZE 1024

/* What the workload knows of: paths below the working directory, and what stands there. */
enum kind { FILE_NODE, DIR_NODE, LINK_NODE, OTHER_NODE, KINDS };

struct node {
    char *path;
    enum kind kind;
};

/* One operation: 0, or -1 with errno. */
struct operation {
    const char *name;
    int weight;
    int (*run)(void);
};

extern const struct operation operations[];
extern const size_t operation_count;
extern uint64_t budget; /* bytes that may still be written */
extern bool may_sync;

uint64_t chance(uint64_t below);
bool one_in(uint64_t n);
size_t random_bytes(void *to, size_t size);

/* A random known path of this kind; NULL where there is none. */
const char *pick(enum kind kind);
const char *pick_any(void);
/* A path that nothing stands at, in a random known folder. */
const char *fresh(char out[NAME_SIZE], const char *prefix);
void add(const char *path, enum kind kind);
void forget(const char *path);
/* Moves a path and all below it. */
void moved(const char *from, const char *to);
void swapped(const char *one, const char *other);
enum kind kind_of(const char *path);

#endif
