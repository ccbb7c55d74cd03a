/*
 * What it is: the outer half: what `cloister run` becomes once the broker has its request. It
 * holds the user's terminal, starts bubblewrap, carries signals, and exits with the agent's code.
 * What it is not: privileged, or a judge: everything it does was asked for by the broker.
 *
 * One rule above all: when the broker goes away, the sandbox ends (exit 125).
 */
#define _GNU_SOURCE
#include "frame.h"
#include "launch.h"
#include "pty.h"
#include "question.h"
#include "shim.h"
#include "sys.h"
#include "tty.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* How long the broker may take to say `F` after bubblewrap has ended, and bubblewrap to end after `F`. */
enum { PATIENCE_MS = 3000 };

/* What of a report fits into one frame. */
enum { REPORT_MAX = 1 << 20 };

static struct outer {
    struct channel broker;
    int signals;
    struct launch launch;
    bool launched; /* a `B` frame came */
    bool waiting;  /* for `G`, after `N` */
    pid_t child;   /* bubblewrap; 0: none, or reaped */
    int child_pidfd;
    int network_pidfd; /* pasta, which ends with us; -1: none */
    bool finished; /* an `F` frame came */
    int code;
    char *text;
    size_t text_length;
    int64_t deadline_ms; /* 0: none */
    struct pty pty;
    struct question question;
    int complaints; /* with a pty: what bubblewrap says of its own failure; -1: none */
    bool progress;  /* a line of progress is on the terminal */
} self;

/* The line of progress: no longer than the narrowest terminal, so that one return goes back to where it began. */
enum { PROGRESS_MAX = 79 };
static const char wipe[] = "\r\033[K";

static void wipe_progress(void)
{
    if (self.progress)
        (void)!sys_write_all(2, wipe, sizeof wipe - 1, 1000);
    self.progress = false;
}

/* Show how far long work is, in place of what was shown before; nothing where nobody looks, or others write. */
static void on_progress(const struct frame *frame)
{
    wipe_progress();
    if (frame->length == 0 || frame->descriptor_count > 0 || !isatty(2) || tcgetpgrp(2) != getpgrp())
        return;
    size_t length = frame->length < PROGRESS_MAX ? frame->length : PROGRESS_MAX;
    sys_write_printable(2, (const char *)frame->payload, length, false);
    self.progress = true;
}

/* SIGKILL bubblewrap and reap it; its PID namespace dies with it. */
static void end_child(void)
{
    if (self.child <= 0)
        return;
    (void)!syscall(SYS_pidfd_send_signal, self.child_pidfd, SIGKILL, NULL, 0);
    while (waitpid(self.child, NULL, 0) < 0 && errno == EINTR)
        continue;
    self.child = 0;
}

/* Show what bubblewrap said. Nobody in the sandbox has this pipe once the agent runs, but it is bounded all the same. */
static void show_complaints(void)
{
    char text[2048];
    ssize_t length = self.complaints < 0 ? 0 : read(self.complaints, text, sizeof text);
    if (length > 0)
        sys_write_printable(2, text, (size_t)length, false);
}

_Noreturn static void leave(int code, const char *text, size_t length)
{
    /* The broker kills pasta as well; each of us may be the one that is left. */
    if (self.network_pidfd >= 0)
        (void)!syscall(SYS_pidfd_send_signal, self.network_pidfd, SIGKILL, NULL, 0);
    wipe_progress();
    question_withdraw(&self.question, &self.pty);
    tty_give_back(); /* the run's; the question's is back already */
    show_complaints();
    sys_write_printable(2, text, length, false);
    if (length > 0 && text[length - 1] != '\n')
        (void)!write(2, "\n", 1);
    _exit(code);
}

/* End the run for a reason of our own. */
_Noreturn static void fail(const char *message, const char *reference, const char *remedy)
{
    char text[512];
    end_child();
    pty_drain(&self.pty);
    int length = snprintf(text, sizeof text, "cloister: %s [%s]\n  try: %s\n", message, reference, remedy);
    leave(EXIT_CLOISTER, text, length < (int)sizeof text ? (size_t)length : sizeof text - 1);
}

