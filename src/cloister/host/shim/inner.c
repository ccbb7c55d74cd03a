/*
 * What it is: the inner half: PID 1 of the sandbox, or the main process of a unit. It proves that
 * the walls stand, waits for go, starts the agent, carries its bytes to the relay, reaps, and leaves with its status.
 * What it is not: the maker of the sandbox (bubblewrap or systemd is), nor a voice: stdout and stderr
 * belong to the agent, everything we have to say goes to the broker.
 *
 * One rule above all: no go, no agent; no broker, no sandbox.
 */
#define _GNU_SOURCE
#include "child.h"
#include "filter.h"
#include "forward.h"
#include "frame.h"
#include "landlock.h"
#include "loop.h"
#include "options.h"
#include "probe.h"
#include "reaper.h"
#include "shim.h"
#include "sys.h"
#include "terminal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

enum { TASKS_MAX = 256, FLAG_PTY = 1, EXIT_KILLED = 137, LOOK_MS = 500 };

/* One command: the agent has id 0. With a pty it waits until the outer half has the master, and made it fit. */
struct task {
    bool taken; /* else this place is free */
    uint32_t id;
    pid_t pid;         /* 0: it waits for its terminal */
    bool told_to_stop; /* its next stop is our own doing, not its terminal's */
    int terminal;      /* the slave, while it waits */
    struct frame frame; /* its order, while it waits */
};

static struct inner {
    struct options options;
    struct channel broker;
    struct rlimit files; /* RLIMIT_NOFILE as it was: the agent's, not ours */
    struct task tasks[TASKS_MAX];
    struct source on_broker, on_signals;
    int signals;
    int null; /* /dev/null, opened before Landlock might forbid it; -1: there is none */
} self;

_Noreturn static void die(int code)
{
    /* Where we are PID 1 the kernel kills everything else in this PID namespace. */
    if (self.options.unit)
        reaper_kill_all();
    _exit(code);
}

static void tell(char type, const struct writer *payload)
{
    if (payload->bad || channel_send(&self.broker, type, payload->data, payload->length, -1) < 0)
        die(EXIT_CLOISTER);
}

static void tell_task(char type, uint32_t id, const uint32_t *value, const char *text)
{
    struct writer payload = {0};
    write_u32(&payload, id);
    if (value)
        write_u32(&payload, *value);
    if (text)
        write_bytes(&payload, text, strlen(text));
    tell(type, &payload);
    free(payload.data);
}

static struct task *task_with(uint32_t id)
{
    for (size_t i = 0; i < TASKS_MAX; i++)
        if (self.tasks[i].taken && self.tasks[i].id == id)
            return &self.tasks[i];
    return NULL;
}

/* Take a free place; NULL when all are in use. */
static struct task *task_new(uint32_t id)
{
    for (size_t i = 0; i < TASKS_MAX; i++)
        if (!self.tasks[i].taken) {
            self.tasks[i] = (struct task){.taken = true, .id = id, .terminal = -1};
            return &self.tasks[i];
        }
    return NULL;
}

static void task_release(struct task *task)
{
    if (task->terminal >= 0)
        close(task->terminal);
    frame_release(&task->frame);
    *task = (struct task){.taken = false};
}

/* What `G` and `X` have in common: u32 flags, list argv, list environment, list (directory). */
struct order {
    uint32_t flags;
    char **argv, **environment, **directory;
    bool good;
};

static struct order order_read(struct reader *reader)
{
    size_t words, names, places;
    struct order order = {.flags = read_u32(reader)};
    order.argv = read_list(reader, &words);
    order.environment = read_list(reader, &names);
    order.directory = read_list(reader, &places);
    order.good = read_complete(reader) && words > 0 && places == 1;
    return order;
}

static void order_release(struct order *order)
{
    free(order->argv);
    free(order->environment);
    free(order->directory);
}

