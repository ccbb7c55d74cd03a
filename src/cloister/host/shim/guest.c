/*
 * What it is: the guest's end of the link: PID 1's life after the boot. It joins a keeper, begins the run's place, starts
 * the inner half, and carries. What it is not: the boot, the mounts (guest_init.c and its kind), or the walls (inner.c).
 *
 * The host is trusted here: what comes from it is read with care, but there is nobody to protect from it.
 */
#define _GNU_SOURCE
#include "guest.h"
#include "guest_link.h"
#include "link.h"
#include "loop.h"
#include "reaper.h"
#include "stream.h"
#include "sys.h"

#include <errno.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

enum { RETRY_MS = 10, LAST_WORDS_MS = 500 };

const struct guest_hooks *guest_hooks;

static struct session {
    int channel, listener, signals;
    const char *verity;
    struct source on_listener, on_signals;
    bool begun, unpacking, started;
    bool restored; /* another keeper has come to a living run: nothing of it moves before that has taken it */
    bool still;    /* the keeper has been told that nothing moves */
    bool strange;  /* the stream is a new one, and nobody has said yet whose */
    uint8_t nonce[LINK_NONCE]; /* of the session */
    char **argv; /* of the inner half */
    char **fields;
    size_t field_count;
} self;

void guest_tell_id(char type, uint32_t id, const void *rest, size_t length)
{
    const uint8_t head[4] = {(uint8_t)id, (uint8_t)(id >> 8), (uint8_t)(id >> 16), (uint8_t)(id >> 24)};
    link_send(type, head, sizeof head, rest, length);
}

_Noreturn void guest_give_up(const char *why)
{
    uint8_t failure[4 + 5] = {(uint8_t)errno, 0, 0, 0, 'b', 'e', 'g', 'i', 'n'};
    guest_tell_id('Y', 0, failure, sizeof failure);
    link_gate(false);
    link_drain(LAST_WORDS_MS);
    guest_hooks->end();
    guest_hooks->off(why);
    _exit(EXIT_CLOISTER);
}

static void write_word(struct writer *list, const char *name, const char *value)
{
    write_u32(list, (uint32_t)(strlen(name) + strlen(value)));
    write_bytes(list, name, strlen(name));
    write_bytes(list, value, strlen(value));
}

/* Nothing is read or written any more for whoever lives here, or all goes on. */
static void hold(bool held)
{
    stream_hold(held);
    guest_box_hold(held);
    guest_inner_hold(held);
}

static bool is_agents(uint32_t stream)
{
    return guest_keeps(stream) && (stream & 0x7fffffffU) >> 2 == 0;
}

/* A keeper is there, the first or, after a restore, another one: all that was under way is void. */
static void on_join(struct reader *payload)
{
    struct writer hello = {0};
    struct utsname system;
    char living[1024];
    uint32_t protocol = read_u32(payload);
    if (payload->bad || payload->left != LINK_NONCE || protocol != LINK_PROTOCOL)
        return; /* its hello never comes, and the keeper says so */
    write_u32(&hello, LINK_PROTOCOL);
    write_bytes(&hello, payload->at, LINK_NONCE);
    memcpy(self.nonce, payload->at, LINK_NONCE);
    self.still = self.strange = false;
    guest_living(living, sizeof living);
    write_u32(&hello, 4);
    write_word(&hello, "kernel=", uname(&system) == 0 ? system.release : "");
    write_word(&hello, "agent=", "4");
    write_word(&hello, "verity=", self.verity);
    write_word(&hello, "commands=", living);
    link_void();
    link_gate(false);
    link_send_payload('H', &hello);
    free(hello.data);
    self.restored = self.begun;
    self.unpacking = self.unpacking && !self.begun;
    hold(self.restored);
    stream_renew(is_agents);
    if (self.restored && !guest_hooks->freeze(true))
        guest_give_up("stand still after a restore");
}

static void on_begin(struct reader *payload)
{
    const char *why = "the fields of the run";
    size_t count, words;
    char **fields = read_list(payload, &count), **argv = read_list(payload, &words);
    if (!read_complete(payload) || words == 0)
        guest_give_up("a begin that cannot be read");
    if (self.begun) {
        /* After a restore with living commands: names, time and randomness, and the files of the box. */
        if (!guest_hooks->renew(fields, count, &why))
            guest_give_up(why);
        self.unpacking = self.restored;
        free(fields);
        free(argv);
        return;
    }
    self.begun = self.unpacking = true;
    self.fields = fields;
    self.field_count = count;
    self.argv = argv;
    if (!guest_hooks->begin(fields, count, &why))
        guest_give_up(why);
}

