/*
 * What it is: what the broker's `B` frame asks of the outer half: namespaces, overlays, and one
 * child with descriptors in fixed places. What it is not: a sandbox; bubblewrap makes that.
 */
#define _GNU_SOURCE
#include "launch.h"
#include "hold.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* First place of a passed descriptor, and where they are kept out of the way while being placed. */
enum { FIRST_PLACE = 3, ASIDE = 64 };

bool launch_parse(struct launch *launch, const struct frame *frame)
{
    memset(launch, 0, sizeof *launch);
    launch->frame = *frame;
    struct reader reader = frame_reader(frame);
    launch->flags = read_u32(&reader);
    launch->argv = read_list(&reader, &launch->argc);
    launch->overlays = read_list(&reader, &launch->overlay_fields);
    if (!reader.bad && reader.left > 0)
        launch->nft = read_list(&reader, &launch->nft_count);
    if (!reader.bad && reader.left > 0)
        launch->report = read_list(&reader, &launch->report_count);
    if (!reader.bad && reader.left > 0)
        launch->holds = read_list(&reader, &launch->hold_fields);
    if (!read_complete(&reader) || launch->overlay_fields % 4 || launch->hold_fields % HOLD_FIELDS)
        return false;
    /* Nothing is searched on PATH: the environment of the child is empty. */
    if (launch->argc > 0 && launch->argv[0][0] != '/')
        return false;
    if (launch->nft_count > 0 && launch->nft[0][0] != '/')
        return false;
    return launch->report_count == 0 || launch->report[0][0] == '/';
}

void launch_release(struct launch *launch)
{
    frame_release(&launch->frame);
    free(launch->argv);
    free(launch->overlays);
    free(launch->nft);
    free(launch->holds);
    launch->argv = launch->overlays = launch->nft = launch->holds = NULL;
}

static int write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t written = write(fd, text, strlen(text));
    int saved = errno;
    close(fd);
    errno = saved;
    return written == (ssize_t)strlen(text) ? 0 : -1;
}

/* Map exactly our own ids to themselves (user_namespaces(7)). */
static int map_ids(uid_t uid, gid_t gid)
{
    char map[64];
    if (write_file("/proc/self/setgroups", "deny") < 0)
        return -1;
    snprintf(map, sizeof map, "%u %u 1", uid, uid);
    if (write_file("/proc/self/uid_map", map) < 0)
        return -1;
    snprintf(map, sizeof map, "%u %u 1", gid, gid);
    return write_file("/proc/self/gid_map", map);
}

/* Mount one overlay. Directories are opened first and named by descriptor: no path can hold a `:` or `,` then. */
static int mount_overlay(char **fields)
{
    int fds[4] = {-1, -1, -1, -1};
    int result = 0;
    for (int i = 0; i < 4 && result == 0; i++) {
        fds[i] = open(fields[i], O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (fds[i] < 0)
            result = -1;
    }
    if (result == 0) {
        char options[256], target[64];
        snprintf(options, sizeof options,
                 "userxattr,lowerdir=/proc/self/fd/%d,upperdir=/proc/self/fd/%d,workdir=/proc/self/fd/%d", fds[0],
                 fds[1], fds[2]);
        snprintf(target, sizeof target, "/proc/self/fd/%d", fds[3]);
        result = mount("overlay", target, "overlay", MS_NODEV | MS_NOSUID, options);
    }
    int saved = errno;
    for (int i = 0; i < 4; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    errno = saved;
    return result;
}

/* Put the passed descriptors at 3, 4, 5… and close all others. */
static int place_descriptors(const struct frame *frame)
{
    int aside[FRAME_DESCRIPTORS_MAX];
    for (unsigned i = 0; i < frame->descriptor_count; i++) {
        aside[i] = fcntl(frame->descriptors[i], F_DUPFD_CLOEXEC, ASIDE);
        if (aside[i] < 0)
            return -1;
    }
    for (unsigned i = 0; i < frame->descriptor_count; i++)
        if (dup2(aside[i], FIRST_PLACE + (int)i) < 0)
            return -1;
    return close_range(FIRST_PLACE + frame->descriptor_count, ~0U, 0);
}

/* Undo what the loop did to signals: a blocked or ignored signal would survive execve(2). */
int launch_reset_signals(void)
{
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL); /* fails for SIGKILL, SIGSTOP and libc's own two, which need no reset */
    sigset_t none;
    sigemptyset(&none);
    return sigprocmask(SIG_SETMASK, &none, NULL);
}

_Noreturn static void child_failed(const char *what)
{
    char text[256];
    int length = snprintf(text, sizeof text, "cloister: cannot %s: %s [launch-failed]\n", what, strerror(errno));
    if (length > 0)
        (void)!write(2, text, (size_t)length);
    _exit(EXIT_CLOISTER);
}

/* Keep CAP_NET_ADMIN over execve(2) although our uid is not 0 (capabilities(7), "Ambient"). */
static int keep_net_admin(void)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &head, data) < 0)
        return -1;
    data[0].inheritable |= 1U << CAP_NET_ADMIN;
    if (syscall(SYS_capset, &head, data) < 0)
        return -1;
    return prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_ADMIN, 0, 0);
}

