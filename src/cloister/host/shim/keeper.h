/*
 * What it is: what the parts of the keeper share: its options, its monitor, its commands, its end.
 * What it is not: anything of the guest's own; what comes from there is judged in keeper_guest.c.
 */
#ifndef CLOISTER_KEEPER_H
#define CLOISTER_KEEPER_H

#include "frame.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { KEEPER_SOCKETS_MAX = 64, KEEPER_PORTS_MAX = 16, KEEPER_CHANNEL = 20, KEEPER_CONSOLE = 21 };

struct keeper_options {
    int ctl;
    const char *box;
    const char *console;
    size_t console_bytes;
    int patience_s;    /* for the guest's walls to be reported */
    const char *vsock; /* NULL: the monitor gets a socket */
    const char *sockets[KEEPER_SOCKETS_MAX];
    size_t socket_count;
    struct {
        int fd;
        uint16_t port;
    } ports[KEEPER_PORTS_MAX];
    size_t port_count;
    int64_t adopt; /* the highest id of a command of the run that this one goes on from; -1: it boots, or starts from a template */
    char **monitor;
};

/* False when an option is unknown, misses its value or is missing. */
bool keeper_options_parse(struct keeper_options *options, int count, char **arguments);

/* keeper.c: the broker, and the end. */
_Noreturn void keeper_end(uint8_t status);
_Noreturn void keeper_fail(const char *reason, const char *format, ...) __attribute__((format(printf, 2, 3)));
void keeper_tell(char type, const struct writer *payload);
bool keeper_tell_if_room(char type, const void *payload, size_t length);
void keeper_tell_terminal(uint32_t id, int master);

void keeper_tick_soon(void);
int keeper_patience_ms(int most_s); /* as the options have it, and no more than this */

/* keeper_monitor.c: the monitor, its console, and the way to the guest. */
int keeper_monitor_start(const struct keeper_options *options, void (*reached)(int fd));
void keeper_monitor_tick(void);
bool keeper_monitor_waiting(void); /* for the guest to listen */
bool keeper_monitor_has_calls(void); /* false: its channel is one for life */
bool keeper_monitor_call(void); /* knock again, where there are calls */
void keeper_monitor_kill(void);
void keeper_monitor_await(int patience_ms); /* its end is near: learn how */
void keeper_monitor_reap(void);       /* SIGCHLD came */
const char *keeper_monitor_status(void); /* how it ended, as text; NULL: it lives */
const char *keeper_console_line(void); /* the last line of the console, printable */

/* keeper_guest.c: the guest's frames. */
void keeper_guest_begin(const struct frame *frame, int tar); /* keep what it is told when it has said hello */
void keeper_guest_join(int fd);
bool keeper_guest_joined(void);
bool keeper_guest_proved(void); /* its walls were reported */
void keeper_guest_signal(const struct frame *frame);
void keeper_guest_ask(const struct frame *frame); /* `T`, `Q` */
void keeper_guest_kill(void);
_Noreturn void keeper_liar(const char *what);
void keeper_pass(char type, const struct reader *payload); /* to the broker, as it is */

/* How many frames of a kind were passed on in this second, and how many were dropped. */
struct keeper_ration {
    int64_t second;
    unsigned passed, dropped;
};

/* Whether one more may pass now; what may not is counted. */
bool keeper_ration(struct keeper_ration *ration, unsigned most);

/* keeper_still.c: a guest that stands still while it is kept, and is met again. */
void keeper_still_ask(bool still);                          /* `Q`: stand still, or go on */
bool keeper_still_answered(const struct reader *payload);   /* the guest's `Q`: whether the broker waits for it */
bool keeper_still_lost(void);                               /* its channel has ended: whether it may do that now */
bool keeper_still_reached(int fd, const uint8_t *nonce);    /* another connection: whether it is for this */
bool keeper_still_meets(uint8_t type, struct reader *payload); /* a frame: whether it was for this */
void keeper_still_tick(void);
bool keeper_still_waiting(void); /* for its tick */

/* keeper_commands.c: what runs in the guest. First what the broker says (`G`, `X`, `M`), then the guest. */
void keeper_guest_order(uint8_t type, struct frame *frame);
void keeper_guest_terminal(const struct frame *frame);
void keeper_command_running(struct reader *payload);
void keeper_command_stopped(struct reader *payload);
void keeper_command_failed(struct reader *payload);
void keeper_command_ended(struct reader *payload);
void keeper_command_wants_terminal(struct reader *payload);
void keeper_look_for_ends(void);
bool keeper_agent_running(void);
bool keeper_agent_ended(void); /* its end was heard; what it wrote may still be under way */
bool keeper_commands_know(uint32_t stream);
void keeper_commands_open(int64_t adopt);
void keeper_commands_living(const char *ids); /* as the guest's hello has them */

/* keeper_box.c: sockets of the box, published ports, renewed files. */
int keeper_box_open(const struct keeper_options *options);
void keeper_box_joined(void); /* the guest can take ports and renewed files from now on */
void keeper_box_guest_opens(uint32_t stream, struct reader *payload);
bool keeper_box_knows(uint32_t stream); /* whether it was opened in this session, by either end */
void keeper_box_forget(uint32_t stream); /* the guest gave it up */
void keeper_box_tick(void);
bool keeper_box_waiting(void); /* for its tick */

/* keeper_pty.c: a terminal of the host's for a command. */
struct keeper_pty {
    int slave;   /* -1: none */
    pid_t watcher;
    int changes; /* readable: the window has changed */
};
int keeper_pty_open(struct keeper_pty *pty, int *master);
void keeper_pty_end(struct keeper_pty *pty); /* the slave is its stream's, or the caller's */

#endif
