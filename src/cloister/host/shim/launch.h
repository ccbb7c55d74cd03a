/*
 * What it is: what the broker's `B` frame asks of the outer half: namespaces, overlays, and one
 * child with descriptors in fixed places. What it is not: a sandbox; bubblewrap makes that.
 */
#ifndef CLOISTER_LAUNCH_H
#define CLOISTER_LAUNCH_H

#include "frame.h"

#include <stdbool.h>
#include <sys/types.h>

enum { LAUNCH_PTY = 1, LAUNCH_USERNS = 2, LAUNCH_NETNS = 4, LAUNCH_PATIENT = 8 };

struct launch {
    struct frame frame; /* owns the descriptors */
    uint32_t flags;
    char **argv; /* empty: attach, no child of ours */
    size_t argc;
    char **overlays; /* lower, upper, work, target, lower, … */
    size_t overlay_fields;
    char **nft; /* empty: no rules to load */
    size_t nft_count;
    char **report; /* empty: nothing to ask in the end */
    size_t report_count;
    char **holds; /* mode, source, target, mode, … (hold.h) */
    size_t hold_fields;
};

/* Take over a `B` frame; false when it is malformed. */
bool launch_parse(struct launch *launch, const struct frame *frame);

/* Enter the namespaces, mount the overlays, load the rules: NULL, or what failed (errno is set). */
const char *launch_prepare(const struct launch *launch);

/* Make the holds in a further user and mount namespace: NULL, or what failed. For the child that becomes bubblewrap. */
const char *launch_hold(const struct launch *launch);

/*
 * Start argv in its own session: pid or -1. With a pty it gets /dev/null for stdin and stdout and `complaints` for
 * stderr, so that no descriptor of the user's terminal is inside; else our own three.
 */
pid_t launch_start(const struct launch *launch, int complaints);

/* Run the report program in our namespaces, with CAP_NET_ADMIN: a descriptor that reads what it printed, or -1. */
int launch_report(const struct launch *launch);

/* Before execve(2): no signal stays blocked or ignored. -1: errno says why. */
int launch_reset_signals(void);

/* Forget everything but the report, and close the descriptors. */
void launch_release(struct launch *launch);

#endif