/* A command could not be started. The broker turns that into 125, 126 or 127 for the user. */
static void give_up(uint32_t id, const struct failure *failure)
{
    uint32_t error = (uint32_t)failure->error;
    tell_task('Y', id, &error, failure->stage);
    if (id == 0)
        die(EXIT_CLOISTER);
}

/* Start a command and tell the broker. */
static void run(struct task *task, const struct order *order, struct command *command)
{
    struct failure failure;
    command->argv = order->argv;
    command->environment = order->environment;
    command->directory = order->directory[0];
    command->broker = &self.broker;
    pid_t pid = child_start(command, &self.options, &self.files, &failure);
    if (pid < 0) {
        uint32_t id = task->id;
        task_release(task);
        give_up(id, &failure);
        return;
    }
    task->pid = pid;
    uint32_t inside = (uint32_t)pid;
    tell_task('R', task->id, &inside, NULL);
}

/* Make a pty the controlling terminal of our session, in which the agent is a job. */
static void take_terminal(int slave)
{
    if (setsid() < 0 && getsid(0) != getpid())
        die(EXIT_CLOISTER);
    if (ioctl(slave, TIOCSCTTY, 0) < 0)
        die(EXIT_CLOISTER);
}

/* The agent owns its stdio alone: while we held it too, a reader would not see it closed. */
static void drop_stdio(void)
{
    if (self.null < 0)
        return; /* a sandbox without /dev/null: the descriptors stay, and end with us */
    for (int fd = 0; fd <= 2; fd++)
        (void)!dup2(self.null, fd);
    close(self.null);
    self.null = -1;
}

/* Make the pty of a command, and send its master out. The command starts when the broker says `M`. */
static void await_terminal(struct task *task, struct frame *frame)
{
    int master;
    struct writer payload = {0};
    task->terminal = terminal_open(&master, self.options.unit);
    if (task->terminal < 0) {
        const struct failure failure = {.error = errno, .stage = "terminal"};
        uint32_t id = task->id;
        task_release(task);
        give_up(id, &failure);
        return;
    }
    task->frame = *frame;
    memset(frame, 0, sizeof *frame);
    write_u32(&payload, task->id);
    if (payload.bad || channel_send(&self.broker, 'M', payload.data, payload.length, master) < 0)
        die(EXIT_CLOISTER);
    free(payload.data);
    close(master);
}

/* A whole order of the agent (id 0), or of a further command with its stdio or a pty. */
static void begin(uint32_t id, struct frame *frame, struct reader reader)
{
    struct order order = order_read(&reader);
    bool pty = order.flags & FLAG_PTY;
    /* The agent inherits ours, but in a unit, where ours are nobody's. */
    bool inherits = id == 0 && !self.options.unit;
    unsigned descriptors = pty || inherits ? 0 : 3;
    if (!order.good || frame->descriptor_count != descriptors || task_with(id))
        die(EXIT_CLOISTER);
    struct task *task = task_new(id);
    if (!task) {
        give_up(id, &(const struct failure){.error = EAGAIN, .stage = "fork"});
    } else if (pty) {
        await_terminal(task, frame);
    } else {
        struct command command = {.stdio = {0, 1, 2}};
        if (!inherits)
            memcpy(command.stdio, frame->descriptors, sizeof command.stdio);
        run(task, &order, &command);
        if (id == 0)
            drop_stdio();
    }
    order_release(&order);
}

/* The outer half has the master: the command may start. */
static void on_terminal(const struct frame *frame)
{
    struct reader reader = frame_reader(frame);
    struct task *task = task_with(read_u32(&reader));
    if (!read_complete(&reader))
        die(EXIT_CLOISTER);
    if (!task)
        return; /* its client left in the meantime */
    if (task->pid != 0)
        die(EXIT_CLOISTER);
    reader = frame_reader(&task->frame);
    if (task->id != 0)
        (void)read_u32(&reader);
    struct order order = order_read(&reader);
    int slave = task->terminal;
    struct frame kept = task->frame;
    task->terminal = -1;
    task->frame = (struct frame){0};
    struct command command = {.stdio = {slave, slave, slave}, .job = task->id == 0, .terminal = task->id != 0};
    if (command.job)
        take_terminal(slave);
    run(task, &order, &command);
    if (command.job)
        drop_stdio();
    close(slave);
    order_release(&order);
    frame_release(&kept);
}

