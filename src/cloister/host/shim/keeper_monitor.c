/*
 * What it is: the monitor: its start, its console, the way to its guest, its end.
 * What it is not: aware of which monitor that is: a program with a socket as descriptor 20, or one that makes a socket.
 */
#define _GNU_SOURCE
#include "keeper.h"
#include "link.h"
#include "loop.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LINE_MAX_LENGTH = 240, OUT_OF_THE_WAY = 64, CALL_PATIENCE_MS = 500, LAST_WORDS_MS = 200 };

static struct monitor {
    pid_t pid; /* 0: not started, or reaped */
    char status[64];
    struct source on_console, on_call;
    int console;    /* our end of its pipe */
    int log;        /* FILE */
    size_t written; /* into FILE */
    const struct keeper_options *options;
    char line[LINE_MAX_LENGTH + 1], last[LINE_MAX_LENGTH + 1]; /* the one that grows, and the last that was not empty */
    size_t line_length;
    void (*reached)(int fd);
    int call; /* a connection to the vsock's socket, not answered yet; -1: none */
    int64_t call_ends_ms;
    char answer[32]; /* to it, so far */
    size_t answer_length;
    bool connected;
} self = {.console = -1, .log = -1, .call = -1};

const char *keeper_monitor_status(void)
{
    return self.status[0] ? self.status : NULL;
}

const char *keeper_console_line(void)
{
    if (self.line_length > 0) {
        self.line[self.line_length] = 0;
        return self.line;
    }
    return self.last;
}

/* Keep the last line, without what must not reach a terminal. */
static void remember(const uint8_t *text, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        if (text[i] == '\n' || text[i] == '\r') {
            if (self.line_length > 0) {
                self.line[self.line_length] = 0;
                memcpy(self.last, self.line, self.line_length + 1);
            }
            self.line_length = 0;
        } else if (self.line_length < LINE_MAX_LENGTH) {
            self.line[self.line_length++] = text[i] >= 0x20 && text[i] < 0x7f ? (char)text[i] : '?';
        }
    }
}

static int open_log(void)
{
    self.log = open(self.options->console, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
    self.written = 0;
    return self.log;
}

/* The older part is kept once: FILE.1. */
static void rotate(void)
{
    char older[4096];
    close(self.log);
    snprintf(older, sizeof older, "%s.1", self.options->console);
    (void)!rename(self.options->console, older);
    (void)!open_log();
}

static void take_console(const uint8_t *text, size_t length)
{
    remember(text, length);
    while (length > 0 && self.log >= 0) {
        if (self.written >= self.options->console_bytes) {
            rotate();
            continue;
        }
        size_t room = self.options->console_bytes - self.written;
        ssize_t put = write(self.log, text, length < room ? length : room);
        if (put <= 0)
            return; /* a full disk must not end a run */
        self.written += (size_t)put;
        text += put;
        length -= (size_t)put;
    }
}

static bool read_console(void)
{
    uint8_t text[16384];
    ssize_t got = read(self.console, text, sizeof text);
    if (got > 0)
        take_console(text, (size_t)got);
    return got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR));
}

static void on_console(struct source *source, uint32_t events)
{
    (void)events;
    if (!read_console())
        (void)!loop_watch(source, self.console, 0);
}

/* What it said last is still in the pipe; others may hold that open, so not for ever. */
static void last_words(void)
{
    int64_t end = sys_now_ms() + LAST_WORDS_MS;
    struct pollfd look = {.fd = self.console, .events = POLLIN};
    while (self.console >= 0 && sys_now_ms() < end && poll(&look, 1, 0) > 0 && (look.revents & POLLIN))
        if (!read_console())
            return;
}

static void note_end(int status)
{
    self.pid = 0;
    if (WIFEXITED(status))
        snprintf(self.status, sizeof self.status, "exit code %d", WEXITSTATUS(status));
    else
        snprintf(self.status, sizeof self.status, "signal %d", WTERMSIG(status));
    last_words();
}

void keeper_monitor_reap(void)
{
    int status;
    pid_t pid, monitor = self.pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (pid == monitor)
            note_end(status);
    if (monitor > 0 && self.pid == 0)
        keeper_fail("monitor-ended", "the monitor ended by itself (%s)", self.status);
}

void keeper_monitor_await(int patience_ms)
{
    int status;
    int64_t end = sys_now_ms() + patience_ms;
    while (self.pid > 0 && sys_now_ms() < end) {
        if (waitpid(self.pid, &status, WNOHANG) == self.pid)
            note_end(status);
        else
            (void)!poll(NULL, 0, 5);
    }
}

void keeper_monitor_kill(void)
{
    int status;
    if (self.pid <= 0)
        return;
    (void)!kill(-self.pid, SIGKILL); /* its session's group; what has left that dies with us, PID 1 */
    (void)!kill(self.pid, SIGKILL);
    while (waitpid(self.pid, &status, 0) < 0 && errno == EINTR)
        continue;
    self.pid = 0;
    last_words();
}

/*
 * In the child: no file of a monitor that was taken over grows beyond the largest that it was given. Firecracker has one
 * more than its disks, into which it writes the guest's memory; QEMU has pipes for that.
 */
