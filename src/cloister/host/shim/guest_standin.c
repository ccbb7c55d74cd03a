/*
 * What it is: the guest's end of the link until the real one is here: it says that the guest is up, and waits.
 * What it is not: any of the link's frames.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <poll.h>
#include <stdio.h>
#include <unistd.h>

__attribute__((weak)) _Noreturn void guest_link(int channel, int listener, const char *verity,
                                                const struct guest_hooks *hooks)
{
    char byte;
    struct pollfd wait = {.fd = channel >= 0 ? channel : listener, .events = POLLIN};
    printf("cloister: up with %s\n", verity);
    while (poll(&wait, 1, -1) < 0 || read(wait.fd, &byte, 1) <= 0)
        (void)!poll(NULL, 0, 10);
    hooks->off("asked to");
    for (;;)
        pause();
}