_Noreturn static void fail_errno(const char *what)
{
    char text[256];
    snprintf(text, sizeof text, "cannot %s: %s", what, strerror(errno));
    fail(text, "launch-failed", "cloister doctor");
}

_Noreturn static void fail_broker(void)
{
    fail("the broker is gone, so the run was ended", "broker-gone", "cloister gc");
}

static void on_finish(const struct frame *frame);

/* The broker may have said how the run ended, and closed, while we were about to say something: its word counts. */
static void hear_last(void)
{
    struct frame frame;
    while (!self.finished && channel_receive(&self.broker, &frame) == CHANNEL_FRAME) {
        if (frame.type == 'F')
            on_finish(&frame);
        frame_release(&frame);
    }
    if (!self.finished)
        fail_broker();
}

static void tell(char type, const void *payload, size_t length, int descriptor)
{
    if (!self.finished && channel_send(&self.broker, type, payload, length, descriptor) < 0)
        hear_last();
}

/* An agent that gets the user's terminal as plain stdio may leave it in odd modes: ours to put right. */
static void remember_terminal(void)
{
    for (int fd = 0; fd <= 2; fd++)
        if (isatty(fd) && tty_take(fd, NULL) == 0)
            return;
}

static void start_child(void)
{
    int ends[2] = {-1, -1};
    bool pty = self.launch.flags & LAUNCH_PTY;
    if (pty && pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0)
        fail_errno("make a pipe");
    self.complaints = ends[0];
    self.child = launch_start(&self.launch, ends[1]);
    if (self.child < 0)
        fail_errno("start bubblewrap");
    if (pty)
        close(ends[1]);
    self.child_pidfd = (int)syscall(SYS_pidfd_open, self.child, 0);
    if (self.child_pidfd < 0)
        fail_errno("watch bubblewrap");
}

/* Start what was asked for, now that its namespaces are ready. With a pty, the terminal is taken when that comes. */
static void start(void)
{
    if (self.launch.flags & LAUNCH_PTY) {
        tty_await_foreground(0);
        if (pty_expect() < 0)
            fail_errno("open a pty");
    } else {
        remember_terminal();
    }
    if (self.launch.argc > 0)
        start_child();
    launch_release(&self.launch);
    /* Not earlier: pasta enters our namespaces by pid, which takes a dumpable process (ptrace(2)). */
    if (prctl(PR_SET_DUMPABLE, 0) < 0)
        fail_errno("close this process to others");
}

/* The pty was made inside: relay it, and say that its size and modes are right, so that the command may start. */
static void on_master(struct frame *frame)
{
    bool wanted = self.launched && !self.waiting && (self.launch.flags & LAUNCH_PTY) && self.pty.master < 0;
    if (!wanted || frame->length > 0 || frame->descriptor_count != 1)
        fail("the broker sent a pty that was not asked for", "protocol", "cloister doctor");
    tty_await_foreground(0);
    int master = frame->descriptors[0];
    frame->descriptors[0] = -1;
    if (pty_adopt(&self.pty, master) < 0)
        fail_errno("use the pty of the sandbox");
    tell('M', NULL, 0, -1);
}

static void on_launch(struct frame *frame)
{
    if (self.launched || self.question.open)
        fail("the broker sent a second launch", "protocol", "cloister doctor");
    wipe_progress();
    self.launched = true;
    bool good = launch_parse(&self.launch, frame);
    memset(frame, 0, sizeof *frame); /* its parts are the launch's now */
    if (!good)
        fail("the broker sent a launch that cannot be read", "protocol", "cloister doctor");
    const char *failed = launch_prepare(&self.launch);
    if (failed)
        fail_errno(failed);
    if (!(self.launch.flags & LAUNCH_NETNS)) {
        start();
        return;
    }
    struct writer pid = {0};
    write_u32(&pid, (uint32_t)getpid());
    if (pid.bad)
        fail_errno("answer the broker");
    tell('N', pid.data, pid.length, -1);
    free(pid.data);
    self.waiting = true;
}

