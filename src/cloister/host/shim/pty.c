/*
 * What it is: the relay between the user's terminal and the master of a pty in the sandbox.
 * What it is not: the maker of that pty, or its session: terminal.c in the inner half is.
 */
#define _GNU_SOURCE
#include "pty.h"
#include "sys.h"
#include "tty.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* How long a terminal that takes no output may hold up the end of a run, and how much a command that ended may say. */
enum { DRAIN_PATIENCE_MS = 2000, DRAIN_BYTES = 1 << 20 };

/* /dev/ptmx and the ptmx of every devpts (Documentation/admin-guide/devices.txt). */
enum { PTMX_MAJOR = 5, PTMX_MINOR = 2 };

/* The user's terminal's size; one that has none (a serial line, a pipe behind a pty) counts as 80 by 24. */
static struct winsize terminal_size(void)
{
    struct winsize size = {0};
    (void)!ioctl(0, TIOCGWINSZ, &size);
    if (size.ws_row == 0 || size.ws_col == 0)
        size = (struct winsize){.ws_row = 24, .ws_col = 80};
    return size;
}

void pty_resize(const struct pty *pty)
{
    struct winsize size = terminal_size();
    if (pty->master >= 0)
        (void)!ioctl(pty->master, TIOCSWINSZ, &size);
}

void pty_redraw(const struct pty *pty)
{
    struct winsize size = terminal_size(), other = size;
    if (pty->master < 0)
        return;
    other.ws_row = size.ws_row > 1 ? size.ws_row - 1 : 2;
    (void)!ioctl(pty->master, TIOCSWINSZ, &other);
    (void)!ioctl(pty->master, TIOCSWINSZ, &size);
}

int pty_expect(void)
{
    struct termios modes;
    if (!isatty(1) || tcgetattr(0, &modes) < 0) {
        errno = ENOTTY;
        return -1;
    }
    modes.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
    return tty_take(0, &modes);
}

/* The master of a pty and nothing else: its device first, so that no other driver sees our ioctl. */
static bool is_master(int fd)
{
    struct stat about;
    unsigned number;
    if (fstat(fd, &about) < 0 || !S_ISCHR(about.st_mode) || about.st_rdev != makedev(PTMX_MAJOR, PTMX_MINOR))
        return false;
    return (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR && ioctl(fd, TIOCGPTN, &number) == 0;
}

/* Become the relay of a checked master. */
static int begin(struct pty *pty, int master)
{
    struct termios modes, raw;
    if (tcgetattr(0, &modes) < 0 || fcntl(master, F_SETFL, O_RDWR | O_NONBLOCK) < 0)
        return -1;
    /* On a master these set the modes of its slave (tty_ioctl(4) calls both ends one terminal). */
    if (tcsetattr(master, TCSANOW, &modes) < 0)
        return -1;
    raw = modes;
    cfmakeraw(&raw);
    if (tty_take(0, &raw) < 0)
        return -1;
    pty->master = master;
    /* A description of our own: O_NONBLOCK on the inherited one would reach the user's shell. */
    pty->terminal = open("/proc/self/fd/1", O_WRONLY | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    if (pty->terminal < 0)
        pty->terminal = 1;
    pty->input_open = pty->output_open = true;
    pty_resize(pty);
    return 0;
}

int pty_adopt(struct pty *pty, int master)
{
    memset(pty, 0, sizeof *pty);
    pty->master = -1;
    tty_give_back(); /* what pty_expect changed */
    errno = EINVAL;
    if (is_master(master) && begin(pty, master) == 0)
        return 0;
    int saved = errno;
    close(master);
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
    size_t total = 0;
    do {
        size_t length = held(&pty->output);
        total += length;
        const char *data = pty->output.data + pty->output.start;
        if (length > 0 && sys_write_all(pty->terminal, data, length, DRAIN_PATIENCE_MS) < 0)
            return;
        pty->output.start = pty->output.end = 0;
    } while (total < DRAIN_BYTES && fill(pty->master, &pty->output) && held(&pty->output) > 0);
}
