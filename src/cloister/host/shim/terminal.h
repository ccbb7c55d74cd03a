/*
 * What it is: a pty of the sandbox's own devpts, so that ttyname(3) finds it and no descriptor of
 * the user's terminal is inside. What it is not: its relay; pty.c in the outer half is.
 */
#ifndef CLOISTER_TERMINAL_H
#define CLOISTER_TERMINAL_H

#include <stdbool.h>

/*
 * Open a pty: the slave, and the master in `*master`; -1 with errno. Neither is anybody's controlling terminal.
 * `unit`: under systemd, whose PrivateDevices= may bring the host's devpts.
 */
int terminal_open(int *master, bool unit);

#endif
