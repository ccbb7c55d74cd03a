/*
 * What it is: the inner half in a guest, as its broker sees it, and the descriptors of what runs in it: pipes and ptys on
 * one side, streams on the other. What it is not: the inner half, which knows nothing of a guest.
 */
#define _GNU_SOURCE
#include "guest_link.h"
#include "link.h"
#include "loop.h"
#include "stream.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { COMMANDS_MAX = 256, FLAG_PTY = 1, FLAG_ADOPT = 2, FLAG_JOINED = 16, EXIT_KILLED = 137, OFF_AFTER_MS = 5000, CC_SIZE = 32 };

struct command {
    bool taken;
    uint32_t id;
    uint32_t pid; /* as the inner half has it; 0: it has not started */
    int master;   /* of its pty; -1: none */
    bool pty;
    bool left; /* its caller is of a run that this one was restored from: nobody hears of it */
    bool ended;
    uint8_t status;
};

static struct inner {
    struct channel channel;
    struct source source;
    pid_t pid; /* 0: not started, or reaped */
    bool agent_ran;
    bool over; /* the agent has ended, and all that the run had is unmounted */
    struct command commands[COMMANDS_MAX];
} self;

static void look_for_ends(void);
static void note_end(struct command *command, uint8_t status);

static struct command *command_with(uint32_t id)
{
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        if (self.commands[i].taken && self.commands[i].id == id)
            return &self.commands[i];
    return NULL;
}

static struct command *command_new(uint32_t id)
{
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        if (!self.commands[i].taken) {
            self.commands[i] = (struct command){.taken = true, .id = id, .master = -1};
            return &self.commands[i];
        }
    return NULL;
}

static void command_release(struct command *command)
{
    if (command->master >= 0)
        close(command->master);
    *command = (struct command){.master = -1};
}

bool guest_keeps(uint32_t stream)
{
    return stream >> 31 && command_with((stream & 0x7fffffffU) >> 2);
}

void guest_living(char *text, size_t size)
{
    size_t used = 0;
    text[0] = 0;
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        if (self.commands[i].taken && !self.commands[i].left && used + 16 < size)
            used += (size_t)sprintf(text + used, "%s%u", used > 0 ? "," : "", self.commands[i].id);
}

/* The agent has ended, or its inner half: everything else ends, and nothing is mounted any more when the host hears. */
static void finish(uint8_t status)
{
    struct command *agent = command_with(0);
    if (self.over)
        return;
    self.over = true;
    (void)!loop_watch(&self.source, self.channel.fd, 0);
    if (self.pid > 0) {
        (void)!kill(self.pid, SIGKILL); /* it had said all */
        while (waitpid(self.pid, NULL, 0) < 0 && errno == EINTR)
            continue;
        self.pid = 0;
    }
    guest_hooks->end();
    if (!agent && !(agent = command_new(0)))
        guest_give_up("no place for the end of the agent");
    note_end(agent, status);
}

static void power_off(void)
{
    guest_hooks->off(NULL);
}

/* Its exit code is there: what it wrote goes first. */
static void note_end(struct command *command, uint8_t status)
{
    command->ended = true;
    command->status = status;
    for (unsigned k = STREAM_STDOUT; k <= STREAM_TERMINAL; k++)
        stream_mark(stream_of(command->id, k));
    loop_soon(look_for_ends);
}

/* A command is over when what it wrote has been sent; what others go on writing follows it, or does not. */
static void look_for_ends(void)
{
    for (size_t i = 0; i < COMMANDS_MAX; i++) {
        struct command *command = &self.commands[i];
        if (!command->taken || !command->ended || !stream_drained(stream_of(command->id, STREAM_STDOUT)) ||
            !stream_drained(stream_of(command->id, STREAM_STDERR)) ||
            !stream_drained(stream_of(command->id, STREAM_TERMINAL)))
            continue;
        uint32_t id = command->id;
        uint8_t status = command->status;
        command_release(command);
        guest_tell_id('E', id, &status, 1);
        if (id == 0)
            loop_later(OFF_AFTER_MS, power_off); /* the keeper ends the monitor when it has heard */
    }
}

