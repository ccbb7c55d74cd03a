/*
 * What it is: the inner half's one event loop over epoll(7), level-triggered, without threads.
 * What it is not: aware of what it waits for.
 */
#ifndef CLOISTER_LOOP_H
#define CLOISTER_LOOP_H

#include <stdbool.h>
#include <stdint.h>

enum { LOOP_READ = 1, LOOP_URGENT = 2, LOOP_WRITE = 4 }; /* EPOLLIN, EPOLLPRI, EPOLLOUT */

/* Embed one per descriptor. */
struct source {
    void (*ready)(struct source *source, uint32_t events);
    int fd;
    uint32_t wanted; /* 0: not in the epoll set, so that a hung-up descriptor cannot keep the loop busy */
};

/* Watch `fd` for `wanted` (0: not at all). Call again to change. */
int loop_watch(struct source *source, int fd, uint32_t wanted);

/* Call `tick` once, `delay_ms` from now; a second call replaces the first. */
void loop_later(int delay_ms, void (*tick)(void));

/* Call `action` once when the present batch of events is done; asking again before that changes nothing. */
void loop_soon(void (*action)(void));

/* Free a block after the current batch of events, in which it may still be named. */
void loop_free(void *block);

/* Runs until epoll fails, which it does not. */
void loop_run(void);

#endif
