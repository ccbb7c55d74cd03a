/*
 * What it is: what a booted guest does for the run that comes to it, as the link asks (guest.h).
 * What it is not: boot, or the link.
 */
#ifndef CLOISTER_GUEST_RUN_H
#define CLOISTER_GUEST_RUN_H

#include "guest.h"

extern const struct guest_hooks guest_run_hooks;

/* Say why on the console (NULL: nothing to say), and switch the machine off. */
_Noreturn void guest_off(const char *why);

#endif
