/*
 * What it is: mount points at any path of a root that cannot be written, and mounts by descriptor.
 * What it is not: what gets mounted there; guest_mounts.c knows that.
 */
#ifndef CLOISTER_GUEST_PLACE_H
#define CLOISTER_GUEST_PLACE_H

#include <sys/types.h>

/*
 * Make a directory at an absolute path, and what is missing above it, in memory where the root is read-only. What is
 * made below `home` (which may be NULL) belongs to uid and gid. -1: errno says why; a link on the way is ELOOP.
 */
int guest_place_make(const char *path, const char *home, uid_t uid, gid_t gid);

/* Open what lies at a relative path below a directory, through no link and no way out; O_PATH. -1: errno. */
int guest_place_open(int below, const char *path);

/* Makes what is open there a mount point, as it is, unless it is one: it can be neither renamed nor removed then. */
int guest_place_pin(int target);

/* Show `source` (a descriptor) at `target` (another), read-only, without devices and set-uid. -1: errno. */
int guest_place_cover(int source, int target);

#endif
