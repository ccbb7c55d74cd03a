/*
 * What it is: the mounts of hold.h, by open_tree(2), mount_setattr(2) and move_mount(2): no path is
 * looked at twice, and none is followed through a symbolic link.
 * What it is not: removable by the agent: bubblewrap's user namespace is a child of ours, and there
 * these mounts are locked together (mount_namespaces(7)).
 */
#define _GNU_SOURCE
#include "hold.h"
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Open a place as it is, refusing symbolic links in all components (ELOOP). */
static int open_place(const char *path)
{
    struct open_how how = {.flags = O_PATH | O_CLOEXEC,
                           .resolve = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
}

/* A detached copy of what lies at `place`, submounts too, without set-uid and devices, read-only if asked. */
static int copy_tree(int place, int read_only)
{
    unsigned flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE;
    int tree = (int)syscall(SYS_open_tree, place, "", flags);
    if (tree < 0)
        return -1;
    struct mount_attr attributes = {.attr_set = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV};
    if (read_only)
        attributes.attr_set |= MOUNT_ATTR_RDONLY;
    if (syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attributes, sizeof attributes) == 0)
        return tree;
    int saved = errno;
    close(tree);
    errno = saved;
    return -1;
}

static int hold(const char *mode, const char *source, const char *target)
{
    int read_only = strcmp(mode, "ro") == 0;
    if (!read_only && strcmp(mode, "rw") != 0) {
        errno = EINVAL;
        return -1;
    }
    int place = open_place(target);
    if (place < 0)
        return -1;
    int from = *source ? open_place(source) : place;
    int tree = from < 0 ? -1 : copy_tree(from, read_only);
    int result = -1;
    if (tree >= 0)
        result = (int)syscall(SYS_move_mount, tree, "", place, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
    int saved = errno;
    if (tree >= 0)
        close(tree);
    if (from >= 0 && from != place)
        close(from);
    close(place);
    errno = saved;
    return result;
}

int hold_all(char **fields, size_t count)
{
    for (size_t i = 0; i + HOLD_FIELDS <= count; i += HOLD_FIELDS)
        if (hold(fields[i], fields[i + 1], fields[i + 2]) < 0)
            return -1;
    return 0;
}

int hold_trial(void)
{
    char read_only[] = "ro", itself[] = "", place[] = "/usr";
    char *fields[] = {read_only, itself, place};
    struct launch launch = {.holds = fields, .hold_fields = HOLD_FIELDS};
    return launch_hold(&launch) == NULL ? 0 : 1;
}
