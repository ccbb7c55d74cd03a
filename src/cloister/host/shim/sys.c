/*
 * What it is: the few system facts every part of the shim needs (time, inherited descriptors,
 * whole writes, printable text). What it is not: policy or protocol.
 */
#define _GNU_SOURCE
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

int64_t sys_now_ms(void)
{
    struct timespec now;
    if (clock_gettime(CLOCK_MONOTONIC, &now) < 0)
        return 0;
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int sys_fill_stdio(void)
{
    for (int fd = 0; fd <= 2; fd++) {
        if (fcntl(fd, F_GETFD) >= 0)
            continue;
        if (open("/dev/null", O_RDWR) != fd)
            return -1;
    }
    return 0;
}

int sys_close_others(int keep)
{
    if (keep < 0)
        return close_range(3, ~0U, 0);
    if (keep > 3 && close_range(3, (unsigned)keep - 1, 0) < 0)
        return -1;
    if (close_range((unsigned)keep + 1, ~0U, 0) < 0)
        return -1;
    return fcntl(keep, F_SETFD, FD_CLOEXEC);
}

int sys_no_core(void)
{
    const struct rlimit none = {0, 0};
    return setrlimit(RLIMIT_CORE, &none);
}

int sys_parse_descriptor(const char *text)
{
    char *end = NULL;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || *end || value < 3 || value > 65535)
        return -1;
    return (int)value;
}

int sys_write_all(int fd, const char *data, size_t length, int patience_ms)
{
    while (length > 0) {
        ssize_t written = write(fd, data, length);
        if (written > 0) {
            data += written;
            length -= (size_t)written;
            continue;
        }
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0 && errno != EAGAIN)
            return -1;
        struct pollfd wait = {.fd = fd, .events = POLLOUT};
        if (poll(&wait, 1, patience_ms) <= 0)
            return -1;
    }
    return 0;
}

/* Length of the sequence at `text` if it must not reach a terminal, else 0. */
static size_t unprintable(const unsigned char *text, size_t left)
{
    if ((text[0] < 0x20 && text[0] != '\n') || text[0] == 0x7f)
        return 1;
    if (text[0] == 0xc2 && left > 1 && text[1] >= 0x80 && text[1] <= 0x9f)
        return 2;
    return 0;
}

void sys_write_printable(int fd, const char *text, size_t length, bool raw_tty)
{
    const unsigned char *at = (const unsigned char *)text;
    char line[512];
    size_t used = 0;
    while (length > 0) {
        size_t bad = unprintable(at, length);
        if (*at == '\n' && raw_tty)
            line[used++] = '\r';
        line[used++] = bad ? '?' : (char)*at;
        size_t step = bad ? bad : 1;
        at += step;
        length -= step;
        if (used + 2 > sizeof line || length == 0) {
            if (sys_write_all(fd, line, used, 1000) < 0)
                return;
            used = 0;
        }
    }
}
