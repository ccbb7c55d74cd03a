/*
 * What it is: a pty of the sandbox's own devpts, so that ttyname(3) finds it and no descriptor of
 * the user's terminal is inside. What it is not: its relay; pty.c in the outer half is.
 */
#define _GNU_SOURCE
#include "terminal.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Not /dev/ptmx: /dev is a tmpfs in which the agent can put what it likes there; nobody can inside a devpts. */
static const char PTMX[] = "/dev/pts/ptmx";

int terminal_open(int *master)
{
    int unlock = 0, slave = -1;
    *master = open(PTMX, O_RDWR | O_NOCTTY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
    if (*master < 0)
        return -1;
    if (ioctl(*master, TIOCSPTLCK, &unlock) == 0)
        slave = ioctl(*master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave >= 0)
        return slave;
    int saved = errno;
    close(*master);
    errno = saved;
    return -1;
}