void guest_kill(void)
{
    link_gate(false); /* also where we stand still: its end is to be told */
    finish(EXIT_KILLED);
}

/* The agent did not start: its disks are left clean all the same. */
static void never_ran(const void *failure, size_t length)
{
    self.over = true;
    (void)!loop_watch(&self.source, self.channel.fd, 0);
    guest_hooks->end();
    guest_tell_id('Y', 0, failure, length);
    loop_later(OFF_AFTER_MS, power_off);
}

/* The inner half is gone without a word of the agent's end: something has killed it. */
static void on_inner_gone(void)
{
    if (self.over)
        return;
    if (self.agent_ran) {
        finish(EXIT_KILLED);
        return;
    }
    const uint8_t failure[] = {EIO, 0, 0, 0, 'i', 'n', 'n', 'e', 'r'};
    never_ran(failure, sizeof failure);
}

/*
 * It took no more. One that has gone has said before what became of the agent: that is still to be read, and counts. An
 * agent's end must not look like its inner half's because a signal came a moment too late.
 */
static void on_unsent(void)
{
    if (errno != EPIPE && errno != ECONNRESET)
        on_inner_gone();
}

void guest_reap(void)
{
    pid_t pid;
    while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
        if (pid == self.pid)
            self.pid = 0; /* what it said last is still in its channel */
}

/* A terminal was made in the inner half: we hold its master, as an outer half would. */
static void on_master(struct frame *frame)
{
    struct reader reader = frame_reader(frame);
    struct command *command = command_with(read_u32(&reader));
    if (!read_complete(&reader) || !command || frame->descriptor_count != 1)
        return;
    command->pty = true;
    command->master = frame->descriptors[0];
    frame->descriptors[0] = -1;
    guest_tell_id('M', command->id, NULL, 0);
}

static void on_inner_frame(struct frame *frame)
{
    struct reader reader = frame_reader(frame);
    uint32_t id = frame->length >= 4 ? read_u32(&reader) : 0;
    struct command *command = command_with(id);
    if (command && command->left && frame->type != 'N') {
        if (frame->type == 'E' || frame->type == 'Y')
            command_release(command);
        return;
    }
    switch (frame->type) {
    case 'M':
        on_master(frame);
        return;
    case 'E':
        if (id == 0) {
            finish(read_u8(&reader));
        } else if (command) {
            note_end(command, read_u8(&reader));
        }
        return;
    case 'N': /* notices: as many as there is room for */
        if (!link_full())
            link_send('N', frame->payload, frame->length, NULL, 0);
        return;
    case 'Y':
        if (id == 0) {
            never_ran(frame->payload + 4, frame->length - 4);
            return;
        }
        if (command)
            command_release(command);
        break;
    case 'R':
        self.agent_ran = self.agent_ran || id == 0;
        if (command)
            command->pid = read_u32(&reader);
        break;
    default:
        break;
    }
    link_send((char)frame->type, frame->payload, frame->length, NULL, 0);
}

static void on_inner(struct source *source, uint32_t events)
{
    (void)source, (void)events;
    struct frame frame;
    while (!self.over) {
        enum channel_result result = channel_receive(&self.channel, &frame);
        if (result == CHANNEL_AGAIN)
            return;
        if (result != CHANNEL_FRAME) {
            on_inner_gone();
            return;
        }
        on_inner_frame(&frame);
        frame_release(&frame);
    }
}

