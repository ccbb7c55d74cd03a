/*
 * What it is: what a booted guest does for the run that comes to it, as the link asks (guest.h).
 * What it is not: boot, or the link.
 */
#define _GNU_SOURCE
#include "guest_run.h"
#include "guest_connections.h"
#include "guest_fields.h"
#include "guest_freeze.h"
#include "guest_identity.h"
#include "guest_mounts.h"
#include "guest_place.h"
#include "guest_pressure.h"
#include "guest_root.h"
#include "guest_tar.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { CAPABILITIES = 64, PENDING = 64 };

/* What the run is, and the words it was read from. */
static struct guest_fields fields;

_Noreturn void guest_off(const char *why)
{
    if (why)
        printf("cloister: the guest ends: %s\n", why);
    (void)fflush(stdout);
    sync();
    /* `reboot=t` on the command line: a triple fault, which every monitor takes for the end. */
    (void)reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}

/* The words of a frame, which is released behind us. Never freed: the tar and the mounts go by them. */
static char **copy(char *const *words, size_t count)
{
    char **kept = calloc(count + 1, sizeof *kept);
    for (size_t i = 0; kept && i < count; i++)
        if (!(kept[i] = strdup(words[i])))
            return NULL;
    return kept;
}

/* User namespaces are where most holes of kernels are reached from: the filter denies them, and here is no other way. */
static const char *without_namespaces(void)
{
    static const char path[] = "/proc/sys/user/max_user_namespaces";
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    ssize_t written = fd < 0 ? -1 : write(fd, "0", 1);
    if (fd >= 0)
        close(fd);
    return written == 1 || errno == ENOENT ? NULL : path;
}

static const char *make_run(char *const *words, size_t count)
{
    char **kept = copy(words, count);
    errno = EINVAL;
    const char *wrong = kept ? guest_fields_read(&fields, kept, count) : "memory";
    if (wrong)
        return wrong;
    if (!fields.fresh || !fields.user || !fields.home || !fields.uid || !fields.gid)
        return "a field that must be there is not";
    if ((wrong = guest_identity_fresh(&fields)) || (wrong = guest_identity_names(&fields)) ||
        (wrong = guest_identity_user(&fields)) || (wrong = guest_identity_network(&fields)) ||
        (wrong = guest_mounts_make(&fields)))
        return wrong;
    if (!fields.nested && (wrong = without_namespaces()))
        return wrong;
    (void)!guest_freeze_prepare(); /* a kernel without it has guests that cannot be kept with their memory */
    if (chown(GUEST_BOX, 0, fields.gid) < 0)
        return GUEST_BOX;
    guest_tar_begin(&fields);
    guest_pressure_watch();
    return NULL;
}

/* The reason with the error behind it: what the keeper and the console get to read. */
static bool told(const char *wrong, const char **why)
{
    static char text[256];
    if (!wrong)
        return true;
    snprintf(text, sizeof text, "%.200s: %s", wrong, strerror(errno));
    *why = text;
    return false;
}

static bool begin(char **words, size_t count, const char **why)
{
    return told(make_run(words, count), why);
}

static const char *make_fresh(char *const *words, size_t count)
{
    struct guest_fields now;
    errno = EINVAL;
    const char *wrong = guest_fields_read(&now, words, count);
    if (wrong)
        return wrong;
    if (!now.fresh)
        return "a field that must be there is not";
    guest_connections_cut(); /* their address is another run's */
    if (!(wrong = guest_identity_fresh(&now)) && !(wrong = guest_identity_names(&now)))
        wrong = guest_identity_network(&now);
    explicit_bzero(now.entropy, sizeof now.entropy);
    guest_tar_renew();
    return wrong;
}

static bool renew(char **words, size_t count, const char **why)
{
    return told(make_fresh(words, count), why);
}

static bool tar_feed(const void *data, size_t length, const char **why)
{
    return length == 0 || told(guest_tar_take(data, length), why);
}

