/*
 * What it is: the main process of the unit beside a run in mode `internet`: it has a network namespace made, with the
 * packet filter in it, starts pasta, which carries its packets to sockets of this account on the host, and hands the
 * namespace out on its channel (standard input). It ends with that channel, with pasta, or when systemd says so.
 * What it is not: where the agent lives, or privileged: both namespaces are the account's own.
 */
#define _GNU_SOURCE
#include "frame.h"
#include "launch.h"
#include "reaper.h"
#include "shim.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

/* How long each step may take; what is kept of pasta's last words, and of a report. */
enum { PATIENCE_MS = 20000, WORDS = 2048, REPORT = 1 << 20 };

static struct network {
    struct channel channel;
    struct launch launch;
    int signals;
    int holder_link; /* to the process that keeps the namespaces */
    pid_t holder;
    pid_t pasta;
    int ready; /* readable once pasta has connected the namespace */
    bool up;
    int words; /* pasta's complaints */
    char said[WORDS];
    size_t said_length;
} self = {.ready = -1, .words = -1};

/* Leave, and take along whatever was started: systemd ends what is left in the unit. */
_Noreturn static void leave(int code)
{
    if (self.pasta > 0)
        (void)!kill(self.pasta, SIGKILL);
    if (self.holder > 0)
        (void)!kill(self.holder, SIGKILL);
    _exit(code);
}

_Noreturn static void fail(const char *what, const char *why)
{
    char text[WORDS + 256];
    int length = snprintf(text, sizeof text, "%s: %s", what, why);
    if (length > 0)
        channel_send(&self.channel, 'F', text, (size_t)length < sizeof text ? (size_t)length : sizeof text - 1, -1);
    leave(EXIT_CLOISTER);
}

static bool readable(int fd, int patience_ms)
{
    struct pollfd one = {.fd = fd, .events = POLLIN};
    return poll(&one, 1, patience_ms) > 0;
}

/* The first and only order: `B`, as the outer half gets it, of namespaces, rules and pasta. */
static void take_order(void)
{
    struct frame frame;
    enum channel_result result;
    while ((result = channel_receive(&self.channel, &frame)) == CHANNEL_AGAIN)
        if (!readable(self.channel.fd, PATIENCE_MS))
            leave(EXIT_CLOISTER);
    if (result != CHANNEL_FRAME)
        leave(EXIT_CLOISTER);
    if (frame.type != 'B' || !launch_parse(&self.launch, &frame) ||
        self.launch.flags != (LAUNCH_USERNS | LAUNCH_NETNS) || self.launch.argc == 0 || self.launch.nft_count == 0 ||
        self.launch.report_count == 0 || self.launch.overlay_fields > 0 || self.launch.hold_fields > 0)
        fail("the network was not started", "the order is malformed");
}

/* Make the namespaces, say how that went, keep them; a byte asks for the counters, the link's end is the end. */
_Noreturn static void hold(int link)
{
    char text[256];
    /* Without the channel: its other side must hear when the main process is killed. */
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0 || dup2(null, 0) < 0 || prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        _exit(EXIT_CLOISTER);
    const char *failed = launch_prepare(&self.launch);
    int length = failed ? snprintf(text, sizeof text, "cannot %s: %s", failed, strerror(errno)) : 0;
    (void)!sys_write_all(link, failed ? text : "", (size_t)length + 1, PATIENCE_MS);
    if (failed || read(link, text, 1) != 1)
        _exit(failed ? EXIT_CLOISTER : 0);
    int report = launch_report(&self.launch);
    char part[4096];
    ssize_t got;
    while (report >= 0 && (got = read(report, part, sizeof part)) > 0)
        if (sys_write_all(link, part, (size_t)got, PATIENCE_MS) < 0)
            break;
    _exit(0);
}

static void start_holder(void)
{
    int ends[2];
    char text[256] = "";
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0 || (self.holder = fork()) < 0)
        fail("the network was not started", strerror(errno));
    if (self.holder == 0) {
        close(ends[0]);
        hold(ends[1]);
    }
    close(ends[1]);
    self.holder_link = ends[0];
    ssize_t got = readable(self.holder_link, PATIENCE_MS) ? read(self.holder_link, text, sizeof text - 1) : 0;
    if (got <= 0 || text[0])
        fail("the network was not started", got > 0 ? text : "its namespace did not come up");
}

