/*
 * What it is: starting one command in the sandbox: session, terminal, limits, directory,
 * execve(2). What it is not: the bookkeeping of what runs; inner.c does that.
 */
#define _GNU_SOURCE
#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

/* linux/prctl.h of Debian 12 does not know them yet (Linux 6.3). */
#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#define PR_MDWE_REFUSE_EXEC_GAIN 1
#endif

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

/* What a child can fail at. The number goes through a pipe; the names go into frame `Y`. */
enum stage { STAGE_SESSION, STAGE_STDIO, STAGE_LIMIT, STAGE_MDWE, STAGE_SIGNALS, STAGE_DIRECTORY, STAGE_NOTIFY, STAGE_EXEC };
static const char *const STAGES[] = {"session", "stdio", "rlimit", "mdwe", "signals", "chdir", "notify", "exec"};

struct report {
    int32_t stage;
    int32_t error;
};

_Noreturn static void give_up(int pipe_end, enum stage stage)
{
    struct report report = {.stage = stage, .error = errno};
    (void)!write(pipe_end, &report, sizeof report);
    _exit(127);
}

static int enter_session(const struct command *command)
{
    if (!command->job) {
        if (setsid() < 0)
            return -1;
        return command->terminal ? ioctl(command->stdio[0], TIOCSCTTY, 0) : 0;
    }
    /* A group of its own in the session of PID 1: an orphaned group would never stop on Ctrl-Z (setpgid(2)). */
    if (setpgid(0, 0) < 0)
        return -1;
    return tcsetpgrp(command->stdio[0], getpid());
}

/* stdio to 0, 1, 2; everything else is closed by execve(2). */
static int place_stdio(const int stdio[3])
{
    int aside[3];
    for (int i = 0; i < 3; i++) {
        aside[i] = fcntl(stdio[i], F_DUPFD_CLOEXEC, 3);
        if (aside[i] < 0)
            return -1;
    }
    for (int i = 0; i < 3; i++)
        if (dup2(aside[i], i) < 0)
            return -1;
    return close_range(3, ~0U, CLOSE_RANGE_CLOEXEC);
}

/* Never above the hard limit we were given: raising it would fail, and less is what was meant. */
static int set_limit(const struct limit *limit)
{
    struct rlimit now;
    if (getrlimit((__rlimit_resource_t)limit->resource, &now) < 0)
        return -1;
    rlim_t value = limit->value < now.rlim_max ? limit->value : now.rlim_max;
    struct rlimit wanted = {.rlim_cur = value, .rlim_max = value};
    return setrlimit((__rlimit_resource_t)limit->resource, &wanted);
}

static int set_limits(const struct options *options, const struct rlimit *files)
{
    if (setrlimit(RLIMIT_NOFILE, files) < 0)
        return -1;
    for (size_t i = 0; i < options->limit_count; i++)
        if (set_limit(&options->limits[i]) < 0)
            return -1;
    return 0;
}

static int reset_signals(void)
{
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL); /* fails for SIGKILL, SIGSTOP and libc's own two, which need no reset */
    sigset_t none;
    sigemptyset(&none);
    return sigprocmask(SIG_SETMASK, &none, NULL);
}

static const char *search_path(char *const *environment)
{
    for (; *environment; environment++)
        if (strncmp(*environment, "PATH=", 5) == 0)
            return *environment + 5;
    return DEFAULT_PATH;
}

/* execvpe(3) with the search path of the agent's environment, not ours. Returns with errno set. */
static void execute(const struct command *command)
{
    const char *name = command->argv[0];
    int found = ENOENT;
    if (strchr(name, '/')) {
        execve(name, command->argv, command->environment);
        return;
    }
    const char *at = search_path(command->environment);
    while (*name && at) {
        char path[PATH_MAX];
        const char *end = strchrnul(at, ':');
        int length = snprintf(path, sizeof path, "%.*s%s%s", (int)(end - at), at, end > at ? "/" : "./", name);
        if (length > 0 && length < (int)sizeof path)
            execve(path, command->argv, command->environment);
        /* As execvp(3): go on looking, but remember that something was there. */
        if (errno != ENOENT && errno != ENOTDIR)
            found = errno;
        if (errno != ENOENT && errno != ENOTDIR && errno != EACCES)
            break;
        at = *end ? end + 1 : NULL;
    }
    errno = found;
}

