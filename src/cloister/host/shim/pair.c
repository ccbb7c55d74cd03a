/*
 * What it is: one carried connection: two sockets, two directions, half-close kept apart.
 * What it is not: its making; forward.c accepts and connects.
 */
#define _GNU_SOURCE
#include "pair.h"
#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

/* Bytes per splice(2) and in a pipe; turns of one direction before others have theirs; pipes kept for reuse. */
enum { CHUNK = 256 * 1024, TURNS = 4, SPARE_PIPES = 4 };
enum { HOW = SPLICE_F_MOVE | SPLICE_F_NONBLOCK };

struct pipe_ends {
    int read, write;
};

struct pair;

struct side {
    struct source source;
    int fd;
    struct pair *pair;
};

/* One direction. `held` bytes are in the pipe; without any there is no pipe. */
struct flow {
    struct side *from, *to;
    struct pipe_ends pipe;
    size_t held;
    bool ended; /* the sender has no more */
    bool shut;  /* and the receiver knows */
};

struct pair {
    void *link; /* loop_free's */
    struct side client, upstream;
    struct flow out, in;
};

static size_t open_pairs;
static struct pipe_ends spare[SPARE_PIPES];
static size_t spare_count;

size_t pair_count(void)
{
    return open_pairs;
}

static bool borrow_pipe(struct flow *flow)
{
    if (flow->pipe.read >= 0)
        return true;
    if (spare_count > 0) {
        flow->pipe = spare[--spare_count];
        return true;
    }
    int ends[2];
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0)
        return false;
    /* A wish: the user may have used up the pages allowed for pipes (pipe(7)); the default works as well. */
    (void)!fcntl(ends[0], F_SETPIPE_SZ, CHUNK);
    flow->pipe = (struct pipe_ends){.read = ends[0], .write = ends[1]};
    return true;
}

static void drop_pipe(struct flow *flow)
{
    if (flow->pipe.read < 0)
        return;
    if (flow->held == 0 && spare_count < SPARE_PIPES) {
        spare[spare_count++] = flow->pipe;
    } else {
        close(flow->pipe.read);
        close(flow->pipe.write);
    }
    flow->pipe = (struct pipe_ends){.read = -1, .write = -1};
}

static void pair_close(struct pair *pair)
{
    (void)!loop_watch(&pair->client.source, pair->client.fd, 0);
    (void)!loop_watch(&pair->upstream.source, pair->upstream.fd, 0);
    drop_pipe(&pair->out);
    drop_pipe(&pair->in);
    close(pair->client.fd);
    close(pair->upstream.fd);
    open_pairs--;
    loop_free(pair);
}

/* The receiver takes no more. Only this direction ends: what it sent before may still be under way. */
static void abandon(struct flow *flow)
{
    drop_pipe(flow);
    flow->held = 0;
    flow->ended = flow->shut = true;
}

/* Pipe to receiver, as far as it goes now. */
static void deliver(struct flow *flow)
{
    while (flow->held > 0) {
        ssize_t moved = splice(flow->pipe.read, NULL, flow->to->fd, NULL, flow->held, HOW);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved < 0 && errno == EAGAIN)
            return;
        if (moved <= 0) {
            abandon(flow);
            return;
        }
        flow->held -= (size_t)moved;
    }
}

/* Tell the receiver, once, that its sender has no more. */
static void finish(struct flow *flow)
{
    if (!flow->ended || flow->shut)
        return;
    flow->shut = true;
    (void)!shutdown(flow->to->fd, SHUT_WR); /* fails when the receiver has gone, which is as good */
}

/* Sender to receiver, as far as it goes now: false when the sender was reset or there is no pipe to be had. */
static bool pump(struct flow *flow)
{
    for (int turn = 0; turn < TURNS; turn++) {
        deliver(flow);
        if (flow->held > 0)
            return true; /* the receiver is full; the pipe stays */
        if (flow->ended)
            break;
        if (!borrow_pipe(flow))
            return false;
        ssize_t moved = splice(flow->from->fd, NULL, flow->pipe.write, NULL, CHUNK, HOW);
        if (moved < 0 && errno != EAGAIN && errno != EINTR)
            return false;
        if (moved < 0)
            break;
        flow->ended = moved == 0;
        flow->held = (size_t)moved;
    }
    deliver(flow);
    if (flow->held == 0) {
        drop_pipe(flow);
        finish(flow);
    }
    return true;
}

static int watch(struct pair *pair)
{
    const struct flow *out = &pair->out, *in = &pair->in;
    uint32_t client = 0, upstream = 0;
    if (!out->ended && out->held == 0)
        client |= LOOP_READ;
    if (in->held > 0)
        client |= LOOP_WRITE;
    if (!in->ended && in->held == 0)
        upstream |= LOOP_READ;
    if (out->held > 0)
        upstream |= LOOP_WRITE;
    if (loop_watch(&pair->client.source, pair->client.fd, client) < 0)
        return -1;
    return loop_watch(&pair->upstream.source, pair->upstream.fd, upstream);
}

static void on_side(struct source *source, uint32_t events)
{
    struct side *side = (struct side *)source;
    struct pair *pair = side->pair;
    struct flow *sending = side == &pair->client ? &pair->out : &pair->in;
    struct flow *receiving = side == &pair->client ? &pair->in : &pair->out;
    bool good = true;
    if (events & (EPOLLOUT | EPOLLERR | EPOLLHUP))
        good = pump(receiving);
    if (good && (events & (EPOLLIN | EPOLLERR | EPOLLHUP)))
        good = pump(sending);
    if (!good || (pair->out.shut && pair->in.shut) || watch(pair) < 0)
        pair_close(pair);
}

int pair_open(int client, int upstream)
{
    struct pair *pair = calloc(1, sizeof *pair);
    if (!pair)
        return -1;
    pair->client = (struct side){.source.ready = on_side, .fd = client, .pair = pair};
    pair->upstream = (struct side){.source.ready = on_side, .fd = upstream, .pair = pair};
    pair->out = (struct flow){.from = &pair->client, .to = &pair->upstream, .pipe = {-1, -1}};
    pair->in = (struct flow){.from = &pair->upstream, .to = &pair->client, .pipe = {-1, -1}};
    if (watch(pair) == 0) {
        open_pairs++;
        return 0;
    }
    (void)!loop_watch(&pair->client.source, client, 0);
    (void)!loop_watch(&pair->upstream.source, upstream, 0);
    free(pair);
    return -1;
}
