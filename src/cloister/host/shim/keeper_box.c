/*
 * What it is: what a guest reaches of the host: the sockets of its run's box, by name; and what reaches it: connections
 * to its published ports, and files of the box that were renewed.
 * What it is not: a proxy: it reads no byte of what it carries.
 */
#define _GNU_SOURCE
#include "keeper.h"
#include "link.h"
#include "loop.h"
#include "stream.h"
#include "sys.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* Connections at once, each way; directories of the box; a renewed file. */
enum { GUEST_OPENS_MAX = 512, HOST_OPENS_MAX = 512, PLACES_MAX = 64, FILE_MAX = 60 * 1024 };
enum { KIND_SOCKET = 1, KIND_PORT = 2, ACCEPTS_AT_ONCE = 16, PATIENCE_MS = 30000 };

struct place {
    int watch;
    char path[192]; /* below the box; empty: the box itself */
};

struct parked {
    uint32_t stream;
    const char *name;
    int64_t until_ms;
};

static struct box {
    const struct keeper_options *options;
    int directory, notices;
    struct source on_notice;
    struct source on_port[KEEPER_PORTS_MAX];
    struct place places[PLACES_MAX];
    size_t place_count;
    struct timespec since; /* files that changed later are sent when the guest has come */
    uint32_t guest_last, host_last; /* numbers only grow */
    size_t guest_open, host_open;
    struct parked parked[GUEST_OPENS_MAX]; /* for room in the backlog of a socket; in the order of their coming */
    size_t parked_count;
    bool joined;
} self = {.host_last = STREAM_FIRST_HOST - 2};

static void tell_abort(uint32_t stream, int error)
{
    struct writer payload = {0};
    write_u32(&payload, stream);
    write_u32(&payload, (uint32_t)error);
    link_send_payload('A', &payload);
    free(payload.data);
}

/* Newcomers waited in the kernel's backlog. */
static void accept_again(void)
{
    for (size_t i = 0; self.joined && i < self.options->port_count; i++)
        (void)!loop_watch(&self.on_port[i], self.options->ports[i].fd, LOOP_READ);
}

static void on_guest_stream_ended(uint32_t number)
{
    (void)number;
    self.guest_open--;
    accept_again();
}

/* Connect to a socket of the box: false when its backlog is full, and it shall be tried again. */
static bool connect_to(uint32_t stream, const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int length = snprintf(address.sun_path, sizeof address.sun_path, "%s/%s", self.options->box, name);
    int fd = length < 0 || length >= (int)sizeof address.sun_path
                 ? -1
                 : socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        tell_abort(stream, EMFILE);
        return true;
    }
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        int error = errno;
        close(fd);
        if (error == EAGAIN)
            return false;
        tell_abort(stream, error);
        return true;
    }
    self.guest_open++;
    if (stream_open(stream, fd, STREAM_SENDS | STREAM_RECEIVES | STREAM_INVITES, on_guest_stream_ended) < 0) {
        self.guest_open--;
        tell_abort(stream, ENOMEM);
    }
    return true;
}

/* The name as the plan has it, or NULL: nothing that the guest says becomes part of a path. */
static const char *given(const struct reader *name)
{
    for (size_t i = 0; i < self.options->socket_count; i++)
        if (strlen(self.options->sockets[i]) == name->left && memcmp(self.options->sockets[i], name->at, name->left) == 0)
            return self.options->sockets[i];
    return NULL;
}

void keeper_box_guest_opens(uint32_t stream, struct reader *payload)
{
    uint8_t kind = read_u8(payload);
    const char *name = payload->bad ? NULL : given(payload);
    if (!name || kind != KIND_SOCKET || stream % 2 == 0 || stream >> 31 || stream <= self.guest_last)
        keeper_fail("guest-protocol", "the guest broke the protocol of the link: it opened what it was not given");
    self.guest_last = stream;
    if (self.guest_open + self.parked_count >= GUEST_OPENS_MAX) {
        tell_abort(stream, EMFILE);
    } else if (!connect_to(stream, name)) {
        self.parked[self.parked_count++] =
            (struct parked){.stream = stream, .name = name, .until_ms = sys_now_ms() + PATIENCE_MS};
        keeper_tick_soon();
    }
}

