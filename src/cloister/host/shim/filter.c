/*
 * What it is: our own system call filter, installed by the first process where the backend did not: systemd's
 * SystemCallFilter= cannot look at arguments. What it is not: the filter itself, which comes as bytes from the plan
 * (isolation/seccomp.py) in the run's read-only directory.
 */
#define _GNU_SOURCE
#include "filter.h"
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MAX_INSTRUCTIONS = 4096 }; /* BPF_MAXINSNS */

/* The count of whole instructions in the file, or 0 with errno. */
static size_t load(const char *path, struct sock_filter *program)
{
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (file < 0)
        return 0;
    size_t most = MAX_INSTRUCTIONS * sizeof *program, length = 0;
    ssize_t got;
    while (length < most && (got = read(file, (char *)program + length, most - length)) != 0) {
        if (got < 0 && errno != EINTR) {
            length = 0;
            break;
        }
        length += got > 0 ? (size_t)got : 0;
    }
    char more;
    bool whole = length > 0 && length % sizeof *program == 0 && read(file, &more, 1) == 0;
    close(file);
    if (whole)
        return length / sizeof *program;
    errno = EINVAL;
    return 0;
}

bool filter_enforce(const char *path, struct writer *findings)
{
    static struct sock_filter program[MAX_INSTRUCTIONS];
    struct sock_fprog wanted = {.filter = program};
    if (!path)
        return true;
    wanted.len = (unsigned short)load(path, program);
    if (wanted.len > 0 && syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &wanted) == 0)
        return true;
    probe_note(findings, "filter", "", strerrorname_np(errno));
    return false;
}
