/*
 * A model provider that costs next to nothing: what every proxy of the benchmark is put in front of.
 *
 * One thread, epoll, HTTP/1.1 with keep-alive. It prints its port. A POST is answered like Anthropic's
 * /v1/messages: JSON with usage, or, where the body asks for a stream, 202 chunks, 200 of which carry the time at
 * which they were written (CLOCK_MONOTONIC, nanoseconds, `T` and 19 digits), so that a reader on the same machine
 * knows how long each was under way. Whether they come at once or paced is told by `max_tokens`, which proxies
 * pass on. GET /count says how many requests were answered. It trusts whoever asks; for benchmarks and tests only.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CHUNKS = 200, EVENTS = 256, MOST_IN = 16 << 20, PACES = 2 };

#define SECOND 1000000000L

/* The value of max_tokens that asks for a pace, and the nanoseconds between two chunks. */
static const struct { long max_tokens, gap; } PACE[PACES] = {
    {777, SECOND / 50},
    {778, SECOND / 10},
};

struct buffer { char *data; size_t used, room; };

struct connection {
    int fd;
    bool dead, waits;         /* waits: for room in the socket */
    struct buffer in, out;
    size_t sent;              /* of out */
    int chunk;                /* the next one to write; -1: no stream */
    int pace;                 /* index of its queue, -1: all at once */
    long due;
    struct connection *next;  /* in its queue, or in the list of the dead */
};

/* All streams of a queue have the same gap, so appending keeps it sorted by time. */
static struct { struct connection *first, **last; } queue[PACES];
static struct connection *dead_ones;
static int poller;
static long answered, streamed;

static long
now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

static void
die(const char *what)
{
    perror(what);
    exit(1);
}

static void
append(struct buffer *to, const void *data, size_t length)
{
    if (to->used + length + 1 > to->room) {
        to->room = (to->used + length + 1) * 2;
        to->data = realloc(to->data, to->room);
        if (!to->data)
            die("realloc");
    }
    memcpy(to->data + to->used, data, length);
    to->used += length;
    to->data[to->used] = 0;
}

static void
give_up(struct connection *c)
{
    if (c->dead)
        return;
    c->dead = true;
    close(c->fd);
    if (c->chunk < 0 || c->pace < 0) { /* else its queue still knows it, and frees it in turn */
        c->next = dead_ones;
        dead_ones = c;
    }
}

static void
watch(struct connection *c, bool waits)
{
    if (c->waits == waits)
        return;
    c->waits = waits;
    struct epoll_event event = {EPOLLIN | (waits ? EPOLLOUT : 0), {.ptr = c}};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event);
}

static void
flush(struct connection *c)
{
    while (!c->dead && c->sent < c->out.used) {
        ssize_t n = send(c->fd, c->out.data + c->sent, c->out.used - c->sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            watch(c, true);
            return;
        }
        if (n < 0) {
            give_up(c);
            return;
        }
        c->sent += (size_t)n;
    }
    c->out.used = c->sent = 0;
    if (!c->dead)
        watch(c, false);
}

static const char DELTA[] =
    "event: content_block_delta\n"
    "data: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"T%019ld tok\"}}\n\n";
static const char FIRST[] =
    "event: message_start\n"
    "data: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_01\",\"type\":\"message\",\"role\":\"assistant\","
    "\"model\":\"claude-sonnet-4-5\",\"content\":[],\"stop_reason\":null,\"stop_sequence\":null,\"usage\":{"
    "\"input_tokens\":120,\"cache_creation_input_tokens\":10,\"cache_read_input_tokens\":2000,\"output_tokens\":1}}}\n\n"
    "event: content_block_start\n"
    "data: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n";
static const char LAST[] =
    "event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n"
    "event: message_delta\n"
    "data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\",\"stop_sequence\":null},"
    "\"usage\":{\"output_tokens\":200}}\n\n"
    "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";

/* Write one chunk, as a server does that flushes each event; the last ends the stream. */
static void
write_chunk(struct connection *c)
{
    char event[512];
    const char *text = event;
    int length = (int)sizeof LAST - 1;
    if (c->chunk == 0) {
        text = FIRST;
        length = (int)sizeof FIRST - 1;
    } else if (c->chunk <= CHUNKS) {
        length = snprintf(event, sizeof event, DELTA, now());
    } else {
        text = LAST;
    }
    char framed[1024];
    int all = snprintf(framed, sizeof framed, "%x\r\n%.*s\r\n%s", (unsigned)length, length, text,
                       c->chunk > CHUNKS ? "0\r\n\r\n" : "");
    append(&c->out, framed, (size_t)all);
    flush(c);
    c->chunk = c->chunk > CHUNKS ? -1 : c->chunk + 1;
}

