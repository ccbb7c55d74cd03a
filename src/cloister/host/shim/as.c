/*
 * What it is: a program under a number that is nobody's: all that root had is given up for good before it begins, and
 * that this is so is looked at. The monitors of root's virtual machines begin so. What it is not: a jail.
 */
#define _GNU_SOURCE
#include "shim.h"
#include "sys.h"

#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { GROUPS_MAX = 8 };

/* A number of the first few thousand could be somebody's, and root's is not meant at all. */
static bool parse_number(const char *text, long least, unsigned *number)
{
    char *end = NULL;
    errno = 0;
    long value = *text >= '1' && *text <= '9' ? strtol(text, &end, 10) : 0;
    *number = (unsigned)value;
    return end && !*end && !errno && value >= least && value < 0xfffffffeL;
}

static int drop_capabilities(void)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0}};
    return (int)syscall(SYS_capset, &head, none);
}

/* Nothing is taken on trust: not that a call which returned 0 did what it says. */
static bool is_nobody(unsigned number)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct has[_LINUX_CAPABILITY_U32S_3] = {{0}};
    uid_t uids[3];
    gid_t gids[3];
    if (getresuid(&uids[0], &uids[1], &uids[2]) < 0 || getresgid(&gids[0], &gids[1], &gids[2]) < 0)
        return false;
    for (int i = 0; i < 3; i++)
        if (uids[i] != number || gids[i] != number)
            return false;
    if (syscall(SYS_capget, &head, has) < 0)
        return false;
    for (int i = 0; i < _LINUX_CAPABILITY_U32S_3; i++)
        if (has[i].effective | has[i].permitted | has[i].inheritable)
            return false;
    return setresuid(0, 0, 0) < 0 && setresgid(0, 0, 0) < 0;
}

int as_main(int count, char **words)
{
    gid_t groups[GROUPS_MAX];
    unsigned number, group;
    int at = 1;
    if (count < 3 || !parse_number(words[0], 65536, &number))
        return EXIT_CLOISTER;
    for (; at < count && strcmp(words[at], "--") != 0; at++) {
        if (at > GROUPS_MAX || !parse_number(words[at], 1, &group))
            return EXIT_CLOISTER;
        groups[at - 1] = group;
    }
    if (at + 1 >= count)
        return EXIT_CLOISTER;
    if (setgroups((size_t)at - 1, groups) < 0 || setresgid(number, number, number) < 0 ||
        setresuid(number, number, number) < 0 || drop_capabilities() < 0 || !is_nobody(number))
        return EXIT_CLOISTER;
    /* The kernel has forgotten that with the number (prctl(2)). */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        return EXIT_CLOISTER;
    execv(words[at + 1], words + at + 1);
    return EXIT_CLOISTER;
}
