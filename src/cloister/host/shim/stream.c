/*
 * What it is: the streams of a link, for both ends: a descriptor here, its twin there, credits in between.
 * What it is not: who opens which for what; keeper*.c and guest*.c are.
 */
#define _GNU_SOURCE
#include "stream.h"
#include "carrier.h"
#include "link.h"
#include "loop.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { BUCKETS = 1024, READS_AT_ONCE = 4 };
enum { GRANT_FROM = STREAM_WINDOW / 4 };

struct stream {
    struct source source; /* first: on_ready casts; its first bytes are loop_free's */
    struct stream *next;  /* of this bucket */
    uint32_t number;
    struct carrier carrier;
    int does;
    void (*ended)(uint32_t number);
    uint32_t credit;  /* bytes we may send */
    uint32_t granted; /* bytes the other end may still send */
    uint32_t owed;    /* bytes written, for which it gets credit again */
    uint8_t *held;    /* what the descriptor did not take */
    size_t held_start, held_end;
    uint64_t sent, written;           /* bytes of its life */
    uint64_t sent_mark, written_mark; /* what they are when all is out that was there at the end of its command */
    bool sent_end, got_end;
    bool shut; /* the descriptor knows that no more comes */
    bool deaf; /* the descriptor takes no more; the rest is thrown away */
    bool gone;
};

static struct stream *buckets[BUCKETS];
static size_t count;
static bool holding;
void (*stream_moved)(void);

static void on_ready(struct source *source, uint32_t events);
static void settle(struct stream *stream);

uint32_t stream_of(uint32_t command, unsigned k)
{
    return 0x80000000U | command << 2 | k;
}

static struct stream **place_of(uint32_t number)
{
    struct stream **place = &buckets[(number ^ number >> 10) % BUCKETS];
    while (*place && (*place)->number != number)
        place = &(*place)->next;
    return place;
}

bool stream_exists(uint32_t number)
{
    return *place_of(number) != NULL;
}

size_t stream_count(void)
{
    return count;
}

static void moved(void)
{
    if (stream_moved)
        loop_soon(stream_moved);
}

void stream_mark(uint32_t number)
{
    struct stream *stream = *place_of(number);
    if (!stream)
        return;
    stream->sent_mark = stream->sent + STREAM_WINDOW; /* no pipe or pty here holds more */
    stream->written_mark = stream->written + (stream->held_end - stream->held_start);
}

bool stream_written(uint32_t number)
{
    const struct stream *stream = *place_of(number);
    return !stream || stream->held_start == stream->held_end || stream->written >= stream->written_mark;
}

bool stream_drained(uint32_t number)
{
    const struct stream *stream = *place_of(number);
    return !stream || stream->sent_end || stream->sent >= stream->sent_mark || !carrier_readable(&stream->carrier);
}

static void release(struct stream *stream, bool abrupt)
{
    uint32_t number = stream->number;
    void (*ended)(uint32_t) = stream->ended;
    struct stream **place = place_of(number);
    *place = stream->next;
    stream->gone = true;
    count--;
    (void)!loop_watch(&stream->source, stream->carrier.fd, 0);
    carrier_close(&stream->carrier, abrupt);
    free(stream->held);
    loop_free(stream);
    moved();
    if (ended)
        ended(number);
}

static void tell(char type, uint32_t number, const uint32_t *value)
{
    struct writer payload = {0};
    write_u32(&payload, number);
    if (value)
        write_u32(&payload, *value);
    link_send_payload(type, &payload);
    free(payload.data);
}

static void abort_stream(struct stream *stream, uint32_t error)
{
    tell('A', stream->number, &error);
    release(stream, true);
}

void stream_abort(uint32_t number, uint32_t error)
{
    struct stream *stream = *place_of(number);
    if (stream)
        abort_stream(stream, error);
}

void stream_drop(uint32_t number)
{
    struct stream *stream = *place_of(number);
    if (stream)
        release(stream, true);
}

void stream_drop_all(void)
{
    for (size_t i = 0; i < BUCKETS; i++)
        while (buckets[i])
            release(buckets[i], true);
}

void stream_renew(bool (*keep)(uint32_t number))
{
    for (size_t i = 0; i < BUCKETS; i++)
        for (struct stream *stream = buckets[i], *next; stream; stream = next) {
            next = stream->next;
            if (!keep(stream->number)) {
                release(stream, true);
                continue;
            }
            stream->credit = STREAM_WINDOW;
            stream->granted = STREAM_WINDOW - (uint32_t)(stream->held_end - stream->held_start);
            stream->owed = 0;
        }
}

