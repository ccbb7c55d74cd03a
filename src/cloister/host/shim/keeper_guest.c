/*
 * What it is: the guest as the keeper sees it: its frames, each of which is checked, and the commands that run in it.
 * What it is not: its streams (stream.c), or what it may reach on the host (keeper_box.c).
 *
 * Whoever breaks out of an agent's account into the guest's kernel speaks here. Every frame that is malformed, unknown,
 * or does not fit what the broker asked for ends the monitor.
 */
#define _GNU_SOURCE
#include "keeper.h"
#include "link.h"
#include "loop.h"
#include "stream.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { COMMANDS_MAX = 256, FLAG_PTY = 1, SKIP_MAX = 4 << 20, WORDS_MAX = 64, LOST_PATIENCE_MS = 500, ENTROPY = 64 };
enum { LOGS_PER_SECOND = 50, NOTICES_PER_SECOND = 2000, NOTICE_MAX = 16 * 1024 };

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

/* How many frames of a kind were passed on in this second, and how many were dropped. */
struct ration {
    int64_t second;
    unsigned passed, dropped;
};

static struct guest {
    struct frame begin; /* `B` of the broker, until the guest can take it */
    int tar;
    bool joined, proved, running, figures_asked, hold_asked;
    uint8_t nonce[LINK_NONCE];
    struct command commands[COMMANDS_MAX];
    int64_t highest; /* id of the latest command; -1: none */
    struct ration logs, notices;
} self = {.tar = -1, .highest = -1};

static void look_for_ends(void);

bool keeper_guest_joined(void)
{
    return self.joined;
}

bool keeper_agent_running(void)
{
    return self.running;
}

