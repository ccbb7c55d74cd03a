/*
 * What it is: see notify.h. The filter is put over each command, not over us: our own connect(2) to the relay would
 * wait for ourselves. Descendants inherit it, and the kernel allows no second listener below it.
 */
#define _GNU_SOURCE
#include "notify.h"
#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined __x86_64__
#define NATIVE AUDIT_ARCH_X86_64
#elif defined __aarch64__
#define NATIVE AUDIT_ARCH_AARCH64
#elif defined __riscv
#define NATIVE AUDIT_ARCH_RISCV64
#endif

/* linux/seccomp.h of Linux 5.19: no signal but a fatal one interrupts a call that we have received. */
#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif

enum { WORDS_MAX = 32, WORD_MAX = 1024, ADDRESS_MAX = 128, TOLD_MAX = 16 << 10, TURN_MAX = 64 };
enum call { CALL_EXECVE = 1, CALL_EXECVEAT = 2, CALL_CONNECT = 3 };

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define WHEN(value, then, otherwise) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), (then), (otherwise))
#define RETURN(what) BPF_STMT(BPF_RET | BPF_K, (what))

bool notify_enter(int link)
{
    struct sock_filter program[] = {
        LOAD(arch),
        WHEN(NATIVE, 0, 7), /* other ABIs are refused by the sandbox's own filter */
        LOAD(nr),
        WHEN(SYS_execve, 6, 0),
        WHEN(SYS_execveat, 5, 0),
        WHEN(SYS_connect, 4, 0),
        WHEN(SYS_seccomp, 0, 2),
        LOAD(args[1]),
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, SECCOMP_FILTER_FLAG_NEW_LISTENER, 2, 0),
        RETURN(SECCOMP_RET_ALLOW),
        RETURN(SECCOMP_RET_USER_NOTIF),
        RETURN(SECCOMP_RET_ERRNO | EPERM),
    };
    struct sock_fprog wanted = {.len = sizeof program / sizeof *program, .filter = program};
    unsigned long flags = SECCOMP_FILTER_FLAG_NEW_LISTENER;
    long listener = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, &wanted);
    if (listener < 0 && errno == EINVAL)
        listener = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &wanted);
    if (listener < 0)
        return false;
    char byte = 0, control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec data = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &(int){(int)listener}, sizeof(int));
    bool sent = sendmsg(link, &message, 0) == 1;
    close((int)listener);
    return sent;
}

