/*
 * What it is: the forwarder: TCP connections on the sandbox's loopback, each carried to the
 * relay's Unix socket by splice(2), and the other way round a service's port on a Unix socket of its own.
 * What it is not: a proxy; it reads no byte of what it carries.
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

/*
 * `PATH=127.0.0.1:18789`: listen on a Unix socket, mode 0660, and carry its connections to that port of our network
 * namespace. A socket that is there already is replaced. False: errno says why.
 */
bool forward_publish(const char *publish);

#endif
