/*
 * What it is: starting one command in the sandbox: session, terminal, limits, directory,
 * execve(2). What it is not: the bookkeeping of what runs; inner.c does that.
 */
#ifndef CLOISTER_CHILD_H
#define CLOISTER_CHILD_H

#include "frame.h"
#include "options.h"

#include <stdbool.h>
#include <sys/resource.h>
#include <sys/types.h>

struct command {
    char **argv;
    char **environment;
    const char *directory;
    int stdio[3];
    bool job;      /* its terminal is already the controlling terminal of our session */
    struct channel *broker; /* who is told of its calls, where the options want that */
    bool terminal; /* make stdin the controlling terminal of a session of its own */
};

/* Why a command did not start. `stage` is "exec" for execve(2) itself. */
struct failure {
    int error;
    const char *stage;
};

/* Returns the pid once execve(2) has succeeded, else -1 and the failure. */
pid_t child_start(const struct command *command, const struct options *options, const struct rlimit *files,
                  struct failure *failure);

#endif