int notify_take(int link)
{
    char byte, control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec data = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t got;
    do
        got = recvmsg(link, &message, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    struct cmsghdr *header = got == 1 ? CMSG_FIRSTHDR(&message) : NULL;
    if (!header || header->cmsg_type != SCM_RIGHTS)
        return -1;
    int listener;
    memcpy(&listener, CMSG_DATA(header), sizeof listener);
    return listener;
}

/* Text of at most `most` bytes at an address of the process; the count without its NUL, -1 when it cannot be read. */
static ssize_t read_text(int memory, uint64_t address, char *text, size_t most)
{
    size_t length = 0;
    while (length < most) {
        /* Up to the end of a page at once: the next one may not be there. */
        size_t step = 4096 - (size_t)((address + length) % 4096);
        step = step < most - length ? step : most - length;
        ssize_t got = pread(memory, text + length, step, (off_t)(address + length));
        if (got <= 0)
            return length > 0 ? (ssize_t)length : -1;
        char *end = memchr(text + length, 0, (size_t)got);
        if (end)
            return end - text;
        length += (size_t)got;
    }
    return (ssize_t)length;
}

/* One item of a list that is being written. */
static void write_item(struct writer *list, const void *data, size_t length)
{
    write_u32(list, (uint32_t)length);
    write_bytes(list, data, length);
}

static void write_link(struct writer *list, uint32_t pid, const char *name)
{
    char path[64], target[PATH_MAX];
    (void)snprintf(path, sizeof path, "/proc/%u/%s", pid, name);
    ssize_t length = readlink(path, target, sizeof target);
    write_item(list, target, length > 0 ? (size_t)length : 0);
}

static void write_name(struct writer *list, uint32_t pid)
{
    char path[64], name[32];
    (void)snprintf(path, sizeof path, "/proc/%u/comm", pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = file >= 0 ? read(file, name, sizeof name) : 0;
    if (file >= 0)
        close(file);
    write_item(list, name, length > 1 ? (size_t)length - 1 : 0);
}

/* The parent of a process, 0 where that is outside (proc_pid_stat(5), field 4). */
static uint32_t parent_of(uint32_t pid)
{
    char path[64], text[512];
    (void)snprintf(path, sizeof path, "/proc/%u/stat", pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = file >= 0 ? read(file, text, sizeof text - 1) : 0;
    if (file >= 0)
        close(file);
    text[length > 0 ? length : 0] = 0;
    const char *behind = strrchr(text, ')'); /* then a blank, the state, a blank, the parent */
    return behind && strlen(behind) > 4 ? (uint32_t)strtoul(behind + 4, NULL, 10) : 0;
}

/* The arguments of execve(2): a vector of addresses. What exceeds our bounds is left out. */
static void write_words(struct writer *list, int memory, uint64_t vector, uint32_t *count)
{
    static char word[WORD_MAX];
    for (unsigned i = 0; i < WORDS_MAX && list->length < TOLD_MAX; i++) {
        uint64_t address = 0;
        if (pread(memory, &address, sizeof address, (off_t)(vector + i * sizeof address)) != sizeof address || !address)
            return;
        ssize_t length = read_text(memory, address, word, sizeof word);
        if (length < 0)
            return;
        write_item(list, word, (size_t)length);
        ++*count;
    }
}

/* Open what is to be executed, as the process names it: through its own root and directory, and never a device. */
static int open_program(uint32_t pid, const char *name, size_t length)
{
    char path[PATH_MAX + 64];
    if (length == 0 || length >= PATH_MAX)
        return -1;
    (void)snprintf(path, sizeof path, "/proc/%u/%s%.*s", pid, name[0] == '/' ? "root" : "cwd/", (int)length, name);
    int place = open(path, O_PATH | O_CLOEXEC);
    struct stat what;
    int file = -1;
    if (place >= 0 && fstat(place, &what) == 0 && S_ISREG(what.st_mode)) {
        (void)snprintf(path, sizeof path, "/proc/self/fd/%d", place);
        file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    }
    if (place >= 0)
        close(place);
    return file;
}

static bool put(struct channel *broker, uint32_t pid, enum call call, const struct writer *list, uint32_t count,
                 int program)
{
    struct writer payload = {0};
    write_u32(&payload, pid);
    write_u32(&payload, parent_of(pid));
    write_u8(&payload, (uint8_t)call);
    write_u32(&payload, count);
    write_bytes(&payload, list->data, list->length);
    bool good = !list->bad && !payload.bad && channel_send(broker, 'N', payload.data, payload.length, program) == 0;
    if (program >= 0)
        close(program);
    free(payload.data);
    return good;
}

static bool tell(const struct seccomp_notif *asked, int memory, struct channel *broker, enum notify_demand demand)
{
    static char path[PATH_MAX];
    const uint64_t *arguments = (const uint64_t *)asked->data.args;
    struct writer list = {0};
    uint32_t count = 3;
    int program = -1;
    enum call call = asked->data.nr == SYS_execve     ? CALL_EXECVE
                     : asked->data.nr == SYS_execveat ? CALL_EXECVEAT
                                                      : CALL_CONNECT;
    write_name(&list, asked->pid);
    if (call == CALL_CONNECT) {
        char address[ADDRESS_MAX];
        size_t length = arguments[2] < sizeof address ? (size_t)arguments[2] : sizeof address;
        ssize_t got = pread(memory, address, length, (off_t)arguments[1]);
        write_link(&list, asked->pid, "exe");
        write_item(&list, address, got > 0 ? (size_t)got : 0);
    } else {
        bool at = call == CALL_EXECVEAT;
        ssize_t length = read_text(memory, arguments[at ? 1 : 0], path, sizeof path);
        write_item(&list, path, length > 0 ? (size_t)length : 0);
        write_link(&list, asked->pid, "cwd");
        write_words(&list, memory, arguments[at ? 2 : 1], &count);
        if (demand == NOTIFY_FILES && !at && length > 0)
            program = open_program(asked->pid, path, (size_t)length);
    }
    bool good = put(broker, asked->pid, call, &list, count, program);
    free(list.data);
    return good;
}

void notify_started(struct channel *broker, enum notify_demand demand, uint32_t pid, char *const *argv)
{
    char path[64];
    struct writer list = {0};
    uint32_t count = 3;
    (void)snprintf(path, sizeof path, "/proc/%u/exe", pid);
    int program = demand == NOTIFY_FILES ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    write_name(&list, pid);
    write_link(&list, pid, "exe");
    write_link(&list, pid, "cwd");
    for (; *argv && count < WORDS_MAX + 3 && list.length < TOLD_MAX; argv++, count++)
        write_item(&list, *argv, strnlen(*argv, WORD_MAX));
    (void)!put(broker, pid, CALL_EXECVE, &list, count, program); /* whether the broker is there, others find out */
    free(list.data);
}

/* Read what a waiting call asks for, tell it, and let it go on. False: the broker hears nothing any more. */
static bool answer(int listener, const struct seccomp_notif *asked, struct channel *broker, enum notify_demand demand)
{
    char path[64];
    (void)snprintf(path, sizeof path, "/proc/%u/mem", asked->pid);
    int memory = open(path, O_RDONLY | O_CLOEXEC);
    bool told = true;
    uint64_t id = asked->id;
    /* The pid may be another's by now: what we opened counts if the call still waits (seccomp_unotify(2)). */
    if (broker && ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &id) == 0)
        told = tell(asked, memory, broker, demand);
    if (memory >= 0)
        close(memory);
    struct seccomp_notif_resp answer = {.id = asked->id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
    (void)!ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer); /* ENOENT: it was killed meanwhile */
    return told;
}

bool notify_serve(int listener, struct channel *broker, enum notify_demand demand)
{
    for (int turn = 0; turn < TURN_MAX; turn++) {
        struct pollfd wait = {.fd = listener, .events = POLLIN};
        if (poll(&wait, 1, 0) <= 0)
            return true;
        if (!(wait.revents & POLLIN))
            return false; /* POLLHUP: the last one with this filter is gone */
        /* The kernel refuses a buffer that holds anything, and newer ones may want more than our headers know. */
        union {
            struct seccomp_notif notification;
            char room[512];
        } asked = {.room = {0}};
        if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &asked) < 0) {
            if (errno == EINTR || errno == ENOENT)
                continue;
            return false;
        }
        if (!answer(listener, &asked.notification, broker, demand))
            return false;
    }
    return true;
}

struct watched {
    struct source source; /* first: the loop gives us its address */
    struct channel *broker;
    enum notify_demand demand;
};

static void on_ready(struct source *source, uint32_t events)
{
    struct watched *watched = (struct watched *)source;
    int listener = source->fd;
    (void)events;
    if (notify_serve(listener, watched->broker, watched->demand))
        return;
    (void)loop_watch(source, listener, 0);
    close(listener);
    loop_free(watched);
}

bool notify_watch(int listener, struct channel *broker, enum notify_demand demand)
{
    struct watched *watched = calloc(1, sizeof *watched);
    if (!watched)
        return false;
    watched->source.ready = on_ready;
    watched->broker = broker;
    watched->demand = demand;
    if (loop_watch(&watched->source, listener, LOOP_READ) == 0)
        return true;
    free(watched);
    return false;
}
