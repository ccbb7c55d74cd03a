/*
 * What it is: a command for programs inside: standard input and output, tunnelled to a host by the
 * run's proxy (RFC 9110, section 9.3.6). ssh starts it as its ProxyCommand, since an empty network
 * namespace has no other way out. What it is not: privileged; whoever may start it could speak to
 * the proxy as well. The proxy decides, and its explanation is shown.
 */
#define _GNU_SOURCE
#include "connect.h"
#include "sys.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sysexits.h>
#include <unistd.h>

enum { PROXY_PORT = 3128, HEAD_MAX = 16 * 1024, FLOW_MAX = 64 * 1024, HOST_MAX = 255 };

/* Bytes on their way in one direction. */
struct flow {
    int from, to;
    size_t at, length;
    bool ended;  /* nothing more will come */
    bool closed; /* the receiver was told, or is gone */
    char data[FLOW_MAX];
};

static struct flow up, down;

static int fail(int code, const char *text, const char *reference)
{
    fprintf(stderr, "cloister: %s [%s]\n", text, reference);
    return code;
}

/* Whether the text can stand in a request: a name, an address, or digits. */
static bool plain(const char *text, size_t max)
{
    size_t length = strlen(text);
    for (size_t i = 0; i < length; i++)
        if (!isalnum((unsigned char)text[i]) && !strchr(".-_:", text[i]))
            return false;
    return length > 0 && length <= max;
}