static void bound_files(void)
{
    struct stat about;
    off_t most = 0;
    for (int fd = 3; fd < KEEPER_CHANNEL; fd++) {
        int flags = fcntl(fd, F_GETFD);
        bool given = flags >= 0 && !(flags & FD_CLOEXEC) && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY;
        if (given && fstat(fd, &about) == 0 && S_ISREG(about.st_mode) && about.st_size > most)
            most = about.st_size;
    }
    const struct rlimit bound = {.rlim_cur = (rlim_t)most, .rlim_max = (rlim_t)most};
    if (most > 0 && setrlimit(RLIMIT_FSIZE, &bound) < 0)
        _exit(EXIT_CLOISTER);
}

/* In the child: the descriptors that the plan names, from 5 on, and two of ours. */
_Noreturn static void become(char *const *argv, int channel, int console, pid_t parent)
{
    sigset_t none;
    sigemptyset(&none);
    extern char **environ;
    int to = fcntl(console, F_DUPFD_CLOEXEC, OUT_OF_THE_WAY);
    int guest = channel < 0 ? -1 : fcntl(channel, F_DUPFD_CLOEXEC, OUT_OF_THE_WAY);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent || setsid() < 0 || to < 0)
        _exit(EXIT_CLOISTER);
    if (dup2(to, 1) < 0 || dup2(to, 2) < 0 || dup2(to, KEEPER_CONSOLE) < 0)
        _exit(EXIT_CLOISTER);
    if (channel >= 0 && dup2(guest, KEEPER_CHANNEL) < 0)
        _exit(EXIT_CLOISTER);
    bound_files();
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execve(argv[0], argv, environ);
    dprintf(2, "the monitor %s cannot be executed: %s\n", argv[0], strerror(errno));
    _exit(EXIT_CLOISTER);
}

static void hang_up(void)
{
    if (self.call < 0)
        return;
    (void)!loop_watch(&self.on_call, self.call, 0);
    close(self.call);
    self.call = -1;
}

/* `OK port` and a newline: then the bytes are the guest's. Byte for byte: those behind belong to somebody else. */
static void on_call(struct source *source, uint32_t events)
{
    (void)source, (void)events;
    char byte, *answer = self.answer;
    ssize_t got;
    while ((got = recv(self.call, &byte, 1, MSG_DONTWAIT)) == 1 && byte != '\n' &&
           self.answer_length < sizeof self.answer - 1)
        answer[self.answer_length++] = byte;
    if (got < 0 && errno == EAGAIN)
        return;
    if (got != 1 || byte != '\n' || self.answer_length < 3 || memcmp(answer, "OK ", 3) != 0) {
        hang_up(); /* nobody listens yet; the next tick tries again */
        return;
    }
    int fd = self.call;
    (void)!loop_watch(&self.on_call, fd, 0);
    self.call = -1;
    self.connected = true;
    self.reached(fd);
}

/* Firecracker's side of vsock (its docs/vsock.md, "Host-initiated connections"). */
static void call(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char word[32];
    if (strlen(self.options->vsock) >= sizeof address.sun_path)
        return;
    strcpy(address.sun_path, self.options->vsock);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int length = snprintf(word, sizeof word, "CONNECT %d\n", LINK_VSOCK_PORT);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) == 0 &&
        send(fd, word, (size_t)length, MSG_NOSIGNAL) == length && loop_watch(&self.on_call, fd, LOOP_READ) == 0) {
        self.call = fd;
        self.answer_length = 0;
        self.call_ends_ms = sys_now_ms() + CALL_PATIENCE_MS;
        return;
    }
    if (fd >= 0)
        close(fd);
}

void keeper_monitor_tick(void)
{
    if (!keeper_monitor_waiting())
        return;
    if (self.call >= 0 && sys_now_ms() >= self.call_ends_ms)
        hang_up();
    if (self.call < 0)
        call();
}

bool keeper_monitor_has_calls(void)
{
    return self.options->vsock != NULL;
}

bool keeper_monitor_call(void)
{
    if (!keeper_monitor_has_calls())
        return false;
    hang_up();
    self.connected = false;
    keeper_tick_soon();
    return true;
}

bool keeper_monitor_waiting(void)
{
    return self.pid > 0 && self.options->vsock && !self.connected;
}

int keeper_monitor_start(const struct keeper_options *options, void (*reached)(int fd))
{
    int pipe_ends[2], channel[2] = {-1, -1};
    self.options = options;
    self.reached = reached;
    self.on_call.ready = on_call;
    self.on_console.ready = on_console;
    if (open_log() < 0 || pipe2(pipe_ends, O_CLOEXEC) < 0)
        return -1;
    if (!options->vsock && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channel) < 0)
        return -1;
    pid_t parent = getpid();
    self.pid = fork();
    if (self.pid == 0)
        become(options->monitor, channel[1], pipe_ends[1], parent);
    close(pipe_ends[1]);
    if (channel[1] >= 0)
        close(channel[1]);
    if (self.pid < 0 || fcntl(pipe_ends[0], F_SETFL, O_NONBLOCK) < 0)
        return -1;
    self.console = pipe_ends[0];
    if (loop_watch(&self.on_console, self.console, LOOP_READ) < 0)
        return -1;
    if (options->vsock)
        return 0;
    if (fcntl(channel[0], F_SETFL, O_NONBLOCK) < 0)
        return -1;
    reached(channel[0]);
    return 0;
}