static void on_exec(struct frame *frame)
{
    struct reader reader = frame_reader(frame);
    uint32_t id = read_u32(&reader);
    if (id == 0)
        die(EXIT_CLOISTER);
    begin(id, frame, reader);
}

static void on_ended(struct task *task, uint8_t code)
{
    struct writer payload = {0};
    uint32_t id = task->id;
    write_u32(&payload, id);
    write_u8(&payload, code);
    task_release(task);
    tell('E', &payload);
    free(payload.data);
    if (id != 0)
        return;
    if (self.options.unit) /* with us its cgroup goes: the broker reads first what the kernel has counted there */
        (void)!channel_await(&self.broker, 'D', LOOK_MS);
    die(code);
}

/* A command that waits for its terminal has no handlers yet: what would end it, ends it. */
static void signal_waiting(struct task *task, int number)
{
    static const int harmless[] = {SIGCONT, SIGTSTP, SIGSTOP, SIGTTIN, SIGTTOU, SIGCHLD, SIGURG, SIGWINCH};
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++)
        if (number == harmless[i])
            return;
    on_ended(task, (uint8_t)(128 + number));
}

/* u8 signal, and u32 id where it is not the agent that is meant. */
static void on_signal_frame(const struct frame *frame)
{
    struct reader reader = frame_reader(frame);
    int number = read_u8(&reader);
    uint32_t id = reader.left > 0 ? read_u32(&reader) : 0;
    if (!read_complete(&reader) || number < 1 || number >= NSIG)
        die(EXIT_CLOISTER);
    struct task *task = task_with(id);
    if (!task)
        return; /* it has just ended */
    if (task->pid == 0) {
        signal_waiting(task, number);
        return;
    }
    if (number == SIGTSTP || number == SIGSTOP) {
        /* SIGTSTP would be dropped: without a job-control parent the group is an orphaned one (setpgid(2)). */
        number = SIGSTOP;
        task->told_to_stop = true;
    } else if (number == SIGCONT) {
        task->told_to_stop = false;
    }
    (void)!kill(-task->pid, number);
}

static void on_frame(struct frame *frame)
{
    switch (frame->type) {
    case 'S':
        on_signal_frame(frame);
        break;
    case 'X':
        on_exec(frame);
        break;
    case 'M':
        on_terminal(frame);
        break;
    case 'K':
        die(EXIT_KILLED);
    default:
        die(EXIT_CLOISTER);
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
            die(EXIT_CLOISTER);
        on_frame(&frame);
        frame_release(&frame);
    }
}

/* `systemctl stop` and its kind: the agent is asked, and its end is ours. Before there is an agent, it is ours now. */
static void on_ending(int number)
{
    struct task *agent = task_with(0);
    if (!agent)
        die(128 + number);
    if (agent->pid == 0) {
        signal_waiting(agent, number);
        return;
    }
    agent->told_to_stop = false;
    (void)!kill(-agent->pid, number);
    (void)!kill(-agent->pid, SIGCONT);
}

static void on_signals(struct source *source, uint32_t events)
{
    (void)source, (void)events;
    struct signalfd_siginfo info;
    while (read(self.signals, &info, sizeof info) == sizeof info)
        if (info.ssi_signo != SIGCHLD)
            on_ending((int)info.ssi_signo);
    int status;
    pid_t pid;
    /* Orphans are ours too: PID 1 reaps whatever ends. */
    while ((pid = waitpid(-1, &status, WNOHANG | WUNTRACED)) > 0) {
        struct task *task = NULL;
        for (size_t i = 0; i < TASKS_MAX && !task; i++)
            if (self.tasks[i].taken && self.tasks[i].pid == pid)
                task = &self.tasks[i];
        if (!task)
            continue;
        if (!WIFSTOPPED(status)) {
            on_ended(task, (uint8_t)(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status)));
        } else if (task->told_to_stop) {
            task->told_to_stop = false;
        } else {
            tell_task('Z', task->id, NULL, NULL);
        }
    }
}