/* All files are there: the sockets, and then the walls. */
static void start(void)
{
    for (size_t i = 0; i < self.field_count; i++)
        if (strncmp(self.fields[i], "socket=", 7) == 0 && !guest_box_listen(self.fields[i] + 7))
            guest_give_up("listen on a socket of the box");
    if (!guest_inner_start(self.argv))
        guest_give_up("start the inner half");
    self.started = true;
    free(self.argv);
    free(self.fields);
    self.argv = self.fields = NULL;
}

/* All that must be fresh is. The walls were tried before the first of its processes; those findings are on record. */
static void tell_renewed(void)
{
    struct writer findings = {0};
    write_u32(&findings, 1);
    write_word(&findings, "restored=", "renewed");
    link_send_payload('P', &findings);
    free(findings.data);
}

/* The keeper has taken over the agent, whose processes go on. */
static void on_adopt(void)
{
    if (!self.restored || self.unpacking)
        return;
    if (!guest_adopt())
        guest_give_up("no agent lives");
    self.restored = false;
    hold(false);
    (void)!guest_hooks->freeze(false);
}

static void on_order(uint8_t type, const struct reader *payload)
{
    if (type == 'G' && guest_adopts(payload))
        on_adopt();
    else
        guest_inner_order(type, payload);
}

/* The tar is not a stream to a descriptor, but it has the credits of one. */
static void on_tar(uint8_t type, struct reader *payload)
{
    const char *why = "unpack the run's files";
    if (!self.unpacking)
        return; /* they are there */
    if (type == 'D') {
        uint32_t length = (uint32_t)payload->left;
        if (!guest_hooks->tar_feed(payload->at, payload->left, &why))
            guest_give_up(why);
        const uint8_t credit[4] = {(uint8_t)length, (uint8_t)(length >> 8), (uint8_t)(length >> 16), 0};
        guest_tell_id('C', STREAM_TAR, credit, sizeof credit);
    } else if (type == 'F') {
        self.unpacking = false;
        if (!guest_hooks->tar_end(&why))
            guest_give_up(why);
        if (self.restored)
            tell_renewed();
        else
            start();
    } else {
        guest_give_up("the run's files were cut off");
    }
}

static void on_stream(uint8_t type, struct reader *payload)
{
    uint32_t number = read_u32(payload);
    if (number == STREAM_TAR)
        on_tar(type, payload);
    else if ((type == 'F' || type == 'A') && number >> 31 && number % 4 == STREAM_TERMINAL)
        guest_hang_up(number);
    else
        (void)stream_frame(type, number, payload);
}

static void open_port(void);

/* The keeper that we stand still for, by another stream: a monitor may have cut the first one when it kept us. */
static void on_again(const struct reader *payload)
{
    if (!self.still)
        return;
    if (payload->left == LINK_NONCE && memcmp(payload->at, self.nonce, LINK_NONCE) == 0) {
        self.strange = false;
        link_send_first('I', self.nonce, LINK_NONCE);
        return;
    }
    link_part(); /* of another session: whoever this is can only join */
    if (self.channel >= 0)
        loop_later(RETRY_MS, open_port);
}

/* Hold still, and say so as the last thing; or go on. */
static void on_hold(struct reader *payload)
{
    if (payload->left == 0) {
        hold(true);
        if (guest_hooks->freeze(true)) {
            link_send('Q', NULL, 0, NULL, 0);
            link_gate(true); /* what the kernel says meanwhile goes behind it */
            self.still = true;
            return;
        }
    }
    self.still = false;
    link_gate(false);
    (void)read_u8(payload);
    uint64_t low = read_u32(payload), high = read_u32(payload);
    if (read_complete(payload))
        guest_hooks->set_time(low | high << 32);
    hold(false);
    (void)!guest_hooks->freeze(false);
}