/* Give credit for what was written. */
static void grant(struct stream *stream, size_t written)
{
    stream->written += written;
    stream->owed += (uint32_t)written;
    if (stream->got_end || (stream->owed < GRANT_FROM && stream->granted > GRANT_FROM))
        return;
    if (stream->owed == 0)
        return;
    tell('C', stream->number, &stream->owed);
    stream->granted += stream->owed;
    stream->owed = 0;
}

/* The descriptor takes no more. What came from it may still be under way, so only this direction ends. */
static void turn_deaf(struct stream *stream)
{
    size_t held = stream->held_end - stream->held_start;
    stream->deaf = true;
    stream->held_start = stream->held_end = 0;
    grant(stream, held);
}

/* Write what was held: false when the stream is gone. */
static bool write_held(struct stream *stream)
{
    while (stream->held_start < stream->held_end) {
        ssize_t put = carrier_write(&stream->carrier, stream->held + stream->held_start, stream->held_end - stream->held_start);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0 && errno == EAGAIN)
            return true;
        if (put < 0) {
            if (!(stream->does & STREAM_SENDS) || stream->sent_end) {
                abort_stream(stream, (uint32_t)errno);
                return false;
            }
            turn_deaf(stream);
            return true;
        }
        stream->held_start += (size_t)put;
        grant(stream, (size_t)put);
        moved();
    }
    stream->held_start = stream->held_end = 0;
    free(stream->held);
    stream->held = NULL;
    return true;
}

/* Read as long as there are bytes, credit and room: false when the stream is gone. */
static bool read_on(struct stream *stream)
{
    int turns = stream->carrier.manner == CARRIER_PLAIN ? STREAM_WINDOW / LINK_DATA_MAX : READS_AT_ONCE;
    while (turns-- > 0 && !stream->sent_end && stream->credit > 0 && !holding && !link_full()) {
        size_t most = stream->credit < LINK_DATA_MAX ? stream->credit : LINK_DATA_MAX;
        uint8_t *into = link_data_begin(most);
        if (!into) {
            abort_stream(stream, ENOMEM);
            return false;
        }
        ssize_t got = carrier_read(&stream->carrier, into, most);
        int error = errno;
        link_data_end(stream->number, got > 0 ? (size_t)got : 0);
        if (got < 0 && (error == EAGAIN || error == EINTR))
            return true;
        moved();
        if (got > 0) {
            stream->credit -= (uint32_t)got;
            stream->sent += (uint64_t)got;
            continue;
        }
        /* EIO: a pty whose other side is closed. Its user has left, or its programs have. */
        if (got < 0 && error != EIO) {
            abort_stream(stream, (uint32_t)error);
            return false;
        }
        stream->sent_end = true;
        tell('F', stream->number, NULL);
    }
    return true;
}

/* What comes next for it: its end, or which events it waits for. */
static void settle(struct stream *stream)
{
    bool holds = stream->held_start < stream->held_end;
    bool sending = (stream->does & STREAM_SENDS) && !stream->sent_end;
    bool receiving = (stream->does & STREAM_RECEIVES) && (!stream->got_end || holds);
    if (!receiving && (stream->does & STREAM_RECEIVES) && !stream->shut) {
        stream->shut = true;
        carrier_finish(&stream->carrier);
    }
    if (receiving && stream->deaf && !sending && !stream->got_end) {
        abort_stream(stream, EPIPE);
        return;
    }
    /* A terminal ends as a whole: its user has left, or its programs have. */
    bool hung_up = (stream->does & STREAM_IS_TERMINAL) && (!sending || !receiving);
    if (hung_up || (!sending && !receiving)) {
        release(stream, false);
        return;
    }
    uint32_t wanted = 0;
    if (sending && stream->credit > 0 && !holding && !link_full())
        wanted |= LOOP_READ;
    if (holds && !holding)
        wanted |= LOOP_WRITE;
    if (stream->carrier.manner == CARRIER_PLAIN) {
        if (wanted & LOOP_READ)
            loop_soon(stream_resume);
        return;
    }
    if (loop_watch(&stream->source, stream->carrier.fd, wanted) < 0)
        abort_stream(stream, (uint32_t)errno);
}

static void on_ready(struct source *source, uint32_t events)
{
    struct stream *stream = (struct stream *)source;
    if (stream->gone || holding)
        return;
    if ((events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) && stream->held_start < stream->held_end) {
        size_t before = stream->held_start;
        if (!write_held(stream))
            return;
        /* Hung up and taking nothing: it would be told for ever. */
        if ((events & EPOLLHUP) && stream->held_end > 0 && stream->held_start == before)
            turn_deaf(stream);
    }
    if ((stream->does & STREAM_SENDS) && (events & (EPOLLIN | EPOLLERR | EPOLLHUP)) && !read_on(stream))
        return;
    /* A pipe that nobody reads any more says so by an error alone. */
    if (!(stream->does & STREAM_SENDS) && (events & EPOLLERR)) {
        abort_stream(stream, EPIPE);
        return;
    }
    settle(stream);
}

