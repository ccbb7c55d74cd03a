/*
 * A load generator for HTTP/1.1 on loopback: `load closed|open HOST:PORT REQUEST CONNECTIONS SECONDS WARM`.
 *
 * REQUEST is a file with one whole request. `closed`: each connection asks again as soon as it is answered, for
 * SECONDS after WARM seconds that do not count. `open`: each connection asks once, the starts are spread over WARM
 * seconds, and it ends when all are answered or SECONDS are over. Prints one line of JSON; times are microseconds.
 * A chunk's latency is from the time that upstream.c wrote into it until it was read here. An answer counts as good
 * when its status is 200, its end was seen, and it holds as many time stamps as the first good one did.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 512, BUCKETS = 10000000, HEAD = 16384, STAMP = 20 };

#define SECOND 1000000000L

/* One bucket per microsecond up to ten seconds; what takes longer is in the last. */
struct histogram { unsigned *bucket; long count, most; };

enum chunked { SIZE, EXTENSION, DATA, AFTER_DATA, TRAILER, TRAILER_LINE, DONE };

struct connection {
    int fd;
    bool finished, headed, chunked, closes;
    size_t sent, head_used;
    int status;
    long began, left;      /* left: bytes of the body, or of the chunk; -1: until the end */
    enum chunked state;
    bool first;            /* a byte of the body was seen */
    int stamp_length;
    long stamp, stamps;
    char head[HEAD];       /* last: it is not cleared between two requests */
};

static struct histogram whole, first_byte, chunk;
static struct sockaddr_in target;
static char *request;
static size_t request_size;
static int poller;
static bool measuring, once;
static long good, broken, refused, incomplete, finished, all, expected_stamps = -1, most_open, open_now;

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
note(struct histogram *h, long nanoseconds)
{
    long us = nanoseconds < 0 ? 0 : nanoseconds / 1000;
    if (!measuring)
        return;
    h->most = us > h->most ? us : h->most;
    h->bucket[us < BUCKETS ? us : BUCKETS - 1]++;
    h->count++;
}

static long
percentile(const struct histogram *h, double share)
{
    long wanted = (long)((double)h->count * share), seen = 0;
    for (long us = 0; h->count && us < BUCKETS - 1; us++)
        if ((seen += h->bucket[us]) > wanted)
            return us;
    return h->most;
}

/* Look for `T` and 19 digits, also across pieces. */
static void
read_stamps(struct connection *c, const char *data, size_t length)
{
    for (const char *end = data + length; data < end; data++) {
        if (!c->stamp_length) {
            data = memchr(data, 'T', (size_t)(end - data));
            if (!data)
                return;
            c->stamp_length = 1;
            c->stamp = 0;
        } else if (*data >= '0' && *data <= '9') {
            c->stamp = c->stamp * 10 + (*data - '0');
            if (++c->stamp_length == STAMP) {
                note(&chunk, now() - c->stamp);
                c->stamps++;
                c->stamp_length = 0;
            }
        } else {
            c->stamp_length = *data == 'T';
            c->stamp = 0;
        }
    }
}

static void
body_bytes(struct connection *c, const char *data, size_t length)
{
    if (!c->first && length) {
        c->first = true;
        note(&first_byte, now() - c->began);
    }
    read_stamps(c, data, length);
}

static int
hex(char digit)
{
    return digit <= '9' ? digit - '0' : (digit | 32) - 'a' + 10;
}

