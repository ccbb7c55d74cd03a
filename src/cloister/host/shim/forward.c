/*
 * What it is: the forwarder: TCP connections on the sandbox's loopback, each carried to the
 * relay's Unix socket by splice(2), and the other way round a service's port on a Unix socket of its own.
 * What it is not: a proxy; it reads no byte of what it carries.
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
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { BACKLOG = 1024, PAIRS_MAX = 8192, RETRY_MS = 5, ACCEPTS_AT_ONCE = 32, LISTENERS_MAX = 8 };

struct address {
    union {
        struct sockaddr any;
        struct sockaddr_un local;
        struct sockaddr_in four;
        struct sockaddr_in6 six;
    };
    socklen_t length;
};

struct listener {
    struct source source; /* first: on_client casts */
    int fd;
    const struct address *target;
};

static struct listener listeners[LISTENERS_MAX];
static int listener_count;
static struct address relay;
/* Accepted, waiting until there is room in the backlog of where it goes. */
static int parked = -1;
static const struct address *parked_target;

static void on_client(struct source *source, uint32_t events);

static void listen_again(void);

/* Stop accepting for a moment: the kernel's backlog holds newcomers meanwhile. */
static void pause_listening(void)
{
    for (int i = 0; i < listener_count; i++)
        (void)!loop_watch(&listeners[i].source, listeners[i].fd, 0);
    loop_later(RETRY_MS, listen_again);
}

/* Close with a reset: the client learns at once that nobody will answer. */
static void refuse(int client)
{
    const struct linger now = {.l_onoff = 1, .l_linger = 0};
    (void)!setsockopt(client, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(client);
}

/* Connect an accepted client: false when it has to wait for room in the backlog of a Unix socket. */
static bool carry(int client, const struct address *target)
{
    int upstream = socket(target->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (upstream < 0) {
        refuse(client);
        return true;
    }
    /* A TCP connection under way takes no bytes until it stands, and reports its failure as a reset would be. */
    if (connect(upstream, &target->any, target->length) == 0 || errno == EINPROGRESS) {
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
        if (!carry(parked, parked_target)) {
            loop_later(RETRY_MS, listen_again);
            return;
        }
        parked = -1;
    }
    for (int i = 0; i < listener_count; i++)
        if (loop_watch(&listeners[i].source, listeners[i].fd, LOOP_READ) < 0)
            loop_later(RETRY_MS, listen_again);
}

static void on_client(struct source *source, uint32_t events)
{
    (void)events;
    const struct listener *listener = (const struct listener *)source;
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
        } else if (!carry(client, listener->target)) {
            parked = client;
            parked_target = listener->target;
            pause_listening();
        }
    }
}

static int open_listener(const struct address *address, const struct address *target)
{
    const int on = 1, tcp = address->any.sa_family != AF_UNIX;
    if (listener_count == LISTENERS_MAX) {
        errno = E2BIG;
        return -1;
    }
    struct listener *listener = &listeners[listener_count];
    int fd = socket(address->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    *listener = (struct listener){.source.ready = on_client, .fd = fd, .target = target};
    /* The relay sees short messages as they come; accepted sockets inherit the option. */
    if ((tcp && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0) ||
        (tcp && setsockopt(fd, IPPROTO_TCP, 1 /* TCP_NODELAY */, &on, sizeof on) < 0) ||
        bind(fd, &address->any, address->length) < 0 || listen(fd, BACKLOG) < 0 ||
        loop_watch(&listener->source, fd, LOOP_READ) < 0) {
        int saved = errno;
        close(fd);
        errno = saved;
        return -1;
    }
    listener_count++;
    return 0;
}

/* `127.0.0.1:3128`: false when it is none. */
static bool parse_port(struct address *address, const char *text)
{
    char host[INET_ADDRSTRLEN] = "";
    const char *colon = strchr(text, ':');
    char *end = NULL;
    long port = colon ? strtol(colon + 1, &end, 10) : 0;
    *address = (struct address){.length = sizeof address->four};
    address->four.sin_family = AF_INET;
    errno = EINVAL;
    if (!colon || *end || port < 1 || port > 65535 || (size_t)(colon - text) >= sizeof host)
        return false;
    memcpy(host, text, (size_t)(colon - text));
    address->four.sin_port = htons((uint16_t)port);
    return inet_pton(AF_INET, host, &address->four.sin_addr) == 1;
}

static bool parse_path(struct address *address, const char *path, size_t length)
{
    *address = (struct address){.length = sizeof address->local};
    address->local.sun_family = AF_UNIX;
    errno = EINVAL;
    if (length == 0 || length >= sizeof address->local.sun_path)
        return false;
    memcpy(address->local.sun_path, path, length);
    return true;
}

static bool open_port(const char *listen)
{
    struct address four, six = {.length = sizeof six.six};
    if (!parse_port(&four, listen) || open_listener(&four, &relay) < 0)
        return false;
    six.six = (struct sockaddr_in6){
        .sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT, .sin6_port = four.four.sin_port};
    /* IPv6 may be off in this kernel or namespace; clients were told the IPv4 address. */
    (void)!open_listener(&six, &relay);
    return true;
}

bool forward_open(const char *const *listen, size_t count, const char *egress)
{
    if (!count)
        return true;
    if (!parse_path(&relay, egress, strlen(egress)))
        return false;
    for (size_t i = 0; i < count; i++)
        if (!open_port(listen[i]))
            return false;
    return true;
}

bool forward_publish(const char *publish)
{
    static struct address targets[LISTENERS_MAX];
    static int count;
    const char *equal = strrchr(publish, '=');
    struct address path;
    struct stat about;
    errno = EINVAL;
    if (count == LISTENERS_MAX || !equal || !parse_path(&path, publish, (size_t)(equal - publish)) ||
        !parse_port(&targets[count], equal + 1))
        return false;
    /* What a killed predecessor left. Anything but a socket there is somebody else's. */
    const char *name = path.local.sun_path;
    if (lstat(name, &about) == 0 && S_ISSOCK(about.st_mode) && unlink(name) < 0)
        return false;
    const mode_t before = umask(0117); /* whoever may connect is in the socket's group */
    bool good = open_listener(&path, &targets[count++]) == 0;
    umask(before);
    return good;
}
