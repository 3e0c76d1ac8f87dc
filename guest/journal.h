/* What outlives a killed applier: the journal of one change set, and the completion marker. */
#ifndef JOURNAL_H
#define JOURNAL_H

#include "change.h"

enum journal_state {
    JOURNAL_NONE,
    JOURNAL_STAGING, /* reserved names may be there; no rename was done */
    JOURNAL_PLANNED, /* everything is staged, renames may be done */
    JOURNAL_UNDOING, /* a failure was met: the only way is back */
};

/* Opens STATE_DIR and takes the lock of which there is one per guest. */
int state_open(struct change *change);

/* Reads the journal of this change set; refuses when another one has one. */
int journal_load(struct change *change, enum journal_state *state);

int journal_create(const struct change *change);
/* Inode numbers of what was staged, and what undo needs; durable with the next syncfs. */
int journal_write_plan(struct change *change);
int journal_mark_undo(const struct change *change);
int journal_remove(const struct change *change);

int marker_is_ours(const struct change *change, bool *ours);
/* By rename; durable with the next syncfs of STATE_DIR's file system, which it does. */
int marker_write(const struct change *change);

#endif
