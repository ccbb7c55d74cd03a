/*
 * What it is: an end for a guest's greediest process where its memory has run out and the kernel itself ends none.
 * What it is not: a limit; the guest's memory is.
 */
#ifndef CLOISTER_GUEST_PRESSURE_H
#define CLOISTER_GUEST_PRESSURE_H

/* From now on. A kernel without pressure stall information leaves it to its own OOM killer. */
void guest_pressure_watch(void);

#endif
