/*
 * What it is: all that runs in the run's place, made to stand still as a whole, without its noticing.
 * What it is not: a limit on it; the guest's memory and processors are.
 *
 * One cgroup (Linux, Documentation/admin-guide/cgroup-v2.rst, "cgroup.freeze"): no signal is involved, so nobody sees
 * its parent stop. A guest that is restored goes on only when it has randomness and a time of its own.
 */
#define _GNU_SOURCE
#include "guest_freeze.h"
#include "guest_root.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define TREE GUEST_PRIVATE "/cgroup"
#define RUN TREE "/run"

enum { PATIENCE_MS = 3000, AGAIN_AFTER_MS = 1 };

static bool made;

static int put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    ssize_t written = fd < 0 ? -1 : write(fd, text, strlen(text));
    int saved = errno;
    if (fd >= 0)
        close(fd);
    errno = saved;
    return written < 0 ? -1 : 0;
}

int guest_freeze_prepare(void)
{
    if ((mkdir(TREE, 0700) < 0 && errno != EEXIST) ||
        mount("cgroup2", TREE, "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0 || mkdir(RUN, 0755) < 0)
        return -1;
    made = access(RUN "/cgroup.freeze", W_OK) == 0;
    return made ? 0 : -1;
}

int guest_freeze_enter(void)
{
    return made ? put(RUN "/cgroup.procs", "0") : 0;
}

static bool is_still(void)
{
    char text[128];
    int fd = open(RUN "/cgroup.events", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    text[got > 0 ? got : 0] = 0;
    return strstr(text, "frozen 1") != NULL;
}

bool guest_freeze(bool still)
{
    int64_t until = sys_now_ms() + PATIENCE_MS;
    if (!made || put(RUN "/cgroup.freeze", still ? "1" : "0") < 0)
        return false;
    while (still && !is_still()) {
        if (sys_now_ms() > until)
            return false;
        (void)!poll(NULL, 0, AGAIN_AFTER_MS);
    }
    return true;
}
