/*
 * What it is: an end for a guest's greediest process where its memory has run out and the kernel itself ends none.
 * What it is not: a limit; the guest's memory is.
 *
 * A fault on a page of a program reads metadata of the root's file system, by an allocation that may not wait for file
 * systems (no __GFP_FS). Such a one never calls the OOM killer (Linux, mm/page_alloc.c, __alloc_pages_may_oom) and
 * never gives up. Where everybody waits for one, the guest stood still for ever, its processors busy. The kernel says
 * so as pressure (Documentation/accounting/psi.rst), and its OOM killer can be called (sysrq.rst, `f`).
 */
#define _GNU_SOURCE
#include "guest_pressure.h"
#include "loop.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TEXT = 1024, LEAST_PART = 16 };

/* Nobody went on for most of a second, for want of memory; in microseconds. */
static const char STALLED[] = "full 800000 1000000";

static struct {
    struct source pressure;
    int memory, killer;
} self;

/* The number behind a name in /proc/meminfo; 0: it is not there. */
static unsigned long long figure(const char *text, const char *name)
{
    const char *at = strstr(text, name);
    return at ? strtoull(at + strlen(name), NULL, 10) : 0;
}

/* A machine that is only slow has memory that could be had. */
static bool is_used_up(void)
{
    char text[TEXT];
    ssize_t got = pread(self.memory, text, sizeof text - 1, 0);
    text[got > 0 ? got : 0] = 0;
    return figure(text, "MemAvailable:") < figure(text, "MemTotal:") / LEAST_PART;
}

static void on_pressure(struct source *source, uint32_t events)
{
    if (!(events & LOOP_URGENT)) { /* the kernel takes it back */
        (void)loop_watch(source, source->fd, 0);
        return;
    }
    if (is_used_up() && write(self.killer, "f", 1) == 1)
        printf("cloister: the guest has no memory left, and stood still: its greediest process is ended\n");
}

void guest_pressure_watch(void)
{
    int pressure = open("/proc/pressure/memory", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    self.memory = open("/proc/meminfo", O_RDONLY | O_CLOEXEC);
    self.killer = open("/proc/sysrq-trigger", O_WRONLY | O_CLOEXEC);
    self.pressure.ready = on_pressure;
    (void)is_used_up(); /* the kernel finds room for that text now, and keeps it */
    if (pressure < 0 || self.memory < 0 || self.killer < 0 || write(pressure, STALLED, sizeof STALLED) < 0)
        return;
    (void)loop_watch(&self.pressure, pressure, LOOP_URGENT);
}