/* A connection to the proxy with the request on its way, or -1. */
static int ask(const char *host, const char *port)
{
    const struct sockaddr_in proxy = {.sin_family = AF_INET, .sin_port = htons(PROXY_PORT),
                                      .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    char request[2 * (HOST_MAX + 16) + 64];
    const char *before = strchr(host, ':') ? "[" : "", *after = strchr(host, ':') ? "]" : "";
    int length = snprintf(request, sizeof request, "CONNECT %s%s%s:%s HTTP/1.1\r\nHost: %s%s%s:%s\r\n\r\n", before,
                          host, after, port, before, host, after, port);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    if (connect(fd, (const struct sockaddr *)&proxy, sizeof proxy) == 0 &&
        sys_write_all(fd, request, (size_t)length, 10000) == 0)
        return fd;
    close(fd);
    return -1;
}

/* Read until the empty line; what was read behind it stays in `down`. The length of the head, or 0. */
static size_t read_head(int fd)
{
    while (down.length < HEAD_MAX) {
        ssize_t count = read(fd, down.data + down.length, HEAD_MAX - down.length);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return 0;
        down.length += (size_t)count;
        const char *end = memmem(down.data, down.length, "\r\n\r\n", 4);
        if (end)
            return (size_t)(end - down.data) + 4;
    }
    return 0;
}

/* Show one field of the refusal, a JSON object of strings; escapes are dropped, control characters replaced. */
static void show_field(const char *body, const char *name, const char *before, const char *after)
{
    char wanted[64], text[1024];
    size_t used = 0;
    snprintf(wanted, sizeof wanted, "\"%s\":\"", name);
    const char *at = strstr(body, wanted);
    if (!at)
        return;
    for (at += strlen(wanted); *at && *at != '"' && used < sizeof text; at++) {
        if (*at == '\\' && !*++at)
            break;
        text[used++] = *at;
    }
    if (!used)
        return;
    fputs(before, stderr);
    fflush(stderr);
    sys_write_printable(STDERR_FILENO, text, used, false);
    fputs(after, stderr);
}

/* Show why the proxy said no; it closes the connection behind its answer, or says how long that is. */
static int refused(int fd, size_t head)
{
    const struct timeval patience = {.tv_sec = 2};
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    down.data[head - 1] = '\0';
    const char *field = strcasestr(down.data, "\r\ncontent-length:");
    size_t body = field ? strtoul(field + strlen("\r\ncontent-length:"), NULL, 10) : HEAD_MAX;
    size_t wanted = body < HEAD_MAX ? head + body : head + HEAD_MAX;
    while (down.length < wanted && down.length < sizeof down.data - 1) {
        ssize_t count = read(fd, down.data + down.length, sizeof down.data - 1 - down.length);
        if (count <= 0)
            break;
        down.length += (size_t)count;
    }
    down.data[down.length] = '\0';
    show_field(down.data + head, "explanation", "cloister: ", "");
    show_field(down.data + head, "reason", " [", "]\n");
    show_field(down.data + head, "remedy", "  try: ", "\n");
    close(fd);
    return EX_NOPERM;
}

/* Take what has come. An error of a sender is its end. */
static void take(struct flow *flow)
{
    ssize_t count = read(flow->from, flow->data, sizeof flow->data);
    if (count < 0 && (errno == EINTR || errno == EAGAIN))
        return;
    flow->at = 0;
    flow->length = count > 0 ? (size_t)count : 0;
    flow->ended = count <= 0;
}

/* Hand on what fits without waiting: the other direction must not stand still for it. */
static void give(struct flow *flow)
{
    size_t left = flow->length - flow->at;
    ssize_t count = send(flow->to, flow->data + flow->at, left, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (count < 0 && errno == ENOTSOCK) /* a pipe that is ready takes that much at once (pipe(7)) */
        count = write(flow->to, flow->data + flow->at, left < PIPE_BUF ? left : PIPE_BUF);
    if (count < 0 && (errno == EINTR || errno == EAGAIN))
        return;
    if (count < 0)
        flow->ended = flow->closed = true;
    flow->at += count > 0 ? (size_t)count : 0;
    if (count < 0 || flow->at == flow->length)
        flow->at = flow->length = 0;
}

/* Pass the end of a direction on. Input and output may be one socket, so closing would not be seen. */
static void finish(struct flow *flow)
{
    if (!flow->ended || flow->length || flow->closed)
        return;
    flow->closed = true;
    if (shutdown(flow->to, SHUT_WR) < 0 && errno == ENOTSOCK)
        close(flow->to);
}

static struct pollfd wait_for(const struct flow *flow)
{
    bool waits_to_give = flow->length > 0;
    struct pollfd result = {.fd = waits_to_give ? flow->to : flow->from, .events = waits_to_give ? POLLOUT : POLLIN};
    if (!waits_to_give && flow->ended)
        result.fd = -1;
    return result;
}

/* Carry both directions until the host's has ended, and ours is known to be of no more use. */
static int carry(void)
{
    for (;;) {
        finish(&up);
        finish(&down);
        if (down.closed)
            return EX_OK;
        struct pollfd ready[] = {wait_for(&up), wait_for(&down)};
        if (poll(ready, 2, -1) < 0 && errno != EINTR)
            return EX_OSERR;
        struct flow *flows[] = {&up, &down};
        for (int i = 0; i < 2; i++) {
            if (!ready[i].revents)
                continue;
            if (flows[i]->length)
                give(flows[i]);
            else
                take(flows[i]);
        }
    }
}

int connect_main(const char *host, const char *port)
{
    if (sys_fill_stdio() < 0 || !plain(host, HOST_MAX) || !plain(port, 5) || strtoul(port, NULL, 10) - 1 >= 65535)
        return fail(EX_USAGE, "cloister-shim connect takes a host and a port", "shim-usage");
    (void)signal(SIGPIPE, SIG_IGN); /* a reader that is gone is an end, as on the other side */
    int fd = ask(host, port);
    if (fd < 0)
        return fail(EX_UNAVAILABLE, "the run's proxy cannot be reached", "proxy-unreachable");
    size_t head = read_head(fd);
    if (!head || strncmp(down.data, "HTTP/1.1 ", 9) != 0)
        return fail(EX_PROTOCOL, "the run's proxy gave no answer", "proxy-silent");
    if (strncmp(down.data + 9, "200", 3) != 0)
        return refused(fd, head);
    down.at = head;
    if (down.at == down.length)
        down.at = down.length = 0;
    up.from = STDIN_FILENO;
    up.to = down.from = fd;
    down.to = STDOUT_FILENO;
    return carry();
}
