/*
 * What it is: the keeper: PID 1 of the jail around a virtual machine's monitor. To the broker it is an inner half; behind
 * it are a monitor and a guest (ARCHITECTURE.md "The link"). This file: the broker's channel, and how all of it ends.
 * What it is not: a believer: the guest's frames are judged in keeper_guest.c, and a guest that lies ends here.
 */
#define _GNU_SOURCE
#include "keeper.h"
#include "loop.h"
#include "reaper.h"
#include "shim.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

enum { EXIT_KILLED = 137, OUT_OF_THE_WAY = 64, TICK_MS = 50, BUSY_TICK_MS = 5 };
enum { KILL_PATIENCE_MS = 2000, LOOKED_WITHIN_MS = 2000 };

static struct keeper {
    struct keeper_options options;
    struct channel broker;
    struct source on_broker, on_signals;
    int signals;
    bool begun;              /* `B` came, and the monitor runs */
    int64_t join_by_ms;      /* the guest has to have reported its walls; 0: not asked yet, or it has */
    int64_t kill_at_ms;      /* the broker said kill, and the guest had its time; 0: it did not */
    uint64_t inherited;      /* descriptors below 64 that are the monitor's: bit N is N */
} self;

_Noreturn void keeper_end(uint8_t status)
{
    keeper_monitor_kill();
    _exit(status);
}

void keeper_tell(char type, const struct writer *payload)
{
    if (payload->bad || channel_send(&self.broker, type, payload->data, payload->length, -1) < 0)
        keeper_end(EXIT_CLOISTER);
}

bool keeper_tell_if_room(char type, const void *payload, size_t length)
{
    struct pollfd look = {.fd = self.broker.fd, .events = POLLOUT};
    if (poll(&look, 1, 0) <= 0 || !(look.revents & POLLOUT))
        return false;
    if (channel_send(&self.broker, type, payload, length, -1) < 0)
        keeper_end(EXIT_CLOISTER);
    return true;
}

void keeper_tell_terminal(uint32_t id, int master)
{
    struct writer payload = {0};
    write_u32(&payload, id);
    if (payload.bad || channel_send(&self.broker, 'M', payload.data, payload.length, master) < 0)
        keeper_end(EXIT_CLOISTER);
    free(payload.data);
}

/* Add `name=text` to a list whose count is written last. */
static void add(struct writer *list, const char *name, const char *text)
{
    char word[768];
    int length = snprintf(word, sizeof word, "%s=%.600s", name, text);
    write_u32(list, (uint32_t)length);
    write_bytes(list, word, (size_t)length);
}

/*
 * Until the broker has seen what the kernel counted in our cgroup (memory.events, pids.events): that goes with us, as
 * systemd removes an empty one at once.
 */
static void await_look(void)
{
    (void)!channel_await(&self.broker, 'D', LOOKED_WITHIN_MS);
}

_Noreturn void keeper_fail(const char *reason, const char *format, ...)
{
    char text[512];
    va_list words;
    va_start(words, format);
    vsnprintf(text, sizeof text, format, words);
    va_end(words);
    const char *ended = keeper_monitor_status();
    struct writer died = {0}, end = {0};
    bool running = keeper_agent_running();
    keeper_monitor_kill();
    write_u32(&died, 4);
    add(&died, "reason", reason);
    add(&died, "text", text);
    add(&died, "console", keeper_console_line());
    add(&died, "status", ended ? ended : "");
    write_u32(&end, 0);
    if (running) {
        write_u8(&end, EXIT_KILLED);
    } else {
        write_u32(&end, EIO);
        write_bytes(&end, "monitor", strlen("monitor"));
    }
    keeper_tell('D', &died);
    keeper_tell(running ? 'E' : 'Y', &end);
    await_look();
    _exit(running ? EXIT_KILLED : EXIT_CLOISTER);
}

static void on_reached(int fd)
{
    keeper_guest_join(fd);
}

static void on_tick(void)
{
    int64_t now = sys_now_ms();
    keeper_monitor_tick();
    keeper_box_tick();
    keeper_still_tick();
    if (self.join_by_ms && keeper_guest_proved())
        self.join_by_ms = 0;
    if (self.kill_at_ms && now >= self.kill_at_ms)
        keeper_end(EXIT_KILLED);
    if (self.join_by_ms && now >= self.join_by_ms)
        keeper_fail("guest-silent", "the guest did not %s within %d s",
                    keeper_guest_joined() ? "report its walls" : "say hello", self.options.patience_s);
    if (self.join_by_ms || self.kill_at_ms || keeper_monitor_waiting() || keeper_box_waiting() || keeper_still_waiting())
        loop_later(keeper_box_waiting() ? BUSY_TICK_MS : TICK_MS, on_tick);
}

int keeper_patience_ms(int most_s)
{
    return (self.options.patience_s < most_s ? self.options.patience_s : most_s) * 1000;
}

