/*
 * What it is: from the initramfs to the verified root: modules, dm-verity, the tree that becomes `/`.
 * What it is not: anything of a run; that comes over the channel.
 *
 * `/` is a small tmpfs that holds nothing but mount points and the links of the image's top level: so a workspace can
 * appear at any path of its host, while every file of the image is read from the verified device.
 */
#define _GNU_SOURCE
#include "guest_root.h"
#include "guest_verity.h"
#include "sys.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { DISK_WITHIN_MS = 60000, PATH_SIZE = 512 };

static const char DISK[] = "/dev/vda";
static const char MAPPED[] = "/dev/dm-0";
static const char IMAGE[] = "/root";
static const char TREE[] = "/tree";

const char *guest_root_begin(void)
{
    umask(022);
    if (mount("dev", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, NULL) < 0)
        return "/dev";
    if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
        return "/proc";
    if (mount("sys", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, NULL) < 0)
        return "/sys";
    return NULL;
}

/* Whether the machine has a virtio device of this type. All are there once virtio_mmio has loaded. */
static bool has_device(unsigned long type)
{
    static const char devices[] = "/sys/bus/virtio/devices";
    char path[PATH_SIZE], text[16];
    bool found = false;
    DIR *directory = opendir(devices);
    for (struct dirent *entry; directory && !found && (entry = readdir(directory));) {
        snprintf(path, sizeof path, "%s/%s/device", devices, entry->d_name);
        int fd = *entry->d_name == '.' ? -1 : open(path, O_RDONLY | O_CLOEXEC);
        ssize_t got = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
        if (fd >= 0)
            close(fd);
        if (got > 0) {
            text[got] = 0;
            found = strtoul(text, NULL, 16) == type;
        }
    }
    if (directory)
        closedir(directory);
    return found;
}

/* `[?][@TYPE ]PATH`: a module that the processor may have no use for, or that drives such a device. */
static bool load(char *line)
{
    bool optional = *line == '?';
    line += optional;
    bool wanted = *line != '@' || has_device(strtoul(line + 1, &line, 10));
    line += *line == ' ';
    if (!wanted)
        return unlink(line) == 0;
    int fd = open(line, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    long result = syscall(SYS_finit_module, fd, "", 0);
    int error = errno;
    close(fd);
    (void)unlink(line); /* its memory is wanted back */
    errno = error;
    return result == 0 || error == EEXIST || optional;
}

const char *guest_root_modules(void)
{
    static char wrong[PATH_SIZE];
    char line[256];
    FILE *list = fopen("/modules.list", "re");
    if (!list)
        return "/modules.list";
    while (fgets(line, sizeof line, list)) {
        line[strcspn(line, "\n")] = 0;
        if (!load(line)) {
            snprintf(wrong, sizeof wrong, "the module %s", line);
            return wrong; /* the machine goes down with the file open */
        }
    }
    fclose(list);
    return NULL;
}

/* Devices come a moment after their driver. */
static bool wait_for(const char *path)
{
    int64_t until = sys_now_ms() + DISK_WITHIN_MS;
    while (access(path, F_OK) < 0) {
        if (sys_now_ms() > until)
            return false;
        (void)!poll(NULL, 0, 1);
    }
    return true;
}

/* What could be written from here could be changed behind the tree's back until it is read again. */
static const char *check_read_only(const char *path)
{
    int read_only = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return path;
    int result = ioctl(fd, BLKROGET, &read_only);
    close(fd);
    return result == 0 && read_only ? NULL : "the root's disk: it can be written";
}

const char *guest_root_open(const struct guest_line *line)
{
    if (!wait_for(DISK))
        return "the root's disk: it did not come";
    const char *wrong = check_read_only(DISK);
    if (!wrong)
        wrong = guest_verity_open(DISK, line);
    if (wrong)
        return wrong;
    if (!wait_for(MAPPED))
        return "the verity device: it did not come";
    if (mount(MAPPED, IMAGE, "erofs", MS_RDONLY | MS_NODEV | MS_NOSUID, NULL) < 0)
        return "the root's file system";
    return NULL;
}

/* Made by ourselves, elsewhere, or not wanted in a guest. */
static bool ours(const char *name)
{
    static const char *const names[] = {".", "..", "dev", "proc", "sys", "run", "tmp", "home", "etc", "boot", "mnt",
        "media", "lost+found", "workspace"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i]) == 0)
            return true;
    return false;
}

/* One name of the image's top level: a directory is bound, a link copied, anything else left out. */
static int carry(const char *name)
{
    char from[PATH_SIZE], to[PATH_SIZE], target[PATH_SIZE];
    struct stat about;
    if (snprintf(from, sizeof from, "%s/%s", IMAGE, name) >= (int)sizeof from ||
        snprintf(to, sizeof to, "%s/%s", TREE, name) >= (int)sizeof to || lstat(from, &about) < 0)
        return -1;
    if (S_ISLNK(about.st_mode)) {
        ssize_t length = readlink(from, target, sizeof target - 1);
        if (length < 0)
            return -1;
        target[length] = 0;
        return symlink(target, to);
    }
    if (!S_ISDIR(about.st_mode))
        return 0;
    return mkdir(to, 0755) < 0 ? -1 : mount(from, to, NULL, MS_BIND, NULL);
}