/* Run nft to its end: 0 when it was content. `output` (-1: our own) becomes its stdout. */
static int run_nft(const struct launch *launch, char **argv, int output)
{
    pid_t pid = fork();
    if (pid < 0)
        return -1;
    if (pid == 0) {
        char *const empty[] = {NULL};
        if ((output >= 0 && dup2(output, 1) < 0) || launch_reset_signals() < 0 || keep_net_admin() < 0 ||
            place_descriptors(&launch->frame) < 0)
            child_failed("prepare nft");
        execve(argv[0], argv, empty);
        child_failed("start nft");
    }
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return -1;
    errno = EPERM;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -1;
}

/* Enter new namespaces; in a user namespace our ids stay what they are, and mounts stay our own. */
static const char *enter(int kinds)
{
    uid_t uid = getuid();
    gid_t gid = getgid();
    if (kinds && unshare(kinds) < 0)
        return "make a namespace";
    if ((kinds & CLONE_NEWUSER) && map_ids(uid, gid) < 0)
        return "map ids in the user namespace";
    if ((kinds & CLONE_NEWNS) && mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0)
        return "detach the mount namespace";
    return NULL;
}

const char *launch_hold(const struct launch *launch)
{
    if (launch->hold_fields == 0)
        return NULL;
    const char *failed = enter(CLONE_NEWUSER | CLONE_NEWNS);
    if (!failed && hold_all(launch->holds, launch->hold_fields) < 0)
        failed = "protect the workspace";
    return failed;
}

const char *launch_prepare(const struct launch *launch)
{
    int kinds = 0;
    if (launch->flags & LAUNCH_USERNS)
        kinds |= CLONE_NEWUSER | CLONE_NEWNS;
    if (launch->flags & LAUNCH_NETNS)
        kinds |= CLONE_NEWNET;
    if (launch->overlay_fields > 0 && !(launch->flags & LAUNCH_USERNS)) {
        errno = EINVAL;
        return "mount an overlay outside a mount namespace";
    }
    const char *failed = enter(kinds);
    if (failed)
        return failed;
    for (size_t i = 0; i < launch->overlay_fields; i += 4)
        if (mount_overlay(launch->overlays + i) < 0)
            return "mount the overlay";
    if (launch->nft_count > 0) {
        if (!(launch->flags & LAUNCH_NETNS)) {
            errno = EINVAL;
            return "load rules outside a network namespace";
        }
        if (run_nft(launch, launch->nft, -1) < 0)
            return "load the nft rules";
    }
    return NULL;
}

int launch_report(const struct launch *launch)
{
    int fd = memfd_create("report", MFD_CLOEXEC);
    if (fd >= 0 && (run_nft(launch, launch->report, fd) < 0 || lseek(fd, 0, SEEK_SET) < 0)) {
        close(fd);
        return -1;
    }
    return fd;
}

/* What bubblewrap gets in place of the user's terminal. */
static int place_stdio(int complaints)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0)
        return -1;
    return dup2(complaints, 2);
}

pid_t launch_start(const struct launch *launch, int complaints)
{
    pid_t parent = getpid();
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    char *const empty[] = {NULL};
    /* When we are killed, so is bubblewrap, and with it the sandbox. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent)
        _exit(EXIT_CLOISTER);
    if (setsid() < 0)
        child_failed("make a session");
    if ((launch->flags & LAUNCH_PTY) && place_stdio(complaints) < 0)
        child_failed("place standard input and output");
    /* Here and not in the parent: the mounts must be gone when bubblewrap is, or removing what they stand on
     * waits for each of them (2 ms: detach_mounts(), fs/namespace.c). */
    const char *failed = launch_hold(launch);
    if (failed)
        child_failed(failed);
    if (launch_reset_signals() < 0 || place_descriptors(&launch->frame) < 0)
        child_failed("place descriptors");
    execve(launch->argv[0], launch->argv, empty);
    child_failed("start bubblewrap");
}