void keeper_tick_soon(void)
{
    loop_later(BUSY_TICK_MS, on_tick);
}

/* `B`: now the run's limits hold for us, and so for the monitor. */
static void on_begin(struct frame *frame)
{
    if (self.begun || frame->descriptor_count != 1)
        keeper_end(EXIT_CLOISTER);
    self.begun = true;
    int tar = frame->descriptors[0];
    frame->descriptors[0] = -1;
    keeper_guest_begin(frame, tar);
    keeper_commands_open(self.options.adopt);
    if (keeper_box_open(&self.options) < 0)
        keeper_fail("monitor-failed", "the box cannot be watched: %s", strerror(errno));
    if (keeper_monitor_start(&self.options, on_reached) < 0)
        keeper_fail("monitor-failed", "the monitor cannot be started: %s", strerror(errno));
    for (int fd = 3; fd < OUT_OF_THE_WAY; fd++)
        if (self.inherited >> fd & 1)
            close(fd);
    self.join_by_ms = sys_now_ms() + (int64_t)self.options.patience_s * 1000;
    on_tick();
}

/* The guest gets a moment to leave its disks clean. */
static void on_kill(void)
{
    if (!self.begun || !keeper_guest_joined())
        keeper_end(EXIT_KILLED);
    keeper_guest_kill();
    self.kill_at_ms = sys_now_ms() + KILL_PATIENCE_MS;
    on_tick();
}

static void on_frame(struct frame *frame)
{
    if (frame->type != 'B' && !self.begun && frame->type != 'K')
        keeper_end(EXIT_CLOISTER);
    switch (frame->type) {
    case 'B':
        on_begin(frame);
        break;
    case 'G':
    case 'X':
        keeper_guest_order(frame->type, frame);
        break;
    case 'S':
        keeper_guest_signal(frame);
        break;
    case 'M':
        keeper_guest_terminal(frame);
        break;
    case 'T':
    case 'Q':
        keeper_guest_ask(frame);
        break;
    case 'K':
        on_kill();
        break;
    default:
        keeper_end(EXIT_CLOISTER);
    }
}

static void on_broker(struct source *source, uint32_t events)
{
    (void)source, (void)events;
    struct frame frame;
    for (;;) {
        enum channel_result result = channel_receive(&self.broker, &frame);
        if (result == CHANNEL_AGAIN)
            return;
        if (result != CHANNEL_FRAME)
            keeper_end(EXIT_CLOISTER);
        on_frame(&frame);
        frame_release(&frame);
    }
}

static void on_signals(struct source *source, uint32_t events)
{
    (void)source, (void)events;
    struct signalfd_siginfo info;
    while (read(self.signals, &info, sizeof info) == sizeof info)
        continue;
    keeper_monitor_reap();
}

/* Our own descriptors go out of the way: from 5 on the numbers are the monitor's, and all of the rest is nobody's. */
static int move(int *fd)
{
    int moved = fcntl(*fd, F_DUPFD_CLOEXEC, OUT_OF_THE_WAY);
    if (moved < 0)
        return -1;
    close(*fd);
    *fd = moved;
    return 0;
}

/* Connections of a guest, and to it, are descriptors of ours. */
static int raise_limit(void)
{
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) < 0)
        return -1;
    files.rlim_cur = files.rlim_max;
    return setrlimit(RLIMIT_NOFILE, &files);
}

static int prepare(void)
{
    if (prctl(PR_SET_DUMPABLE, 0) < 0 || prctl(PR_SET_NAME, "cloister") < 0 || sys_no_core() < 0)
        return -1;
    if (raise_limit() < 0 || move(&self.options.ctl) < 0)
        return -1;
    for (size_t i = 0; i < self.options.port_count; i++)
        if (move(&self.options.ports[i].fd) < 0)
            return -1;
    for (int fd = 3; fd < OUT_OF_THE_WAY; fd++)
        if (fcntl(fd, F_GETFD) >= 0)
            self.inherited |= (uint64_t)1 << fd;
    /* Standard input and output are a caller's, who has nothing to do with the monitor. */
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0)
        return -1;
    for (int fd = 0; fd <= 2; fd++)
        if (dup2(null, fd) < 0)
            return -1;
    if (null > 2)
        close(null);
    return self.signals = reaper_watch(false);
}

int keeper_main(int count, char **options)
{
    if (!keeper_options_parse(&self.options, count, options) || prepare() < 0)
        return EXIT_CLOISTER;
    channel_open(&self.broker, self.options.ctl);
    self.on_broker.ready = on_broker;
    self.on_signals.ready = on_signals;
    if (loop_watch(&self.on_broker, self.broker.fd, LOOP_READ) < 0 ||
        loop_watch(&self.on_signals, self.signals, LOOP_READ) < 0)
        return EXIT_CLOISTER;
    loop_run();
    return EXIT_CLOISTER;
}
