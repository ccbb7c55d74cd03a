/*
 * What it is: the wire between keeper and guest (ARCHITECTURE.md "The link"): frames on one byte stream, queued on the
 * way out, whole on the way in. One per process. What it is not: the meaning of a frame, or its streams; stream.c has those.
 */
#ifndef CLOISTER_LINK_H
#define CLOISTER_LINK_H

#include "frame.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    LINK_PROTOCOL = 2,
    LINK_NONCE = 16,
    LINK_DATA_MAX = 64 * 1024,
    LINK_GUEST_MAX = LINK_DATA_MAX + 64, /* payload of a frame from the guest, which is hostile */
    LINK_VSOCK_PORT = 5000,
};

/* Whose end this is. All are called from the loop, never from within link_send. */
struct link_end {
    size_t payload_max; /* of what arrives */
    bool always_reads;  /* the guest's end, whose peer it may trust */
    void (*frame)(uint8_t type, struct reader *payload);
    void (*lost)(const char *why); /* the stream ended, or a frame was too long; nothing is read any more */
    void (*room)(void);            /* what was queued has drained: sources may be read again */
};

/* Speak on `fd` (non-blocking; ours from now on). What was queued or half read before is void. -1: errno. */
int link_open(int fd, const struct link_end *end);

/* Let the stream go, and forget what is queued. */
void link_close(void);

/*
 * The same session over another stream, while a gate is closed and both ends have read whole frames only: let the old
 * one go and keep what waits behind the gate, also what is queued from now on; then speak on `fd`, as link_open does.
 * A stream that ends while the gate is closed is let go so, before `lost` hears of it.
 */
void link_part(void);
int link_rejoin(int fd);
bool link_parted(void);
bool link_cut(void); /* of what was lost: the stream ended, and nothing was wrong with what had come */
bool link_connected(void);

/* Queue a frame in front of all that waits; it passes a gate. Nothing of a frame may have left in part. */
void link_send_first(char type, const void *payload, size_t length);

/*
 * Void everything that arrives until a frame `H` with this nonce: what a guest's former session left in the stream.
 * More than `most` bytes of it, and the link is lost.
 */
void link_skip_to(const uint8_t nonce[LINK_NONCE], size_t most);

/* Forget what is queued: it was for a session that is over. */
void link_void(void);

/* Queue one frame of two parts. It leaves when the loop has done its batch. */
void link_send(char type, const void *head, size_t head_length, const void *rest, size_t length);
void link_send_payload(char type, const struct writer *payload);

/* A place for up to `most` bytes of one `D`; then say how many it became (0: none). In between nothing else is sent. */
uint8_t *link_data_begin(size_t most);
void link_data_end(uint32_t stream, size_t length);

/* Write what is queued by now and nothing that is queued later, until the gate opens again. */
void link_gate(bool closed);

/* Whether all has left that may leave. */
bool link_gate_reached(void);

/* Bytes that are queued, and whether sources should wait. */
size_t link_queued(void);
bool link_full(void);

/* Write what is queued, waiting up to `patience_ms` for each step: before an end. */
void link_drain(int patience_ms);

#endif