static bool tar_end(const char **why)
{
    return told(guest_tar_take(NULL, 0), why);
}

/* By rename, so that a reader sees the old file or the new one; the directory of the box is root's. */
static bool update(const char *path, mode_t mode, const void *data, size_t length)
{
    char parent[PATH_MAX] = ".", fresh[NAME_MAX + 1];
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    if (!guest_fields_relative(path) || snprintf(fresh, sizeof fresh, ".%.200s.new", name) >= (int)sizeof fresh)
        return false;
    if (slash)
        snprintf(parent, sizeof parent, "%.*s", (int)(slash - path), path);
    int box = open(GUEST_BOX, O_PATH | O_DIRECTORY | O_CLOEXEC);
    int found = box < 0 ? -1 : guest_place_open(box, parent);
    int directory = found < 0 ? -1 : openat(found, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int file = -1;
    if (directory >= 0 && (unlinkat(directory, fresh, 0) == 0 || errno == ENOENT))
        file = openat(directory, fresh, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    bool good = file >= 0 && sys_write_all(file, data, length, 1000) == 0 && fchown(file, 0, fields.gid) == 0 &&
                fchmod(file, mode & 0100 ? 0550 : 0440) == 0 && renameat(directory, fresh, directory, name) == 0;
    if (file >= 0)
        close(file);
    if (directory >= 0)
        close(directory);
    if (found >= 0)
        close(found);
    if (box >= 0)
        close(box);
    return good;
}

static int box_socket(const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    errno = EINVAL;
    if (strchr(name, '/') || !guest_fields_relative(name) ||
        snprintf(address.sun_path, sizeof address.sun_path, "%s/%s", GUEST_BOX, name) >= (int)sizeof address.sun_path)
        return -1;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || chown(address.sun_path, 0, fields.gid) < 0 ||
        chmod(address.sun_path, 0660) < 0 || listen(fd, PENDING) < 0) {
        int saved = errno;
        close(fd);
        errno = saved;
        return -1;
    }
    return fd;
}

static int drop_capabilities(void)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {0};
    return (int)syscall(SYS_capset, &head, none);
}

/* Nothing of root's goes along, and nothing of it can be had back: not by a set-uid program, not by a file's marks. */
static int child(void)
{
    if (fields.uid == 0 || fields.gid == 0) {
        errno = EPERM;
        return -1;
    }
    if (guest_freeze_enter() < 0)
        return -1;
    for (int i = 0; i < CAPABILITIES; i++)
        if (prctl(PR_CAPBSET_DROP, i, 0, 0, 0) < 0 && errno != EINVAL)
            return -1;
    if (setsid() < 0 || setgroups(0, NULL) < 0 || setresgid(fields.gid, fields.gid, fields.gid) < 0 ||
        setresuid(fields.uid, fields.uid, fields.uid) < 0 || drop_capabilities() < 0 ||
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return -1;
    umask(fields.umask);
    /* After the change of uid, which clears it. */
    return prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0 ? -1 : chdir("/");
}

static void set_time(uint64_t time_ns)
{
    const struct timespec now = {.tv_sec = (time_t)(time_ns / 1000000000ULL), .tv_nsec = (long)(time_ns % 1000000000ULL)};
    (void)!clock_settime(CLOCK_REALTIME, &now);
}

/* No process moves, and the kernel sends nothing on behalf of one: a restored guest has another run's address at first. */
static bool stand_still(bool still)
{
    if (still)
        return guest_freeze(true) && guest_identity_quiet(true);
    bool heard = guest_identity_quiet(false);
    return guest_freeze(false) && heard;
}

const struct guest_hooks guest_run_hooks = {
    .begin = begin,
    .renew = renew,
    .tar_feed = tar_feed,
    .tar_end = tar_end,
    .update = update,
    .box_socket = box_socket,
    .child = child,
    .end = guest_mounts_end,
    .off = guest_off,
    .freeze = stand_still,
    .set_time = set_time,
};
