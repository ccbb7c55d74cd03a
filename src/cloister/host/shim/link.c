/*
 * What it is: the wire between keeper and guest (ARCHITECTURE.md "The link"): frames on one byte stream, queued on the
 * way out, whole on the way in. One per process. What it is not: the meaning of a frame, or its streams; stream.c has those.
 *
 * Neither end ever waits in a write: two ends that both do would never wake. The guest always reads. The keeper stops
 * reading while much is queued for a guest that reads nothing, so that answers to a flood cannot pile up.
 */
#define _GNU_SOURCE
#include "link.h"
#include "loop.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

/* Sources wait above FULL; above STUFFED the keeper reads nothing either. One read(2) takes READ at most. */
enum { FULL = 256 * 1024, STUFFED = 1024 * 1024, READ = 128 * 1024, DATA_HEAD = FRAME_HEADER + 4 };
enum { HELLO_HEAD = FRAME_HEADER + 4 };

struct bytes {
    uint8_t *at;
    size_t start, end, capacity;
};

static struct link {
    struct source source;
    int fd;
    const struct link_end *end;
    struct bytes in, out;
    bool awaited; /* the queue was full: tell when it is not */
    bool failed;  /* memory ran out while queueing, told when the loop comes round */
    bool gated;
    size_t gate; /* bytes that may still leave while it is closed */
    bool cut;    /* the last one ended by itself */
    bool parted; /* without a connection: what is queued waits for the next one */
    bool skipping;
    uint8_t nonce[LINK_NONCE];
    size_t skip_left;
} wire = {.fd = -1};

/* Room for `more` bytes behind what is held: false when memory ran out. */
static bool make_room(struct bytes *bytes, size_t more)
{
    if (bytes->start == bytes->end)
        bytes->start = bytes->end = 0;
    if (bytes->capacity - bytes->end >= more)
        return true;
    size_t held = bytes->end - bytes->start;
    if (bytes->start > 0) {
        memmove(bytes->at, bytes->at + bytes->start, held);
        bytes->start = 0;
        bytes->end = held;
    }
    if (bytes->capacity - held >= more)
        return true;
    size_t capacity = held + more < 2 * READ ? 2 * READ : (held + more) * 2;
    uint8_t *grown = realloc(bytes->at, capacity);
    if (!grown)
        return false;
    bytes->at = grown;
    bytes->capacity = capacity;
    return true;
}

static void forget(struct bytes *bytes)
{
    free(bytes->at);
    *bytes = (struct bytes){0};
}

size_t link_queued(void)
{
    return wire.out.end - wire.out.start;
}

/* Whether what is sent goes anywhere, now or later. */
static bool queueing(void)
{
    return wire.fd >= 0 || wire.parted;
}

bool link_full(void)
{
    bool full = link_queued() >= FULL || !queueing();
    wire.awaited = wire.awaited || full;
    return full;
}

/* Bytes that may leave now. */
static size_t leaving(void)
{
    return wire.gated && wire.gate < link_queued() ? wire.gate : link_queued();
}

static void lose(const char *why)
{
    const struct link_end *end = wire.end;
    wire.cut = false;
    link_close();
    end->lost(why);
}

/* The connection has ended, and nothing was wrong with what came by it: what waits behind a gate may have another. */
static void break_off(const char *why)
{
    if (wire.failed) {
        lose(why);
        return;
    }
    wire.cut = true;
    if (wire.gated)
        link_part();
    else
        link_close();
    wire.end->lost(why);
}

