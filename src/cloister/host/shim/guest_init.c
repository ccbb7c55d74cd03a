/*
 * What it is: PID 1 of a guest until the channel is open, whatever the run.
 * What it is not: the link, or the agent's confinement; the run's inner half does that, as everywhere.
 *
 * One rule above all: no verified root, no guest. Whatever is odd is said on the console, and the machine goes off.
 */
#define _GNU_SOURCE
#include "guest_init.h"
#include "guest_line.h"
#include "guest_root.h"
#include "guest_run.h"
#include "sys.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CHANNEL_WITHIN_MS = 60000, CHANNEL_PORT = 5000, LINE_SIZE = 4096 };

/* What no agent needs and the kernel still has. A kernel without one of them has nothing to lock there. */
static const char *const LOCKS[][2] = {
    {"kernel/modules_disabled", "1"}, /* what is loaded now is all there will ever be */
    {"kernel/kexec_load_disabled", "1"},
    {"kernel/dmesg_restrict", "1"},
    {"kernel/kptr_restrict", "2"},
    {"kernel/unprivileged_bpf_disabled", "1"},
    {"kernel/perf_event_paranoid", "3"},
    {"kernel/sysrq", "0"},
    {"kernel/core_pattern", ""},
    {"kernel/panic_on_oops", "1"}, /* a kernel that has tripped over itself is not to be trusted any more */
    {"fs/protected_symlinks", "1"},
    {"fs/protected_hardlinks", "1"},
    {"fs/protected_fifos", "2"},
    {"fs/protected_regular", "2"},
};

_Noreturn static void give_up(const char *what, int error)
{
    printf("cloister: the guest does not start: %s%s%s\n", what, error ? ": " : "", error ? strerror(error) : "");
    guest_off(NULL);
}

static void require(const char *wrong)
{
    if (wrong)
        give_up(wrong, errno);
}

static void read_line(struct guest_line *line)
{
    static char text[LINE_SIZE];
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    if (got <= 0 || got == (ssize_t)sizeof text - 1)
        give_up("the command line cannot be read", got < 0 ? errno : 0);
    text[got] = 0;
    const char *wrong = guest_line_parse(line, text);
    if (wrong)
        give_up(wrong, 0);
}

static void lock_kernel(void)
{
    char path[128];
    for (size_t i = 0; i < sizeof LOCKS / sizeof *LOCKS; i++) {
        snprintf(path, sizeof path, "/proc/sys/%s", LOCKS[i][0]);
        int fd = open(path, O_WRONLY | O_CLOEXEC);
        if (fd < 0 && errno == ENOENT)
            continue;
        size_t length = strlen(LOCKS[i][1]);
        if (fd < 0 || (length ? write(fd, LOCKS[i][1], length) : write(fd, "\n", 1)) < 0)
            give_up(LOCKS[i][0], errno);
        close(fd);
    }
}

/* The virtio port that is named `cloister`; it is numbered as the monitor likes, and comes late. */
static int open_port(void)
{
    static const char ports[] = "/sys/class/virtio-ports";
    char path[512], name[32];
    int found = -1;
    DIR *directory = opendir(ports);
    for (struct dirent *entry; directory && found < 0 && (entry = readdir(directory));) {
        snprintf(path, sizeof path, "%s/%s/name", ports, entry->d_name);
        int fd = *entry->d_name == '.' ? -1 : open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        ssize_t got = read(fd, name, sizeof name);
        close(fd);
        if (got != 9 || memcmp(name, "cloister\n", 9) != 0)
            continue;
        snprintf(path, sizeof path, "%s/%s", GUEST_DEVICES, entry->d_name);
        found = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    }
    if (directory)
        closedir(directory);
    return found;
}

/* A monitor without virtio-serial connects to us. Without such a device the guest has no address of that family. */
static int open_vsock(void)
{
    unsigned own = VMADDR_CID_ANY;
    const struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = CHANNEL_PORT, .svm_cid = VMADDR_CID_ANY};
    int control = open(GUEST_DEVICES "/vsock", O_RDONLY | O_CLOEXEC);
    int result = control < 0 ? -1 : ioctl(control, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &own);
    if (control >= 0)
        close(control);
    if (result < 0 || own == VMADDR_CID_ANY || own <= VMADDR_CID_HOST)
        return -1;
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd >= 0 && (bind(fd, (const struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 1) < 0)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

/* The open port; or, with `listens`, a socket that waits for its monitor. */
static int open_channel(bool *listens)
{
    int64_t until = sys_now_ms() + CHANNEL_WITHIN_MS;
    for (;;) {
        int channel = open_port();
        if (channel < 0)
            *listens = (channel = open_vsock()) >= 0;
        if (channel >= 0)
            return channel;
        if (sys_now_ms() > until)
            give_up("the channel did not come", errno);
        (void)!poll(NULL, 0, 1);
    }
}

_Noreturn void guest_init(int count)
{
    static struct guest_line line;
    setvbuf(stdout, NULL, _IOLBF, 0);
    (void)clearenv();
    if (count != 1)
        give_up("the command line holds words that are nobody's", 0);
    require(guest_root_begin());
    read_line(&line);
    if (line.probe) {
        printf("cloister: hello from a guest\n");
        guest_off(NULL);
    }
    require(guest_root_modules());
    require(guest_root_open(&line));
    require(guest_root_enter());
    lock_kernel();
    bool listens = false;
    int channel = open_channel(&listens);
    guest_link(listens ? -1 : channel, listens ? channel : -1, line.root_hash, &guest_run_hooks);
}
