/*
 * What it is: the self-probe: before the agent gets control, what must be denied is tried and
 * what must work is done once. What it is not: proof of everything; `cloister prove` is the battery.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SECCOMP_FILTERED = 2, REFUSED_WITHIN_MS = 250, EGRESS_WITHIN_MS = 3000, TEXT_MAX = 512 };

void probe_note(struct writer *findings, const char *name, const char *object, const char *result)
{
    char text[TEXT_MAX];
    int length = snprintf(text, sizeof text, "%s%.400s=%s", name, object, result ? result : "unknown");
    if (length < 0 || length >= (int)sizeof text) {
        findings->bad = true;
        return;
    }
    if (findings->length == 0)
        write_u32(findings, 0); /* the count, filled in by probe_tell */
    write_u32(findings, (uint32_t)length);
    write_bytes(findings, text, (size_t)length);
}

void probe_tell(struct channel *broker, struct writer *findings)
{
    uint32_t count = 0;
    for (size_t at = 4; !findings->bad && at + 4 <= findings->length; count++) {
        const uint8_t *item = findings->data + at;
        at += 4 + ((size_t)item[0] | (size_t)item[1] << 8);
    }
    if (!findings->bad && findings->length >= 4) {
        const uint8_t bytes[4] = {(uint8_t)count, (uint8_t)(count >> 8), (uint8_t)(count >> 16), 0};
        memcpy(findings->data, bytes, sizeof bytes);
        (void)channel_send(broker, 'P', findings->data, findings->length, -1);
    }
    free(findings->data);
    memset(findings, 0, sizeof *findings);
}

void probe_list(const struct writer *findings, char *text, size_t size)
{
    size_t used = 0;
    for (size_t at = 4; !findings->bad && at + 4 <= findings->length;) {
        const uint8_t *item = findings->data + at;
        size_t length = (size_t)item[0] | (size_t)item[1] << 8;
        if (used + length + 2 > size)
            break;
        if (used > 0)
            text[used++] = ' ';
        memcpy(text + used, item + 4, length);
        used += length;
        at += 4 + length;
    }
    text[used] = 0;
}

/* An error number as a result: the refusals a wall gives are `denied`. 0 is `allowed`. */
static const char *result_name(int error)
{
    switch (error) {
    case 0:
        return "allowed";
    case EROFS:
    case EACCES:
    case EPERM:
    case ENETUNREACH:
    case ECONNREFUSED:
        return "denied";
    default:
        return strerrorname_np(error);
    }
}

/* Open for writing in a way that leaves nothing behind: 0 when it worked, else errno. */
static int try_write_below(const char *directory)
{
    char path[TEXT_MAX];
    int fd = open(directory, O_TMPFILE | O_WRONLY | O_CLOEXEC, 0600);
    if (fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR)) {
        int length = snprintf(path, sizeof path, "%s/.cloister-probe", directory);
        if (length < 0 || length >= (int)sizeof path)
            return ENAMETOOLONG;
        fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (fd >= 0)
            (void)!unlink(path);
    }
    if (fd < 0)
        return errno;
    close(fd);
    return 0;
}

static int try_write(const char *path)
{
    struct stat about;
    if (stat(path, &about) == 0 && S_ISDIR(about.st_mode))
        return try_write_below(path);
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd >= 0)
        (void)!unlink(path);
    else if (errno == EEXIST)
        fd = open(path, O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    close(fd);
    return 0;
}

/* `1.2.3.4:9` or `[2001:db8::1]:9`; the length of the address, or 0 when it is none. */
static socklen_t parse_address(const char *text, struct sockaddr_storage *address)
{
    char host[INET6_ADDRSTRLEN + 2];
    const char *colon = strrchr(text, ':');
    char *end = NULL;
    if (!colon || (size_t)(colon - text) >= sizeof host)
        return 0;
    memcpy(host, text, (size_t)(colon - text));
    host[colon - text] = 0;
    long port = strtol(colon + 1, &end, 10);
    if (end == colon + 1 || *end || port < 1 || port > 65535)
        return 0;
    memset(address, 0, sizeof *address);
    size_t length = strlen(host);
    if (length > 2 && host[0] == '[' && host[length - 1] == ']') {
        struct sockaddr_in6 *six = (struct sockaddr_in6 *)address;
        host[length - 1] = 0;
        six->sin6_family = AF_INET6;
        six->sin6_port = htons((uint16_t)port);
        return inet_pton(AF_INET6, host + 1, &six->sin6_addr) == 1 ? sizeof *six : 0;
    }
    struct sockaddr_in *four = (struct sockaddr_in *)address;
    four->sin_family = AF_INET;
    four->sin_port = htons((uint16_t)port);
    return inet_pton(AF_INET, host, &four->sin_addr) == 1 ? sizeof *four : 0;
}

/*
 * 0 when the connection is made or still under way, else errno. A firewall's reset comes back
 * through the network stack a moment after connect(2): hence the short wait.
 */
static int try_connect(const char *text)
{
    struct sockaddr_storage address;
    socklen_t length = parse_address(text, &address);
    if (!length)
        return EINVAL;
    int fd = socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return errno;
    int error = connect(fd, (struct sockaddr *)&address, length) < 0 ? errno : 0;
    struct pollfd wait = {.fd = fd, .events = POLLOUT};
    if (error == EINPROGRESS) {
        socklen_t size = sizeof error;
        error = 0;
        if (poll(&wait, 1, REFUSED_WITHIN_MS) > 0 && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0)
            error = 0;
    }
    close(fd);
    return error;
}

