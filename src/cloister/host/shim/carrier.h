/*
 * What it is: one descriptor of any kind, read and written without waiting, without changing it for those who share it.
 * What it is not: what is carried; stream.c is.
 */
#ifndef CLOISTER_CARRIER_H
#define CLOISTER_CARRIER_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

struct carrier {
    int fd;
    enum {
        CARRIER_NONBLOCKING,
        CARRIER_SOCKET,
        CARRIER_PLAIN, /* a file: always ready, and epoll(7) refuses it */
        CARRIER_BLOCKING,
    } manner;
};

/* Take `fd` over, or a description of our own for it. It is the carrier's also when this fails (-1, errno). */
int carrier_open(struct carrier *carrier, int fd);

/* As read(2) and write(2): EAGAIN where either would wait. */
ssize_t carrier_read(const struct carrier *carrier, void *into, size_t length);
ssize_t carrier_write(const struct carrier *carrier, const void *data, size_t length);

/* Whether there is something unread. */
bool carrier_readable(const struct carrier *carrier);

/* No more will be written; and its end, for a TCP connection by a reset where it is abrupt. */
void carrier_finish(const struct carrier *carrier);
void carrier_close(const struct carrier *carrier, bool abrupt);

#endif