_Noreturn static void liar(const char *what)
{
    keeper_fail("guest-protocol", "the guest broke the protocol of the link: %s", what);
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

static void pass(char type, const struct reader *payload)
{
    struct writer copy = {0};
    write_bytes(&copy, payload->at, payload->left);
    keeper_tell(type, &copy);
    free(copy.data);
}

static void tell_id(char type, uint32_t id, const void *rest, size_t length)
{
    struct writer payload = {0};
    write_u32(&payload, id);
    write_bytes(&payload, rest, length);
    keeper_tell(type, &payload);
    free(payload.data);
}

/* The list that a frame consists of, checked: false when it is none, or too long. */
static bool is_list(struct reader payload, size_t most)
{
    size_t count;
    char **list = read_list(&payload, &count);
    free(list);
    return list && read_complete(&payload) && count <= most;
}

/* Not earlier: what the tar has of a renewed file is older. */
static void on_tar_sent(uint32_t number)
{
    (void)number;
    keeper_box_joined();
}

/* Fields, and what only we know at this moment. */
static void send_begin(void)
{
    struct reader reader = frame_reader(&self.begin);
    struct writer payload = {0};
    struct timespec now;
    uint8_t entropy[ENTROPY];
    char fresh[2][sizeof "entropy=" + 2 * ENTROPY], *at = fresh[0] + sprintf(fresh[0], "entropy=");
    size_t count, words;
    char **fields = read_list(&reader, &count), **argv = read_list(&reader, &words);
    if (!read_complete(&reader) || words == 0 || getrandom(entropy, sizeof entropy, 0) != sizeof entropy ||
        clock_gettime(CLOCK_REALTIME, &now) < 0)
        keeper_end(EXIT_CLOISTER);
    for (size_t i = 0; i < sizeof entropy; i++)
        at += sprintf(at, "%02x", entropy[i]);
    sprintf(fresh[1], "time_ns=%llu", (unsigned long long)now.tv_sec * 1000000000ULL + (unsigned long long)now.tv_nsec);
    write_u32(&payload, (uint32_t)count + 2);
    for (size_t i = 0; i < count + 2; i++) {
        const char *word = i < count ? fields[i] : fresh[i - count];
        write_u32(&payload, (uint32_t)strlen(word));
        write_bytes(&payload, word, strlen(word));
    }
    write_u32(&payload, (uint32_t)words);
    for (size_t i = 0; i < words; i++) {
        write_u32(&payload, (uint32_t)strlen(argv[i]));
        write_bytes(&payload, argv[i], strlen(argv[i]));
    }
    link_send_payload('B', &payload);
    explicit_bzero(entropy, sizeof entropy);
    explicit_bzero(fresh, sizeof fresh);
    free(payload.data);
    free(fields);
    free(argv);
    frame_release(&self.begin);
    if (stream_open(STREAM_TAR, self.tar, STREAM_SENDS, on_tar_sent) < 0)
        keeper_end(EXIT_CLOISTER);
}

static void on_hello(struct reader *payload)
{
    struct reader whole;
    uint8_t nonce[LINK_NONCE];
    if (self.joined)
        liar("a second hello");
    uint32_t protocol = read_u32(payload);
    for (size_t i = 0; i < sizeof nonce; i++)
        nonce[i] = read_u8(payload);
    whole = *payload;
    if (payload->bad || memcmp(nonce, self.nonce, sizeof nonce) != 0 || !is_list(*payload, WORDS_MAX))
        liar("a hello that cannot be read");
    if (protocol != LINK_PROTOCOL)
        keeper_fail("guest-protocol", "the image's shim speaks version %u of the link, not %d", protocol, LINK_PROTOCOL);
    self.joined = true;
    pass('H', &whole);
    send_begin();
}

/* `R`, `Z`, `M`: the command must be there, and in a state that fits. */
static struct command *fitting(struct reader *payload, unsigned states, const char *what)
{
    struct command *command = command_with(read_u32(payload));
    if (payload->bad || !command || !(states & 1U << command->state))
        liar(what);
    return command;
}

static void on_running(struct reader *payload)
{
    struct reader whole = *payload;
    struct command *command = fitting(payload, 1U << ASKED | 1U << READY, "a start that was not asked for");
    (void)read_u32(payload);
    if (!read_complete(payload) || command->has_pty != (command->state == READY))
        liar("a start that was not asked for");
    command->state = RUNNING;
    self.running = self.running || command->id == 0;
    pass('R', &whole);
}

static void on_stopped(struct reader *payload)
{
    struct reader whole = *payload;
    (void)fitting(payload, 1U << RUNNING, "a stop of a command that does not run");
    if (!read_complete(payload))
        liar("a stop that cannot be read");
    pass('Z', &whole);
}

static void on_failed(struct reader *payload)
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
        liar("a failure of a command that was not asked for");
    if (command)
        command_release(command);
    if (id == 0)
        keeper_monitor_kill();
    pass('Y', &whole);
    if (id == 0)
        keeper_end(EXIT_CLOISTER);
}

static void on_ended(struct reader *payload)
{
    uint32_t id = read_u32(payload);
    uint8_t status = read_u8(payload);
    struct command *command = command_with(id);
    if (!read_complete(payload) || !command || command->state == ENDED)
        liar("an end of a command that does not run");
    command->state = ENDED;
    command->status = status;
    stream_abort(stream_of(id, STREAM_STDIN), EPIPE);
    loop_soon(look_for_ends);
}

/* A command that has ended is over when all that it wrote has been written here. */
static void look_for_ends(void)
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
    struct writer payload = {0};
    write_u32(&payload, command->id);
    write_u32(&payload, (uint32_t)size.ws_row | (uint32_t)size.ws_col << 16);
    link_send_payload('W', &payload);
    free(payload.data);
}

static void on_terminal_wanted(struct reader *payload)
{
    int master;
    struct command *command = fitting(payload, 1U << ASKED, "a terminal that was not asked for");
    if (!read_complete(payload) || !command->has_pty)
        liar("a terminal that was not asked for");
    if (keeper_pty_open(&command->pty, &master) < 0)
        keeper_fail("monitor-failed", "no terminal is to be had in the jail: %s", strerror(errno));
    command->on_change.ready = on_change;
    command->state = TERMINAL;
    if (loop_watch(&command->on_change, command->pty.changes, LOOP_READ) < 0)
        keeper_end(EXIT_CLOISTER);
    keeper_tell_terminal(command->id, master);
    close(master);
}

