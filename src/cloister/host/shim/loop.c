/*
 * What it is: the inner half's one event loop over epoll(7), level-triggered, without threads.
 * What it is not: aware of what it waits for.
 */
#define _GNU_SOURCE
#include "loop.h"
#include "sys.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

enum { BATCH = 64, SOON_MAX = 8 };

static int epoll = -1;
static int64_t tick_at_ms;
static void (*tick_action)(void);
static void (*soon[SOON_MAX])(void);

/* Blocks that wait to be freed: linked through their own first bytes. */
struct freed {
    struct freed *next;
};
static struct freed *garbage;

int loop_watch(struct source *source, int fd, uint32_t wanted)
{
    if (epoll < 0 && (epoll = epoll_create1(EPOLL_CLOEXEC)) < 0)
        return -1;
    if (wanted == source->wanted)
        return 0;
    int operation = !wanted ? EPOLL_CTL_DEL : source->wanted ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    struct epoll_event event = {.events = wanted, .data.ptr = source};
    if (epoll_ctl(epoll, operation, fd, &event) < 0)
        return -1;
    source->fd = fd;
    source->wanted = wanted;
    return 0;
}

void loop_later(int delay_ms, void (*tick)(void))
{
    tick_at_ms = sys_now_ms() + delay_ms;
    tick_action = tick;
}

void loop_free(void *block)
{
    struct freed *freed = block;
    freed->next = garbage;
    garbage = freed;
}

static void sweep(void)
{
    while (garbage) {
        struct freed *next = garbage->next;
        free(garbage);
        garbage = next;
    }
}

void loop_soon(void (*action)(void))
{
    for (int i = 0; i < SOON_MAX; i++) {
        if (soon[i] == action)
            return;
        if (!soon[i]) {
            soon[i] = action;
            return;
        }
    }
}

/* An action may ask for others, or for itself again: they follow in the next round, after new events. */
static void act(void)
{
    void (*now[SOON_MAX])(void);
    memcpy(now, soon, sizeof now);
    memset(soon, 0, sizeof soon);
    for (int i = 0; i < SOON_MAX && now[i]; i++)
        now[i]();
}

static int timeout(void)
{
    if (soon[0])
        return 0;
    if (!tick_action)
        return -1;
    int64_t left = tick_at_ms - sys_now_ms();
    return left > 0 ? (int)left : 0;
}

void loop_run(void)
{
    struct epoll_event events[BATCH];
    for (;;) {
        int count = epoll_wait(epoll, events, BATCH, timeout());
        if (count < 0 && errno != EINTR)
            return;
        for (int i = 0; i < count; i++) {
            struct source *source = events[i].data.ptr;
            if (source->wanted)
                source->ready(source, events[i].events);
        }
        act();
        sweep();
        if (tick_action && sys_now_ms() >= tick_at_ms) {
            void (*action)(void) = tick_action;
            tick_action = NULL;
            action();
        }
    }
}
