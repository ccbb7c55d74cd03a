/*
 * What it is: the commands in a guest, as the keeper follows them: asked for by the broker, started, stopped and ended by
 * the guest's word, which must fit. What it is not: their bytes; stream.c carries those.
 */
#define _GNU_SOURCE
#include "keeper.h"
#include "link.h"
#include "loop.h"
#include "stream.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

enum { COMMANDS_MAX = 256, FLAG_PTY = 1, FLAG_ADOPT = 2, FLAG_JOINED = 16, STOPS_PER_SECOND = 100 };

/* What a command waits for: the guest's answer, its terminal to be relayed, nothing. */
enum state { ASKED, TERMINAL, READY, RUNNING, ENDED };

struct command {
    bool taken;
    uint32_t id;
    bool has_pty;
    enum state state;
    uint8_t status;
    struct keeper_pty pty;
    struct source on_change;
};

static struct commands {
    struct command commands[COMMANDS_MAX];
    int64_t highest; /* id of the latest command; -1: none */
    int64_t adopt;   /* as in the options */
    bool running;    /* the agent */
    struct keeper_ration stops;
} self = {.highest = -1, .adopt = -1};

void keeper_commands_open(int64_t adopt)
{
    self.adopt = adopt;
}

/* `0,3,4`: the agent, and what its run's callers had started. */
void keeper_commands_living(const char *ids)
{
    bool agent = false;
    if (self.adopt < 0) {
        if (*ids)
            keeper_liar("commands that live before any was started");
        return;
    }
    for (const char *at = ids; *at;) {
        size_t digits = strspn(at, "0123456789");
        char *end = NULL;
        long id = digits > 0 && digits < 10 ? strtol(at, &end, 10) : -1;
        if (id < 0 || id > self.adopt || (*end && (*end != ',' || !end[1])))
            keeper_liar("living commands that were not kept");
        agent = agent || id == 0;
        at = *end ? end + 1 : end;
    }
    if (!agent)
        keeper_liar("the agent that was kept does not live");
}

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
            self.commands[i] = (struct command){.taken = true, .id = id, .pty.slave = -1, .pty.changes = -1};
            return &self.commands[i];
        }
    return NULL;
}

static void forget_terminal(struct command *command)
{
    if (command->pty.changes >= 0)
        (void)!loop_watch(&command->on_change, command->pty.changes, 0);
    keeper_pty_end(&command->pty);
    if (command->pty.slave >= 0)
        close(command->pty.slave);
    command->pty.slave = -1;
}

/* Its input was for it alone; its output goes on while somebody in the guest holds it open. */
static void command_release(struct command *command)
{
    uint32_t id = command->id;
    forget_terminal(command);
    command->taken = false;
    stream_abort(stream_of(id, STREAM_STDIN), EPIPE);
    stream_abort(stream_of(id, STREAM_TERMINAL), EIO);
}

bool keeper_agent_running(void)
{
    return self.running;
}

bool keeper_agent_ended(void)
{
    const struct command *agent = command_with(0);
    return agent && agent->state == ENDED;
}

bool keeper_commands_know(uint32_t stream)
{
    return (int64_t)((stream & 0x7fffffffU) >> 2) <= self.highest;
}

static void tell_id(char type, uint32_t id, const void *rest, size_t length)
{
    struct writer payload = {0};
    write_u32(&payload, id);
    write_bytes(&payload, rest, length);
    keeper_tell(type, &payload);
    free(payload.data);
}

/* `R`, `Z`, `M`: the command must be there, and in a state that fits. */
static struct command *fitting(struct reader *payload, unsigned states, const char *what)
{
    struct command *command = command_with(read_u32(payload));
    if (payload->bad || !command || !(states & 1U << command->state))
        keeper_liar(what);
    return command;
}

void keeper_command_running(struct reader *payload)
{
    struct reader whole = *payload;
    struct command *command = fitting(payload, 1U << ASKED | 1U << READY, "a start that was not asked for");
    (void)read_u32(payload);
    if (!read_complete(payload) || command->has_pty != (command->state == READY))
        keeper_liar("a start that was not asked for");
    command->state = RUNNING;
    self.running = self.running || command->id == 0;
    keeper_pass('R', &whole);
}

void keeper_command_stopped(struct reader *payload)
{
    struct reader whole = *payload;
    (void)fitting(payload, 1U << RUNNING, "a stop of a command that does not run");
    if (!read_complete(payload))
        keeper_liar("a stop that cannot be read");
    if (keeper_ration(&self.stops, STOPS_PER_SECOND)) /* a program may stop and continue itself without end */
        keeper_pass('Z', &whole);
}

