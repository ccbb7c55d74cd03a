/*
 * What it is: seccomp's user notification (seccomp_unotify(2)) for a small set of calls: every command of the sandbox
 * waits in execve(2), execveat(2) and connect(2) until we have told the broker what it asked for. What it is not: a
 * wall; the call goes on whatever it is, and its arguments may have changed by then.
 */
#ifndef CLOISTER_NOTIFY_H
#define CLOISTER_NOTIFY_H

#include "frame.h"

#include <stdbool.h>

enum notify_demand { NOTIFY_NOTHING, NOTIFY_CALLS, NOTIFY_FILES };

/*
 * In the child, last before execve(2): put the filter over it and all that it will start, and send the listener
 * through `link`. False: errno says why, and nothing may be started.
 */
bool notify_enter(int link);

/* In the parent: take the listener from `link`; -1 when the child ended before it sent one. */
int notify_take(int link);

/* Answer what waits at a listener, and tell it (`broker` NULL: tell nobody). False: nobody is left below it. */
bool notify_serve(int listener, struct channel *broker, enum notify_demand demand);

/* Tell of a command that we have started ourselves: until its execve(2) its memory is as closed as ours. */
void notify_started(struct channel *broker, enum notify_demand demand, uint32_t pid, char *const *argv);

/* Watch a listener from the loop until nobody is left below it. */
bool notify_watch(int listener, struct channel *broker, enum notify_demand demand);

#endif