/* Take the body of a chunked answer; return whether it has ended. */
static bool
take_chunked(struct connection *c, const char *data, size_t length)
{
    for (const char *end = data + length; data < end && c->state != DONE;) {
        char byte = *data;
        if (c->state == DATA) {
            size_t n = (size_t)(end - data) < (size_t)c->left ? (size_t)(end - data) : (size_t)c->left;
            body_bytes(c, data, n);
            data += n;
            c->left -= (long)n;
            if (!c->left)
                c->state = AFTER_DATA;
            continue;
        }
        data++;
        if (c->state == AFTER_DATA) {
            c->state = byte == '\n' ? SIZE : AFTER_DATA;
        } else if (c->state == TRAILER) {
            c->state = byte == '\n' ? DONE : byte == '\r' ? TRAILER : TRAILER_LINE;
        } else if (c->state == TRAILER_LINE) {
            c->state = byte == '\n' ? TRAILER : TRAILER_LINE;
        } else if (byte == '\n') {
            c->state = c->left ? DATA : TRAILER;
        } else if (byte == ';' || byte == '\r') {
            c->state = EXTENSION;
        } else if (c->state == SIZE) {
            c->left = c->left * 16 + hex(byte);
        }
    }
    return c->state == DONE;
}

static bool
take_body(struct connection *c, const char *data, size_t length)
{
    if (c->chunked)
        return take_chunked(c, data, length);
    body_bytes(c, data, length);
    if (c->left < 0)
        return false;
    c->left -= (long)length;
    return c->left <= 0;
}

/* Read the head; return how many bytes of `data` belong to it, 0 while it is not complete. */
static size_t
take_head(struct connection *c, const char *data, size_t length)
{
    size_t before = c->head_used, room = HEAD - 1 - before, copied = length < room ? length : room;
    memcpy(c->head + before, data, copied);
    c->head_used += copied;
    c->head[c->head_used] = 0;
    const char *end = strstr(c->head, "\r\n\r\n");
    if (!end)
        return 0;
    c->headed = true;
    c->status = atoi(c->head + 9);
    c->left = -1;
    for (const char *line = c->head; line < end; line = strstr(line, "\r\n") + 2) {
        if (!strncasecmp(line, "content-length:", 15))
            c->left = atol(line + 15);
        else if (!strncasecmp(line, "transfer-encoding:", 18))
            c->chunked = true;
        else if (!strncasecmp(line, "connection: close", 17))
            c->closes = true;
    }
    if (c->chunked)
        c->left = 0;
    return (size_t)(end - c->head) + 4 - before;
}

static void
watch(struct connection *c, int operation)
{
    struct epoll_event event = {EPOLLIN | (c->sent < request_size ? EPOLLOUT : 0), {.ptr = c}};
    epoll_ctl(poller, operation, c->fd, &event);
}

static void
send_rest(struct connection *c)
{
    while (c->sent < request_size) {
        ssize_t n = send(c->fd, request + c->sent, request_size - c->sent, MSG_NOSIGNAL);
        if (n <= 0)
            break;
        c->sent += (size_t)n;
    }
}

static void
ask(struct connection *c)
{
    int fd = c->fd;
    memset(c, 0, offsetof(struct connection, head));
    c->fd = fd;
    c->began = now();
    send_rest(c);
}

static void
open_connection(struct connection *c)
{
    int on = 1;
    for (int attempt = 0;; attempt++) {
        c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (!connect(c->fd, (void *)&target, sizeof target))
            break;
        close(c->fd);
        if (attempt == 100)
            die("connect");
        usleep(20000);
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    ask(c);
    watch(c, EPOLL_CTL_ADD);
    most_open = ++open_now > most_open ? open_now : most_open;
}

static void
finish(struct connection *c, bool complete)
{
    all++;
    if (measuring) {
        finished++;
        if (complete && c->status == 200 && expected_stamps < 0)
            expected_stamps = c->stamps;
        if (!complete)
            broken++;
        else if (c->status != 200)
            refused++;
        else if (c->stamps != expected_stamps)
            incomplete++;
        else
            good++;
        if (complete)
            note(&whole, now() - c->began);
    }
    if (once || c->closes || !complete) {
        close(c->fd);
        open_now--;
        c->finished = true;
        if (!once) {
            open_connection(c);
        }
        return;
    }
    ask(c);
    if (c->sent < request_size)
        watch(c, EPOLL_CTL_MOD);
}

static void
take(struct connection *c)
{
    static char data[1 << 16];
    ssize_t n = recv(c->fd, data, sizeof data, 0);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        finish(c, c->headed && !c->chunked && c->left < 0);
        return;
    }
    size_t head = 0;
    if (!c->headed && !(head = take_head(c, data, (size_t)n)))
        return;
    if ((!c->chunked && c->left == 0) || ((size_t)n > head && take_body(c, data + head, (size_t)n - head)))
        finish(c, true);
}