/* Wait for a frame of this type; anything else, the end of the channel above all, means that nothing may run. */
static struct frame await(uint8_t type)
{
    struct frame frame;
    for (;;) {
        enum channel_result result = channel_receive(&self.broker, &frame);
        if (result == CHANNEL_FRAME && frame.type == type)
            return frame;
        if (result != CHANNEL_AGAIN)
            die(result == CHANNEL_FRAME && frame.type == 'K' ? EXIT_KILLED : EXIT_CLOISTER);
        struct pollfd wait[2] = {{.fd = self.broker.fd, .events = POLLIN}, {.fd = self.signals, .events = POLLIN}};
        if (poll(wait, 2, -1) < 0 && errno != EINTR)
            die(EXIT_CLOISTER);
        if (wait[1].revents)
            on_signals(NULL, 0);
    }
}

/* The channel that came as standard input goes out of the way of stdio. */
static int move_channel(void)
{
    int moved = fcntl(0, F_DUPFD_CLOEXEC, 3);
    if (moved < 0)
        return -1;
    close(0);
    self.options.ctl = moved;
    return 0;
}

static int prepare(void)
{
    if (self.options.ctl == 0 && (!self.options.unit || move_channel() < 0))
        return -1;
    if (self.options.command || self.options.publish.count > 0)
        return -1; /* a service's */
    if (self.options.ctl < 0 || reaper_shut_in(self.options.ctl, &self.files) < 0)
        return -1;
    if (self.options.unit && reaper_adopt() < 0)
        return -1;
    self.null = open("/dev/null", O_RDWR | O_CLOEXEC);
    return self.signals = reaper_watch(self.options.unit);
}

/* Restrict ourselves and try the walls, and tell the broker: false when one of them does not stand. */
static bool prove_walls(void)
{
    struct writer findings = {0};
    /* Landlock first: the probes then see what the agent will see. */
    bool good = landlock_enforce(&self.options, &findings);
    good = filter_enforce(self.options.seccomp, &findings) && good;
    good = probe_run(&self.options, &findings) && good;
    if (good && !forward_open(self.options.listen.items, self.options.listen.count, self.options.egress)) {
        probe_note(&findings, "forwarder", "", strerrorname_np(errno));
        good = false;
    }
    probe_note(&findings, "verdict", "", good ? "passed" : "failed");
    probe_tell(&self.broker, &findings);
    return good;
}

int inner_main(int count, char **options)
{
    if (!options_parse(&self.options, count, options) || prepare() < 0)
        return EXIT_CLOISTER;
    channel_open(&self.broker, self.options.ctl);
    if (self.options.unit) {
        /* Workspace, home and the relay's socket are mounted after our start. */
        struct frame mounted = await('B');
        bool empty = mounted.length == 0 && mounted.descriptor_count == 0;
        frame_release(&mounted);
        if (!empty)
            return EXIT_CLOISTER;
    }
    if (!prove_walls())
        return EXIT_CLOISTER;
    /* The go comes after our findings: the broker has looked at the mounts from outside by then. */
    struct frame go = await('G');
    self.on_broker.ready = on_broker;
    self.on_signals.ready = on_signals;
    if (loop_watch(&self.on_broker, self.broker.fd, LOOP_READ) < 0 ||
        loop_watch(&self.on_signals, self.signals, LOOP_READ) < 0)
        return EXIT_CLOISTER;
    begin(0, &go, frame_reader(&go));
    frame_release(&go);
    loop_run();
    return EXIT_CLOISTER;
}