static void on_terminal_gone(uint32_t number)
{
    struct command *command = command_with((number & 0x7fffffffU) >> 2);
    if (command && command->has_pty) {
        forget_terminal(command);
        loop_soon(look_for_ends);
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
    link_send_payload('M', &payload);
    free(payload.data);
    command->state = READY;
    int carried = fcntl(slave, F_DUPFD_CLOEXEC, 3); /* ours stays for its size */
    if (tcsetattr(slave, TCSANOW, &raw) < 0 || carried < 0 ||
        stream_open(stream_of(command->id, STREAM_TERMINAL), carried,
                    STREAM_SENDS | STREAM_RECEIVES | STREAM_IS_TERMINAL, on_terminal_gone) < 0)
        keeper_end(EXIT_CLOISTER);
}

/* `G` or `X`: what it carries goes on as it is, and its descriptors become streams. */
void keeper_guest_order(uint8_t type, struct frame *frame)
{
    struct reader reader = frame_reader(frame);
    uint32_t id = type == 'X' ? read_u32(&reader) : 0;
    bool pty = read_u32(&reader) & FLAG_PTY;
    if (reader.bad || (int64_t)id <= self.highest || (type == 'X') != (id > 0) || id >= STREAM_COMMANDS_MAX ||
        !self.proved || frame->descriptor_count != (pty ? 0 : 3))
        keeper_end(EXIT_CLOISTER);
    self.highest = id;
    struct command *command = command_new(id);
    if (!command) {
        uint8_t failure[] = {EAGAIN, 0, 0, 0, 'f', 'o', 'r', 'k'};
        tell_id('Y', id, failure, sizeof failure);
        return;
    }
    command->has_pty = pty;
    link_send((char)type, frame->payload, frame->length, NULL, 0);
    for (unsigned k = 0; k < frame->descriptor_count; k++) {
        int fd = frame->descriptors[k];
        frame->descriptors[k] = -1;
        if (stream_open(stream_of(id, k), fd, k == STREAM_STDIN ? STREAM_SENDS : STREAM_RECEIVES, NULL) < 0)
            keeper_end(EXIT_CLOISTER);
    }
}

void keeper_guest_signal(const struct frame *frame)
{
    if (frame->length != 1 && frame->length != 5)
        keeper_end(EXIT_CLOISTER);
    link_send('S', frame->payload, frame->length, NULL, 0);
}

void keeper_guest_kill(void)
{
    link_send('K', NULL, 0, NULL, 0);
}

void keeper_guest_ask(const struct frame *frame)
{
    if (!self.joined || frame->length > (frame->type == 'Q'))
        return; /* there is nobody yet */
    if (frame->type == 'T') {
        self.figures_asked = true;
    } else {
        self.hold_asked = frame->length == 0;
        stream_hold(self.hold_asked);
    }
    link_send((char)frame->type, frame->payload, frame->length, NULL, 0);
}

/* Whether one more may pass now; what may not is counted, and told with the next that may. */
static bool ration(struct ration *ration, unsigned most)
{
    int64_t second = sys_now_ms() / 1000;
    if (second != ration->second) {
        ration->second = second;
        ration->passed = 0;
    }
    if (ration->passed < most) {
        ration->passed++;
        return true;
    }
    ration->dropped++;
    return false;
}

static void tell_dropped(const char *what, struct ration *ration)
{
    struct writer payload = {0};
    char word[64];
    if (ration->dropped == 0)
        return;
    write_u32(&payload, 1);
    int length = snprintf(word, sizeof word, "dropped.%s=%u", what, ration->dropped);
    write_u32(&payload, (uint32_t)length);
    write_bytes(&payload, word, (size_t)length);
    if (!payload.bad && keeper_tell_if_room('L', payload.data, payload.length))
        ration->dropped = 0;
    free(payload.data);
}

/* Events of the guest: as many as anybody reads. */
static void on_event(uint8_t type, const struct reader *payload)
{
    bool log = type == 'L';
    struct ration *of = log ? &self.logs : &self.notices;
    if (payload->left > (log ? LINK_GUEST_MAX : NOTICE_MAX) || (log && !is_list(*payload, WORDS_MAX)))
        liar("an event that cannot be read");
    if (!ration(of, log ? LOGS_PER_SECOND : NOTICES_PER_SECOND))
        return;
    tell_dropped(log ? "log" : "notice", of);
    if (!keeper_tell_if_room((char)type, payload->at, payload->left))
        of->dropped++;
}

static void on_answer(uint8_t type, const struct reader *payload)
{
    if (type == 'P') {
        if (self.proved || !is_list(*payload, 4096))
            liar("findings that were not asked for");
        self.proved = true;
    } else if (type == 'T') {
        if (!self.figures_asked || !is_list(*payload, WORDS_MAX))
            liar("figures that were not asked for");
        self.figures_asked = false;
    } else {
        if (!self.hold_asked || payload->left > 0)
            liar("a rest that was not asked for");
        self.hold_asked = false;
    }
    pass((char)type, payload);
}

/* Whether a stream of this number ever was in this session. */
static bool known(uint32_t number)
{
    if (number >> 31)
        return (int64_t)((number & 0x7fffffffU) >> 2) <= self.highest;
    return number == STREAM_TAR || keeper_box_knows(number);
}

static void on_stream(uint8_t type, struct reader *payload)
{
    uint32_t number = read_u32(payload);
    if (payload->bad || !known(number))
        liar("a frame of a stream that never was");
    if (type == 'A')
        keeper_box_forget(number);
    if (!stream_frame(type, number, payload))
        liar("a stream that breaks its rules");
}

static void on_frame(uint8_t type, struct reader *payload)
{
    if (!self.joined && type != 'H')
        liar("no hello");
    switch (type) {
    case 'D':
    case 'C':
    case 'F':
    case 'A':
        on_stream(type, payload);
        return;
    case 'O':
        keeper_box_guest_opens(read_u32(payload), payload);
        return;
    case 'H':
        on_hello(payload);
        return;
    case 'R':
        on_running(payload);
        return;
    case 'Y':
        on_failed(payload);
        return;
    case 'E':
        on_ended(payload);
        return;
    case 'Z':
        on_stopped(payload);
        return;
    case 'M':
        on_terminal_wanted(payload);
        return;
    case 'P':
    case 'T':
    case 'Q':
        on_answer(type, payload);
        return;
    case 'L':
    case 'N':
        on_event(type, payload);
        return;
    default:
        liar("a frame of an unknown type");
    }
}

/* Its channel has ended: it powered off, it crashed, or the monitor did. */
static void on_lost(const char *why)
{
    const struct command *agent = command_with(0);
    if (agent && agent->state == ENDED)
        return; /* it has said all that it had to */
    keeper_monitor_await(LOST_PATIENCE_MS);
    if (keeper_monitor_status())
        keeper_fail("monitor-ended", "the monitor ended by itself (%s)", keeper_monitor_status());
    keeper_fail("guest-ended", "the guest's channel ended: %s", why);
}

void keeper_guest_begin(const struct frame *frame, int tar)
{
    struct writer copy = {0};
    write_bytes(&copy, frame->payload, frame->length);
    if (copy.bad)
        keeper_end(EXIT_CLOISTER);
    self.begin = (struct frame){.payload = copy.data, .length = (uint32_t)copy.length};
    self.tar = tar;
}

void keeper_guest_join(int fd)
{
    static const struct link_end end = {
        .payload_max = LINK_GUEST_MAX, .frame = on_frame, .lost = on_lost, .room = stream_resume};
    struct writer payload = {0};
    if (getrandom(self.nonce, sizeof self.nonce, 0) != sizeof self.nonce || link_open(fd, &end) < 0)
        keeper_end(EXIT_CLOISTER);
    stream_moved = look_for_ends;
    link_skip_to(self.nonce, SKIP_MAX);
    write_u32(&payload, LINK_PROTOCOL);
    write_bytes(&payload, self.nonce, sizeof self.nonce);
    link_send_payload('J', &payload);
    free(payload.data);
}
