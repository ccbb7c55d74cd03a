/*
 * What it is: unpacking the run's files as they arrive, where they belong in a guest (host/tar_format.py writes them).
 * What it is not: a tar for anybody else; what is not as we write it is refused.
 */
#ifndef CLOISTER_GUEST_TAR_H
#define CLOISTER_GUEST_TAR_H

#include "guest_fields.h"

/* Whose home, and which files of kept state stay as they are. The fields' strings must outlive the tar. */
void guest_tar_begin(const struct guest_fields *fields);

/* The same run after a restore: only its box is renewed, while nobody in it moves. */
void guest_tar_renew(void);

/* The next piece, of any size; of length 0: the end. NULL, or what is wrong, with errno. */
const char *guest_tar_take(const void *piece, size_t length);

#endif
