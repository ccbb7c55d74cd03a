/*
 * What it is: what makes one guest differ from every other that began with the same memory: randomness, time, names,
 * addresses. What it is not: mounts.
 */
#define _GNU_SOURCE
#include "guest_identity.h"
#include "sys.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

const char *guest_identity_fresh(const struct guest_fields *fields)
{
    const struct rand_pool_info head = {.entropy_count = GUEST_ENTROPY * 8, .buf_size = GUEST_ENTROPY};
    _Alignas(struct rand_pool_info) unsigned char pool[sizeof head + GUEST_ENTROPY];
    const struct timespec now = {.tv_sec = (time_t)(fields->time_ns / 1000000000ULL),
        .tv_nsec = (long)(fields->time_ns % 1000000000ULL)};
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    memcpy(pool, &head, sizeof head);
    memcpy(pool + sizeof head, fields->entropy, GUEST_ENTROPY);
    int result = fd < 0 ? -1 : ioctl(fd, RNDADDENTROPY, pool);
    explicit_bzero(pool, sizeof pool);
    if (result == 0)
        result = ioctl(fd, RNDRESEEDCRNG);
    if (fd >= 0)
        close(fd);
    if (result < 0)
        return "entropy";
    return clock_settime(CLOCK_REALTIME, &now) < 0 ? "time_ns" : NULL;
}

