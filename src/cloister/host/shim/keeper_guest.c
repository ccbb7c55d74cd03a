/*
 * What it is: the guest as the keeper sees it: its frames, each of which is checked.
 * What it is not: its commands (keeper_commands.c), its streams (stream.c), what it reaches of the host (keeper_box.c).
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

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>

enum { SKIP_MAX = 4 << 20, WORDS_MAX = 64, LOST_PATIENCE_MS = 500, JOINS_MOST = 3, ENTROPY = 64, OWN_FIELDS = 3 };
enum { LOGS_PER_SECOND = 50, NOTICES_PER_SECOND = 2000, NOTICE_MAX = 16 * 1024 };

static struct guest {
    struct frame begin; /* `B` of the broker, until the guest can take it */
    int tar;
    bool joined, proved, figures_asked;
    unsigned joins;      /* connections over which it was asked to join */
    uint8_t nonce[LINK_NONCE];
    struct keeper_ration logs, notices;
} self = {.tar = -1};

bool keeper_guest_joined(void)
{
    return self.joined;
}

bool keeper_guest_proved(void)
{
    return self.proved;
}

_Noreturn void keeper_liar(const char *what)
{
    keeper_fail("guest-protocol", "the guest broke the protocol of the link: %s", what);
}

void keeper_pass(char type, const struct reader *payload)
{
    struct writer copy = {0};
    write_bytes(&copy, payload->at, payload->left);
    keeper_tell(type, &copy);
    free(copy.data);
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

/* Ours is that of whoever started the run: files of a guest get the modes that those of any other run get. */
static unsigned caller_umask(void)
{
    const mode_t mask = umask(077);
    umask(mask);
    return mask & 0777;
}

/* Fields, and what only we know at this moment. */
static void send_begin(void)
{
    struct reader reader = frame_reader(&self.begin);
    struct writer payload = {0};
    struct timespec now;
    uint8_t entropy[ENTROPY];
    char fresh[OWN_FIELDS][sizeof "entropy=" + 2 * ENTROPY], *at = fresh[0] + sprintf(fresh[0], "entropy=");
    size_t count, words;
    char **fields = read_list(&reader, &count), **argv = read_list(&reader, &words);
    if (!read_complete(&reader) || words == 0 || getrandom(entropy, sizeof entropy, 0) != sizeof entropy ||
        clock_gettime(CLOCK_REALTIME, &now) < 0)
        keeper_end(EXIT_CLOISTER);
    for (size_t i = 0; i < sizeof entropy; i++)
        at += sprintf(at, "%02x", entropy[i]);
    sprintf(fresh[1], "time_ns=%llu", (unsigned long long)now.tv_sec * 1000000000ULL + (unsigned long long)now.tv_nsec);
    sprintf(fresh[2], "umask=%03o", caller_umask());
    write_u32(&payload, (uint32_t)count + OWN_FIELDS);
    for (size_t i = 0; i < count + OWN_FIELDS; i++) {
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

/* Which commands live must be what the broker was told when the guest was kept. */
static void look_for_living(struct reader payload)
{
    static const char name[] = "commands=";
    size_t count;
    char **words = read_list(&payload, &count);
    const char *ids = "";
    for (size_t i = 0; words && i < count; i++)
        if (strncmp(words[i], name, sizeof name - 1) == 0)
            ids = words[i] + sizeof name - 1;
    keeper_commands_living(ids);
    free(words);
}

static void on_hello(struct reader *payload)
{
    struct reader whole;
    uint8_t nonce[LINK_NONCE];
    if (self.joined)
        keeper_liar("a second hello");
    uint32_t protocol = read_u32(payload);
    for (size_t i = 0; i < sizeof nonce; i++)
        nonce[i] = read_u8(payload);
    whole = *payload;
    if (payload->bad || memcmp(nonce, self.nonce, sizeof nonce) != 0 || !is_list(*payload, WORDS_MAX))
        keeper_liar("a hello that cannot be read");
    if (protocol != LINK_PROTOCOL)
        keeper_fail("guest-protocol", "the image's shim speaks version %u of the link, not %d", protocol, LINK_PROTOCOL);
    self.joined = true;
    look_for_living(*payload);
    keeper_pass('H', &whole);
    send_begin();
}

void keeper_guest_signal(const struct frame *frame)
{
    if (frame->length != 1 && frame->length != 5)
        keeper_end(EXIT_CLOISTER);
    link_send('S', frame->payload, frame->length, NULL, 0);
}

void keeper_guest_kill(void)
{
    link_gate(false);
    link_send('K', NULL, 0, NULL, 0);
}

void keeper_guest_ask(const struct frame *frame)
{
    if (!self.joined || frame->length > (frame->type == 'Q'))
        return; /* there is nobody yet */
    if (frame->type == 'T') {
        self.figures_asked = true;
        link_send('T', NULL, 0, NULL, 0);
    } else {
        keeper_still_ask(frame->length == 0);
    }
}

bool keeper_ration(struct keeper_ration *ration, unsigned most)
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

static void tell_dropped(const char *what, struct keeper_ration *ration)
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
    struct keeper_ration *of = log ? &self.logs : &self.notices;
    if (payload->left > (log ? LINK_GUEST_MAX : NOTICE_MAX) || (log && !is_list(*payload, WORDS_MAX)))
        keeper_liar("an event that cannot be read");
    if (!keeper_ration(of, log ? LOGS_PER_SECOND : NOTICES_PER_SECOND))
        return;
    tell_dropped(log ? "log" : "notice", of);
    if (!keeper_tell_if_room((char)type, payload->at, payload->left))
        of->dropped++;
}

static void on_answer(uint8_t type, const struct reader *payload)
{
    if (type == 'P') {
        if (self.proved || !is_list(*payload, 4096))
            keeper_liar("findings that were not asked for");
        self.proved = true;
    } else if (type == 'T') {
        if (!self.figures_asked || !is_list(*payload, WORDS_MAX))
            keeper_liar("figures that were not asked for");
        self.figures_asked = false;
    } else if (!keeper_still_answered(payload)) {
        return; /* an answer to a question that was taken back */
    }
    keeper_pass((char)type, payload);
}

/* Whether a stream of this number ever was in this session. */
static bool known(uint32_t number)
{
    if (number >> 31)
        return keeper_commands_know(number);
    return number == STREAM_TAR || keeper_box_knows(number);
}

static void on_stream(uint8_t type, struct reader *payload)
{
    uint32_t number = read_u32(payload);
    if (payload->bad || !known(number))
        keeper_liar("a frame of a stream that never was");
    if (type == 'A')
        keeper_box_forget(number);
    if (!stream_frame(type, number, payload))
        keeper_liar("a stream that breaks its rules");
}

static void on_frame(uint8_t type, struct reader *payload)
{
    if (!self.joined && type != 'H')
        keeper_liar("no hello");
    if (keeper_still_meets(type, payload))
        return;
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
        keeper_command_running(payload);
        return;
    case 'Y':
        keeper_command_failed(payload);
        return;
    case 'E':
        keeper_command_ended(payload);
        return;
    case 'Z':
        keeper_command_stopped(payload);
        return;
    case 'M':
        keeper_command_wants_terminal(payload);
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
        keeper_liar("a frame of an unknown type");
    }
}

/* Its channel has ended: it powered off, it crashed, or the monitor did. */
static void on_lost(const char *why)
{
    if (keeper_agent_ended() || keeper_still_lost())
        return; /* it has said all that it had to, or its monitor was keeping it */
    /* A monitor tells a guest that it restored to forget its connections; that may come behind our first one. */
    if (!self.joined && link_cut() && self.joins < JOINS_MOST && keeper_monitor_call())
        return;
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
    if (keeper_still_reached(fd, self.nonce))
        return;
    self.joins++;
    if (getrandom(self.nonce, sizeof self.nonce, 0) != sizeof self.nonce || link_open(fd, &end) < 0)
        keeper_end(EXIT_CLOISTER);
    stream_moved = keeper_look_for_ends;
    link_skip_to(self.nonce, SKIP_MAX);
    write_u32(&payload, LINK_PROTOCOL);
    write_bytes(&payload, self.nonce, sizeof self.nonce);
    link_send_payload('J', &payload);
    free(payload.data);
}
