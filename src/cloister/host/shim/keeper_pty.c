/*
 * What it is: the terminal that the user's side of a command in a guest sees: a pty of the jail, raw, whose line
 * discipline is the guest's. What it is not: the relay of its bytes; stream.c is.
 *
 * The size of a pty's window changes without a word to whoever holds the other end, but for the session that it
 * controls. So each terminal has a session, of one process that waits for SIGWINCH.
 */
#define _GNU_SOURCE
#include "keeper.h"
#include "terminal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { READY_PATIENCE_MS = 3000 };

/* Leave the terminal before leaving: the death of its session's leader would throw away what was not read yet. */
_Noreturn static void watch(int slave, int told)
{
    sigset_t set;
    int number;
    /* All signals have been blocked since the keeper's start. */
    if (prctl(PR_SET_PDEATHSIG, SIGTERM) < 0 || setsid() < 0 || ioctl(slave, TIOCSCTTY, 0) < 0)
        _exit(1);
    (void)!write(told, "r", 1);
    sigemptyset(&set);
    sigaddset(&set, SIGWINCH);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGHUP);
    while (sigwait(&set, &number) == 0 && number == SIGWINCH)
        if (write(told, "w", 1) < 0 && errno != EAGAIN)
            break;
    (void)!ioctl(slave, TIOCNOTTY);
    _exit(0);
}

/* A size that changes before the session is there would not be heard of. */
static bool await_ready(int changes)
{
    struct pollfd look = {.fd = changes, .events = POLLIN};
    char byte;
    return poll(&look, 1, READY_PATIENCE_MS) > 0 && read(changes, &byte, 1) == 1;
}

void keeper_pty_end(struct keeper_pty *pty)
{
    if (pty->watcher > 0) {
        (void)!kill(pty->watcher, SIGTERM);
        while (waitpid(pty->watcher, NULL, 0) < 0 && errno == EINTR)
            continue;
    }
    if (pty->changes >= 0)
        close(pty->changes);
    pty->watcher = 0;
    pty->changes = -1;
}

int keeper_pty_open(struct keeper_pty *pty, int *master)
{
    int ends[2];
    *pty = (struct keeper_pty){.slave = -1, .changes = -1};
    pty->slave = terminal_open(master, false);
    if (pty->slave < 0)
        return -1;
    if (fcntl(pty->slave, F_SETFL, O_RDWR | O_NONBLOCK) == 0 && pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0) {
        pty->watcher = fork();
        if (pty->watcher == 0) {
            int slave = fcntl(pty->slave, F_DUPFD, 3);
            int told = fcntl(ends[1], F_DUPFD, 3);
            int low = slave < told ? slave : told, high = slave < told ? told : slave;
            close_range(0, (unsigned)low - 1, 0);
            if (high > low + 1)
                close_range((unsigned)low + 1, (unsigned)high - 1, 0);
            close_range((unsigned)high + 1, ~0U, 0);
            watch(slave, told);
        }
        close(ends[1]);
        pty->changes = ends[0];
        if (pty->watcher > 0 && await_ready(ends[0]))
            return 0;
        keeper_pty_end(pty);
    }
    int saved = errno;
    close(pty->slave);
    close(*master);
    pty->slave = -1;
    errno = saved;
    return -1;
}