_Noreturn static void run(const struct command *command, const struct options *options, const struct rlimit *files,
                          int report, int link)
{
    if (enter_session(command) < 0)
        give_up(report, STAGE_SESSION);
    int end = fcntl(report, F_DUPFD_CLOEXEC, 16); /* out of the way of stdio */
    if (end >= 0 && link >= 0)
        link = fcntl(link, F_DUPFD_CLOEXEC, 17);
    if (end < 0 || place_stdio(command->stdio) < 0)
        give_up(end < 0 ? report : end, STAGE_STDIO);
    if (set_limits(options, files) < 0)
        give_up(end, STAGE_LIMIT);
    if (options->mdwe && prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) < 0)
        give_up(end, STAGE_MDWE);
    if (chdir(command->directory) < 0)
        give_up(end, STAGE_DIRECTORY);
    if (reset_signals() < 0)
        give_up(end, STAGE_SIGNALS);
    if (link >= 0 && !notify_enter(link))
        give_up(end, STAGE_NOTIFY);
    execute(command);
    give_up(end, STAGE_EXEC);
}

/* Wait until the child has executed, or says why not; its own execve(2) may wait for us. */
static ssize_t await_report(int end, int listener, struct report *report)
{
    ssize_t got;
    struct pollfd wait[2] = {{.fd = end, .events = POLLIN}, {.fd = listener, .events = POLLIN}};
    while (listener >= 0) {
        if (poll(wait, 2, -1) < 0 && errno != EINTR)
            return -1;
        if (wait[0].revents)
            break;
        if (wait[1].revents && !notify_serve(listener, NULL, NOTIFY_NOTHING))
            wait[1].fd = -1;
    }
    do
        got = read(end, report, sizeof *report);
    while (got < 0 && errno == EINTR);
    return got;
}

/* Pipe for what it fails at, and where its calls are told a link for their listener. */
static int open_ends(int ends[2], int link[2], bool told)
{
    link[0] = link[1] = -1;
    if (told && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, link) < 0)
        return -1;
    return pipe2(ends, O_CLOEXEC);
}

pid_t child_start(const struct command *command, const struct options *options, const struct rlimit *files,
                  struct failure *failure)
{
    int ends[2], link[2], listener = -1;
    *failure = (struct failure){.stage = "fork"};
    if (open_ends(ends, link, options->notify != NOTIFY_NOTHING && command->broker) < 0) {
        failure->error = errno;
        return -1;
    }
    pid_t pid = fork();
    if (pid == 0)
        run(command, options, files, ends[1], link[1]);
    failure->error = errno;
    close(ends[1]);
    if (link[0] >= 0) {
        close(link[1]);
        listener = pid > 0 ? notify_take(link[0]) : -1;
        close(link[0]);
    }
    struct report report;
    ssize_t got = pid > 0 ? await_report(ends[0], listener, &report) : 0;
    close(ends[0]);
    if (pid > 0 && got == 0 && listener >= 0 && notify_watch(listener, command->broker, options->notify)) {
        notify_started(command->broker, options->notify, (uint32_t)pid, command->argv);
        return pid;
    }
    if (listener >= 0)
        close(listener); /* who waits there gets ENOSYS */
    if (pid < 0 || (got == 0 && listener < 0))
        return pid;
    /* Its end is ours to collect: nobody will hear of this pid. */
    (void)!kill(pid, SIGKILL);
    while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
        continue;
    if (got == sizeof report && report.stage >= STAGE_SESSION && report.stage <= STAGE_EXEC)
        *failure = (struct failure){.error = report.error, .stage = STAGES[report.stage]};
    return -1;
}
