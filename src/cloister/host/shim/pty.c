/*
 * What it is: the agent's own pty and the relay between it and the user's terminal.
 * What it is not: the agent's session; the inner half makes the pty its controlling terminal.
 */
#define _GNU_SOURCE
#include "pty.h"
#include "sys.h"
#include "tty.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* How long a terminal that takes no output may hold up the end of a run. */
enum { DRAIN_PATIENCE_MS = 2000 };

void pty_resize(const struct pty *pty)
{
    struct winsize size;
    if (pty->master >= 0 && ioctl(0, TIOCGWINSZ, &size) == 0)
        (void)!ioctl(pty->master, TIOCSWINSZ, &size);
}

void pty_redraw(const struct pty *pty)
{
    struct winsize size;
    if (pty->master < 0 || ioctl(0, TIOCGWINSZ, &size) < 0)
        return;
    struct winsize other = size;
    other.ws_row = size.ws_row > 1 ? size.ws_row - 1 : 2;
    (void)!ioctl(pty->master, TIOCSWINSZ, &other);
    (void)!ioctl(pty->master, TIOCSWINSZ, &size);
}

/* Open a master and its slave, without a path: /dev/pts need not be the one we think it is. */
static int open_pair(struct pty *pty, const struct termios *modes)
{
    int unlock = 0;
    pty->master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (pty->master < 0)
        return -1;
    int slave = -1;
    if (ioctl(pty->master, TIOCSPTLCK, &unlock) == 0)
        slave = ioctl(pty->master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave >= 0 && tcsetattr(slave, TCSANOW, modes) == 0)
        return slave;
    int saved = errno;
    if (slave >= 0)
        close(slave);
    close(pty->master);
    pty->master = -1;
    errno = saved;
    return -1;
}

int pty_open(struct pty *pty)
{
    struct termios modes;
    memset(pty, 0, sizeof *pty);
    pty->master = -1;
    if (!isatty(1) || tcgetattr(0, &modes) < 0) {
        errno = ENOTTY;
        return -1;
    }
    int slave = open_pair(pty, &modes);
    if (slave < 0)
        return -1;
    /* A description of our own: O_NONBLOCK on the inherited one would reach the user's shell. */
    pty->terminal = open("/proc/self/fd/1", O_WRONLY | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (pty->terminal < 0)
        pty->terminal = 1;
    pty->input_open = pty->output_open = true;
    pty_resize(pty);
    struct termios raw = modes;
    cfmakeraw(&raw);
    if (tty_take(0, &raw) == 0)
        return slave;
    int saved = errno;
    close(slave);
    close(pty->master);
    pty->master = -1;
    errno = saved;
    return -1;
}

static size_t held(const struct pty_buffer *buffer)
{
    return buffer->end - buffer->start;
}

/* Read once into an empty buffer: false when this side has ended. */
static bool fill(int fd, struct pty_buffer *buffer)
{
    ssize_t got = read(fd, buffer->data, sizeof buffer->data);
    if (got < 0)
        return errno == EAGAIN || errno == EINTR;
    buffer->start = 0;
    buffer->end = (size_t)got;
    return got > 0;
}

/* Write once: false when this side has ended. */
static bool empty(int fd, struct pty_buffer *buffer)
{
    ssize_t put = write(fd, buffer->data + buffer->start, held(buffer));
    if (put < 0)
        return errno == EAGAIN || errno == EINTR;
    buffer->start += (size_t)put;
    return true;
}

void pty_wanted(const struct pty *pty, struct pollfd polls[PTY_POLLS])
{
    for (int i = 0; i < PTY_POLLS; i++)
        polls[i] = (struct pollfd){.fd = -1};
    if (pty->master < 0)
        return;
    if (pty->input_open && !pty->hold && held(&pty->input) == 0)
        polls[0] = (struct pollfd){.fd = 0, .events = POLLIN};
    if (held(&pty->output) > 0)
        polls[1] = (struct pollfd){.fd = pty->terminal, .events = POLLOUT};
    short events = 0;
    if (held(&pty->input) > 0)
        events |= POLLOUT;
    if (pty->output_open && !pty->hold && held(&pty->output) == 0)
        events |= POLLIN;
    if (events)
        polls[2] = (struct pollfd){.fd = pty->master, .events = events};
}

void pty_move(struct pty *pty, const struct pollfd polls[PTY_POLLS])
{
    if (polls[0].revents && !fill(0, &pty->input))
        pty->input_open = false;
    /* A terminal that has gone away must not stop the agent: its output is dropped from then on. */
    if (polls[1].revents && !empty(pty->terminal, &pty->output))
        pty->output.start = pty->output.end;
    if (polls[2].revents & POLLIN) {
        if (!fill(pty->master, &pty->output))
            pty->output_open = false;
    } else if ((polls[2].events & POLLIN) && (polls[2].revents & (POLLHUP | POLLERR))) {
        pty->output_open = false;
    }
    if (held(&pty->input) > 0 && (polls[0].revents || (polls[2].revents & (POLLOUT | POLLHUP | POLLERR))) &&
        !empty(pty->master, &pty->input))
        pty->input.start = pty->input.end;
}

void pty_drain(struct pty *pty)
{
    if (pty->master < 0)
        return;
    do {
        size_t length = held(&pty->output);
        const char *data = pty->output.data + pty->output.start;
        if (length > 0 && sys_write_all(pty->terminal, data, length, DRAIN_PATIENCE_MS) < 0)
            return;
        pty->output.start = pty->output.end = 0;
    } while (fill(pty->master, &pty->output) && held(&pty->output) > 0);
}
