/*
 * What it is: what the first process of a sandbox owes it: it shuts itself in, orphans come to it, and it takes them
 * along when it leaves. What it is not: aware of which command is which; inner.c and service.c are.
 */
#define _GNU_SOURCE
#include "reaper.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

/* A sweep takes what the file names at once; sweeps go on while there is something, a millisecond apart. */
enum { SWEEPS = 500, LISTED = 4096 };

/* Our direct children, as the kernel lists them (CONFIG_PROC_CHILDREN; hidepid= does not thin them out); -1: not to be
 * had. */
static int children = -1;

int reaper_shut_in(int keep, struct rlimit *files)
{
    if (prctl(PR_SET_DUMPABLE, 0) < 0 || prctl(PR_SET_NAME, "cloister") < 0)
        return -1;
    if (sys_fill_stdio() < 0 || sys_close_others(keep) < 0 || sys_no_core() < 0)
        return -1;
    if (getrlimit(RLIMIT_NOFILE, files) < 0)
        return -1;
    /* Two descriptors per connection; the agent gets the old limit back (child.c). */
    const struct rlimit wide = {.rlim_cur = files->rlim_max, .rlim_max = files->rlim_max};
    return setrlimit(RLIMIT_NOFILE, &wide);
}

int reaper_adopt(void)
{
    if (getpid() == 1)
        return 0;
    children = open("/proc/thread-self/children", O_RDONLY | O_CLOEXEC);
    return prctl(PR_SET_CHILD_SUBREAPER, 1);
}

int reaper_watch(bool endings)
{
    sigset_t all, ours;
    sigfillset(&all);
    sigemptyset(&ours);
    sigaddset(&ours, SIGCHLD);
    if (endings) {
        sigaddset(&ours, SIGHUP);
        sigaddset(&ours, SIGINT);
        sigaddset(&ours, SIGTERM);
    }
    if (sigprocmask(SIG_SETMASK, &all, NULL) < 0)
        return -1;
    return signalfd(-1, &ours, SFD_NONBLOCK | SFD_CLOEXEC);
}

/* Kill the direct children: false when there are none. Their own children are ours then. */
static bool sweep(void)
{
    char text[LISTED];
    ssize_t got = pread(children, text, sizeof text - 1, 0);
    if (got <= 0)
        return false;
    text[got] = 0;
    /* The last number may be cut off: it could be anybody's. The next sweep has it. */
    if (got == (ssize_t)sizeof text - 1)
        *(strrchr(text, ' ') ? strrchr(text, ' ') : text) = 0;
    char *at = text, *end = NULL;
    for (long pid = strtol(at, &end, 10); end != at; pid = strtol(at, &end, 10)) {
        if (pid > 1)
            (void)!kill((pid_t)pid, SIGKILL); /* not reaped yet, so still ours */
        at = end;
    }
    return true;
}

void reaper_kill_all(void)
{
    if (getpid() == 1 || children < 0)
        return;
    for (int i = 0; i < SWEEPS && sweep(); i++) {
        while (waitpid(-1, NULL, WNOHANG) > 0)
            continue;
        (void)!poll(NULL, 0, 1);
    }
}
