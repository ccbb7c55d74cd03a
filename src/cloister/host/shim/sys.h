/*
 * What it is: the few system facts every part of the shim needs (time, inherited descriptors,
 * whole writes, printable text). What it is not: policy or protocol.
 */
#ifndef CLOISTER_SYS_H
#define CLOISTER_SYS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Exit code of our own failures (DESIGN section 12). */
#define EXIT_CLOISTER 125

/* Milliseconds of CLOCK_MONOTONIC. */
int64_t sys_now_ms(void);

/* Open /dev/null in every closed slot of 0, 1, 2, so that no later descriptor lands there. */
int sys_fill_stdio(void);

/* Close everything from 3 upwards except `keep`, and mark `keep` close-on-exec. -1: keep nothing. */
int sys_close_others(int keep);

/* No core dump of this process or its children: memory may hold what the agent must not see. */
int sys_no_core(void);

/* Parse a decimal descriptor number of at least 3; -1 when it is none. */
int sys_parse_descriptor(const char *text);

/* Write everything, waiting up to `patience_ms` for each step; -1 when that did not work. */
int sys_write_all(int fd, const char *data, size_t length, int patience_ms);

/* Write text with control characters (C0 but newline, DEL, C1) replaced: part of it may be hostile. */
void sys_write_printable(int fd, const char *text, size_t length, bool raw_tty);

#endif
