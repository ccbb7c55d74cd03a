/*
 * What it is: a command for programs inside: standard input and output, tunnelled to a host by the
 * run's proxy. What it is not: a client of anything; it carries bytes and shows refusals.
 */
#ifndef CLOISTER_CONNECT_H
#define CLOISTER_CONNECT_H

/* `cloister-shim connect HOST PORT`, for ssh's ProxyCommand; returns the exit code (sysexits.h). */
int connect_main(const char *host, const char *port);

#endif
