/*
 * What it is: from the initramfs to the verified root: modules, dm-verity, the tree that becomes `/`.
 * What it is not: anything of a run; that comes over the channel.
 */
#ifndef CLOISTER_GUEST_ROOT_H
#define CLOISTER_GUEST_ROOT_H

#include "guest_line.h"

/* Only root gets below it: the devices, and what is behind the guest's own mounts. */
#define GUEST_PRIVATE "/run/cloister/private"
#define GUEST_DEVICES GUEST_PRIVATE "/dev"
#define GUEST_MEMORY GUEST_PRIVATE "/memory"
#define GUEST_BOX "/run/cloister/box"

/* Each returns NULL, or what failed, with errno. */

/* /dev, /proc and /sys of the initramfs. */
const char *guest_root_begin(void);

/* Load what /modules.list names, in its order. */
const char *guest_root_modules(void);

/* Make the verified device of the table, and mount its file system. */
const char *guest_root_open(const struct guest_line *line);

/* Build the tree of mounts around it, and make it `/`. */
const char *guest_root_enter(void);

#endif
