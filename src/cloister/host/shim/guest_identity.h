/*
 * What it is: what makes one guest differ from every other that began with the same memory: randomness, time, names,
 * addresses. What it is not: mounts.
 */
#ifndef CLOISTER_GUEST_IDENTITY_H
#define CLOISTER_GUEST_IDENTITY_H

#include "guest_fields.h"

/* Each returns NULL, or what failed, with errno. */

/* Randomness and the clock, first of all: clones of one snapshot hold the same state of the kernel's generator. */
const char *guest_identity_fresh(const struct guest_fields *fields);

/* Host name and machine id. */
const char *guest_identity_names(const struct guest_fields *fields);

/* The agent's account, in the /etc in memory. */
const char *guest_identity_user(const struct guest_fields *fields);

/* Loopback, and eth0 where an address was given: it has that before its link goes up. */
const char *guest_identity_network(const struct guest_fields *fields);

/* Take eth0's link down, so that a guest which stands still sends nothing; or up again, where it was down by this.
 * False: it does not happen. */
bool guest_identity_quiet(bool quiet);

#endif
