/*
 * What it is: mounts inside the workspace that keep what is protected as it is. They are made before
 * bubblewrap starts, which then needs one bind for the whole workspace (it reads its mount table for
 * each bind). What it is not: the choice of what is protected; that stands in the plan.
 */
#ifndef CLOISTER_HOLD_H
#define CLOISTER_HOLD_H

#include <stddef.h>

enum { HOLD_FIELDS = 3 }; /* "ro" or "rw", source (empty: the target itself), target */

/* Make the mounts in order; 0, or -1 with errno. Only in a mount namespace of our own. */
int hold_all(char **fields, size_t count);

/* Whether this kernel lets us make such a namespace and mount: the exit code of `cloister-shim trial`, 0 for yes. */
int hold_trial(void);

#endif
