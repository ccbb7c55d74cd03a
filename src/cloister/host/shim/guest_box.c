/*
 * What it is: what a guest has of its run's box, and the host of the guest: the box's sockets, the guest's published
 * ports, renewed files, figures. What it is not: a judge of what goes through; the host's end is.
 */
#define _GNU_SOURCE
#include "guest_link.h"
#include "link.h"
#include "loop.h"
#include "stream.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/sysinfo.h>
#include <unistd.h>

/* As many connections at once as the keeper takes: more wait in the sockets' backlogs. */
enum { SOCKETS_MAX = 64, CONNECTIONS_MAX = 500, ACCEPTS_AT_ONCE = 16, KIND_SOCKET = 1, KIND_PORT = 2 };

struct listener {
    struct source source; /* first: on_client casts */
    char name[64];
    int fd;
};

static struct box {
    struct listener listeners[SOCKETS_MAX];
    size_t count, open;
    uint32_t last; /* of our streams, odd ones */
    bool held;
} self = {.last = (uint32_t)-1};

static void watch_all(void)
{
    uint32_t wanted = self.held || self.open >= CONNECTIONS_MAX ? 0 : LOOP_READ;
    for (size_t i = 0; i < self.count; i++)
        (void)!loop_watch(&self.listeners[i].source, self.listeners[i].fd, wanted);
}

static void on_ended(uint32_t number)
{
    (void)number;
    if (self.open-- == CONNECTIONS_MAX)
        watch_all();
}

static void on_client(struct source *source, uint32_t events)
{
    (void)events;
    const struct listener *listener = (const struct listener *)source;
    for (int i = 0; i < ACCEPTS_AT_ONCE; i++) {
        if (self.open >= CONNECTIONS_MAX) {
            watch_all();
            return;
        }
        int client = accept4(source->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (client < 0)
            return;
        struct writer payload = {0};
        self.last += 2;
        write_u32(&payload, self.last);
        write_u8(&payload, KIND_SOCKET);
        write_bytes(&payload, listener->name, strlen(listener->name));
        link_send_payload('O', &payload);
        free(payload.data);
        self.open++;
        if (stream_open(self.last, client, STREAM_SENDS | STREAM_RECEIVES | STREAM_AWAITS, on_ended) < 0)
            self.open--;
    }
}

bool guest_box_listen(const char *name)
{
    if (self.count == SOCKETS_MAX || strlen(name) >= sizeof self.listeners[0].name)
        return false;
    struct listener *listener = &self.listeners[self.count];
    listener->fd = guest_hooks->box_socket(name);
    if (listener->fd < 0)
        return false;
    strcpy(listener->name, name);
    listener->source.ready = on_client;
    self.count++;
    return loop_watch(&listener->source, listener->fd, self.held ? 0 : LOOP_READ) == 0;
}

void guest_box_hold(bool held)
{
    self.held = held;
    watch_all();
}

void guest_box_port(uint32_t stream, struct reader *payload)
{
    char text[8] = "";
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    uint32_t error = ECONNREFUSED;
    bool good = read_u8(payload) == KIND_PORT && payload->left > 0 && payload->left < sizeof text;
    if (good)
        memcpy(text, payload->at, payload->left);
    address.sin_port = htons((uint16_t)atoi(text));
    int fd = good ? socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0) : -1;
    /* Under way it takes no bytes, and reports its failure as a reset would be. */
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) {
        close(fd);
        fd = -1;
    }
    if (fd < 0 || stream_open(stream, fd, STREAM_SENDS | STREAM_RECEIVES, NULL) < 0)
        guest_tell_id('A', stream, &error, sizeof error);
}

/* One item of a list, which may hold any bytes. */
static struct reader item(struct reader *list)
{
    struct reader found = {.left = read_u32(list)};
    if (list->bad || found.left > list->left) {
        list->bad = true;
        return (struct reader){.bad = true};
    }
    found.at = list->at;
    list->at += found.left;
    list->left -= found.left;
    return found;
}

static bool as_text(struct reader item, char *text, size_t size)
{
    if (item.bad || item.left >= size || memchr(item.at, 0, item.left))
        return false;
    memcpy(text, item.at, item.left);
    text[item.left] = 0;
    return true;
}

void guest_box_update(struct reader *payload)
{
    char path[512], mode[8];
    uint32_t count = read_u32(payload);
    if (count != 3 || !as_text(item(payload), path, sizeof path) || !as_text(item(payload), mode, sizeof mode))
        return;
    struct reader content = item(payload);
    if (!content.bad)
        (void)!guest_hooks->update(path, (mode_t)strtoul(mode, NULL, 8), content.at, content.left);
}

static void figure(struct writer *list, uint32_t *count, const char *name, unsigned long long value)
{
    char word[64];
    int length = snprintf(word, sizeof word, "%s=%llu", name, value);
    write_u32(list, (uint32_t)length);
    write_bytes(list, word, (size_t)length);
    (*count)++;
}

static void disk(struct writer *list, uint32_t *count, const char *name, const char *path)
{
    struct statvfs about;
    char word[32];
    if (statvfs(path, &about) < 0)
        return;
    snprintf(word, sizeof word, "%s_total", name);
    figure(list, count, word, (unsigned long long)about.f_blocks * about.f_frsize);
    snprintf(word, sizeof word, "%s_free", name);
    figure(list, count, word, (unsigned long long)about.f_bavail * about.f_frsize);
}

/* MemAvailable: sysinfo(2) does not count what the page cache would give back. */
static unsigned long long memory_available(void)
{
    static const char name[] = "MemAvailable:";
    char line[128];
    unsigned long long kib = 0;
    FILE *file = fopen("/proc/meminfo", "re");
    while (file && kib == 0 && fgets(line, sizeof line, file))
        if (strncmp(line, name, sizeof name - 1) == 0)
            kib = strtoull(line + sizeof name - 1, NULL, 10);
    if (file)
        fclose(file);
    return kib * 1024;
}

void guest_figures(void)
{
    struct writer list = {0}, words = {0};
    struct sysinfo system;
    uint32_t count = 0;
    if (sysinfo(&system) == 0) {
        figure(&words, &count, "uptime_s", (unsigned long long)system.uptime);
        figure(&words, &count, "memory_total", (unsigned long long)system.totalram * system.mem_unit);
        figure(&words, &count, "memory_available", memory_available());
        figure(&words, &count, "processes", system.procs);
        figure(&words, &count, "load_1_percent", (unsigned long long)system.loads[0] * 100 >> SI_LOAD_SHIFT);
    }
    disk(&words, &count, "workspace", "/workspace");
    disk(&words, &count, "var", "/var");
    write_u32(&list, count);
    write_bytes(&list, words.data, words.length);
    link_send_payload('T', &list);
    free(words.data);
    free(list.data);
}
