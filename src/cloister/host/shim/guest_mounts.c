/*
 * What it is: what one run sees in its guest: home, /var and the state on its disk, the workspace, and what is held
 * or hidden in it. What it is not: the root; that stands before any run is known.
 */
#define _GNU_SOURCE
#include "guest_mounts.h"
#include "guest_place.h"
#include "guest_root.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { KILL_WITHIN_MS = 5000, AGAIN_AFTER_MS = 50 };

#define PLAIN (MS_NOSUID | MS_NODEV)

static const char VAR_DISK[] = GUEST_DEVICES "/vdb";
static const char VAR[] = GUEST_PRIVATE "/var";
static const char STATE[] = GUEST_PRIVATE "/var/state";
static const char WORK_DISK[] = GUEST_DEVICES "/vdc";
static const char WORKSPACE[] = "/workspace";
/* Nothing is written on top of what the kernel has found to be damaged. */
static const char DAMAGED[] = "errors=remount-ro";

/* What guest_mounts_end has to take down; empty: not mounted. */
static char home_at[PATH_MAX], shown_at[PATH_MAX], workspace_at[PATH_MAX];
static bool var_is_on;

/* A template of this guest may have read blocks of the disk that was there then (its partition table, say). */
static const char *forget_blocks(const char *disk)
{
    int fd = open(disk, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return disk;
    int result = ioctl(fd, BLKFLSBUF, 0);
    close(fd);
    return result < 0 ? disk : NULL;
}

/* The home and what else is kept in memory, within the run's bound. */
static const char *mount_home(const struct guest_fields *fields)
{
    char options[128], size[32] = "50%";
    if (fields->tmpfs)
        snprintf(size, sizeof size, "%llu", fields->tmpfs);
    snprintf(options, sizeof options, "size=%s", size);
    if (mount(NULL, "/tmp", NULL, MS_REMOUNT | PLAIN, options) < 0 ||
        mount(NULL, "/dev/shm", NULL, MS_REMOUNT | PLAIN | MS_NOEXEC, options) < 0)
        return "tmpfs";
    snprintf(options, sizeof options, "mode=700,uid=%u,gid=%u,size=%s", fields->uid, fields->gid, size);
    if (guest_place_make(fields->home, NULL, fields->uid, fields->gid) < 0 ||
        mount("tmpfs", fields->home, "tmpfs", PLAIN, options) < 0)
        return "home";
    strcpy(home_at, fields->home); /* guest_fields.c has bounded it */
    return NULL;
}

static int make_directory(const char *path, mode_t mode)
{
    return mkdir(path, mode) < 0 && errno != EEXIST ? -1 : 0;
}

/* /var is the image's, with a layer on the agent's own disk; without a disk in memory, and gone with the run. */
static const char *mount_var(const struct guest_fields *fields)
{
    bool disk = access(VAR_DISK, F_OK) == 0;
    if (!disk && fields->state.count > 0)
        return VAR_DISK;
    if (mkdir(VAR, 0700) < 0)
        return VAR;
    if (disk && forget_blocks(VAR_DISK))
        return VAR_DISK;
    const char *source = disk ? VAR_DISK : "tmpfs";
    if (mount(source, VAR, disk ? "ext4" : "tmpfs", PLAIN, disk ? DAMAGED : NULL) < 0)
        return VAR_DISK;
    var_is_on = disk;
    if (make_directory(GUEST_PRIVATE "/var/upper", 0755) < 0 || make_directory(GUEST_PRIVATE "/var/work", 0700) < 0 ||
        make_directory(STATE, 0700) < 0)
        return VAR;
    if (mount("overlay", "/var", "overlay", PLAIN,
            "lowerdir=/var,upperdir=" GUEST_PRIVATE "/var/upper,workdir=" GUEST_PRIVATE "/var/work") < 0)
        return "/var";
    return NULL;
}

/* Make the directories of a relative path below `top`, through no link; those made belong to the agent. */
static int make_state(const char *name, const struct guest_fields *fields)
{
    char part[NAME_MAX + 1];
    int at = open(STATE, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    while (at >= 0 && *name) {
        size_t length = strcspn(name, "/");
        memcpy(part, name, length);
        part[length] = 0;
        bool made = mkdirat(at, part, 0700) == 0;
        int next = made || errno == EEXIST ? openat(at, part, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC) : -1;
        if (next >= 0 && made && fchown(next, fields->uid, fields->gid) < 0) {
            close(next);
            next = -1;
        }
        close(at);
        at = next;
        name += length + (name[length] == '/');
    }
    return at;
}

static const char *mount_state(const struct guest_fields *fields)
{
    char from[64], to[PATH_MAX];
    for (size_t i = 0; i < fields->state.count; i++) {
        const char *name = fields->state.items[i];
        if (snprintf(to, sizeof to, "%s/%s", fields->home, name) >= (int)sizeof to)
            return "state";
        int kept = make_state(name, fields);
        if (kept < 0)
            return name;
        snprintf(from, sizeof from, "/proc/self/fd/%d", kept);
        bool bound = guest_place_make(to, fields->home, fields->uid, fields->gid) == 0 &&
                     mount(from, to, NULL, MS_BIND, NULL) == 0;
        close(kept);
        if (!bound)
            return name;
    }
    return NULL;
}

/* A name that is not there, or is a link, is nothing to hold; the review of the changes sees what becomes of it. */
static bool nothing_there(void)
{
    return errno == ENOENT || errno == ELOOP || errno == ENOTDIR;
}

/* What lies above something held becomes a mount point too: renamed away, another could be put in its place. */
static bool pin_above(int workspace, const char *path)
{
    char part[PATH_MAX];
    for (const char *slash = strchr(path, '/'); slash; slash = strchr(slash + 1, '/')) {
        if ((size_t)(slash - path) >= sizeof part)
            return false;
        memcpy(part, path, (size_t)(slash - path));
        part[slash - path] = 0;
        int target = guest_place_open(workspace, part);
        if (target < 0 && nothing_there())
            return true;
        int result = target < 0 ? -1 : guest_place_pin(target);
        if (target >= 0)
            close(target);
        if (result < 0)
            return false;
    }
    return true;
}

static const char *hold(int workspace, const struct guest_words *names)
{
    for (size_t i = 0; i < names->count; i++)
        if (!pin_above(workspace, names->items[i]))
            return names->items[i];
    for (size_t i = 0; i < names->count; i++) {
        int target = guest_place_open(workspace, names->items[i]);
        if (target < 0 && nothing_there())
            continue;
        int result = target < 0 ? -1 : guest_place_cover(target, target);
        if (target >= 0)
            close(target);
        if (result < 0)
            return names->items[i];
    }
    return NULL;
}

/* Directories become empty ones, anything else an empty file. */
static const char *hide(int workspace, const struct guest_words *names)
{
    struct stat about;
    int nothing = open(GUEST_MEMORY "/nothing", O_RDONLY | O_CREAT | O_CLOEXEC, 0444);
    int empty = mkdir(GUEST_MEMORY "/empty", 0555) < 0
                    ? -1
                    : open(GUEST_MEMORY "/empty", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const char *wrong = nothing < 0 || empty < 0 ? "mask" : NULL;
    for (size_t i = 0; !wrong && i < names->count; i++) {
        int target = guest_place_open(workspace, names->items[i]);
        if (target < 0 && nothing_there())
            continue;
        if (target < 0 || fstat(target, &about) < 0 ||
            guest_place_cover(S_ISDIR(about.st_mode) ? empty : nothing, target) < 0)
            wrong = names->items[i];
        if (target >= 0)
            close(target);
    }
    if (nothing >= 0)
        close(nothing);
    if (empty >= 0)
        close(empty);
    return wrong;
}

static int make_stand(unsigned number, const char *text, size_t digits)
{
    char name[sizeof GUEST_MEMORY + 32], content[4096];
    if (digits / 2 > sizeof content) {
        errno = E2BIG;
        return -1;
    }
    for (size_t i = 0; i < digits / 2; i++)
        content[i] = (char)guest_fields_byte(text + 2 * i);
    snprintf(name, sizeof name, GUEST_MEMORY "/stand%u", number);
    int fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd >= 0 && digits > 0 && write(fd, content, digits / 2) != (ssize_t)digits / 2) {
        close(fd);
        return -1;
    }
    return fd;
}

/*
 * Files that cannot be changed, where the disk has sockets: git takes those for nothing, so that no agent commits what is
 * only there to be kept from being made.
 */
static const char *stand_in(int workspace, const struct guest_words *words)
{
    for (size_t i = 0; i < words->count; i++) {
        size_t digits = strcspn(words->items[i], ":");
        const char *path = words->items[i] + digits + 1;
        if (!pin_above(workspace, path))
            return path;
        int target = guest_place_open(workspace, path);
        if (target < 0 && nothing_there())
            continue;
        int source = target < 0 ? -1 : make_stand((unsigned)i, words->items[i], digits);
        bool good = source >= 0 && guest_place_cover(source, target) == 0;
        if (source >= 0)
            close(source);
        if (target >= 0)
            close(target);
        if (!good)
            return path;
    }
    return NULL;
}

static bool is_below(const char *path, const char *top)
{
    size_t length = strlen(top);
    return strncmp(path, top, length) == 0 && path[length] == '/';
}

/* At a second path: with all that is held and hidden below it. */
static const char *show_workspace(const struct guest_fields *fields)
{
    static const char *const taken[] = {"/dev", "/proc", "/sys", "/run", "/etc", "/usr"};
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++)
        if (strcmp(fields->workspace, taken[i]) == 0 || is_below(fields->workspace, taken[i]))
            return "workspace: the guest itself needs that place";
    if (guest_place_make(fields->workspace, fields->home, fields->uid, fields->gid) < 0)
        return "workspace";
    return NULL;
}

static const char *mount_workspace(const struct guest_fields *fields)
{
    bool inside = is_below(fields->workspace, WORKSPACE);
    bool twice = !inside && strcmp(fields->workspace, WORKSPACE) != 0;
    const char *at = inside ? fields->workspace : WORKSPACE;
    if (forget_blocks(WORK_DISK))
        return WORK_DISK;
    const char *wrong = twice || inside ? show_workspace(fields) : NULL;
    if (wrong)
        return wrong;
    if (mount(WORK_DISK, at, "ext4", PLAIN, DAMAGED) < 0)
        return WORK_DISK;
    strcpy(workspace_at, at);
    int workspace = open(at, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    wrong = workspace < 0 ? at : hold(workspace, &fields->read_only);
    if (!wrong)
        wrong = hide(workspace, &fields->mask);
    if (!wrong)
        wrong = stand_in(workspace, &fields->stand);
    if (workspace >= 0)
        close(workspace);
    if (!wrong && twice) {
        if (mount(at, fields->workspace, NULL, MS_BIND | MS_REC, NULL) < 0)
            return "workspace";
        strcpy(shown_at, fields->workspace);
    }
    return wrong;
}

/* The tree of mount points is complete: nothing is added to it any more. */
static const char *seal(void)
{
    struct mount_attr wanted = {.attr_set = MOUNT_ATTR_RDONLY};
    return syscall(SYS_mount_setattr, AT_FDCWD, "/", 0, &wanted, sizeof wanted) < 0 ? "/" : NULL;
}

const char *guest_mounts_make(const struct guest_fields *fields)
{
    const char *wrong = mount_home(fields);
    if (!wrong)
        wrong = mount_var(fields);
    if (!wrong)
        wrong = mount_state(fields);
    if (!wrong && fields->workspace)
        wrong = mount_workspace(fields);
    return wrong ? wrong : seal();
}

/* As PID 1: everything that is not of the kernel. What does not die in time is stuck there. */
static void kill_all(void)
{
    int64_t until = sys_now_ms() + KILL_WITHIN_MS;
    (void)kill(-1, SIGKILL);
    while (sys_now_ms() < until) {
        pid_t pid = waitpid(-1, NULL, WNOHANG);
        if (pid < 0 && errno != EINTR)
            return;
        if (pid == 0) {
            (void)kill(-1, SIGKILL);
            (void)!poll(NULL, 0, 2);
        }
    }
}

/* Read-only is clean, whoever still has the file system open. */
static void leave_disk(const char *path)
{
    for (int i = 0; i < 2; i++) {
        if (mount(NULL, path, NULL, MS_REMOUNT | MS_RDONLY | PLAIN, NULL) == 0)
            break;
        (void)!poll(NULL, 0, AGAIN_AFTER_MS);
    }
    (void)umount2(path, MNT_DETACH);
}

void guest_mounts_end(void)
{
    kill_all();
    if (*shown_at)
        (void)umount2(shown_at, MNT_DETACH);
    if (*home_at)
        (void)umount2(home_at, MNT_DETACH);
    if (var_is_on)
        (void)umount2("/var", MNT_DETACH);
    if (*workspace_at)
        leave_disk(workspace_at);
    if (var_is_on)
        leave_disk(VAR);
    sync();
    *shown_at = *home_at = *workspace_at = 0;
    var_is_on = false;
}
