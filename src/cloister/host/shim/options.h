/*
 * What it is: the command line of the inner half and of a service. What it is not: anything the agent may
 * influence; argv comes from the plan, the agent's own words come in frame `G` or behind `--`.
 */
#ifndef CLOISTER_OPTIONS_H
#define CLOISTER_OPTIONS_H

#include "notify.h"

#include <stdbool.h>
#include <stddef.h>
#include <sys/resource.h>

enum landlock_demand { LANDLOCK_AVAILABLE, LANDLOCK_REQUIRED, LANDLOCK_OFF };

struct words {
    const char **items;
    size_t count;
};

struct limit {
    int resource;
    rlim_t value;
};

enum { LIMITS_MAX = 16 };

struct options {
    int ctl; /* -1: none */
    bool unit; /* under systemd: perhaps not PID 1, mounts still to come */
    const char *egress;
    const char *seccomp; /* a file with a filter to install; none: the backend has */
    struct words listen; /* none: no forwarder */
    struct words publish; /* of a service */
    const char *end;      /* of a service: where it is asked to end; none: by signals only */
    char **command; /* what stands behind `--`: of a service */
    struct words probe_write, probe_connect;
    struct words landlock_rw, landlock_ro;
    enum landlock_demand landlock;
    bool mdwe;   /* refuse memory that is writable and executable (PR_SET_MDWE, Linux 6.3) */
    enum notify_demand notify; /* which calls of its commands are told */
    bool nested; /* the agent may make user namespaces and mounts */
    struct limit limits[LIMITS_MAX];
    size_t limit_count;
};

/* False when an option is unknown or misses its value, or `--egress` is absent. */
bool options_parse(struct options *options, int count, char **arguments);

#endif
