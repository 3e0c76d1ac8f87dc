/* What outlives a killed applier: the journal of one change set, and the completion marker. */
#ifndef JOURNAL_H
#define JOURNAL_H

#include "change.h"

#include <time.h>

enum journal_state {
    JOURNAL_NONE,
    JOURNAL_STAGING, /* reserved names may be there; no rename was done */
    JOURNAL_PLANNED, /* everything is staged, renames may be done */
    JOURNAL_UNDOING, /* a failure was met: the only way is back */
    JOURNAL_ROLLING, /* the update was whole; it is being taken back */
    JOURNAL_STAYING, /* taking it back failed: the update stays */
};

/* Opens STATE_DIR and takes the lock of which there is one per guest. */
int state_open(struct change *change);

/* Reads the journal of this change set; refuses when another one has one. */
int journal_load(struct change *change, enum journal_state *state);

int journal_create(const struct change *change);
/* Inode numbers of what was staged, and what undo needs; durable with the next syncfs. */
int journal_write_plan(struct change *change);
int journal_mark_undo(struct change *change);
int journal_remove(const struct change *change);

/* The journal of a whole update stays under another name: with the old files, it is the undo. */
int journal_keep(const struct change *change);
/* Reads it; found is unset when there is none of this change set. */
int journal_load_kept(struct change *change, bool *found);
/* It is the journal again, with the mark of a rollback, all durable. */
int journal_begin_rollback(struct change *change);
int journal_mark_stay(struct change *change);

enum marker {
    MARKER_NONE, /* or another change set's */
    MARKER_APPLIED,
    MARKER_ROLLED_BACK,
};

int marker_read(const struct change *change, enum marker *marker);
/* By rename; durable with the next syncfs of STATE_DIR's file system. */
int marker_write(const struct change *change, enum marker marker, time_t now);

/* What the medium has of an attestation, with what this run has done; under another name first.
 * Its own comes after the marker's, and is durable with it. */
int attestation_draft(const struct change *change, time_t now);
int attestation_set(const struct change *change);

#endif
