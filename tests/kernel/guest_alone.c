/*
 * What it is: the guest's end of the link without a machine: PID 1 of a bubblewrap sandbox, on an inherited socket, with
 * the real inner half behind it. For tests. What it is not: part of the product; nothing is mounted here.
 *
 *   guest CHANNEL    speak on this descriptor; the inner half's argv comes over the link
 *   listen SOCKET    the same on what this one accepts, as on a vsock
 *   inner OPTIONS…   be the inner half
 */
#define _GNU_SOURCE
#include "guest.h"
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define PLACE "/run/cloister"

static int carried = -1;

static bool begin(char **fields, size_t count, const char **why)
{
    FILE *file = fopen(PLACE "/fields", "we");
    for (size_t i = 0; file && i < count; i++) {
        fprintf(file, "%s\n", fields[i]);
        if (strcmp(fields[i], "hostname=refused") == 0) {
            *why = "the host name";
            errno = EINVAL;
            return false;
        }
    }
    if (file)
        fclose(file);
    carried = open(PLACE "/carried", O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    return carried >= 0;
}

static bool renew(char **fields, size_t count, const char **why)
{
    (void)fields, (void)count, (void)why;
    carried = open(PLACE "/renewed", O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    return carried >= 0;
}

static bool tar_feed(const void *data, size_t length, const char **why)
{
    (void)why;
    return write(carried, data, length) == (ssize_t)length;
}

static bool tar_end(const char **why)
{
    (void)why;
    return close(carried) == 0;
}

static bool update(const char *path, mode_t mode, const void *data, size_t length)
{
    char whole[512], next[520];
    snprintf(whole, sizeof whole, GUEST_BOX_DIRECTORY "/%s", path);
    for (char *at = whole + strlen(GUEST_BOX_DIRECTORY) + 1; (at = strchr(at, '/')); *at++ = '/') {
        *at = 0;
        (void)!mkdir(whole, 0755);
    }
    snprintf(next, sizeof next, "%s.next", whole);
    int fd = open(next, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode);
    bool good = fd >= 0 && write(fd, data, length) == (ssize_t)length && rename(next, whole) == 0;
    if (fd >= 0)
        close(fd);
    return good;
}

static int box_socket(const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, GUEST_BOX_DIRECTORY "/%s", name);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 1024) < 0)
        return -1;
    return fd;
}

static int child(void)
{
    return setsid() < 0 ? -1 : prctl(PR_SET_PDEATHSIG, SIGKILL);
}

static void end(void)
{
    if (getpid() != 1) /* -1 would be every process of the user's */
        _exit(2);
    (void)!kill(-1, SIGKILL);
    while (wait(NULL) > 0 || errno == EINTR)
        continue;
    fputs("unmounted\n", stderr);
}

static void off(const char *why)
{
    fprintf(stderr, "off: %s\n", why ? why : "");
    _exit(0);
}

/* Nobody here can be frozen: what matters to these tests is who is told what, and when. */
static bool still_stand(bool still)
{
    fputs(still ? "still\n" : "going on\n", stderr);
    return true;
}

static void set_time(uint64_t time_ns)
{
    fprintf(stderr, "time %s\n", time_ns ? "set" : "lost");
}

int main(int argc, char **argv)
{
    static const struct guest_hooks hooks = {begin, renew, tar_feed, tar_end, update, box_socket, child, end, off,
                                            still_stand, set_time};
    if (argc >= 4 && strcmp(argv[1], "inner") == 0)
        return inner_main(argc - 2, argv + 2);
    if (argc != 3 || (strcmp(argv[1], "guest") != 0 && strcmp(argv[1], "listen") != 0))
        return 2;
    bool listens = strcmp(argv[1], "listen") == 0;
    int channel = atoi(argv[2]);
    if (fcntl(channel, F_SETFL, O_RDWR | O_NONBLOCK) < 0 || fcntl(channel, F_SETFD, FD_CLOEXEC) < 0)
        return 2;
    fputs("a guest without a machine\n", stderr);
    guest_link(listens ? -1 : channel, listens ? channel : -1, "00ff", &hooks);
}