/* Do `visit` for all, which may end any of them. */
static void each(void (*visit)(struct stream *stream))
{
    for (size_t i = 0; i < BUCKETS; i++)
        for (struct stream *stream = buckets[i], *next; stream; stream = next) {
            next = stream->next;
            visit(stream);
        }
}

static void resume(struct stream *stream)
{
    if (stream->carrier.manner == CARRIER_PLAIN && (stream->does & STREAM_SENDS) && !read_on(stream))
        return;
    settle(stream);
}

void stream_resume(void)
{
    each(resume);
}

void stream_hold(bool held)
{
    holding = held;
    each(resume);
}

int stream_open(uint32_t number, int fd, int does, void (*ended)(uint32_t number))
{
    struct stream **place = place_of(number);
    struct stream *stream = *place ? NULL : calloc(1, sizeof *stream);
    if (!stream) {
        close(fd);
        return -1;
    }
    *stream = (struct stream){.source.ready = on_ready, .number = number, .does = does, .ended = ended,
                              .credit = does & STREAM_AWAITS ? 0 : STREAM_WINDOW, .granted = STREAM_WINDOW};
    if (carrier_open(&stream->carrier, fd) < 0) {
        close(stream->carrier.fd);
        free(stream);
        return -1;
    }
    *place = stream;
    count++;
    if (does & STREAM_INVITES)
        tell('C', number, &stream->granted);
    settle(stream);
    return 0;
}

/* Keep what the descriptor did not take: it is within the window, as all that is granted is. */
static bool keep(struct stream *stream, const uint8_t *data, size_t length)
{
    if (length == 0)
        return true;
    size_t held = stream->held_end - stream->held_start;
    if (!stream->held)
        stream->held = malloc(STREAM_WINDOW);
    if (!stream->held || held + length > STREAM_WINDOW)
        return false;
    if (stream->held_end + length > STREAM_WINDOW) {
        memmove(stream->held, stream->held + stream->held_start, held);
        stream->held_start = 0;
        stream->held_end = held;
    }
    memcpy(stream->held + stream->held_end, data, length);
    stream->held_end += length;
    return true;
}

/* `D`: straight to the descriptor, and what it does not take is kept. */
static bool on_data(struct stream *stream, const struct reader *payload)
{
    const uint8_t *data = payload->at;
    size_t length = payload->left;
    if (!(stream->does & STREAM_RECEIVES) || stream->got_end || length == 0 || length > LINK_DATA_MAX ||
        length > stream->granted)
        return false;
    stream->granted -= (uint32_t)length;
    if (stream->deaf) {
        grant(stream, length);
        return true;
    }
    while (length > 0 && stream->held_start == stream->held_end) {
        ssize_t put = carrier_write(&stream->carrier, data, length);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            break; /* a failure shows again when it is written from what is held */
        data += put;
        length -= (size_t)put;
        grant(stream, (size_t)put);
    }
    if (!keep(stream, data, length)) {
        abort_stream(stream, ENOMEM);
        return true;
    }
    if (length == 0 || write_held(stream))
        settle(stream);
    return true;
}

static bool on_credit(struct stream *stream, struct reader *payload)
{
    uint32_t more = read_u32(payload);
    if (!read_complete(payload) || !(stream->does & STREAM_SENDS) || more == 0 ||
        more > STREAM_WINDOW - stream->credit)
        return false;
    stream->credit += more;
    resume(stream);
    return true;
}

static bool on_end(struct stream *stream, const struct reader *payload)
{
    if (!read_complete(payload) || !(stream->does & STREAM_RECEIVES) || stream->got_end)
        return false;
    stream->got_end = true;
    settle(stream);
    return true;
}

bool stream_frame(uint8_t type, uint32_t number, struct reader *payload)
{
    struct stream *stream = *place_of(number);
    if (!stream)
        return payload->left <= LINK_DATA_MAX;
    switch (type) {
    case 'D':
        return on_data(stream, payload);
    case 'C':
        return on_credit(stream, payload);
    case 'F':
        return on_end(stream, payload);
    case 'A':
        (void)read_u32(payload);
        if (!read_complete(payload))
            return false;
        release(stream, true);
        return true;
    default:
        return false;
    }
}
