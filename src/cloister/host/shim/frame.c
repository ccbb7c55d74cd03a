/*
 * What it is: the frame codec of both channels (ARCHITECTURE.md "Shim protocol").
 * What it is not: the meaning of any frame; outer.c and inner.c know that.
 *
 * A header is read on its own, so that descriptors can only belong to the frame whose first
 * byte they came with (unix(7): recvmsg(2) joins earlier data without descriptors to them).
 */
#define _GNU_SOURCE
#include "frame.h"
#include "sys.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { SEND_PATIENCE_MS = 3000 };

void channel_open(struct channel *channel, int fd)
{
    memset(channel, 0, sizeof *channel);
    channel->fd = fd;
}

void frame_release(struct frame *frame)
{
    for (unsigned i = 0; i < frame->descriptor_count; i++)
        if (frame->descriptors[i] >= 0)
            close(frame->descriptors[i]);
    free(frame->payload);
    memset(frame, 0, sizeof *frame);
}

/* Keep the descriptors of a received message in the arriving frame; surplus ones are closed and reported. */
static int take_descriptors(struct frame *frame, struct msghdr *message)
{
    int surplus = (message->msg_flags & MSG_CTRUNC) ? 1 : 0;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
            if (frame->descriptor_count < FRAME_DESCRIPTORS_MAX) {
                frame->descriptors[frame->descriptor_count++] = fd;
            } else {
                close(fd);
                surplus = 1;
            }
        }
    }
    return surplus ? -1 : 0;
}

/* One recvmsg(2) of at most `length` bytes: bytes read, 0 at the end, -1 error, -2 nothing there. */
static ssize_t receive_some(struct channel *channel, void *into, size_t length)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int) * FRAME_DESCRIPTORS_MAX)];
        struct cmsghdr align;
    } control;
    struct iovec part = {.iov_base = into, .iov_len = length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof control};
    ssize_t got;
    do
        got = recvmsg(channel->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return errno == EAGAIN ? -2 : -1;
    unsigned before = channel->arriving.descriptor_count;
    if (take_descriptors(&channel->arriving, &message) < 0)
        return -1;
    /* Descriptors travel with the first byte only. */
    if (channel->arriving.descriptor_count > before && channel->header_filled > 0)
        return -1;
    return got;
}

static enum channel_result broken(struct channel *channel)
{
    frame_release(&channel->arriving);
    return CHANNEL_BROKEN;
}

static enum channel_result receive_header(struct channel *channel)
{
    while (channel->header_filled < FRAME_HEADER) {
        ssize_t got = receive_some(channel, channel->header + channel->header_filled,
                                   FRAME_HEADER - channel->header_filled);
        if (got == -2)
            return CHANNEL_AGAIN;
        if (got == 0 && channel->header_filled == 0 && channel->arriving.descriptor_count == 0)
            return CHANNEL_CLOSED;
        if (got <= 0)
            return broken(channel);
        channel->header_filled += (unsigned)got;
    }
    const uint8_t *head = channel->header;
    struct frame *frame = &channel->arriving;
    if (frame->payload)
        return CHANNEL_FRAME;
    frame->length = (uint32_t)head[0] | (uint32_t)head[1] << 8 | (uint32_t)head[2] << 16 | (uint32_t)head[3] << 24;
    frame->type = head[4];
    if (frame->length > FRAME_PAYLOAD_MAX)
        return broken(channel);
    frame->payload = malloc(frame->length ? frame->length : 1);
    return frame->payload ? CHANNEL_FRAME : broken(channel);
}

enum channel_result channel_receive(struct channel *channel, struct frame *frame)
{
    enum channel_result result = receive_header(channel);
    if (result != CHANNEL_FRAME)
        return result;
    struct frame *arriving = &channel->arriving;
    while (channel->payload_filled < arriving->length) {
        ssize_t got = receive_some(channel, arriving->payload + channel->payload_filled,
                                   arriving->length - channel->payload_filled);
        if (got == -2)
            return CHANNEL_AGAIN;
        if (got <= 0)
            return broken(channel);
        channel->payload_filled += (uint32_t)got;
    }
    *frame = *arriving;
    int fd = channel->fd;
    channel_open(channel, fd);
    return CHANNEL_FRAME;
}

bool channel_await(struct channel *channel, char type, int patience_ms)
{
    int64_t until = sys_now_ms() + patience_ms, left;
    while ((left = until - sys_now_ms()) > 0) {
        struct frame frame;
        enum channel_result result = channel_receive(channel, &frame);
        if (result == CHANNEL_AGAIN) {
            struct pollfd wait = {.fd = channel->fd, .events = POLLIN};
            (void)!poll(&wait, 1, (int)left);
            continue;
        }
        if (result != CHANNEL_FRAME)
            return false;
        bool found = frame.type == (uint8_t)type;
        frame_release(&frame);
        if (found)
            return true;
    }
    return false;
}

