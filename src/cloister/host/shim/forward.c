/*
 * What it is: the forwarder: TCP connections on the sandbox's loopback, each carried to the
 * relay's Unix socket by splice(2). What it is not: a proxy; it reads no byte of what it carries.
 *
 * Memory per idle connection is two descriptors and one small block: a pipe is borrowed only
 * while bytes are under way. A receiver that does not read stops its sender, nothing else.
 */
#define _GNU_SOURCE
#include "forward.h"
#include "loop.h"
#include "pair.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { BACKLOG = 1024, PAIRS_MAX = 8192, RETRY_MS = 5, ACCEPTS_AT_ONCE = 32, LISTENERS_MAX = 8 };

static struct source listeners[LISTENERS_MAX];
static int listener_fds[LISTENERS_MAX];
static int listener_count;
static struct sockaddr_un relay = {.sun_family = AF_UNIX};
static int parked = -1; /* accepted, waiting until the relay's backlog has room */

static void on_client(struct source *source, uint32_t events);

static void listen_again(void);

/* Stop accepting for a moment: the kernel's backlog holds newcomers meanwhile. */
static void pause_listening(void)
{
    for (int i = 0; i < listener_count; i++)
        (void)!loop_watch(&listeners[i], listener_fds[i], 0);
    loop_later(RETRY_MS, listen_again);
}

/* Close with a reset: the client learns at once that nobody will answer. */
static void refuse(int client)
{
    const struct linger now = {.l_onoff = 1, .l_linger = 0};
    (void)!setsockopt(client, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(client);
}

/* Connect an accepted client to the relay: false when it has to wait for room in the relay's backlog. */
static bool carry(int client)
{
    int upstream = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (upstream < 0) {
        refuse(client);
        return true;
    }
    if (connect(upstream, (struct sockaddr *)&relay, sizeof relay) == 0) {
        if (pair_open(client, upstream) < 0) {
            refuse(client);
            close(upstream);
        }
        return true;
    }
    int error = errno;
    close(upstream);
    if (error == EAGAIN) /* unix(7): the backlog is full */
        return false;
    refuse(client);
    return true;
}

static void listen_again(void)
{
    if (parked >= 0) {
        if (!carry(parked)) {
            loop_later(RETRY_MS, listen_again);
            return;
        }
        parked = -1;
    }
    for (int i = 0; i < listener_count; i++)
        if (loop_watch(&listeners[i], listener_fds[i], LOOP_READ) < 0)
            loop_later(RETRY_MS, listen_again);
}

static void on_client(struct source *source, uint32_t events)
{
    (void)events;
    for (int i = 0; i < ACCEPTS_AT_ONCE && parked < 0; i++) {
        int client = accept4(source->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (client < 0) {
            /* Out of descriptors or memory: without a pause a level-triggered loop would spin. */
            if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
                pause_listening();
            return;
        }
        if (pair_count() >= PAIRS_MAX) {
            refuse(client);
        } else if (!carry(client)) {
            parked = client;
            pause_listening();
        }
    }
}

static int open_listener(const struct sockaddr *address, socklen_t length)
{
    const int on = 1, place = listener_count;
    if (place == LISTENERS_MAX) {
        errno = E2BIG;
        return -1;
    }
    int fd = socket(address->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    listeners[place].ready = on_client;
    /* The relay sees short messages as they come; accepted sockets inherit the option. */
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0 ||
        setsockopt(fd, IPPROTO_TCP, 1 /* TCP_NODELAY */, &on, sizeof on) < 0 || bind(fd, address, length) < 0 ||
        listen(fd, BACKLOG) < 0 || loop_watch(&listeners[place], fd, LOOP_READ) < 0) {
        int saved = errno;
        close(fd);
        errno = saved;
        return -1;
    }
    listener_fds[listener_count++] = fd;
    return 0;
}

static bool open_port(const char *listen)
{
    struct sockaddr_in four = {.sin_family = AF_INET};
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    char host[INET_ADDRSTRLEN] = "";
    const char *colon = strchr(listen, ':');
    char *end = NULL;
    long port = colon ? strtol(colon + 1, &end, 10) : 0;
    errno = EINVAL;
    if (!colon || *end || port < 1 || port > 65535 || (size_t)(colon - listen) >= sizeof host)
        return false;
    memcpy(host, listen, (size_t)(colon - listen));
    if (inet_pton(AF_INET, host, &four.sin_addr) != 1)
        return false;
    four.sin_port = six.sin6_port = htons((uint16_t)port);
    if (open_listener((struct sockaddr *)&four, sizeof four) < 0)
        return false;
    /* IPv6 may be off in this kernel or namespace; clients were told the IPv4 address. */
    (void)!open_listener((struct sockaddr *)&six, sizeof six);
    return true;
}

bool forward_open(const char *const *listen, size_t count, const char *egress)
{
    if (!count)
        return true;
    if (strlen(egress) >= sizeof relay.sun_path) {
        errno = EINVAL;
        return false;
    }
    strcpy(relay.sun_path, egress);
    for (size_t i = 0; i < count; i++)
        if (!open_port(listen[i]))
            return false;
    return true;
}
