/*
 * What it is: what the parts of the guest's end of the link share. What it is not: its interface; guest.h is.
 */
#ifndef CLOISTER_GUEST_LINK_H
#define CLOISTER_GUEST_LINK_H

#include "frame.h"
#include "guest.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { FILES_MAX = 524288 };

/* guest.c: the session. */
extern const struct guest_hooks *guest_hooks;
_Noreturn void guest_give_up(const char *why); /* say so to the host and on the console, power off */
void guest_tell_id(char type, uint32_t id, const void *rest, size_t length);

/* guest_commands.c: the inner half and what runs in it. */
bool guest_inner_start(char *const *argv);
void guest_inner_order(uint8_t type, const struct reader *payload);
void guest_inner_signal(const struct reader *payload);
void guest_terminal_ready(struct reader *payload);
void guest_hang_up(uint32_t stream);
void guest_window(struct reader *payload);
void guest_reap(void);
void guest_inner_hold(bool held);
void guest_kill(void);
bool guest_keeps(uint32_t stream); /* over a new session */
void guest_living(char *text, size_t size); /* ids, with commas */
bool guest_adopts(const struct reader *payload); /* whether a `G` is for an agent that lives */
bool guest_adopt(void); /* it has a new keeper, others are left alone; false: there is none */

/* guest_box.c: sockets of the box, ports of the guest, files of the host, figures. */
bool guest_box_listen(const char *name);
void guest_box_hold(bool held);
void guest_box_port(uint32_t stream, struct reader *payload);
void guest_box_update(struct reader *payload);
void guest_figures(void);

/* guest_events.c: what the kernel says. */
void guest_events_open(void);

#endif
