/*
 * What it is: the frame codec of both channels (ARCHITECTURE.md "Shim protocol").
 * What it is not: the meaning of any frame; outer.c and inner.c know that.
 */
#ifndef CLOISTER_FRAME_H
#define CLOISTER_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { FRAME_HEADER = 5, FRAME_PAYLOAD_MAX = 4 << 20, FRAME_DESCRIPTORS_MAX = 16 };

struct frame {
    uint8_t type;
    uint8_t *payload;
    uint32_t length;
    int descriptors[FRAME_DESCRIPTORS_MAX];
    unsigned descriptor_count;
};

/* One end of a stream socket, and the frame that is arriving on it. */
struct channel {
    int fd;
    uint8_t header[FRAME_HEADER];
    unsigned header_filled;
    uint32_t payload_filled;
    struct frame arriving;
};

enum channel_result {
    CHANNEL_AGAIN,  /* nothing whole yet */
    CHANNEL_FRAME,  /* *frame is yours: frame_release it */
    CHANNEL_CLOSED, /* end of stream between two frames */
    CHANNEL_BROKEN, /* end within a frame, a bad frame, or an error */
};

void channel_open(struct channel *channel, int fd);

/* Take what has arrived; never waits. */
enum channel_result channel_receive(struct channel *channel, struct frame *frame);

/* Wait for a frame of this type, and drop what comes before it: false where it does not come in time, or ever. */
bool channel_await(struct channel *channel, char type, int patience_ms);

/* Send one frame, with `descriptor` unless it is -1. Waits at most 3 s: a peer that reads nothing counts as gone. */
int channel_send(struct channel *channel, char type, const void *payload, size_t length, int descriptor);

/* The same with several, FRAME_DESCRIPTORS_MAX at most. */
int channel_send_all(struct channel *channel, char type, const void *payload, size_t length, const int *descriptors,
                     unsigned count);

/* Free the payload and close the descriptors that were not taken (set to -1). */
void frame_release(struct frame *frame);

/* Reads a payload from front to end. After the first mistake `bad` is set and everything reads as 0. */
struct reader {
    const uint8_t *at;
    size_t left;
    bool bad;
};

struct reader frame_reader(const struct frame *frame);
uint8_t read_u8(struct reader *reader);
uint32_t read_u32(struct reader *reader);

/* A list as NULL-terminated strings in one block (free() it). Items that hold a NUL byte are a mistake. */
char **read_list(struct reader *reader, size_t *count);

/* True when everything was read and nothing was wrong. */
bool read_complete(const struct reader *reader);

/* Builds a payload. `bad` is set when memory ran out. */
struct writer {
    uint8_t *data;
    size_t length;
    size_t capacity;
    bool bad;
};

void write_u8(struct writer *writer, uint8_t value);
void write_u32(struct writer *writer, uint32_t value);
void write_bytes(struct writer *writer, const void *data, size_t length);

#endif
