/*
 * What it is: the guest's end of the link, and what it asks of the half that mounts and unmounts.
 * What it is not: boot; that is over when this begins.
 */
#ifndef CLOISTER_GUEST_H
#define CLOISTER_GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define GUEST_BOX_DIRECTORY "/run/cloister/box"

/* What PID 1's other half does. Where `why` is set, nothing may go on. */
struct guest_hooks {
    /* The fields of `B`: mounts, randomness, clock, names, network. */
    bool (*begin)(char **fields, size_t count, const char **why);
    /* The same fields after a restore with living commands: only what must be fresh. A tar with the box follows. */
    bool (*renew)(char **fields, size_t count, const char **why);
    /* The tar, in pieces of any size, and its end. */
    bool (*tar_feed)(const void *data, size_t length, const char **why);
    bool (*tar_end)(const char **why);
    /* One renewed file, by its path below the box. */
    bool (*update)(const char *path, mode_t mode, const void *data, size_t length);
    /* A listening socket of this name in the box; -1: errno. */
    int (*box_socket)(const char *name);
    /* In the child that becomes the inner half: give up whatever is root's; -1: errno. */
    int (*child)(void);
    /* Kill everything else, unmount, sync. */
    void (*end)(void);
    void (*off)(const char *why);
    /* Whatever runs stands still, or goes on: false when that does not happen. */
    bool (*freeze)(bool still);
    /* The time that it is after a standstill, since the epoch. */
    void (*set_time)(uint64_t time_ns);
};

/*
 * Speak on `channel` (a virtio port, or -1) or on what `listener` accepts (AF_VSOCK, or -1) until the machine is off.
 * `verity`: the root hash it booted with.
 */
_Noreturn void guest_link(int channel, int listener, const char *verity, const struct guest_hooks *hooks);

#endif
