/*
 * What it is: the fields of the frame `B` that make a booted guest the place of one run (ARCHITECTURE.md, "The link").
 * What it is not: where anything is done about them.
 */
#ifndef CLOISTER_GUEST_FIELDS_H
#define CLOISTER_GUEST_FIELDS_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

enum { GUEST_ENTROPY = 64, GUEST_WORDS_MAX = 256 };

/* Strings are those of the frame, which outlives this. NULL: not given. */
struct guest_fields {
    const char *hostname, *machine_id, *user, *home, *workspace, *address, *gateway, *mac;
    uid_t uid;
    gid_t gid;
    mode_t umask; /* umask of the agent; 022 when it was not given */
    unsigned long long tmpfs;   /* bytes of the home and /tmp; 0: the kernel's half of memory */
    unsigned long long time_ns; /* since the epoch */
    unsigned char entropy[GUEST_ENTROPY];
    bool fresh;  /* entropy and time_ns were there */
    bool nested; /* the agent may build sandboxes of its own */
    struct guest_words {
        const char *items[GUEST_WORDS_MAX];
        size_t count;
    } state, read_only, mask, stand, seed; /* of `stand` each is a content in hex, a colon, and a path */
};

/* NULL, or what is wrong: a field unknown, malformed, doubled or missing. */
const char *guest_fields_read(struct guest_fields *fields, char *const *words, size_t count);

/* The byte that two digits of hex say; only for what `guest_fields_read` has accepted. */
unsigned char guest_fields_byte(const char *text);

/* A relative path without empty parts, `.` and `..`. */
bool guest_fields_relative(const char *path);

#endif
