/*
 * What it is: the Landlock layer (landlock(7)), applied to PID 1 before anything runs, so that
 * every command of the sandbox lives in the same domain. What it is not: the first wall; bubblewrap's mounts are.
 */
#ifndef CLOISTER_LANDLOCK_H
#define CLOISTER_LANDLOCK_H

#include "frame.h"
#include "options.h"

/* Restrict this process and all it will start; note the ABI. False: what was demanded cannot be had. */
bool landlock_enforce(const struct options *options, struct writer *findings);

#endif
