/*
 * What it is: the modes of the user's terminal: one change at a time, undone at every exit path,
 * fatal signals included. What it is not: the relay of bytes; pty.c does that.
 */
#define _GNU_SOURCE
#include "tty.h"

#include <signal.h>
#include <string.h>
#include <unistd.h>

/* One slot: a signal handler has to find it. `taken` is written last and read first. */
static volatile sig_atomic_t taken;
static int taken_fd;
static struct termios before;
static struct termios during;

/*
 * tcsetattr(3) is async-signal-safe (signal-safety(7)). SIGTTOU is blocked, so it also works in the
 * background. TCSANOW: with TCSADRAIN a terminal stopped by Ctrl-S would hang our exit.
 */
static void restore(void)
{
    if (taken)
        (void)!tcsetattr(taken_fd, TCSANOW, &before);
}

static void on_fatal(int number)
{
    if (taken)
        (void)!tcsetattr(taken_fd, TCSANOW, &before);
    taken = 0;
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
    if (taken || tcgetattr(fd, &before) < 0)
        return -1;
    during = *wanted;
    taken_fd = fd;
    taken = 1;
    if (tcsetattr(fd, TCSANOW, wanted) < 0) {
        taken = 0;
        return -1;
    }
    return 0;
}

void tty_give_back(void)
{
    restore();
    taken = 0;
}

void tty_suspend(void)
{
    restore();
}

void tty_resume(void)
{
    if (taken && tty_foreground(taken_fd))
        (void)!tcsetattr(taken_fd, TCSANOW, &during);
}

bool tty_foreground(int fd)
{
    return tcgetpgrp(fd) == getpgrp();
}

void tty_stop_self(void)
{
    /* SIGSTOP and not SIGTSTP: the latter is dropped in an orphaned process group (setpgid(2)). */
    do
        kill(getpid(), SIGSTOP);
    while (taken && tcgetpgrp(taken_fd) > 0 && !tty_foreground(taken_fd));
}
