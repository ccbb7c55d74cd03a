/*
 * What it is: an end for the TCP connections of an address that a restored guest has no more.
 * What it is not: a wall; the host takes no frame of that address from it.
 */
#ifndef CLOISTER_GUEST_CONNECTIONS_H
#define CLOISTER_GUEST_CONNECTIONS_H

/* Cut those of eth0's address, while its link is down: nobody is told but their owners, who read ECONNABORTED at once
 * instead of waiting for an answer. A kernel without SOCK_DESTROY leaves them to their timeouts. */
void guest_connections_cut(void);

#endif