static void
wait_some(int milliseconds)
{
    struct epoll_event events[EVENTS];
    int n = epoll_wait(poller, events, EVENTS, milliseconds);
    for (int i = 0; i < n; i++) {
        struct connection *c = events[i].data.ptr;
        if (c->finished)
            continue;
        if ((events[i].events & EPOLLOUT) && c->sent < request_size) {
            send_rest(c);
            watch(c, EPOLL_CTL_MOD);
        }
        if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
            take(c);
    }
}

static double
run_closed(struct connection *connections, int count, double seconds, double warm)
{
    for (int i = 0; i < count; i++)
        open_connection(&connections[i]);
    long until = now() + (long)(warm * SECOND);
    while (now() < until)
        wait_some(100);
    long began = now();
    measuring = true;
    until = began + (long)(seconds * SECOND);
    while (now() < until)
        wait_some(100);
    return (double)(now() - began) / SECOND;
}

static double
run_open(struct connection *connections, int count, double seconds, double spread)
{
    long began = now(), until = began + (long)(seconds * SECOND);
    int opened = 0;
    once = measuring = true;
    while (finished < count && now() < until) {
        while (opened < count && now() >= began + (long)(spread * SECOND * opened / count))
            open_connection(&connections[opened++]);
        wait_some(opened < count ? 1 : 100);
    }
    return (double)(now() - began) / SECOND;
}

static void
prepare(const char *place, const char *path)
{
    const char *colon = strrchr(place, ':');
    char host[64];
    snprintf(host, sizeof host, "%.*s", colon ? (int)(colon - place) : 0, place);
    target.sin_family = AF_INET;
    if (!colon || inet_pton(AF_INET, host, &target.sin_addr) != 1)
        die("HOST:PORT");
    target.sin_port = htons((uint16_t)atoi(colon + 1));
    FILE *file = fopen(path, "rb");
    if (!file)
        die(path);
    request = malloc(64 << 20);
    request_size = request ? fread(request, 1, 64 << 20, file) : 0;
    fclose(file);
    struct histogram *each[] = {&whole, &first_byte, &chunk};
    for (int i = 0; i < 3; i++)
        if (!(each[i]->bucket = calloc(BUCKETS, sizeof *each[i]->bucket)))
            die("calloc");
    poller = epoll_create1(EPOLL_CLOEXEC);
}

int
main(int argc, char **argv)
{
    if (argc != 7)
        die("closed|open HOST:PORT REQUEST CONNECTIONS SECONDS WARM");
    prepare(argv[2], argv[3]);
    int count = atoi(argv[4]);
    struct connection *connections = calloc((size_t)count, sizeof *connections);
    if (!connections)
        die("calloc");
    bool closed = !strcmp(argv[1], "closed");
    double took = (closed ? run_closed : run_open)(connections, count, atof(argv[5]), atof(argv[6]));
    printf("{\"seconds\":%.3f,\"all\":%ld,\"finished\":%ld,\"good\":%ld,\"refused\":%ld,\"broken\":%ld,"
           "\"incomplete\":%ld,\"most_open\":%ld,\"per_second\":%.1f,", took, all, finished, good, refused, broken,
           incomplete, most_open, (double)good / took);
    printf("\"p50\":%ld,\"p99\":%ld,\"most\":%ld,\"first_p50\":%ld,\"first_p99\":%ld,", percentile(&whole, .5),
           percentile(&whole, .99), whole.most, percentile(&first_byte, .5), percentile(&first_byte, .99));
    printf("\"chunks\":%ld,\"chunk_p50\":%ld,\"chunk_p99\":%ld,\"chunk_most\":%ld}\n", chunk.count,
           percentile(&chunk, .5), percentile(&chunk, .99), chunk.most);
    return 0;
}
