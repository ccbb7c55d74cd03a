/*
 * What it is: the forwarder: TCP connections on the sandbox's loopback, each carried to the
 * relay's Unix socket by splice(2). What it is not: a proxy; it reads no byte of what it carries.
 */
#ifndef CLOISTER_FORWARD_H
#define CLOISTER_FORWARD_H

#include <stdbool.h>
#include <stddef.h>

/*
 * Listen on each of `listen` (`127.0.0.1:3128`; ::1 as well where there is IPv6), all for the same relay: it tells
 * by the first request what a client wants. None: no forwarder. False: errno says why.
 */
bool forward_open(const char *const *listen, size_t count, const char *egress);

#endif
