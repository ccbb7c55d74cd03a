/*
 * What it is: the main process of a gateway's unit: it proves that the walls stand, carries the gateway's bytes to the
 * relay and its port to the host, starts it with the stdio and the environment of the unit, hands signals on, reaps,
 * and leaves with its status. What it is not: half of a run; no broker speaks to it, and its go is systemd's start.
 */
#define _GNU_SOURCE
#include "child.h"
#include "ending.h"
#include "filter.h"
#include "forward.h"
#include "frame.h"
#include "landlock.h"
#include "loop.h"
#include "options.h"
#include "probe.h"
#include "reaper.h"
#include "shim.h"
#include "sys.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

enum { NOT_FOUND = 127, NOT_EXECUTABLE = 126 };

static struct service {
    struct options options;
    struct rlimit files;
    struct source on_signals;
    int signals;
    pid_t pid;
    bool ending; /* somebody waits for our end */
} self;

_Noreturn static void leave(int code)
{
    reaper_kill_all();
    _exit(code);
}

/* One line for the journal. */
__attribute__((format(printf, 2, 3))) static void complain(const char *reference, const char *format, ...)
{
    char text[4096];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(text, sizeof text, format, values);
    va_end(values);
    if (length < 0)
        return;
    size_t shown = length < (int)sizeof text ? (size_t)length : sizeof text - 1;
    sys_write_printable(2, "cloister: ", 10, false);
    sys_write_printable(2, text, shown, false);
    length = snprintf(text, sizeof text, " [%s]\n", reference);
    sys_write_printable(2, text, (size_t)length, false);
}

/* To the gateway alone, as systemd does with KillMode=mixed: its children are its own to end. */
static void hand_on(int number)
{
    if (self.ending && number == SIGTERM)
        leave(128 + SIGTERM); /* it was asked, and systemd says that the time for that is over */
    (void)!kill(self.pid, number);
}

static void on_asked(void)
{
    if (!self.ending)
        (void)!kill(self.pid, SIGTERM);
    self.ending = true;
}

static void on_signals(struct source *source, uint32_t events)
{
    (void)source, (void)events;
    struct signalfd_siginfo info;
    while (read(self.signals, &info, sizeof info) == sizeof info)
        if (info.ssi_signo != SIGCHLD)
            hand_on((int)info.ssi_signo);
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (pid == self.pid)
            leave(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

/* What is not as promised, in words; true when everything is. */
static bool prove_walls(void)
{
    struct writer findings = {0};
    bool good = landlock_enforce(&self.options, &findings);
    good = filter_enforce(self.options.seccomp, &findings) && good;
    good = probe_run(&self.options, &findings) && good;
    if (!good) {
        char text[2048];
        probe_list(&findings, text, sizeof text);
        complain("self-probe-failed", "the sandbox of this service is not what was promised: %s", text);
    }
    free(findings.data);
    return good;
}

static bool open_ports(void)
{
    for (size_t i = 0; i < self.options.publish.count; i++)
        if (!forward_publish(self.options.publish.items[i])) {
            complain("publish-failed", "cannot listen on %s: %s", self.options.publish.items[i], strerror(errno));
            return false;
        }
    if (self.options.end && !ending_open(self.options.end, on_asked)) {
        complain("publish-failed", "cannot listen on %s: %s", self.options.end, strerror(errno));
        return false;
    }
    return true;
}

static bool start(void)
{
    struct failure failure;
    struct command command = {.argv = self.options.command, .environment = environ, .directory = ".",
                              .stdio = {0, 1, 2}};
    self.pid = child_start(&command, &self.options, &self.files, &failure);
    if (self.pid > 0)
        return true;
    complain("service-not-started", "cannot start %s (%s): %s", command.argv[0], failure.stage,
             strerror(failure.error));
    if (strcmp(failure.stage, "exec") == 0)
        leave(failure.error == ENOENT ? NOT_FOUND : NOT_EXECUTABLE);
    return false;
}

int service_main(int count, char **options)
{
    if (!options_parse(&self.options, count, options) || self.options.ctl >= 0 || !self.options.command ||
        !self.options.command[0]) {
        complain("usage", "cloister-shim service --egress PATH [OPTION]... -- COMMAND...");
        return EXIT_CLOISTER;
    }
    self.options.unit = true;
    if (reaper_shut_in(-1, &self.files) < 0 || reaper_adopt() < 0 || (self.signals = reaper_watch(true)) < 0) {
        complain("service-not-started", "cannot prepare: %s", strerror(errno));
        return EXIT_CLOISTER;
    }
    /* Published before Landlock: nothing the gateway starts needs to be able to write where the socket is. */
    if (!open_ports() || !prove_walls())
        return EXIT_CLOISTER;
    if (!forward_open(self.options.listen.items, self.options.listen.count, self.options.egress)) {
        complain("forwarder-failed", "cannot listen for the gateway's way out: %s", strerror(errno));
        return EXIT_CLOISTER;
    }
    self.on_signals.ready = on_signals;
    if (loop_watch(&self.on_signals, self.signals, LOOP_READ) < 0 || !start())
        leave(EXIT_CLOISTER);
    loop_run();
    leave(EXIT_CLOISTER);
}