static void on_frame(uint8_t type, struct reader *payload)
{
    switch (type) {
    case 'D':
    case 'C':
    case 'F':
    case 'A':
        on_stream(type, payload);
        break;
    case 'O':
        guest_box_port(read_u32(payload), payload);
        break;
    case 'J':
        on_join(payload);
        break;
    case 'B':
        on_begin(payload);
        break;
    case 'G':
    case 'X':
        on_order(type, payload);
        break;
    case 'S':
        guest_inner_signal(payload);
        break;
    case 'M':
        guest_terminal_ready(payload);
        break;
    case 'W':
        guest_window(payload);
        break;
    case 'U':
        guest_box_update(payload);
        break;
    case 'T':
        guest_figures();
        break;
    case 'Q':
        on_hold(payload);
        break;
    case 'I':
        on_again(payload);
        break;
    case 'K':
        guest_kill();
        break;
    default:
        break; /* of a later version: what matters is asked for by its number in `J` */
    }
}

/* On a new stream nothing counts before it is known whose that is. */
static void on_word(uint8_t type, struct reader *payload)
{
    if (!self.strange || type == 'I' || type == 'J')
        on_frame(type, payload);
}

/* A port without a host's end, or a keeper that left: another may come. */
static void on_lost(const char *why)
{
    (void)why;
    self.still = self.still && link_parted(); /* else what waited is gone, and nobody goes on as if it were there */
    if (self.channel >= 0)
        loop_later(RETRY_MS, open_port);
}

static const struct link_end LINK_END = {.payload_max = FRAME_PAYLOAD_MAX, .always_reads = true, .frame = on_word,
                                         .lost = on_lost, .room = stream_resume};

/* A stream to a keeper: a new one, or that of whom we stand still for, which is not cut off from what it waits for. */
static void take(int fd)
{
    self.strange = self.still;
    if (fd < 0 || (self.still ? link_rejoin(fd) : link_open(fd, &LINK_END)) < 0)
        guest_give_up("the channel cannot be used");
}

/* A virtio port is one descriptor for life; it reads as hung up while the host has nobody there. */
static void open_port(void)
{
    struct stat about;
    struct pollfd look = {.fd = self.channel, .events = POLLIN};
    if (poll(&look, 1, 0) > 0 && (look.revents & (POLLHUP | POLLERR))) {
        if (fstat(self.channel, &about) == 0 && !S_ISCHR(about.st_mode))
            guest_give_up("the channel has ended");
        loop_later(RETRY_MS, open_port);
        return;
    }
    take(dup(self.channel));
}

/* While a run moves, its keeper's stream is no other one's to take. */
static void on_listener(struct source *source, uint32_t events)
{
    (void)events;
    struct sockaddr_vm from = {0};
    socklen_t length = sizeof from;
    int fd = accept4(source->fd, (struct sockaddr *)&from, &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return;
    bool inside = from.svm_family == AF_VSOCK && from.svm_cid != VMADDR_CID_HOST;
    if (inside || (self.begun && !self.still && !self.restored && link_connected()))
        close(fd);
    else
        take(fd);
}

static void on_signals(struct source *source, uint32_t events)
{
    (void)events;
    struct signalfd_siginfo info;
    while (read(source->fd, &info, sizeof info) == sizeof info)
        continue;
    guest_reap();
}

_Noreturn void guest_link(int channel, int listener, const char *verity, const struct guest_hooks *hooks)
{
    /* Pipes and connections are ours; outside of a machine less may be allowed, and has to do. */
    const struct rlimit files = {.rlim_cur = FILES_MAX, .rlim_max = FILES_MAX};
    (void)!setrlimit(RLIMIT_NOFILE, &files);
    guest_hooks = hooks;
    self.channel = channel;
    self.listener = listener;
    self.verity = verity;
    self.on_listener.ready = on_listener;
    self.on_signals.ready = on_signals;
    self.signals = reaper_watch(false);
    if (self.signals < 0 || loop_watch(&self.on_signals, self.signals, LOOP_READ) < 0 ||
        (listener >= 0 && loop_watch(&self.on_listener, listener, LOOP_READ) < 0)) {
        hooks->off("events cannot be waited for");
        _exit(EXIT_CLOISTER);
    }
    guest_events_open();
    if (channel >= 0)
        open_port();
    loop_run();
    hooks->off("events cannot be waited for");
    _exit(EXIT_CLOISTER);
}
