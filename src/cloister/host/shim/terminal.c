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

/* In a unit /dev is root's, and where its devpts is the host's, that one's own ptmx is closed to everybody. */
static const char UNIT_PTMX[] = "/dev/ptmx";

int terminal_open(int *master, bool unit)
{
    const int how = O_RDWR | O_NOCTTY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC;
    int unlock = 0, slave = -1;
    *master = open(PTMX, how);
    if (*master < 0 && unit && errno == EACCES)
        *master = open(UNIT_PTMX, how);
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