_Noreturn static void become_pasta(int ready, int words)
{
    char target[16];
    char *environment[] = {"PATH=/usr/bin:/bin", NULL};
    char **argv = calloc(self.launch.argc + 2, sizeof *argv);
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (!argv || null < 0)
        _exit(EXIT_CLOISTER);
    snprintf(target, sizeof target, "%d", (int)self.holder);
    memcpy(argv, self.launch.argv, self.launch.argc * sizeof *argv);
    argv[self.launch.argc] = target;
    if (dup2(null, 0) < 0 || dup2(ready, 1) < 0 || dup2(words, 2) < 0 || close_range(3, ~0U, 0) < 0 ||
        launch_reset_signals() < 0 || setsid() < 0)
        _exit(EXIT_CLOISTER);
    execve(argv[0], argv, environment);
    dprintf(2, "%s: %s\n", argv[0], strerror(errno));
    _exit(EXIT_CLOISTER);
}

static void start_pasta(void)
{
    int ready[2], words[2];
    if (pipe2(ready, O_CLOEXEC | O_NONBLOCK) < 0 || pipe2(words, O_CLOEXEC | O_NONBLOCK) < 0 ||
        (self.pasta = fork()) < 0)
        fail("pasta did not start", strerror(errno));
    if (self.pasta == 0)
        become_pasta(ready[1], words[1]);
    close(ready[1]);
    close(words[1]);
    self.ready = ready[0];
    self.words = words[0];
}

/* Keep the last of what pasta complains of. */
static void listen_to_pasta(void)
{
    char part[512];
    ssize_t got;
    while ((got = read(self.words, part, sizeof part)) > 0) {
        size_t room = sizeof self.said - 1 - self.said_length;
        if ((size_t)got > room) {
            size_t drop = (size_t)got - room;
            memmove(self.said, self.said + drop, self.said_length - drop);
            self.said_length -= drop;
        }
        memcpy(self.said + self.said_length, part, (size_t)got);
        self.said_length += (size_t)got;
        self.said[self.said_length] = 0;
    }
}

static void hand_out(void)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/ns/net", (int)self.holder);
    int space = open(path, O_RDONLY | O_CLOEXEC);
    if (space < 0)
        fail("the network was not started", strerror(errno));
    if (channel_send(&self.channel, 'N', NULL, 0, space) < 0)
        leave(EXIT_CLOISTER);
    close(space);
}

/* What pasta has said on its ready pipe: a line when the namespace is connected, nothing when it gave up. */
static void on_ready(void)
{
    char line[64];
    ssize_t got = read(self.ready, line, sizeof line);
    if (got < 0 && errno == EAGAIN)
        return;
    close(self.ready);
    self.ready = -1;
    self.up = got > 0;
    if (self.up)
        hand_out();
}

_Noreturn static void report(void)
{
    char *text = malloc(REPORT);
    size_t length = 0;
    (void)!kill(self.pasta, SIGKILL); /* what is counted is over */
    if (text && sys_write_all(self.holder_link, "r", 1, 1000) == 0) {
        ssize_t got = 0;
        while (length < REPORT && readable(self.holder_link, 2000) &&
               (got = read(self.holder_link, text + length, REPORT - length)) > 0)
            length += (size_t)got;
        channel_send(&self.channel, 'W', text, length, -1);
    }
    leave(0);
}

static void on_signals(void)
{
    struct signalfd_siginfo info;
    bool over = false;
    while (read(self.signals, &info, sizeof info) == sizeof info)
        over = over || info.ssi_signo != SIGCHLD;
    if (over)
        report();
    pid_t pid;
    while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
        if (pid == self.pasta || pid == self.holder) {
            listen_to_pasta();
            const char *why = self.said_length ? self.said : "it was killed";
            fail(self.up ? "pasta ended, and the network with it" : "pasta did not start", why);
        }
}

int network_main(void)
{
    /* Dumpable, other than the rest of us: pasta looks at the holder's namespaces, and who else has this uid is kept
     * from them by living in another user namespace (ptrace(2), "ptrace access mode checking"). */
    channel_open(&self.channel, 0);
    if (fcntl(0, F_SETFD, FD_CLOEXEC) < 0 || sys_close_others(-1) < 0 || sys_no_core() < 0 ||
        (self.signals = reaper_watch(true)) < 0)
        return EXIT_CLOISTER;
    take_order();
    start_holder();
    start_pasta();
    for (;;) {
        struct pollfd fds[] = {{.fd = self.signals, .events = POLLIN},
                               {.fd = self.words, .events = POLLIN},
                               {.fd = self.ready, .events = POLLIN},
                               {.fd = self.channel.fd, .events = POLLIN}};
        if (poll(fds, 4, -1) < 0 && errno != EINTR)
            leave(EXIT_CLOISTER);
        if (fds[1].revents)
            listen_to_pasta();
        if (fds[1].revents & POLLHUP)
            self.words = -1; /* nothing comes any more */
        if (fds[2].revents)
            on_ready();
        if (fds[0].revents)
            on_signals();
        if (fds[3].revents) /* nobody says anything but its end */
            leave(0);
    }
}