/* The namespace is ready; a descriptor with the frame is pasta's pidfd, ours to keep. */
static void on_network(struct frame *frame)
{
    if (frame->descriptor_count == 0)
        return;
    self.network_pidfd = frame->descriptors[0];
    frame->descriptors[0] = -1;
}

static void on_finish(const struct frame *frame)
{
    struct reader reader = frame_reader(frame);
    self.code = read_u8(&reader);
    if (reader.bad)
        fail("the broker sent an end that cannot be read", "protocol", "cloister doctor");
    self.text = malloc(reader.left + 1);
    if (self.text) {
        memcpy(self.text, reader.at, reader.left);
        self.text_length = reader.left;
    }
    self.finished = true;
    self.deadline_ms = sys_now_ms() + PATIENCE_MS;
}

/* An empty list takes the question back; it may have been answered in the meantime. */
static bool takes_back(const struct frame *frame)
{
    struct reader reader = frame_reader(frame);
    return read_u32(&reader) == 0 && read_complete(&reader);
}

static void on_question(const struct frame *frame)
{
    if (takes_back(frame)) {
        bool open = self.question.open;
        question_withdraw(&self.question, &self.pty);
        if (open)
            tell('A', &self.question.nobody, 1, -1);
        return;
    }
    int answer = self.question.open ? -1 : question_put(&self.question, frame, &self.pty);
    if (answer < 0)
        fail("the broker sent a question that cannot be read", "protocol", "cloister doctor");
    char letter = (char)answer;
    if (letter)
        tell('A', &letter, 1, -1);
}

/* Stop as the terminal's job control wants it, and tell the broker when we run again. */
static void stop(void)
{
    tty_suspend();
    tty_stop_self();
    tty_resume();
    pty_resize(&self.pty);
    if (self.launched && !self.waiting && !self.finished)
        tell('C', NULL, 0, -1);
}

static void on_frame(struct frame *frame)
{
    switch (frame->type) {
    case 'B':
        on_launch(frame);
        break;
    case 'F':
        on_finish(frame);
        break;
    case 'Q':
        on_question(frame);
        break;
    case 'I':
        on_progress(frame);
        break;
    case 'M':
        on_master(frame);
        break;
    case 'T':
        stop();
        break;
    case 'G':
        if (!self.waiting)
            fail("the broker said go twice", "protocol", "cloister doctor");
        self.waiting = false;
        on_network(frame);
        start();
        break;
    default:
        fail("the broker sent a frame of an unknown type", "protocol", "reinstall cloister");
    }
}

static void on_broker(void)
{
    struct frame frame;
    while (!self.finished) {
        switch (channel_receive(&self.broker, &frame)) {
        case CHANNEL_AGAIN:
            return;
        case CHANNEL_FRAME:
            on_frame(&frame);
            frame_release(&frame);
            break;
        case CHANNEL_CLOSED:
            fail_broker();
        case CHANNEL_BROKEN:
            fail("the broker broke the protocol", "protocol", "cloister doctor");
        }
    }
}

/* Tell that bubblewrap is gone, with the counters of the rules where they were asked for. */
static void tell_waited(void)
{
    struct writer text = {0};
    uint8_t buffer[4096];
    ssize_t got;
    int fd = self.launch.report_count > 0 ? launch_report(&self.launch) : -1;
    while (fd >= 0 && text.length < REPORT_MAX && (got = read(fd, buffer, sizeof buffer)) > 0)
        write_bytes(&text, buffer, (size_t)got);
    if (fd >= 0)
        close(fd);
    tell('W', text.data, text.bad ? 0 : text.length, -1);
    free(text.data);
}

static void on_child(void)
{
    int status;
    if (self.child > 0 && waitpid(self.child, &status, WNOHANG) == self.child) {
        self.child = 0;
        if (self.finished)
            return;
        tell_waited();
        /* A guest's changes are handed back first, which takes as long as it takes; the broker's death is seen anyway. */
        if (!(self.launch.flags & LAUNCH_PATIENT))
            self.deadline_ms = sys_now_ms() + PATIENCE_MS;
    }
}

