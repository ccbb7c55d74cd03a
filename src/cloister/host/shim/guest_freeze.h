/*
 * What it is: all that runs in the run's place, made to stand still as a whole, without its noticing.
 * What it is not: a limit on it; the guest's memory and processors are.
 */
#ifndef CLOISTER_GUEST_FREEZE_H
#define CLOISTER_GUEST_FREEZE_H

#include <stdbool.h>

/* Make the place. -1: this kernel has no such thing, and its guests cannot be kept with their memory. */
int guest_freeze_prepare(void);

/* In the first process of the run, while it is root: it and all that it starts belong to it. -1: errno. */
int guest_freeze_enter(void);

/* Stand still, which is waited for, or go on: false when it does not happen. */
bool guest_freeze(bool still);

#endif
