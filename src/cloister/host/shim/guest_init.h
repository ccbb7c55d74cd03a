/*
 * What it is: the entry of PID 1 in a guest. What it is not: the link; guest.h has that.
 */
#ifndef CLOISTER_GUEST_INIT_H
#define CLOISTER_GUEST_INIT_H

/* Boot, and serve the channel until the machine goes off. */
_Noreturn void guest_init(int count);

#endif