/* Put a whole file in the place of another: a reader sees one of the two. */
static int replace(const char *path, const char *data, size_t length)
{
    char fresh[64];
    if (snprintf(fresh, sizeof fresh, "%s.new", path) >= (int)sizeof fresh)
        return -1;
    int fd = open(fresh, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (fd < 0)
        return -1;
    int result = sys_write_all(fd, data, length, 1000);
    return close(fd) < 0 || result < 0 ? -1 : rename(fresh, path);
}

const char *guest_identity_names(const struct guest_fields *fields)
{
    char text[256];
    if (fields->hostname) {
        int length = snprintf(text, sizeof text, "%s\n", fields->hostname);
        if (sethostname(fields->hostname, strlen(fields->hostname)) < 0 ||
            replace("/etc/hostname", text, (size_t)length) < 0)
            return "hostname";
        length = snprintf(text, sizeof text, "127.0.0.1 localhost %s\n::1 localhost %s\n", fields->hostname,
            fields->hostname);
        if (replace("/etc/hosts", text, (size_t)length) < 0)
            return "/etc/hosts";
    }
    if (fields->machine_id) {
        int length = snprintf(text, sizeof text, "%s\n", fields->machine_id);
        if (replace("/etc/machine-id", text, (size_t)length) < 0)
            return "machine_id";
    }
    return NULL;
}

/* The lines of an account database without those that have this name or this number; then `line`. */
static int put_account(const char *path, const char *name, unsigned number, const char *line)
{
    char *data = NULL, *at = NULL;
    size_t size = 0, room = 0;
    FILE *into = open_memstream(&data, &size);
    if (!into)
        return -1;
    FILE *from = fopen(path, "re");
    while (from && getline(&at, &room, from) > 0) {
        size_t length = strcspn(at, ":");
        const char *digits = strchr(at + length, ':') ? strchr(at + length + 1, ':') : NULL;
        bool same = strlen(name) == length && strncmp(at, name, length) == 0;
        if (!same && !(digits && strtoul(digits + 1, NULL, 10) == number))
            fputs(at, into);
    }
    fputs(line, into);
    free(at);
    if (from)
        fclose(from);
    int result = fclose(into) == 0 ? replace(path, data, size) : -1;
    free(data);
    return result;
}

const char *guest_identity_user(const struct guest_fields *fields)
{
    char line[PATH_MAX + 128];
    const char *shell = access("/bin/bash", X_OK) == 0 ? "/bin/bash" : "/bin/sh";
    snprintf(line, sizeof line, "%s:x:%u:%u::%s:%s\n", fields->user, fields->uid, fields->gid, fields->home, shell);
    if (strpbrk(fields->home, ":\n") || put_account("/etc/passwd", fields->user, fields->uid, line) < 0)
        return "user";
    snprintf(line, sizeof line, "%s:x:%u:\n", fields->user, fields->gid);
    return put_account("/etc/group", fields->user, fields->gid, line) < 0 ? "gid" : NULL;
}

/* Whether eth0's link is down for a guest that stands still. A restored one stands still, too. */
static bool quieted;

static int set_link(int fd, const char *name, bool up)
{
    struct ifreq request = {0};
    memcpy(request.ifr_name, name, strlen(name));
    if (ioctl(fd, SIOCGIFFLAGS, &request) < 0)
        return -1;
    request.ifr_flags = (short)(up ? request.ifr_flags | IFF_UP : request.ifr_flags & ~IFF_UP);
    return ioctl(fd, SIOCSIFFLAGS, &request);
}

static bool is_up(int fd, const char *name)
{
    struct ifreq request = {0};
    memcpy(request.ifr_name, name, strlen(name));
    return ioctl(fd, SIOCGIFFLAGS, &request) == 0 && request.ifr_flags & IFF_UP;
}

static struct sockaddr_in four(in_addr_t address)
{
    return (struct sockaddr_in){.sin_family = AF_INET, .sin_addr = {.s_addr = address}};
}

/* ADDRESS/PREFIX on eth0. */
static int set_address(int fd, const char *text)
{
    struct ifreq request = {.ifr_name = "eth0"};
    char address[INET_ADDRSTRLEN];
    const char *slash = strchr(text, '/');
    struct in_addr parsed;
    size_t length = slash ? (size_t)(slash - text) : 0;
    long prefix = slash ? strtol(slash + 1, NULL, 10) : 0;
    errno = EINVAL;
    if (length == 0 || length >= sizeof address || prefix < 1 || prefix > 32)
        return -1;
    memcpy(address, text, length);
    address[length] = 0;
    if (inet_pton(AF_INET, address, &parsed) != 1)
        return -1;
    struct sockaddr_in own = four(parsed.s_addr);
    memcpy(&request.ifr_addr, &own, sizeof own);
    if (ioctl(fd, SIOCSIFADDR, &request) < 0)
        return -1;
    own = four(htonl((uint32_t)(0xffffffffULL << (32 - prefix))));
    memcpy(&request.ifr_netmask, &own, sizeof own);
    return ioctl(fd, SIOCSIFNETMASK, &request);
}

static int hex_digit(char digit)
{
    if (digit >= '0' && digit <= '9')
        return digit - '0';
    digit |= 'a' ^ 'A';
    return digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
}

/* `02:00:00:00:00:01`: six times two digits, and nothing else. */
static bool parse_mac(const char *text, unsigned char bytes[6])
{
    for (int i = 0; i < 6; i++, text += 3) {
        int high = hex_digit(text[0]), low = high < 0 ? -1 : hex_digit(text[1]);
        if (low < 0 || text[2] != (i < 5 ? ':' : 0))
            return false;
        bytes[i] = (unsigned char)(high << 4 | low);
    }
    return true;
}

static int set_mac(int fd, const char *text)
{
    struct ifreq request = {.ifr_name = "eth0"};
    unsigned char bytes[6];
    errno = EINVAL;
    if (!parse_mac(text, bytes))
        return -1;
    request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    memcpy(request.ifr_hwaddr.sa_data, bytes, sizeof bytes);
    return ioctl(fd, SIOCSIFHWADDR, &request);
}

static int set_gateway(int fd, const char *text)
{
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
    struct in_addr parsed;
    errno = EINVAL;
    if (inet_pton(AF_INET, text, &parsed) != 1)
        return -1;
    struct sockaddr_in gateway = four(parsed.s_addr), any = four(0);
    memcpy(&route.rt_gateway, &gateway, sizeof gateway);
    memcpy(&route.rt_dst, &any, sizeof any);
    memcpy(&route.rt_genmask, &any, sizeof any);
    return ioctl(fd, SIOCADDRT, &route);
}

/* A guest has one address and no other way to be spoken to. */
static int without_ipv6(void)
{
    int fd = open("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT ? 0 : -1;
    ssize_t written = write(fd, "1", 1);
    close(fd);
    return written == 1 ? 0 : -1;
}

const char *guest_identity_network(const struct guest_fields *fields)
{
    const char *wrong = NULL;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || set_link(fd, "lo", true) < 0)
        wrong = "loopback";
    if (!wrong && fields->address) {
        if (without_ipv6() < 0)
            wrong = "IPv6";
        else if (fields->mac && set_mac(fd, fields->mac) < 0)
            wrong = "mac";
        else if (set_address(fd, fields->address) < 0 || set_link(fd, "eth0", true) < 0)
            wrong = "address";
        else if (fields->gateway && set_gateway(fd, fields->gateway) < 0 && errno != EEXIST)
            wrong = "gateway";
        quieted = false;
    }
    int saved = errno;
    if (fd >= 0)
        close(fd);
    errno = saved;
    return wrong;
}

bool guest_identity_quiet(bool quiet)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool wanted = quiet ? is_up(fd, "eth0") : quieted;
    bool good = fd >= 0 && (!wanted || set_link(fd, "eth0", !quiet) == 0);
    if (good && wanted)
        quieted = quiet;
    if (fd >= 0)
        close(fd);
    return good;
}
