/*
 * What it is: what one run sees in its guest: home, /var and the state on its disk, the workspace, and what is held
 * or hidden in it. What it is not: the root; that stands before any run is known.
 */
#ifndef CLOISTER_GUEST_MOUNTS_H
#define CLOISTER_GUEST_MOUNTS_H

#include "guest_fields.h"

/* Mount everything: NULL, or what failed, with errno. */
const char *guest_mounts_make(const struct guest_fields *fields);

/* Kill all but ourselves, and leave both disks clean, as far as that can be had. Also before anything was mounted. */
void guest_mounts_end(void);

#endif
