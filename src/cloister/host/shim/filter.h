/*
 * What it is: our own system call filter, installed by the first process where the backend did not: systemd's
 * SystemCallFilter= cannot look at arguments. What it is not: the filter itself, which comes as bytes from the plan
 * (isolation/seccomp.py) in the run's read-only directory.
 */
#ifndef CLOISTER_FILTER_H
#define CLOISTER_FILTER_H

#include "frame.h"

#include <stdbool.h>

/* Install the filter in the file, for this process and all it will start. Without a path there is nothing to do. */
bool filter_enforce(const char *path, struct writer *findings);

#endif