/*
 * 0 when loopback of our own network carries a connection, else errno: systemd's IPAddressDeny=any drops it without a
 * word, and whoever goes to the forwarder would wait for ever.
 */
static int try_loopback(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int error = 0, client = -1, server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (server < 0 || bind(server, (struct sockaddr *)&address, length) < 0 || listen(server, 1) < 0 ||
        getsockname(server, (struct sockaddr *)&address, &length) < 0)
        error = errno;
    if (!error && (client = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)) < 0)
        error = errno;
    if (!error && connect(client, (struct sockaddr *)&address, length) < 0)
        error = errno;
    struct pollfd wait = {.fd = client, .events = POLLOUT};
    if (error == EINPROGRESS)
        error = poll(&wait, 1, REFUSED_WITHIN_MS) > 0 && !(wait.revents & (POLLERR | POLLHUP)) ? 0 : ETIMEDOUT;
    if (client >= 0)
        close(client);
    if (server >= 0)
        close(server);
    return error;
}

/* 0 when a user namespace can be made, else errno; tried in a child, which it would change. */
static int try_user_namespace(void)
{
    pid_t pid = fork();
    if (pid < 0)
        return errno;
    if (pid == 0)
        _exit(unshare(CLONE_NEWUSER) < 0 ? errno & 0xff : 0);
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return errno;
    return WIFEXITED(status) ? WEXITSTATUS(status) : EPERM; /* killed by seccomp: denied as well */
}

/* 0 when the relay answers a SOCKS5 greeting (RFC 1928 section 3), else errno. */
static int try_egress(const char *path)
{
    static const uint8_t greeting[3] = {5, 1, 0}, answer[2] = {5, 0};
    const struct timeval patience = {.tv_sec = EGRESS_WITHIN_MS / 1000};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    uint8_t got[2] = {0};
    if (strlen(path) >= sizeof address.sun_path)
        return ENAMETOOLONG;
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return errno;
    int error = 0;
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) < 0 ||
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) < 0 ||
        connect(fd, (struct sockaddr *)&address, sizeof address) < 0 ||
        send(fd, greeting, sizeof greeting, MSG_NOSIGNAL) < 0)
        error = errno;
    else if (recv(fd, got, sizeof got, MSG_WAITALL) != sizeof got || memcmp(got, answer, sizeof got) != 0)
        error = EPROTO;
    close(fd);
    return error;
}

static bool probe_number(struct writer *findings, const char *name, int value, int wanted)
{
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    probe_note(findings, name, "", text);
    return value == wanted;
}

/* Neither held nor to be had by executing something (capabilities(7)). */
static bool capabilities_none(void)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &head, data) < 0)
        return false;
    for (int i = 0; i < 2; i++)
        if (data[i].effective | data[i].permitted | data[i].inheritable)
            return false;
    return true;
}

/*
 * Only the death of PID 1 takes everything in the sandbox with it; in a unit systemd does that, and we are the one to
 * whom orphans come. A unit has a uid of its own, and must have nothing but that.
 */
static bool probe_place(const struct options *options, struct writer *findings)
{
    char text[16];
    if (!options->unit)
        return probe_number(findings, "pid", getpid(), 1);
    int adopts = 0;
    bool good = true;
    if (getpid() == 1)
        probe_note(findings, "pid", "", "1");
    else
        good = prctl(PR_GET_CHILD_SUBREAPER, &adopts) == 0 && probe_number(findings, "subreaper", adopts, 1);
    snprintf(text, sizeof text, "%u", getuid());
    probe_note(findings, "uid", "", text);
    bool bare = capabilities_none();
    probe_note(findings, "capabilities", "", bare ? "none" : "some");
    if (options->listen.count > 0) {
        int error = try_loopback();
        probe_note(findings, "loopback", "", result_name(error));
        good = good && error == 0;
    }
    return good && bare && getuid() != 0 && geteuid() == getuid();
}

bool probe_run(const struct options *options, struct writer *findings)
{
    bool good = true;
    for (size_t i = 0; i < options->probe_write.count; i++) {
        const char *path = options->probe_write.items[i];
        const char *result = result_name(try_write(path));
        probe_note(findings, "write:", path, result);
        good = result && strcmp(result, "denied") == 0 && good;
    }
    for (size_t i = 0; i < options->probe_connect.count; i++) {
        const char *address = options->probe_connect.items[i];
        const char *result = result_name(try_connect(address));
        probe_note(findings, "connect:", address, result);
        good = result && strcmp(result, "denied") == 0 && good;
    }
    int error = try_user_namespace();
    probe_note(findings, "userns", "", result_name(error));
    good = (options->nested || error == EPERM) && good;
    good = probe_number(findings, "seccomp", prctl(PR_GET_SECCOMP), SECCOMP_FILTERED) && good;
    good = probe_number(findings, "no-new-privs", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), 1) && good;
    good = probe_place(options, findings) && good;
    error = try_egress(options->egress);
    probe_note(findings, "egress", "", error ? strerrorname_np(error) : "allowed");
    return error == 0 && good;
}