_Noreturn static void become(int program, int channel, char *const *argv)
{
    char *const empty[] = {NULL};
    int null = open("/dev/null", O_RDWR);
    /* What systemd gives: programs that cannot do with more see little, those that want more ask for it. */
    const struct rlimit files = {.rlim_cur = 1024, .rlim_max = FILES_MAX};
    (void)!setrlimit(RLIMIT_NOFILE, &files);
    if (guest_hooks->child() < 0 || null < 0 || dup2(channel, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
        _exit(EXIT_CLOISTER);
    execveat(program, "", argv, empty, AT_EMPTY_PATH);
    _exit(EXIT_CLOISTER);
}

bool guest_inner_start(char *const *argv)
{
    int ends[2];
    int program = open("/proc/self/exe", O_PATH | O_CLOEXEC);
    if (program < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        return false;
    self.pid = fork();
    if (self.pid == 0)
        become(program, ends[1], argv);
    close(program);
    close(ends[1]);
    if (self.pid < 0)
        return false;
    channel_open(&self.channel, ends[0]);
    self.source.ready = on_inner;
    stream_moved = look_for_ends;
    return loop_watch(&self.source, ends[0], LOOP_READ) == 0 && channel_send(&self.channel, 'B', NULL, 0, -1) == 0;
}

void guest_inner_hold(bool held)
{
    if (self.channel.fd > 0 && !self.over)
        (void)!loop_watch(&self.source, self.channel.fd, held ? 0 : LOOP_READ);
}

/* Pipes for a command: its ends in `theirs`, ours become streams. Where both outputs are one file, they are one pipe. */
static bool make_pipes(uint32_t id, bool joined, int theirs[3])
{
    for (unsigned k = 0; k < 3; k++) {
        int ends[2];
        if (joined && k == STREAM_STDERR)
            return (theirs[k] = fcntl(theirs[STREAM_STDOUT], F_DUPFD_CLOEXEC, 3)) >= 0;
        if (pipe2(ends, O_CLOEXEC) < 0)
            return false;
        bool input = k == STREAM_STDIN;
        theirs[k] = ends[input ? 0 : 1];
        int ours = ends[input ? 1 : 0];
        /* A wish: each turn of a bulk transfer costs a switch between two processes, which a machine without KVM feels. */
        (void)!fcntl(ours, F_SETPIPE_SZ, STREAM_WINDOW);
        if (fcntl(ours, F_SETFL, O_NONBLOCK) < 0 ||
            stream_open(stream_of(id, k), ours, input ? STREAM_RECEIVES : STREAM_SENDS, NULL) < 0)
            return false;
    }
    return true;
}

static void fail_order(uint32_t id, int error)
{
    uint8_t failure[] = {(uint8_t)error, 0, 0, 0, 'f', 'o', 'r', 'k'};
    struct command *command = command_with(id);
    if (command)
        command_release(command);
    for (unsigned k = STREAM_STDIN; k <= STREAM_STDERR; k++)
        stream_abort(stream_of(id, k), (uint32_t)error);
    guest_tell_id('Y', id, failure, sizeof failure);
}

void guest_inner_order(uint8_t type, const struct reader *payload)
{
    struct reader reader = *payload;
    uint32_t id = type == 'X' ? read_u32(&reader) : 0;
    uint32_t flags = read_u32(&reader);
    bool pty = flags & FLAG_PTY;
    int theirs[3] = {-1, -1, -1};
    if (reader.bad || self.over || self.channel.fd <= 0)
        return;
    bool good = command_new(id) && (pty || make_pipes(id, flags & FLAG_JOINED, theirs));
    if (!good)
        fail_order(id, EAGAIN);
    else if (channel_send_all(&self.channel, (char)type, payload->at, payload->left, theirs, pty ? 0 : 3) < 0)
        on_unsent();
    for (unsigned k = 0; k < 3; k++)
        if (theirs[k] >= 0)
            close(theirs[k]);
}

/* What callers of the former run had started ends as when they hang up. */
static void leave(struct command *command)
{
    static const int last[] = {SIGHUP, SIGCONT};
    const uint32_t id = command->id;
    command->left = true;
    if (command->master >= 0)
        close(command->master);
    command->master = -1;
    if (command->ended) {
        command_release(command);
        return;
    }
    for (size_t i = 0; i < sizeof last / sizeof *last; i++) {
        const uint8_t order[] = {(uint8_t)last[i], (uint8_t)id, (uint8_t)(id >> 8), (uint8_t)(id >> 16), (uint8_t)(id >> 24)};
        if (!self.over && channel_send(&self.channel, 'S', order, sizeof order, -1) < 0)
            on_inner_gone();
    }
}

bool guest_adopts(const struct reader *payload)
{
    struct reader reader = *payload;
    return payload->left == 4 && (read_u32(&reader) & FLAG_ADOPT);
}

bool guest_adopt(void)
{
    const struct command *agent = command_with(0);
    if (!agent)
        return false;
    for (size_t i = 0; i < COMMANDS_MAX; i++)
        if (self.commands[i].taken && self.commands[i].id != 0 && !self.commands[i].left)
            leave(&self.commands[i]);
    const uint8_t pid[] = {(uint8_t)agent->pid, (uint8_t)(agent->pid >> 8), (uint8_t)(agent->pid >> 16),
                           (uint8_t)(agent->pid >> 24)};
    guest_tell_id('R', 0, pid, sizeof pid);
    /* What it had closed itself: the new keeper has opened it, as it opens all. */
    const uint32_t gone = EPIPE;
    if (!agent->pty && !stream_exists(stream_of(0, STREAM_STDIN)))
        guest_tell_id('A', stream_of(0, STREAM_STDIN), &gone, sizeof gone);
    for (unsigned k = agent->pty ? STREAM_TERMINAL : STREAM_STDOUT; k <= (agent->pty ? STREAM_TERMINAL : STREAM_STDERR); k++)
        if (!stream_exists(stream_of(0, k)))
            guest_tell_id('F', stream_of(0, k), NULL, 0);
    loop_soon(look_for_ends);
    return true;
}

void guest_inner_signal(const struct reader *payload)
{
    if (self.channel.fd > 0 && !self.over && channel_send(&self.channel, 'S', payload->at, payload->left, -1) < 0)
        on_unsent();
}

/* Its user has left: the last descriptor goes, and who is still there gets SIGHUP from the kernel. */
void guest_hang_up(uint32_t stream)
{
    struct command *command = command_with((stream & 0x7fffffffU) >> 2);
    stream_drop(stream);
    if (!command || command->master < 0)
        return;
    close(command->master);
    command->master = -1;
}

static void set_window(const struct command *command, uint32_t size)
{
    struct winsize now = {0}, wanted = {.ws_row = (unsigned short)size, .ws_col = (unsigned short)(size >> 16)};
    if (ioctl(command->master, TIOCGWINSZ, &now) == 0 && now.ws_row == wanted.ws_row && now.ws_col == wanted.ws_col) {
        /* Somebody wants it drawn again: the kernel sends SIGWINCH only when the size changes. */
        now.ws_row = wanted.ws_row > 1 ? wanted.ws_row - 1 : 2;
        (void)!ioctl(command->master, TIOCSWINSZ, &now);
    }
    (void)!ioctl(command->master, TIOCSWINSZ, &wanted);
}

void guest_window(struct reader *payload)
{
    const struct command *command = command_with(read_u32(payload));
    uint32_t size = read_u32(payload);
    if (read_complete(payload) && command && command->master >= 0)
        set_window(command, size);
}

/* The user's terminal is relayed at the other end: its size and modes become those of the guest's, and the command starts. */
void guest_terminal_ready(struct reader *payload)
{
    struct termios modes;
    struct command *command = command_with(read_u32(payload));
    uint32_t size = read_u32(payload);
    if (!command || command->master < 0 || tcgetattr(command->master, &modes) < 0)
        return;
    modes.c_iflag = read_u32(payload);
    modes.c_oflag = read_u32(payload);
    modes.c_cflag = read_u32(payload);
    modes.c_lflag = read_u32(payload);
    for (size_t i = 0; i < CC_SIZE; i++)
        modes.c_cc[i % NCCS] = read_u8(payload);
    if (!read_complete(payload))
        return;
    set_window(command, size);
    (void)!tcsetattr(command->master, TCSANOW, &modes);
    int carried = fcntl(command->master, F_DUPFD_CLOEXEC, 3);
    const uint8_t id[4] = {(uint8_t)command->id, (uint8_t)(command->id >> 8), (uint8_t)(command->id >> 16),
                           (uint8_t)(command->id >> 24)};
    if (carried < 0 || fcntl(carried, F_SETFL, O_RDWR | O_NONBLOCK) < 0 ||
        stream_open(stream_of(command->id, STREAM_TERMINAL), carried,
                    STREAM_SENDS | STREAM_RECEIVES | STREAM_IS_TERMINAL, NULL) < 0)
        guest_give_up("relay a terminal");
    if (channel_send(&self.channel, 'M', id, sizeof id, -1) < 0)
        on_unsent();
}
