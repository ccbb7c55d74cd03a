/*
 * What it is: what the first process of a sandbox owes it: it shuts itself in, orphans come to it, and it takes them
 * along when it leaves. What it is not: aware of which command is which; inner.c and service.c are.
 */
#ifndef CLOISTER_REAPER_H
#define CLOISTER_REAPER_H

#include <stdbool.h>
#include <sys/resource.h>

/*
 * Not dumpable, no core, no descriptor above 2 but `keep` (-1: none), as many of our own as we may have. `files`
 * becomes RLIMIT_NOFILE as it was: the agent's, not ours. -1: errno says why.
 */
int reaper_shut_in(int keep, struct rlimit *files);

/* Where we are not PID 1: orphans come to us all the same (PR_SET_CHILD_SUBREAPER). Before Landlock: it opens /proc. */
int reaper_adopt(void);

/*
 * Block every signal, and return a descriptor on which SIGCHLD arrives; with `endings` also HUP, INT and TERM, with
 * which systemd ends or reloads a unit. Without, what an agent sends to PID 1 waits for ever.
 */
int reaper_watch(bool endings);

/*
 * Kill whatever lives below us, also what forks meanwhile, within bounds. As PID 1 there is nothing to do: the kernel
 * does it. What escapes this (it may not, short of a bug) is in the unit's cgroup, which systemd kills.
 */
void reaper_kill_all(void);

#endif
