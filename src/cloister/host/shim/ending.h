/*
 * What it is: how a service is told to end, and how somebody waits for that: a Unix socket; who connects asks for the
 * end, and hears of it when the connection closes, as it does with the service's last breath.
 * What it is not: a way to kill; that is systemd's, when the time it gives is over.
 *
 * systemd 257 with PrivatePIDs= takes the main process for somebody else's child when it looks too early, which is
 * often: it sends TERM, does not wait, and kills the unit in the same moment. So a unit beside it is stopped first, which
 * asks for the end and waits. It has another user and sees no process of the service, so it cannot signal; hence a socket.
 */
#ifndef CLOISTER_ENDING_H
#define CLOISTER_ENDING_H

#include <stdbool.h>

/* Listen on `path`, mode 0660, replacing a socket that a killed predecessor left; `asked` once for each client. */
bool ending_open(const char *path, void (*asked)(void));

/* `cloister-shim end PATH`: ask for the end and wait for it; 0, also where nobody listens any more. */
int ending_main(const char *path);

#endif