static uint32_t little(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

/* Drop what comes before the hello with our nonce: true when it has been found and stands first. */
static bool skip(void)
{
    struct bytes *in = &wire.in;
    size_t wanted = HELLO_HEAD + LINK_NONCE, held = in->end - in->start;
    if (held < wanted)
        return false;
    const uint8_t *at = in->at + in->start;
    const uint8_t *found = memmem(at + HELLO_HEAD, held - HELLO_HEAD, wire.nonce, LINK_NONCE);
    if (found && found[-5] == 'H' && little(found - HELLO_HEAD) <= wire.end->payload_max) {
        in->start += (size_t)(found - HELLO_HEAD - at);
        wire.skipping = false;
        return true;
    }
    size_t dropped = held - (wanted - 1); /* the rest may be its beginning */
    in->start += dropped;
    if (dropped > wire.skip_left) {
        lose("no answer to the join within what was skipped");
        return false;
    }
    wire.skip_left -= dropped;
    return false;
}

/* Hand on every whole frame that has arrived. */
static void deliver(void)
{
    const struct link_end *end = wire.end;
    struct bytes *in = &wire.in;
    if (wire.skipping && !skip())
        return;
    while (wire.fd >= 0 && in->end - in->start >= FRAME_HEADER) {
        const uint8_t *head = in->at + in->start;
        size_t length = little(head);
        if (length > end->payload_max) {
            lose("a frame is too long");
            return;
        }
        if (in->end - in->start < FRAME_HEADER + length)
            return;
        struct reader payload = {.at = head + FRAME_HEADER, .left = length};
        in->start += FRAME_HEADER + length;
        end->frame(head[4], &payload);
    }
}

static void watch(void)
{
    uint32_t wanted = leaving() > 0 ? LOOP_WRITE : 0;
    if (link_queued() < STUFFED || wire.end->always_reads)
        wanted |= LOOP_READ;
    if (wire.fd >= 0 && loop_watch(&wire.source, wire.fd, wanted) < 0)
        lose(strerror(errno));
}

/* Write what the other end takes now: false when it takes nothing more, ever. */
static bool flush(void)
{
    while (leaving() > 0) {
        ssize_t put = write(wire.fd, wire.out.at + wire.out.start, leaving());
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return errno == EAGAIN;
        wire.out.start += (size_t)put;
        wire.gate -= wire.gated ? (size_t)put : 0;
    }
    return true;
}

static void flush_soon(void)
{
    if (wire.fd < 0)
        return;
    if (wire.failed || !flush()) {
        break_off(wire.failed ? "out of memory" : "the other end is gone");
        return;
    }
    watch();
    if (wire.awaited && wire.fd >= 0 && link_queued() < FULL / 2) {
        wire.awaited = false;
        wire.end->room();
    }
}

static void on_ready(struct source *source, uint32_t events)
{
    (void)source;
    if (events & EPOLLOUT)
        flush_soon();
    if (wire.fd < 0 || !(events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        return;
    if (!make_room(&wire.in, READ)) {
        lose("out of memory");
        return;
    }
    ssize_t got = read(wire.fd, wire.in.at + wire.in.end, READ);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
        if (events & (EPOLLHUP | EPOLLERR)) /* a port without a host: level-triggered, it would spin */
            break_off("the other end is gone");
        return;
    }
    if (got <= 0) {
        break_off("the other end is gone");
        return;
    }
    wire.in.end += (size_t)got;
    deliver();
}

int link_open(int fd, const struct link_end *end)
{
    link_close();
    wire.fd = fd;
    wire.end = end;
    wire.source.ready = on_ready;
    return loop_watch(&wire.source, fd, LOOP_READ);
}

static void let_go(void)
{
    if (wire.fd >= 0) {
        (void)!loop_watch(&wire.source, wire.fd, 0);
        close(wire.fd);
    }
    wire.fd = -1;
    wire.skipping = false;
    forget(&wire.in);
}

void link_close(void)
{
    let_go();
    forget(&wire.out);
    wire.awaited = wire.failed = wire.gated = wire.parted = false;
}

void link_part(void)
{
    let_go();
    if (wire.gated) {
        wire.out.start += leaving(); /* half of a frame may be gone already */
        wire.gate = 0;
    }
    wire.parted = true;
}

int link_rejoin(int fd)
{
    link_part();
    wire.parted = false;
    wire.fd = fd;
    return loop_watch(&wire.source, fd, LOOP_READ);
}

bool link_cut(void)
{
    return wire.cut;
}

bool link_parted(void)
{
    return wire.parted;
}

bool link_connected(void)
{
    return wire.fd >= 0;
}

void link_skip_to(const uint8_t nonce[LINK_NONCE], size_t most)
{
    memcpy(wire.nonce, nonce, LINK_NONCE);
    wire.skip_left = most;
    wire.skipping = true;
}

void link_gate(bool closed)
{
    wire.gated = closed;
    wire.gate = link_queued();
    if (wire.fd >= 0)
        loop_soon(flush_soon);
}

bool link_gate_reached(void)
{
    return !wire.gated || leaving() == 0;
}

void link_void(void)
{
    wire.out.start = wire.out.end = 0;
}

static void put(const void *data, size_t length)
{
    if (length > 0)
        memcpy(wire.out.at + wire.out.end, data, length);
    wire.out.end += length;
}

static void put_head(char type, size_t length)
{
    const uint8_t head[FRAME_HEADER] = {(uint8_t)length, (uint8_t)(length >> 8), (uint8_t)(length >> 16),
                                        (uint8_t)(length >> 24), (uint8_t)type};
    put(head, sizeof head);
}

void link_send_first(char type, const void *payload, size_t length)
{
    size_t held = link_queued(), whole = FRAME_HEADER + length;
    if (wire.fd < 0)
        return;
    loop_soon(flush_soon);
    if (!make_room(&wire.out, whole)) {
        wire.failed = true;
        return;
    }
    uint8_t *at = wire.out.at + wire.out.start;
    memmove(at + whole, at, held);
    wire.out.end = wire.out.start;
    put_head(type, length);
    put(payload, length);
    wire.out.end += held;
    wire.gate += whole;
}

void link_send(char type, const void *head, size_t head_length, const void *rest, size_t length)
{
    if (!queueing())
        return;
    loop_soon(flush_soon);
    if (head_length + length > FRAME_PAYLOAD_MAX || !make_room(&wire.out, FRAME_HEADER + head_length + length)) {
        wire.failed = true;
        return;
    }
    put_head(type, head_length + length);
    put(head, head_length);
    put(rest, length);
}

void link_send_payload(char type, const struct writer *payload)
{
    if (payload->bad)
        wire.failed = true;
    link_send(type, payload->data, payload->bad ? 0 : payload->length, NULL, 0);
}

uint8_t *link_data_begin(size_t most)
{
    if (!queueing() || !make_room(&wire.out, DATA_HEAD + most))
        return NULL;
    return wire.out.at + wire.out.end + DATA_HEAD;
}

void link_data_end(uint32_t stream, size_t length)
{
    const uint8_t number[4] = {(uint8_t)stream, (uint8_t)(stream >> 8), (uint8_t)(stream >> 16), (uint8_t)(stream >> 24)};
    if (length == 0)
        return;
    loop_soon(flush_soon);
    put_head('D', sizeof number + length);
    put(number, sizeof number);
    wire.out.end += length; /* it is there already */
}

void link_drain(int patience_ms)
{
    while (wire.fd >= 0 && flush() && leaving() > 0) {
        struct pollfd wait = {.fd = wire.fd, .events = POLLOUT};
        if (poll(&wait, 1, patience_ms) <= 0)
            return;
    }
}