static const char *carry_image(void)
{
    DIR *top = opendir(IMAGE);
    if (!top)
        return "the root's directory";
    const char *wrong = NULL;
    for (struct dirent *entry; !wrong && (entry = readdir(top));)
        if (!ours(entry->d_name) && carry(entry->d_name) < 0)
            wrong = "a directory of the root";
    closedir(top);
    return wrong;
}

struct place {
    const char *path; /* below the tree */
    mode_t mode;
    const char *type; /* NULL: a plain directory */
    unsigned long flags;
    const char *options;
};

#define QUIET (MS_NOSUID | MS_NODEV | MS_NOEXEC)

/* In this order. What is kept in memory counts against the guest's memory; `tmpfs=` of the run bounds it later. */
static const struct place PLACES[] = {
    {"/run", 0755, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=64m"},
    {"/run/cloister", 0755, NULL, 0, NULL},
    {GUEST_BOX, 0750, NULL, 0, NULL},
    {GUEST_PRIVATE, 0700, NULL, 0, NULL},
    {GUEST_DEVICES, 0755, NULL, 0, NULL},
    {GUEST_MEMORY, 0700, "tmpfs", MS_NOSUID | MS_NODEV, "mode=700,size=256m"},
    {GUEST_MEMORY "/etc", 0755, NULL, 0, NULL},
    {GUEST_MEMORY "/etc/upper", 0755, NULL, 0, NULL},
    {GUEST_MEMORY "/etc/work", 0700, NULL, 0, NULL},
    {"/proc", 0555, "proc", QUIET, "hidepid=invisible"},
    {"/sys", 0555, "sysfs", QUIET | MS_RDONLY, NULL},
    {"/dev", 0755, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=64k"},
    {"/dev/pts", 0755, "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5"},
    {"/dev/shm", 01777, "tmpfs", QUIET, "mode=1777,size=50%"},
    {"/tmp", 01777, "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=50%"},
    {"/home", 0755, NULL, 0, NULL},
    {"/mnt", 0755, NULL, 0, NULL},
    {"/media", 0755, NULL, 0, NULL},
    {"/workspace", 0755, NULL, 0, NULL},
    {"/etc", 0755, "overlay", MS_NOSUID | MS_NODEV,
        "lowerdir=/root/etc,upperdir=/tree" GUEST_MEMORY "/etc/upper,workdir=/tree" GUEST_MEMORY "/etc/work"},
};

static const char *make_places(void)
{
    char path[PATH_SIZE];
    for (size_t i = 0; i < sizeof PLACES / sizeof *PLACES; i++) {
        const struct place *place = &PLACES[i];
        snprintf(path, sizeof path, "%s%s", TREE, place->path);
        if (mkdir(path, place->mode) < 0 && errno != EEXIST)
            return place->path;
        if (place->type && mount(place->type, path, place->type, place->flags, place->options) < 0)
            return place->path;
    }
    return NULL;
}

/* What programs expect below /dev, and nothing that reaches a disk, the memory or the channel. */
static const char *make_devices(void)
{
    static const struct {
        const char *name;
        unsigned minor, major;
    } nodes[] = {{"null", 3, 1}, {"zero", 5, 1}, {"full", 7, 1}, {"random", 8, 1}, {"urandom", 9, 1}, {"tty", 0, 5}};
    static const char *const links[][2] = {{"pts/ptmx", "ptmx"}, {"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"},
        {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"}};
    char path[PATH_SIZE];
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++) {
        snprintf(path, sizeof path, "%s/dev/%s", TREE, nodes[i].name);
        if (mknod(path, S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)) < 0 || chmod(path, 0666) < 0)
            return "a device";
    }
    for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
        snprintf(path, sizeof path, "%s/dev/%s", TREE, links[i][1]);
        if (symlink(links[i][0], path) < 0)
            return "a link of /dev";
    }
    return NULL;
}

/* The image holds no program of ours: what PID 1 is, the run's inner half is too. */
static const char *copy_shim(void)
{
    char buffer[65536];
    ssize_t got = -1;
    int from = open("/init", O_RDONLY | O_CLOEXEC);
    int to = open("/tree/run/cloister/shim", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0755);
    if (from >= 0 && to >= 0)
        while ((got = read(from, buffer, sizeof buffer)) > 0)
            if (sys_write_all(to, buffer, (size_t)got, 1000) < 0) {
                got = -1;
                break;
            }
    int closed = to >= 0 ? close(to) : -1;
    if (from >= 0)
        close(from);
    return got == 0 && closed == 0 ? NULL : "the shim";
}

const char *guest_root_enter(void)
{
    if (mkdir(TREE, 0755) < 0 || mount("tmpfs", TREE, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m") < 0)
        return "the tree of mounts";
    const char *wrong = carry_image();
    if (!wrong)
        wrong = make_places();
    if (!wrong)
        wrong = make_devices();
    if (!wrong)
        wrong = copy_shim();
    if (wrong)
        return wrong;
    (void)unlink("/init");
    if (mount("/dev", "/tree" GUEST_DEVICES, NULL, MS_MOVE, NULL) < 0)
        return "moving /dev";
    if (umount2("/proc", MNT_DETACH) < 0 || umount2("/sys", MNT_DETACH) < 0)
        return "leaving /proc";
    if (chdir(TREE) < 0 || mount(TREE, "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        return "entering the root";
    return NULL;
}
