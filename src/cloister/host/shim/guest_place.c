/*
 * What it is: mount points at any path of a root that cannot be written, and mounts by descriptor.
 * What it is not: what gets mounted there; guest_mounts.c knows that.
 */
#define _GNU_SOURCE
#include "guest_place.h"
#include "guest_root.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A directory of the image gets a layer in memory: what is in it stays, and a mount point can be added. */
static int make_writable(const char *path)
{
    static unsigned made;
    char upper[PATH_MAX], work[PATH_MAX], options[3 * PATH_MAX + 64];
    /* Overlayfs takes colon, comma and backslash in its options for its own. */
    if (strpbrk(path, ":,\\")) {
        errno = EINVAL;
        return -1;
    }
    unsigned number = ++made;
    snprintf(upper, sizeof upper, GUEST_MEMORY "/upper%u", number);
    snprintf(work, sizeof work, GUEST_MEMORY "/work%u", number);
    snprintf(options, sizeof options, "lowerdir=%s,upperdir=%s,workdir=%s", path, upper, work);
    if (mkdir(upper, 0755) < 0 || mkdir(work, 0700) < 0)
        return -1;
    return mount("overlay", path, "overlay", MS_NOSUID | MS_NODEV, options);
}

static int make_one(const char *path, const char *parent, bool owned, uid_t uid, gid_t gid)
{
    if (mkdir(path, 0755) < 0) {
        if (errno != EROFS || make_writable(parent) < 0 || mkdir(path, 0755) < 0)
            return -1;
    }
    return owned ? lchown(path, uid, gid) : 0;
}

/* Like root's own home: what lies below it would be out of the agent's reach. */
static int make_passable(const char *path, const struct stat *about, uid_t uid)
{
    if (about->st_uid == uid || (about->st_mode & 01))
        return 0;
    return mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m");
}

static bool is_below(const char *path, const char *top)
{
    size_t length = top ? strlen(top) : 0;
    return length > 0 && strncmp(path, top, length) == 0 && path[length] == '/';
}

int guest_place_make(const char *path, const char *home, uid_t uid, gid_t gid)
{
    char part[PATH_MAX], parent[PATH_MAX] = "/";
    struct stat about;
    for (const char *at = path; *at;) {
        at += 1 + strcspn(at + 1, "/");
        if ((size_t)(at - path) >= sizeof part) {
            errno = ENAMETOOLONG;
            return -1;
        }
        memcpy(part, path, (size_t)(at - path));
        part[at - path] = 0;
        if (lstat(part, &about) == 0) {
            if (!S_ISDIR(about.st_mode)) {
                errno = S_ISLNK(about.st_mode) ? ELOOP : ENOTDIR;
                return -1;
            }
            if (*at && make_passable(part, &about, uid) < 0)
                return -1;
        } else if (errno != ENOENT || make_one(part, parent, is_below(part, home), uid, gid) < 0) {
            return -1;
        }
        memcpy(parent, part, sizeof parent);
    }
    return 0;
}

int guest_place_open(int below, const char *path)
{
    struct open_how how = {.flags = O_PATH | O_CLOEXEC,
        .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, below, path, &how, sizeof how);
}

int guest_place_pin(int target)
{
    struct statx about;
    if (statx(target, "", AT_EMPTY_PATH, STATX_TYPE, &about) < 0)
        return -1;
    if (about.stx_attributes & STATX_ATTR_MOUNT_ROOT)
        return 0;
    int tree = (int)syscall(SYS_open_tree, target, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    if (tree < 0)
        return -1;
    long result = syscall(SYS_move_mount, tree, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
    int saved = errno;
    close(tree);
    errno = saved;
    return (int)result;
}

int guest_place_cover(int source, int target)
{
    struct mount_attr wanted = {.attr_set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV};
    int tree = (int)syscall(SYS_open_tree, source, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    if (tree < 0)
        return -1;
    long result = syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &wanted, sizeof wanted);
    if (result == 0)
        result = syscall(SYS_move_mount, tree, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
    int saved = errno;
    close(tree);
    errno = saved;
    return (int)result;
}
