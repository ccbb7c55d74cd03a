/*
 * What it is: the fast front door. `cloister run` and `cloister exec` with a broker that answers:
 * hand it the raw words, the environment and the descriptors, then become the outer half. No
 * interpreter is started for that (measured: 20 ms of 35).
 * What it is not: a parser. Words are understood in one place, runs/words.py, by the broker.
 * Everything else (other verbs, no broker, help) is Python's: the script beside this program.
 */
#define _GNU_SOURCE
#include "client.h"
#include "frame.h"
#include "shim.h"
#include "sys.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

extern char **environ;

enum { DESCRIPTORS = 3 };

static const char PYTHON[] = "cloister-python";

/* The broker's socket, by the rule of runs/client.py. Without a runtime directory that rule asks more: not here. */
static bool broker_address(struct sockaddr_un *address)
{
    const char *base = getenv("XDG_RUNTIME_DIR");
    char own[64];
    struct stat status;
    if (!base || base[0] != '/') {
        snprintf(own, sizeof own, "/run/user/%u", getuid());
        if (lstat(own, &status) < 0 || status.st_uid != getuid())
            return false;
        base = own;
    }
    int length = (int)strlen(base);
    while (length > 0 && base[length - 1] == '/')
        length--;
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    int written = snprintf(address->sun_path, sizeof address->sun_path, "%.*s/cloister/broker.sock", length, base);
    return written > 0 && (size_t)written < sizeof address->sun_path;
}

/* A connection to a broker that is ours by the kernel's word (unix(7), SO_PEERCRED), or -1. */
static int connect_broker(void)
{
    struct sockaddr_un address;
    struct ucred peer;
    socklen_t size = sizeof peer;
    if (!broker_address(&address))
        return -1;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0 &&
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == getuid())
        return fd;
    close(fd);
    return -1;
}

static void write_item(struct writer *writer, const char *text)
{
    size_t length = strlen(text);
    if (length > FRAME_PAYLOAD_MAX) {
        writer->bad = true;
        return;
    }
    write_u32(writer, (uint32_t)length);
    write_bytes(writer, text, length);
}

/* Begin a frame whose length is filled in by `frame_end`; returns where it begins. */
static size_t frame_begin(struct writer *writer, char type)
{
    size_t start = writer->length;
    write_u32(writer, 0);
    write_u8(writer, (uint8_t)type);
    return start;
}

static void frame_end(struct writer *writer, size_t start)
{
    size_t length = writer->length - start - FRAME_HEADER;
    if (writer->bad)
        return;
    if (length > FRAME_PAYLOAD_MAX) {
        writer->bad = true;
        return;
    }
    for (int i = 0; i < 4; i++)
        writer->data[start + (size_t)i] = (uint8_t)(length >> (8 * i));
}

static void write_list(struct writer *writer, char type, char *const *items)
{
    uint32_t count = 0;
    size_t start = frame_begin(writer, type);
    while (items[count])
        count++;
    write_u32(writer, count);
    for (uint32_t i = 0; i < count; i++)
        write_item(writer, items[i]);
    frame_end(writer, start);
}

/* The request in its three frames: what is asked (L), the words (V), the environment (N). */
static bool write_request(struct writer *writer, const char *verb, char *const *words)
{
    char fields[2][PATH_MAX + 8];
    char directory[PATH_MAX];
    if (!getcwd(directory, sizeof directory) || directory[0] != '/')
        return false;
    snprintf(fields[0], sizeof fields[0], "verb=%s", verb);
    snprintf(fields[1], sizeof fields[1], "cwd=%s", directory);
    char terminal[] = "terminal=1", raw[] = "raw=1";
    char *head[] = {fields[0], fields[1], raw, isatty(0) && isatty(1) ? terminal : NULL, NULL};
    write_list(writer, 'L', head);
    write_list(writer, 'V', words);
    write_list(writer, 'N', environ);
    return !writer->bad;
}

/* Send everything; standard input, output and error travel with the first byte. */
static bool send_request(int fd, const struct writer *request)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int) * DESCRIPTORS)];
        struct cmsghdr align;
    } control = {0};
    const int descriptors[DESCRIPTORS] = {0, 1, 2};
    struct iovec part = {.iov_base = request->data, .iov_len = request->length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof descriptors);
    memcpy(CMSG_DATA(head), descriptors, sizeof descriptors);
    while (part.iov_len > 0) {
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return false;
        part.iov_base = (char *)part.iov_base + sent;
        part.iov_len -= (size_t)sent;
        message.msg_control = NULL;
        message.msg_controllen = 0;
    }
    return true;
}

/*
 * Whether this is left to Python: by the broker (frame H: help, a dry run), or because it died with the request
 * unread, which Python starts another one for. Looks without taking.
 */
static bool declined(int fd)
{
    uint8_t head[FRAME_HEADER];
    ssize_t seen;
    do
        seen = recv(fd, head, sizeof head, MSG_PEEK | MSG_WAITALL);
    while (seen < 0 && errno == EINTR);
    if (seen < 0)
        return errno == ECONNRESET;
    return seen == (ssize_t)sizeof head && head[FRAME_HEADER - 1] == 'H';
}

/* The connection on which the broker goes on with this run, or -1: start Python. */
static int ask_broker(const char *verb, char *const *words)
{
    int fd = connect_broker();
    if (fd < 0)
        return -1;
    struct writer request = {0};
    bool good = write_request(&request, verb, words) && send_request(fd, &request) && !declined(fd);
    free(request.data);
    if (good)
        return fd;
    close(fd);
    return -1;
}

/* Become the script that the installer put beside this program; its first line names the right interpreter. */
static int become_python(char **argv)
{
    char path[PATH_MAX + sizeof PYTHON];
    ssize_t length = readlink("/proc/self/exe", path, PATH_MAX);
    if (length > 0) {
        path[length] = '\0';
        char *slash = strrchr(path, '/');
        if (slash) {
            strcpy(slash + 1, PYTHON);
            execv(path, argv);
        }
    }
    fputs("cloister: cloister-shim is started by `cloister run`, not by hand [shim-usage]\n"
          "  try: cloister run --help\n",
          stderr);
    return EXIT_CLOISTER;
}

int client_main(int argc, char **argv)
{
    if (argc >= 2 && (strcmp(argv[1], "run") == 0 || strcmp(argv[1], "exec") == 0) && sys_fill_stdio() == 0) {
        int fd = ask_broker(argv[1], argv + 2);
        if (fd >= 0)
            return outer_run(fd);
    }
    return become_python(argv);
}