/* Send the rest of a frame whose first bytes are out. */
static int send_rest(int fd, const uint8_t *data, size_t length)
{
    while (length > 0) {
        ssize_t sent = send(fd, data, length, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0) {
            data += sent;
            length -= (size_t)sent;
            continue;
        }
        if (errno == EINTR)
            continue;
        struct pollfd wait = {.fd = fd, .events = POLLOUT};
        if (errno != EAGAIN || poll(&wait, 1, SEND_PATIENCE_MS) <= 0)
            return -1;
    }
    return 0;
}

/* Send the first bytes, which carry the descriptors: bytes sent or -1. */
static ssize_t send_first(int fd, const uint8_t *data, size_t length, const int *descriptors, unsigned count)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int) * FRAME_DESCRIPTORS_MAX)];
        struct cmsghdr align;
    } control;
    memset(&control, 0, sizeof control);
    struct iovec part = {.iov_base = (void *)(uintptr_t)data, .iov_len = length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = CMSG_SPACE(sizeof(int) * count)};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int) * count);
    memcpy(CMSG_DATA(head), descriptors, sizeof(int) * count);
    for (;;) {
        ssize_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0 || (errno != EINTR && errno != EAGAIN))
            return sent;
        struct pollfd wait = {.fd = fd, .events = POLLOUT};
        if (errno == EAGAIN && poll(&wait, 1, SEND_PATIENCE_MS) <= 0)
            return -1;
    }
}

int channel_send_all(struct channel *channel, char type, const void *payload, size_t length, const int *descriptors,
                     unsigned count)
{
    struct writer frame = {0};
    write_u32(&frame, (uint32_t)length);
    write_u8(&frame, (uint8_t)type);
    write_bytes(&frame, payload, length);
    size_t done = 0;
    int result = frame.bad || length > FRAME_PAYLOAD_MAX || count > FRAME_DESCRIPTORS_MAX ? -1 : 0;
    if (result == 0 && count > 0) {
        ssize_t sent = send_first(channel->fd, frame.data, frame.length, descriptors, count);
        if (sent < 0)
            result = -1;
        else
            done = (size_t)sent;
    }
    if (result == 0)
        result = send_rest(channel->fd, frame.data + done, frame.length - done);
    free(frame.data);
    return result;
}

int channel_send(struct channel *channel, char type, const void *payload, size_t length, int descriptor)
{
    return channel_send_all(channel, type, payload, length, &descriptor, descriptor >= 0);
}

struct reader frame_reader(const struct frame *frame)
{
    return (struct reader){.at = frame->payload, .left = frame->length};
}

uint8_t read_u8(struct reader *reader)
{
    if (reader->bad || reader->left < 1) {
        reader->bad = true;
        return 0;
    }
    reader->left -= 1;
    return *reader->at++;
}

uint32_t read_u32(struct reader *reader)
{
    if (reader->bad || reader->left < 4) {
        reader->bad = true;
        return 0;
    }
    const uint8_t *at = reader->at;
    reader->at += 4;
    reader->left -= 4;
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

/* Copy one item to `into`: the place after its NUL, or NULL. */
static char *read_item(struct reader *reader, char *into)
{
    uint32_t length = read_u32(reader);
    if (reader->bad || length > reader->left || memchr(reader->at, 0, length)) {
        reader->bad = true;
        return NULL;
    }
    memcpy(into, reader->at, length);
    into[length] = 0;
    reader->at += length;
    reader->left -= length;
    return into + length + 1;
}

char **read_list(struct reader *reader, size_t *count)
{
    uint32_t items = read_u32(reader);
    *count = 0;
    /* Every item takes four bytes at least, so what is left bounds the memory asked for. */
    if (reader->bad || items > reader->left / 4) {
        reader->bad = true;
        return NULL;
    }
    char **list = malloc((items + 1) * sizeof *list + reader->left + items);
    if (!list) {
        reader->bad = true;
        return NULL;
    }
    char *text = (char *)(list + items + 1);
    for (uint32_t i = 0; i < items; i++) {
        list[i] = text;
        text = read_item(reader, text);
        if (!text) {
            free(list);
            return NULL;
        }
    }
    list[items] = NULL;
    *count = items;
    return list;
}

bool read_complete(const struct reader *reader)
{
    return !reader->bad && reader->left == 0;
}

void write_bytes(struct writer *writer, const void *data, size_t length)
{
    if (writer->bad || length == 0)
        return;
    if (length > writer->capacity - writer->length) {
        size_t capacity = (writer->length + length) * 2;
        uint8_t *grown = realloc(writer->data, capacity);
        if (!grown) {
            writer->bad = true;
            return;
        }
        writer->data = grown;
        writer->capacity = capacity;
    }
    memcpy(writer->data + writer->length, data, length);
    writer->length += length;
}

void write_u8(struct writer *writer, uint8_t value)
{
    write_bytes(writer, &value, 1);
}

void write_u32(struct writer *writer, uint32_t value)
{
    const uint8_t bytes[4] = {(uint8_t)value, (uint8_t)(value >> 8), (uint8_t)(value >> 16), (uint8_t)(value >> 24)};
    write_bytes(writer, bytes, sizeof bytes);
}