static void
begin_stream(struct connection *c, const char *body, size_t length)
{
    static const char head[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                               "Cache-Control: no-cache\r\nrequest-id: req_1\r\nTransfer-Encoding: chunked\r\n\r\n";
    append(&c->out, head, sizeof head - 1);
    streamed++;
    c->chunk = 0;
    c->pace = -1;
    static const char word[] = "\"max_tokens\":";
    const char *found = memmem(body, length, word, sizeof word - 1);
    for (int i = 0; i < PACES; i++)
        if (found && atol(found + sizeof word - 1) == PACE[i].max_tokens)
            c->pace = i;
    write_chunk(c);
    if (c->pace < 0) {
        while (c->chunk >= 0 && !c->dead)
            write_chunk(c);
        return;
    }
    c->due = now() + PACE[c->pace].gap;
    c->next = NULL;
    *queue[c->pace].last = c;
    queue[c->pace].last = &c->next;
}

static void
write_answer(struct connection *c, bool count)
{
    char body[1200], head[256];
    int length;
    if (count) {
        length = snprintf(body, sizeof body, "{\"requests\":%ld,\"streams\":%ld}", answered, streamed);
    } else {
        char text[601];
        memset(text, 'x', 600);
        text[600] = 0;
        length = snprintf(body, sizeof body,
            "{\"id\":\"msg_01\",\"type\":\"message\",\"role\":\"assistant\",\"model\":\"claude-sonnet-4-5\","
            "\"content\":[{\"type\":\"text\",\"text\":\"%s\"}],\"stop_reason\":\"end_turn\",\"stop_sequence\":null,"
            "\"usage\":{\"input_tokens\":120,\"cache_creation_input_tokens\":10,\"cache_read_input_tokens\":2000,"
            "\"output_tokens\":180}}", text);
    }
    int all = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nrequest-id: req_1\r\n"
                       "Content-Length: %d\r\n\r\n", length);
    append(&c->out, head, (size_t)all);
    append(&c->out, body, (size_t)length);
    flush(c);
}

/* Return the length of the first request of a buffer, 0 when it is not all there; `body` is where its body begins. */
static size_t
request_length(const struct buffer *in, size_t *body)
{
    const char *end = in->used ? memmem(in->data, in->used, "\r\n\r\n", 4) : NULL;
    if (!end)
        return 0;
    *body = (size_t)(end - in->data) + 4;
    size_t length = 0;
    for (const char *line = in->data; line < end; line = strstr(line, "\r\n") + 2) {
        if (!strncasecmp(line, "content-length:", 15))
            length = (size_t)atol(line + 15);
        if (!strncasecmp(line, "transfer-encoding:", 18)) {
            const char *last = strstr(end, "\r\n0\r\n\r\n");
            return last ? (size_t)(last - in->data) + 7 : 0;
        }
    }
    return in->used >= *body + length ? *body + length : 0;
}

static void
answer_all(struct connection *c)
{
    size_t body, length;
    while (!c->dead && c->chunk < 0 && (length = request_length(&c->in, &body))) {
        const char *text = c->in.data + body;
        if (!strncmp(c->in.data, "GET /count ", 11)) {
            write_answer(c, true);
        } else {
            answered++;
            if (memmem(text, length - body, "\"stream\":true", 13) || memmem(text, length - body, "\"stream\": true", 14))
                begin_stream(c, text, length - body);
            else
                write_answer(c, false);
        }
        memmove(c->in.data, c->in.data + length, c->in.used - length);
        c->in.used -= length;
    }
}

static void
take(struct connection *c)
{
    static char data[1 << 16];
    ssize_t n = recv(c->fd, data, sizeof data, 0);
    if ((n < 0 && errno != EAGAIN) || n == 0 || c->in.used > MOST_IN) {
        give_up(c);
    } else if (n > 0) {
        append(&c->in, data, (size_t)n);
        answer_all(c);
    }
}

/* Write what is due; return the nanoseconds until the next is, -1 when nothing waits. */
static long
run_queue(int i)
{
    for (struct connection *c; (c = queue[i].first);) {
        long left = c->due - now();
        if (!c->dead && left > 0)
            return left;
        queue[i].first = c->next;
        if (!queue[i].first)
            queue[i].last = &queue[i].first;
        if (!c->dead)
            write_chunk(c);
        if (c->dead) {
            c->next = dead_ones;
            dead_ones = c;
        } else if (c->chunk < 0) {
            answer_all(c);
        } else {
            c->due += PACE[i].gap;
            c->next = NULL;
            *queue[i].last = c;
            queue[i].last = &c->next;
        }
    }
    return -1;
}

static void
welcome(int listener)
{
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
        int on = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct connection *c = calloc(1, sizeof *c);
        if (!c)
            die("calloc");
        c->fd = fd;
        c->chunk = c->pace = -1;
        struct epoll_event event = {EPOLLIN, {.ptr = c}};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
    }
}

static void
bury(void)
{
    while (dead_ones) {
        struct connection *c = dead_ones;
        dead_ones = c->next;
        free(c->in.data);
        free(c->out.data);
        free(c);
    }
}

static int
listen_anywhere(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (listener < 0 || bind(listener, (void *)&address, size) || listen(listener, 4096))
        die("listen");
    getsockname(listener, (void *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return listener;
}

int
main(int argc, char **argv)
{
    struct epoll_event events[EVENTS], listening = {EPOLLIN, {.ptr = NULL}};
    poller = epoll_create1(EPOLL_CLOEXEC);
    int listener = listen_anywhere(argc > 1 ? atoi(argv[1]) : 0);
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &listening);
    for (int i = 0; i < PACES; i++)
        queue[i].last = &queue[i].first;
    for (;;) {
        long wait = -1;
        for (int i = 0; i < PACES; i++) {
            long left = run_queue(i);
            if (left >= 0 && (wait < 0 || left < wait))
                wait = left;
        }
        struct timespec timeout = {wait / SECOND, wait % SECOND};
        int n = epoll_pwait2(poller, events, EVENTS, wait < 0 ? NULL : &timeout, NULL);
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c) {
                welcome(listener);
                continue;
            }
            if (!c->dead && (events[i].events & EPOLLOUT))
                flush(c);
            if (!c->dead && (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
                take(c);
        }
        bury();
    }
}
