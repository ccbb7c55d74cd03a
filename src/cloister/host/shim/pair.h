/*
 * What it is: one carried connection: two sockets, two directions, half-close kept apart.
 * What it is not: its making; forward.c accepts and connects.
 */
#ifndef CLOISTER_PAIR_H
#define CLOISTER_PAIR_H

#include <stddef.h>

/* Carry bytes between two non-blocking stream sockets until both directions have ended. -1: not taken over. */
int pair_open(int client, int upstream);

/* Pairs that are open now. */
size_t pair_count(void);

#endif
