/*
 * What it is: an end for the TCP connections of an address that a restored guest has no more.
 * What it is not: a wall; the host takes no frame of that address from it.
 *
 * By sock_diag(7) and its SOCK_DESTROY (Linux, net/ipv4/inet_diag.c): all are listed first, and then ended one by one.
 */
#define _GNU_SOURCE
#include "guest_connections.h"

#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

enum { PATIENCE_S = 2, ANSWER = 16 << 10, MOST = 1 << 16 };

struct request {
    struct nlmsghdr head;
    struct inet_diag_req_v2 body;
};

/* Connections, by what the kernel tells them apart with. */
struct found {
    struct connection {
        uint8_t family;
        struct inet_diag_sockid id;
    } *items;
    size_t count;
};

/* Of both kinds of sockets: one of IPv6 may be connected by IPv4 (ipv6(7), "v4-mapped"). */
static const uint8_t FAMILIES[] = {AF_INET, AF_INET6};

static uint32_t own_address(void)
{
    struct ifreq request = {.ifr_name = "eth0"};
    struct sockaddr_in address = {0};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && ioctl(fd, SIOCGIFADDR, &request) == 0)
        memcpy(&address, &request.ifr_addr, sizeof address);
    if (fd >= 0)
        close(fd);
    return address.sin_addr.s_addr;
}

static int open_diag(void)
{
    const struct timeval patience = {.tv_sec = PATIENCE_S};
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
    if (fd >= 0)
        (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    return fd;
}

static bool is_from(const struct inet_diag_msg *message, uint32_t address)
{
    const uint32_t *source = message->id.idiag_src;
    if (message->idiag_family == AF_INET)
        return source[0] == address;
    return source[0] == 0 && source[1] == 0 && source[2] == htonl(0xffff) && source[3] == address;
}

static bool ask(int fd, uint16_t type, uint16_t flags, const struct connection *which)
{
    struct request request = {
        .head = {.nlmsg_len = sizeof request, .nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | flags},
        .body = {.sdiag_family = which->family, .sdiag_protocol = IPPROTO_TCP, .idiag_states = ~(1U << TCP_LISTEN),
            .id = which->id},
    };
    return send(fd, &request, sizeof request, 0) == sizeof request;
}

/* Keep one connection of this address. False: there is no room. */
static bool keep(struct found *found, const struct nlmsghdr *head, uint32_t address)
{
    struct inet_diag_msg message;
    if (head->nlmsg_len < NLMSG_LENGTH(sizeof message))
        return true;
    memcpy(&message, NLMSG_DATA(head), sizeof message);
    if (!is_from(&message, address))
        return true;
    if (found->count % 64 == 0) {
        void *more = found->count < MOST ? realloc(found->items, (found->count + 64) * sizeof *found->items) : NULL;
        if (!more)
            return false;
        found->items = more;
    }
    found->items[found->count++] = (struct connection){message.idiag_family, message.id};
    return true;
}

static void look_for(int fd, struct found *found, uint8_t family, uint32_t address)
{
    _Alignas(struct nlmsghdr) char answer[ANSWER];
    if (!ask(fd, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &(struct connection){.family = family}))
        return;
    for (;;) {
        ssize_t got = recv(fd, answer, sizeof answer, 0);
        const struct nlmsghdr *head = (const struct nlmsghdr *)answer;
        if (got <= 0)
            return;
        for (size_t left = (size_t)got; NLMSG_OK(head, left); head = NLMSG_NEXT(head, left))
            if (head->nlmsg_type != SOCK_DIAG_BY_FAMILY || !keep(found, head, address))
                return; /* the end, an error, or no room */
    }
}

void guest_connections_cut(void)
{
    struct found found = {0};
    uint32_t address = own_address();
    int fd = address ? open_diag() : -1;
    if (fd < 0)
        return;
    for (size_t i = 0; i < sizeof FAMILIES; i++)
        look_for(fd, &found, FAMILIES[i], address);
    for (size_t i = 0; i < found.count; i++)
        (void)ask(fd, SOCK_DESTROY, 0, &found.items[i]); /* one that has ended meanwhile is what was wanted */
    close(fd);
    free(found.items);
}
