/*
 * What it is: the Landlock layer (landlock(7)), applied to PID 1 before anything runs, so that
 * every command of the sandbox lives in the same domain. What it is not: the first wall; bubblewrap's mounts are.
 *
 * Numbers are written out: Debian 12's headers end at ABI 2 (include/uapi/linux/landlock.h of Linux 6.15 has them).
 */
#define _GNU_SOURCE
#include "landlock.h"
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RIGHT_EXECUTE (1ULL << 0)
#define RIGHT_WRITE_FILE (1ULL << 1)
#define RIGHT_READ_FILE (1ULL << 2)
#define RIGHT_READ_DIR (1ULL << 3)
#define RIGHTS_ABI_1 ((1ULL << 13) - 1)
#define RIGHT_REFER (1ULL << 13)     /* ABI 2, Linux 5.19 */
#define RIGHT_TRUNCATE (1ULL << 14)  /* ABI 3, Linux 6.2 */
#define RIGHT_IOCTL_DEV (1ULL << 15) /* ABI 5, Linux 6.10 */
#define RIGHTS_OF_FILES (RIGHT_EXECUTE | RIGHT_WRITE_FILE | RIGHT_READ_FILE | RIGHT_TRUNCATE | RIGHT_IOCTL_DEV)
#define SCOPE_ABSTRACT_UNIX (1ULL << 0) /* ABI 6, Linux 6.12 */
#define SCOPE_SIGNAL (1ULL << 1)
#define RULE_PATH_BENEATH 1
#define CREATE_RULESET_VERSION 1U

struct ruleset {
    uint64_t handled_fs;
    uint64_t handled_net;
    uint64_t scoped;
};

struct path_beneath {
    uint64_t allowed;
    int32_t parent;
} __attribute__((packed));

/* The best ABI of this kernel; 0 when it has no Landlock, or it is off. */
static int best_abi(void)
{
    long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, CREATE_RULESET_VERSION);
    return abi > 0 ? (int)abi : 0;
}

static uint64_t rights_of_abi(int abi)
{
    uint64_t rights = RIGHTS_ABI_1;
    if (abi >= 2)
        rights |= RIGHT_REFER;
    if (abi >= 3)
        rights |= RIGHT_TRUNCATE;
    if (abi >= 5)
        rights |= RIGHT_IOCTL_DEV;
    return rights;
}

/* Allow `rights` below a path. A path that is not there needs no rule: nothing is granted, which is the safe side. */
static int allow(int rules, const char *path, uint64_t rights)
{
    struct stat about;
    int fd = open(path, O_PATH | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT ? 0 : -1;
    int result = fstat(fd, &about);
    if (result == 0) {
        if (!S_ISDIR(about.st_mode))
            rights &= RIGHTS_OF_FILES;
        struct path_beneath rule = {.allowed = rights, .parent = fd};
        result = (int)syscall(SYS_landlock_add_rule, rules, RULE_PATH_BENEATH, &rule, 0);
    }
    int saved = errno;
    close(fd);
    errno = saved;
    return result;
}

static int allow_all(int rules, const struct words *paths, uint64_t rights)
{
    for (size_t i = 0; i < paths->count; i++)
        if (allow(rules, paths->items[i], rights) < 0)
            return -1;
    return 0;
}

static int enforce(const struct options *options, int abi)
{
    /* Landlock refuses every mount once it handles files, so a nested sandbox gets the scopes only. */
    bool files = !options->nested && options->landlock_rw.count + options->landlock_ro.count > 0;
    struct ruleset wanted = {
        .handled_fs = files ? rights_of_abi(abi) : 0,
        .scoped = abi >= 6 ? SCOPE_ABSTRACT_UNIX | SCOPE_SIGNAL : 0,
    };
    if (!wanted.handled_fs && !wanted.scoped)
        return 0;
    size_t size = abi >= 6 ? sizeof wanted : sizeof wanted.handled_fs;
    int rules = (int)syscall(SYS_landlock_create_ruleset, &wanted, size, 0);
    if (rules < 0)
        return -1;
    int result = 0;
    if (files)
        result = allow_all(rules, &options->landlock_rw, wanted.handled_fs);
    if (files && result == 0)
        result = allow_all(rules, &options->landlock_ro, RIGHT_EXECUTE | RIGHT_READ_FILE | RIGHT_READ_DIR);
    if (result == 0)
        result = (int)syscall(SYS_landlock_restrict_self, rules, 0);
    int saved = errno;
    close(rules);
    errno = saved;
    return result;
}

bool landlock_enforce(const struct options *options, struct writer *findings)
{
    char text[16];
    int abi = best_abi();
    if (options->landlock == LANDLOCK_OFF) {
        probe_note(findings, "landlock", "", "off");
        return true;
    }
    if (abi > 0 && enforce(options, abi) < 0) {
        /* The kernel has it and refuses our rules: a bug of ours or the plan's, never a reason to go on without. */
        probe_note(findings, "landlock", "", strerrorname_np(errno));
        return false;
    }
    snprintf(text, sizeof text, "%d", abi);
    probe_note(findings, "landlock", "", text);
    return abi > 0 || options->landlock != LANDLOCK_REQUIRED;
}
