/*
 * What it is: one descriptor of any kind, read and written without waiting, without changing it for those who share it.
 * What it is not: what is carried; stream.c is.
 *
 * A descriptor may be the user's own standard output: O_NONBLOCK would reach his shell. So it is opened once more where
 * that works, and else only read and written when poll(2) says that this does not wait.
 */
#define _GNU_SOURCE
#include "carrier.h"
#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CAREFUL = 4096 /* PIPE_BUF: what a pipe that is not full takes */ };

/* Never called: the trial below leaves nothing to wait for. */
static void nothing(struct source *source, uint32_t events)
{
    (void)source, (void)events;
}

/* A description of our own, if it is to be had: else the shared one stays, and is treated with care. */
static void reopen(struct carrier *carrier, int flags)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", carrier->fd);
    int own = open(path, (flags & O_ACCMODE) | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (own < 0)
        return;
    close(carrier->fd);
    carrier->fd = own;
    carrier->manner = CARRIER_NONBLOCKING;
}

int carrier_open(struct carrier *carrier, int fd)
{
    struct stat about;
    int flags = fcntl(fd, F_GETFL);
    *carrier = (struct carrier){.fd = fd, .manner = CARRIER_BLOCKING};
    if (flags < 0 || fstat(fd, &about) < 0)
        return -1;
    if (S_ISSOCK(about.st_mode))
        carrier->manner = CARRIER_SOCKET;
    else if (flags & O_NONBLOCK)
        carrier->manner = CARRIER_NONBLOCKING;
    else if (!S_ISREG(about.st_mode))
        reopen(carrier, flags);
    struct source trial = {.ready = nothing};
    if (loop_watch(&trial, carrier->fd, LOOP_READ) == 0)
        return loop_watch(&trial, carrier->fd, 0);
    carrier->manner = CARRIER_PLAIN; /* a file, /dev/null and its kind */
    return errno == EPERM ? 0 : -1;
}

bool carrier_readable(const struct carrier *carrier)
{
    struct pollfd look = {.fd = carrier->fd, .events = POLLIN};
    /* Of a pty this also brings along what is under way: it is not there yet when its writer has ended. */
    return poll(&look, 1, 0) > 0 && (look.revents & POLLIN);
}

ssize_t carrier_read(const struct carrier *carrier, void *into, size_t length)
{
    struct pollfd look = {.fd = carrier->fd, .events = POLLIN};
    if (carrier->manner == CARRIER_SOCKET)
        return recv(carrier->fd, into, length, MSG_DONTWAIT);
    if (carrier->manner != CARRIER_BLOCKING)
        return read(carrier->fd, into, length);
    if (poll(&look, 1, 0) == 0) {
        errno = EAGAIN;
        return -1;
    }
    return look.revents & POLLIN ? read(carrier->fd, into, length) : 0; /* hung up, and nothing left */
}

ssize_t carrier_write(const struct carrier *carrier, const void *data, size_t length)
{
    struct pollfd look = {.fd = carrier->fd, .events = POLLOUT};
    if (carrier->manner == CARRIER_SOCKET)
        return send(carrier->fd, data, length, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (carrier->manner != CARRIER_BLOCKING)
        return write(carrier->fd, data, length);
    if (poll(&look, 1, 0) == 0) {
        errno = EAGAIN;
        return -1;
    }
    return write(carrier->fd, data, length < CAREFUL ? length : CAREFUL);
}

void carrier_finish(const struct carrier *carrier)
{
    if (carrier->manner == CARRIER_SOCKET)
        (void)!shutdown(carrier->fd, SHUT_WR);
}

void carrier_close(const struct carrier *carrier, bool abrupt)
{
    const struct linger now = {.l_onoff = 1, .l_linger = 0};
    /* A program shall not take a connection that was cut for one that has ended. */
    if (abrupt && carrier->manner == CARRIER_SOCKET)
        (void)!setsockopt(carrier->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(carrier->fd);
}
