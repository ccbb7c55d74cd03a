/*
 * What it is: the modes of the user's terminal: the run's change and a question's over it, undone at
 * every exit path, fatal signals included. What it is not: the relay of bytes; pty.c does that.
 */
#define _GNU_SOURCE
#include "tty.h"

#include <signal.h>
#include <string.h>
#include <unistd.h>

/* Two at most: the run's, and a question's over it. A signal handler has to find them: `depth` is written last. */
enum { DEPTH_MAX = 2 };
static volatile sig_atomic_t depth;
static struct {
    int fd;
    struct termios before;
    struct termios during;
} changes[DEPTH_MAX];

/*
 * All calls are async-signal-safe (signal-safety(7)). In the background the terminal is somebody
 * else's. TCSANOW: with TCSADRAIN a terminal stopped by Ctrl-S would hang our exit.
 */
static void restore(int from)
{
    for (int i = depth - 1; i >= from; i--)
        if (tty_foreground(changes[i].fd))
            (void)!tcsetattr(changes[i].fd, TCSANOW, &changes[i].before);
}

static void on_fatal(int number)
{
    restore(0);
    depth = 0;
    raise(number); /* SA_RESETHAND: this time the default action kills us */
}

int tty_guard(void)
{
    static const int fatal[] = {SIGSEGV, SIGBUS,  SIGFPE,    SIGILL,  SIGABRT, SIGTRAP,
                                SIGSYS,  SIGALRM, SIGVTALRM, SIGPROF, SIGXCPU, SIGXFSZ};
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_fatal;
    action.sa_flags = SA_RESETHAND | SA_NODEFER;
    for (size_t i = 0; i < sizeof fatal / sizeof *fatal; i++)
        if (sigaction(fatal[i], &action, NULL) < 0)
            return -1;
    return 0;
}

int tty_take(int fd, const struct termios *wanted)
{
    if (depth == DEPTH_MAX || tcgetattr(fd, &changes[depth].before) < 0)
        return -1;
    changes[depth].during = wanted ? *wanted : changes[depth].before;
    changes[depth].fd = fd;
    depth++;
    if (wanted && tcsetattr(fd, TCSANOW, wanted) < 0) {
        depth--;
        return -1;
    }
    return 0;
}

void tty_give_back(void)
{
    if (depth == 0)
        return;
    restore(depth - 1);
    depth--;
}

void tty_suspend(void)
{
    restore(0);
}

void tty_resume(void)
{
    for (int i = 0; i < depth; i++)
        if (tty_foreground(changes[i].fd))
            (void)!tcsetattr(changes[i].fd, TCSANOW, &changes[i].during);
}

bool tty_foreground(int fd)
{
    pid_t group = tcgetpgrp(fd);
    return group < 0 || group == getpgrp(); /* not our controlling terminal, or gone: nobody to be in front of us */
}

void tty_stop_self(void)
{
    /* SIGSTOP and not SIGTSTP: the latter is dropped in an orphaned process group (setpgid(2)). */
    do
        kill(getpid(), SIGSTOP);
    while (depth > 0 && !tty_foreground(changes[0].fd));
}

void tty_await_foreground(int fd)
{
    while (!tty_foreground(fd))
        kill(getpid(), SIGSTOP);
}