bool keeper_box_knows(uint32_t stream)
{
    if (stream % 2 == 1)
        return stream <= self.guest_last;
    return stream >= STREAM_FIRST_HOST && stream <= self.host_last;
}

bool keeper_box_waiting(void)
{
    return self.parked_count > 0;
}

void keeper_box_tick(void)
{
    size_t kept = 0;
    for (size_t i = 0; i < self.parked_count; i++) {
        struct parked parked = self.parked[i];
        if (connect_to(parked.stream, parked.name))
            continue;
        if (sys_now_ms() < parked.until_ms)
            self.parked[kept++] = parked;
        else
            tell_abort(parked.stream, EAGAIN);
    }
    self.parked_count = kept;
}

void keeper_box_forget(uint32_t stream)
{
    size_t kept = 0;
    for (size_t i = 0; i < self.parked_count; i++)
        if (self.parked[i].stream != stream)
            self.parked[kept++] = self.parked[i];
    self.parked_count = kept;
}

static void on_host_stream_ended(uint32_t number)
{
    (void)number;
    self.host_open--;
    accept_again();
}

/* A connection to a published port: the guest connects its own end. */
static void on_port(struct source *source, uint32_t events)
{
    (void)events;
    char text[8];
    size_t which = (size_t)(source - self.on_port);
    for (int i = 0; i < ACCEPTS_AT_ONCE; i++) {
        if (self.host_open >= HOST_OPENS_MAX) {
            (void)!loop_watch(source, source->fd, 0);
            return;
        }
        int client = accept4(source->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (client < 0) {
            /* Out of descriptors: a level-triggered loop would spin. */
            if (errno == EMFILE || errno == ENFILE)
                (void)!loop_watch(source, source->fd, 0);
            return;
        }
        struct writer payload = {0};
        self.host_last += 2;
        write_u32(&payload, self.host_last);
        write_u8(&payload, KIND_PORT);
        int length = snprintf(text, sizeof text, "%u", self.options->ports[which].port);
        write_bytes(&payload, text, (size_t)length);
        link_send_payload('O', &payload);
        free(payload.data);
        self.host_open++;
        if (stream_open(self.host_last, client, STREAM_SENDS | STREAM_RECEIVES, on_host_stream_ended) < 0) {
            self.host_open--;
            tell_abort(self.host_last, ENOMEM);
        }
    }
}

static void write_item(struct writer *list, const void *data, size_t length)
{
    write_u32(list, (uint32_t)length);
    write_bytes(list, data, length);
}

/* Send one file of the box, if it is one, and small enough to be a token and its kind. */
static void send_file(const char *path)
{
    char content[FILE_MAX + 1], mode[8];
    struct stat about;
    struct writer list = {0};
    int fd = openat(self.directory, path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return;
    ssize_t length = fstat(fd, &about) == 0 && S_ISREG(about.st_mode) ? read(fd, content, sizeof content) : -1;
    close(fd);
    if (length < 0 || length > FILE_MAX)
        return;
    write_u32(&list, 3);
    write_item(&list, path, strlen(path));
    snprintf(mode, sizeof mode, "%o", about.st_mode & 07777);
    write_item(&list, mode, strlen(mode));
    write_item(&list, content, (size_t)length);
    link_send_payload('U', &list);
    if (list.data)
        explicit_bzero(list.data, list.length); /* tokens */
    explicit_bzero(content, sizeof content);
    free(list.data);
}

static bool later(const struct timespec *time)
{
    return time->tv_sec > self.since.tv_sec ||
           (time->tv_sec == self.since.tv_sec && time->tv_nsec >= self.since.tv_nsec);
}

static void watch_place(const char *path);

/* What is in a directory: others are watched too; with `changed` files that are newer than our start are sent. */
static void visit(const char *path, bool changed)
{
    int fd = openat(self.directory, *path ? path : ".", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *directory = fd < 0 ? NULL : fdopendir(fd);
    const struct dirent *entry;
    while (directory && (entry = readdir(directory))) {
        char below[192];
        struct stat about;
        int length = snprintf(below, sizeof below, "%s%s%s", path, *path ? "/" : "", entry->d_name);
        if (entry->d_name[0] == '.' || length >= (int)sizeof below ||
            fstatat(self.directory, below, &about, AT_SYMLINK_NOFOLLOW) < 0)
            continue;
        if (S_ISDIR(about.st_mode) && !changed)
            watch_place(below);
        else if (S_ISREG(about.st_mode) && changed && later(&about.st_ctim))
            send_file(below);
    }
    if (directory)
        closedir(directory);
    else if (fd >= 0)
        close(fd);
}

static void watch_place(const char *path)
{
    char whole[PATH_MAX];
    if (self.place_count == PLACES_MAX || strlen(path) >= sizeof self.places[0].path)
        return;
    snprintf(whole, sizeof whole, "%s/%s", self.options->box, path);
    int watch = inotify_add_watch(self.notices, whole, IN_MOVED_TO | IN_CLOSE_WRITE | IN_CREATE | IN_ONLYDIR | IN_DONT_FOLLOW);
    if (watch < 0)
        return;
    for (size_t i = 0; i < self.place_count; i++)
        if (self.places[i].watch == watch)
            return;
    struct place *place = &self.places[self.place_count++];
    place->watch = watch;
    strcpy(place->path, path);
    visit(path, false);
    if (self.joined)
        visit(path, true);
}

static void on_event(const struct inotify_event *event)
{
    char path[512];
    for (size_t i = 0; i < self.place_count; i++) {
        const struct place *place = &self.places[i];
        if (place->watch != event->wd || event->len == 0 || event->name[0] == '.')
            continue;
        snprintf(path, sizeof path, "%s%s%s", place->path, *place->path ? "/" : "", event->name);
        if (event->mask & IN_ISDIR)
            watch_place(path);
        else if (!(event->mask & IN_CREATE)) /* whoever made it is still writing */
            send_file(path);
        return;
    }
}

static void on_notice(struct source *source, uint32_t events)
{
    (void)events;
    char buffer[8192] __attribute__((aligned(__alignof__(struct inotify_event))));
    ssize_t got;
    while ((got = read(source->fd, buffer, sizeof buffer)) > 0)
        for (char *at = buffer; at < buffer + got;) {
            const struct inotify_event *event = (const struct inotify_event *)at;
            on_event(event);
            at += sizeof *event + event->len;
        }
}

int keeper_box_open(const struct keeper_options *options)
{
    self.options = options;
    self.directory = open(options->box, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    self.notices = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (self.directory < 0 || self.notices < 0 || clock_gettime(CLOCK_REALTIME, &self.since) < 0)
        return -1;
    self.since.tv_sec -= 1; /* a kernel's time of a file is up to a tick behind; to send one twice does no harm */
    self.on_notice.ready = on_notice;
    watch_place("");
    return self.place_count == 0 ? -1 : 0;
}

void keeper_box_joined(void)
{
    self.joined = true;
    for (size_t i = 0; i < self.place_count; i++)
        visit(self.places[i].path, true);
    if (loop_watch(&self.on_notice, self.notices, LOOP_READ) < 0)
        keeper_end(125);
    for (size_t i = 0; i < self.options->port_count; i++) {
        self.on_port[i].ready = on_port;
        if (fcntl(self.options->ports[i].fd, F_SETFL, O_RDWR | O_NONBLOCK) < 0 ||
            loop_watch(&self.on_port[i], self.options->ports[i].fd, LOOP_READ) < 0)
            keeper_end(125);
    }
}