void keeper_command_failed(struct reader *payload)
{
    struct reader whole = *payload;
    uint32_t id = read_u32(payload);
    (void)read_u32(payload);
    struct command *command = command_with(id);
    bool good = !payload->bad && payload->left > 0 && payload->left <= 32;
    for (size_t i = 0; good && i < payload->left; i++)
        good = payload->at[i] >= 'a' && payload->at[i] <= 'z';
    /* Without a command: what PID 1 had to do before there could be one. */
    if (!good || (command ? command->state >= RUNNING : id != 0 || self.highest >= 0))
        keeper_liar("a failure of a command that was not asked for");
    if (command)
        command_release(command);
    if (id == 0)
        keeper_monitor_kill();
    keeper_pass('Y', &whole);
    if (id == 0)
        keeper_end(EXIT_CLOISTER);
}

void keeper_command_ended(struct reader *payload)
{
    uint32_t id = read_u32(payload);
    uint8_t status = read_u8(payload);
    struct command *command = command_with(id);
    if (!read_complete(payload) || !command || command->state == ENDED)
        keeper_liar("an end of a command that does not run");
    command->state = ENDED;
    command->status = status;
    for (unsigned k = STREAM_STDOUT; k <= STREAM_TERMINAL; k++)
        stream_mark(stream_of(id, k));
    stream_abort(stream_of(id, STREAM_STDIN), EPIPE);
    loop_soon(keeper_look_for_ends);
}

/* A command that has ended is over when all that it wrote has been written here. */
void keeper_look_for_ends(void)
{
    for (size_t i = 0; i < COMMANDS_MAX; i++) {
        struct command *command = &self.commands[i];
        if (!command->taken || command->state != ENDED || !stream_written(stream_of(command->id, STREAM_STDOUT)) ||
            !stream_written(stream_of(command->id, STREAM_STDERR)) ||
            !stream_written(stream_of(command->id, STREAM_TERMINAL)))
            continue;
        uint32_t id = command->id;
        uint8_t status = command->status;
        command_release(command);
        if (id == 0) {
            for (size_t k = 0; k < COMMANDS_MAX; k++)
                if (self.commands[k].taken)
                    forget_terminal(&self.commands[k]);
            keeper_monitor_kill();
        }
        tell_id('E', id, &status, 1);
        if (id == 0)
            keeper_end(status);
    }
}

static void tell_window(uint32_t id, const struct winsize *size)
{
    struct writer payload = {0};
    write_u32(&payload, id);
    write_u32(&payload, (uint32_t)size->ws_row | (uint32_t)size->ws_col << 16);
    link_send_payload('W', &payload);
    free(payload.data);
}

/* Our end of everything that the agent has is open: it may go on. */
static void tell_adopted(bool pty)
{
    struct writer payload = {0};
    write_u32(&payload, FLAG_ADOPT | (pty ? FLAG_PTY : 0));
    link_send_payload('G', &payload);
    free(payload.data);
}

/* The window of a terminal has changed, or somebody wants it drawn again. */
static void on_change(struct source *source, uint32_t events)
{
    (void)events;
    struct command *command = (struct command *)((char *)source - offsetof(struct command, on_change));
    char words[64];
    struct winsize size;
    ssize_t got = read(command->pty.changes, words, sizeof words);
    if (got == 0) {
        (void)!loop_watch(source, command->pty.changes, 0);
        return;
    }
    if (got < 0 || command->pty.slave < 0 || ioctl(command->pty.slave, TIOCGWINSZ, &size) < 0)
        return;
    tell_window(command->id, &size);
}

static void open_terminal(struct command *command)
{
    int master;
    if (keeper_pty_open(&command->pty, &master) < 0)
        keeper_fail("monitor-failed", "no terminal is to be had in the jail: %s", strerror(errno));
    command->on_change.ready = on_change;
    command->state = TERMINAL;
    if (loop_watch(&command->on_change, command->pty.changes, LOOP_READ) < 0)
        keeper_end(EXIT_CLOISTER);
    keeper_tell_terminal(command->id, master);
    close(master);
}

void keeper_command_wants_terminal(struct reader *payload)
{
    struct command *command = fitting(payload, 1U << ASKED, "a terminal that was not asked for");
    if (!read_complete(payload) || !command->has_pty)
        keeper_liar("a terminal that was not asked for");
    open_terminal(command);
}

static void on_terminal_gone(uint32_t number)
{
    struct command *command = command_with((number & 0x7fffffffU) >> 2);
    if (command && command->has_pty) {
        forget_terminal(command);
        loop_soon(keeper_look_for_ends);
    }
}

