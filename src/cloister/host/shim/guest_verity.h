/*
 * What it is: a dm-verity device, by three ioctls (Linux, Documentation/admin-guide/device-mapper/verity.rst).
 * What it is not: libdevmapper or veritysetup; no superblock on the disk is read, so none is believed.
 */
#ifndef CLOISTER_GUEST_VERITY_H
#define CLOISTER_GUEST_VERITY_H

#include "guest_line.h"

/* Activate the table over `disk` as the only mapped device: NULL, or what failed, with errno. */
const char *guest_verity_open(const char *disk, const struct guest_line *line);

#endif
