/*
 * What it is: the streams of a link, for both ends: a descriptor here, its twin there, credits in between.
 * What it is not: who opens which for what; keeper*.c and guest*.c are.
 *
 * Memory: a stream holds what its descriptor has not taken yet, STREAM_WINDOW at most, and nothing while it takes all.
 */
#ifndef CLOISTER_STREAM_H
#define CLOISTER_STREAM_H

#include "frame.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { STREAM_WINDOW = 256 * 1024, STREAM_TAR = 2, STREAM_FIRST_HOST = 16 };
enum { STREAM_STDIN, STREAM_STDOUT, STREAM_STDERR, STREAM_TERMINAL }; /* k of a command's streams */

/* Commands have ids below this: their streams' numbers are the upper half of u32. */
#define STREAM_COMMANDS_MAX (1U << 29)

/*
 * What a stream does here: read its descriptor, write it, or both. Whoever opens a socket of the box has no credit before
 * it is connected (AWAITS), which the other end says by a first credit (INVITES).
 */
enum { STREAM_SENDS = 1, STREAM_RECEIVES = 2, STREAM_IS_TERMINAL = 4, STREAM_AWAITS = 8, STREAM_INVITES = 16 };

uint32_t stream_of(uint32_t command, unsigned k);

/*
 * Carry `fd`, ours from now on, also when this fails (-1). It may be of any kind; where it does not block it stays so.
 * `ended` may be NULL, and is called when the stream is gone, in whatever way.
 */
int stream_open(uint32_t number, int fd, int does, void (*ended)(uint32_t number));

/* End one: close its descriptor (a TCP connection by a reset), and tell the other end, unless it is it that told. */
void stream_abort(uint32_t number, uint32_t error);
void stream_drop(uint32_t number);

/* All that are open, without a word: their session is over. */
void stream_drop_all(void);

/* A new session, while all is held: those that `keep` names begin anew, with fresh credits, the others are dropped. */
void stream_renew(bool (*keep)(uint32_t number));

bool stream_exists(uint32_t number);
size_t stream_count(void);

/*
 * The command behind it has ended. From then on: whether all that had arrived was written, and whether all that could be
 * read was sent. Others may go on writing without end, which must not hold up the news.
 */
void stream_mark(uint32_t number);
bool stream_written(uint32_t number);
bool stream_drained(uint32_t number);

/* Read again where reading waited for room in the link. */
void stream_resume(void);

/* Neither read nor write any descriptor by itself, or go on: nothing shall be in flight. */
void stream_hold(bool held);

/* Called, when set, after bytes have moved: what waits for stream_written or stream_drained looks again. */
extern void (*stream_moved)(void);

/*
 * A frame `D`, `C`, `F` or `A`. False: it breaks the rules (a flow that does not go this way, more than its credit, a
 * second end). A stream that is not open any more ignores it: the frame has crossed its end. Whether the number ever was
 * one is for the caller to know.
 */
bool stream_frame(uint8_t type, uint32_t number, struct reader *payload);

#endif