void keeper_guest_terminal(const struct frame *frame)
{
    struct reader reader = frame_reader(frame);
    struct command *command = command_with(read_u32(&reader));
    struct termios modes, raw;
    struct winsize size;
    if (!read_complete(&reader) || frame->descriptor_count > 0)
        keeper_end(EXIT_CLOISTER);
    if (!command || command->state != TERMINAL)
        return; /* it ended in the meantime */
    int slave = command->pty.slave;
    if (tcgetattr(slave, &modes) < 0 || ioctl(slave, TIOCGWINSZ, &size) < 0)
        return; /* its user has left: the broker says what follows */
    raw = modes;
    cfmakeraw(&raw);
    struct writer payload = {0};
    write_u32(&payload, command->id);
    write_u32(&payload, (uint32_t)size.ws_row | (uint32_t)size.ws_col << 16);
    write_u32(&payload, modes.c_iflag);
    write_u32(&payload, modes.c_oflag);
    write_u32(&payload, modes.c_cflag);
    write_u32(&payload, modes.c_lflag);
    write_bytes(&payload, modes.c_cc, 32);
    if (self.adopt < 0 || command->id > 0)
        link_send_payload('M', &payload);
    free(payload.data);
    command->state = READY;
    int carried = fcntl(slave, F_DUPFD_CLOEXEC, 3); /* ours stays for its size */
    if (tcsetattr(slave, TCSANOW, &raw) < 0 || carried < 0 ||
        stream_open(stream_of(command->id, STREAM_TERMINAL), carried,
                    STREAM_SENDS | STREAM_RECEIVES | STREAM_IS_TERMINAL, on_terminal_gone) < 0)
        keeper_end(EXIT_CLOISTER);
    if (self.adopt >= 0 && command->id == 0) {
        tell_adopted(true);
        tell_window(0, &size);
    }
}

/* Take one of the caller's descriptors for a stream, or close it. */
static void carry(struct frame *frame, unsigned k, uint32_t stream, int does)
{
    int fd = frame->descriptors[k];
    frame->descriptors[k] = -1;
    if (stream_open(stream, fd, does, NULL) < 0)
        keeper_end(EXIT_CLOISTER);
}

/* `G` for an agent that lives. One with a terminal, and a caller without: what it writes goes to standard output. */
static void adopt(struct frame *frame, bool pty)
{
    bool terminal = pty && frame->descriptor_count == 0;
    struct command *command = command_new(0);
    if (!command || (!terminal && frame->descriptor_count != 3))
        keeper_end(EXIT_CLOISTER);
    self.highest = self.adopt;
    command->has_pty = terminal;
    if (terminal) {
        open_terminal(command);
        return;
    }
    if (pty)
        carry(frame, 1, stream_of(0, STREAM_TERMINAL), STREAM_RECEIVES);
    for (unsigned k = 0; k < 3 && !pty; k++)
        carry(frame, k, stream_of(0, k), k == STREAM_STDIN ? STREAM_SENDS : STREAM_RECEIVES);
    tell_adopted(pty);
}

/*
 * Whether output and error are one file, as after `>log 2>&1`: then the guest has one pipe for both, and what is written
 * to them keeps its order. Two descriptions of a file at the same place are taken for one.
 */
static bool joined(const struct frame *frame)
{
    struct stat out, err;
    int first = frame->descriptor_count == 3 ? frame->descriptors[STREAM_STDOUT] : -1;
    int second = first < 0 ? -1 : frame->descriptors[STREAM_STDERR];
    return first >= 0 && fstat(first, &out) == 0 && fstat(second, &err) == 0 && out.st_dev == err.st_dev &&
           out.st_ino == err.st_ino && lseek(first, 0, SEEK_CUR) == lseek(second, 0, SEEK_CUR);
}

/* `G` or `X`: what it carries goes on as it is but for one flag, and its descriptors become streams. */
void keeper_guest_order(uint8_t type, struct frame *frame)
{
    struct reader reader = frame_reader(frame);
    uint32_t id = type == 'X' ? read_u32(&reader) : 0;
    uint32_t flags = read_u32(&reader);
    bool pty = flags & FLAG_PTY, adopts = flags & FLAG_ADOPT;
    if (type == 'G' && !reader.bad && adopts && reader.left == 0 && self.adopt >= 0 && self.highest < 0 &&
        keeper_guest_proved()) {
        adopt(frame, pty);
        return;
    }
    if (reader.bad || adopts || (type == 'G' && self.adopt >= 0) || (int64_t)id <= self.highest || (type == 'X') != (id > 0) || id >= STREAM_COMMANDS_MAX ||
        !keeper_guest_proved() || frame->descriptor_count != (pty ? 0 : 3))
        keeper_end(EXIT_CLOISTER);
    self.highest = id;
    struct command *command = command_new(id);
    if (!command) {
        uint8_t failure[] = {EAGAIN, 0, 0, 0, 'f', 'o', 'r', 'k'};
        tell_id('Y', id, failure, sizeof failure);
        return;
    }
    command->has_pty = pty;
    bool one = joined(frame);
    if (one)
        frame->payload[type == 'X' ? 4 : 0] |= FLAG_JOINED;
    link_send((char)type, frame->payload, frame->length, NULL, 0);
    for (unsigned k = 0; k < frame->descriptor_count; k++) {
        if (one && k == STREAM_STDERR) {
            close(frame->descriptors[k]);
            frame->descriptors[k] = -1;
        } else {
            carry(frame, k, stream_of(id, k), k == STREAM_STDIN ? STREAM_SENDS : STREAM_RECEIVES);
        }
    }
}