static void on_terminal_signal(uint8_t number)
{
    /* Nothing runs yet: leaving is enough, the broker sees our connection close. */
    bool running = self.launched && !self.waiting;
    if (!running && number != SIGTSTP)
        leave(128 + number, "", 0);
    if (running && !self.finished)
        tell('S', &number, 1, -1);
    if (number == SIGTSTP)
        stop();
}

static void on_signals(void)
{
    struct signalfd_siginfo info;
    while (read(self.signals, &info, sizeof info) == sizeof info) {
        switch (info.ssi_signo) {
        case SIGCHLD:
            on_child();
            break;
        case SIGWINCH:
            pty_resize(&self.pty);
            break;
        case SIGCONT:
            tty_resume();
            self.pty.input_open = self.pty.master >= 0; /* in the background, reading was an error */
            pty_resize(&self.pty);
            break;
        default:
            on_terminal_signal((uint8_t)info.ssi_signo);
        }
    }
}

static int watch_signals(void)
{
    static const int numbers[] = {SIGCHLD, SIGWINCH, SIGCONT, SIGHUP,  SIGINT,
                                  SIGQUIT, SIGTERM,  SIGUSR1, SIGUSR2, SIGTSTP};
    sigset_t set;
    sigemptyset(&set);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        sigaddset(&set, numbers[i]);
    self.signals = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    /* Blocked and not watched: a background write to the terminal, and a closed pipe, are ordinary errors. */
    sigaddset(&set, SIGTTOU);
    sigaddset(&set, SIGTTIN);
    sigaddset(&set, SIGPIPE);
    return self.signals < 0 ? -1 : sigprocmask(SIG_BLOCK, &set, NULL);
}

/* Whether the run is over; ends what does not end in time. */
static bool over(void)
{
    if (self.finished && self.child == 0)
        return true;
    if (self.deadline_ms == 0 || sys_now_ms() < self.deadline_ms)
        return false;
    if (!self.finished)
        fail("the broker did not say how the run ended", "broker-silent", "cloister gc");
    end_child();
    return true;
}

static void turn(void)
{
    enum { SIGNALS, BROKER, QUESTION, PTY };
    struct pollfd polls[PTY + PTY_POLLS] = {
        [SIGNALS] = {.fd = self.signals, .events = POLLIN},
        [BROKER] = {.fd = self.finished ? -1 : self.broker.fd, .events = POLLIN},
        [QUESTION] = {.fd = self.question.open ? self.question.terminal : -1, .events = POLLIN},
    };
    pty_wanted(&self.pty, polls + PTY);
    int timeout = -1;
    if (self.deadline_ms > 0) {
        int64_t left = self.deadline_ms - sys_now_ms();
        timeout = left > 0 ? (int)left : 0;
    }
    if (poll(polls, PTY + PTY_POLLS, timeout) < 0) {
        if (errno == EINTR)
            return;
        fail_errno("wait for events");
    }
    if (polls[QUESTION].revents) {
        char letter = (char)question_read(&self.question, &self.pty);
        if (letter)
            tell('A', &letter, 1, -1);
    }
    pty_move(&self.pty, polls + PTY);
    if (polls[SIGNALS].revents)
        on_signals();
    if (polls[BROKER].revents)
        on_broker();
}

int outer_main(const char *text, const char *mask)
{
    if (mask)
        umask((mode_t)strtoul(mask, NULL, 8) & 0777);
    return outer_run(sys_parse_descriptor(text));
}

int outer_run(int fd)
{
    self.pty.master = self.complaints = -1;
    self.network_pidfd = -1;
    if (fd < 0 || sys_fill_stdio() < 0 || sys_close_others(fd) < 0)
        fail("the descriptor of the broker is not open", "shim-usage", "cloister run --help");
    channel_open(&self.broker, fd);
    if (sys_no_core() < 0 || watch_signals() < 0 || tty_guard() < 0)
        fail_errno("set up signals");
    while (!over())
        turn();
    pty_drain(&self.pty);
    leave(self.code, self.text, self.text_length);
}
