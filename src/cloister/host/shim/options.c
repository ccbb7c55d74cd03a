/*
 * What it is: the command line of the inner half and of a service. What it is not: anything the agent may
 * influence; argv comes from the plan, the agent's own words come in frame `G` or behind `--`.
 */
#define _GNU_SOURCE
#include "options.h"
#include "sys.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    int resource;
} RESOURCES[] = {
    {"as", RLIMIT_AS},         {"core", RLIMIT_CORE},         {"cpu", RLIMIT_CPU},     {"data", RLIMIT_DATA},
    {"fsize", RLIMIT_FSIZE},   {"memlock", RLIMIT_MEMLOCK},   {"nofile", RLIMIT_NOFILE}, {"nproc", RLIMIT_NPROC},
    {"stack", RLIMIT_STACK},   {"msgqueue", RLIMIT_MSGQUEUE}, {"locks", RLIMIT_LOCKS},
    {"sigpending", RLIMIT_SIGPENDING},
};

static bool parse_resource(struct limit *limit, const char *name, size_t length)
{
    for (size_t i = 0; i < sizeof RESOURCES / sizeof *RESOURCES; i++) {
        if (strlen(RESOURCES[i].name) == length && memcmp(RESOURCES[i].name, name, length) == 0) {
            limit->resource = RESOURCES[i].resource;
            return true;
        }
    }
    return false;
}

/* `NAME=VALUE`, in the units of setrlimit(2), or `NAME=unlimited`. */
static bool parse_limit(struct options *options, const char *text)
{
    const char *equal = strchr(text, '=');
    if (!equal || options->limit_count == LIMITS_MAX)
        return false;
    struct limit *limit = &options->limits[options->limit_count];
    if (!parse_resource(limit, text, (size_t)(equal - text)))
        return false;
    if (strcmp(equal + 1, "unlimited") == 0) {
        limit->value = RLIM_INFINITY;
    } else {
        char *end = NULL;
        if (equal[1] < '0' || equal[1] > '9')
            return false;
        errno = 0;
        limit->value = strtoull(equal + 1, &end, 10);
        if (errno || *end)
            return false;
    }
    options->limit_count++;
    return true;
}

static bool parse_landlock(struct options *options, const char *text)
{
    static const char *const names[] = {
        [LANDLOCK_AVAILABLE] = "available", [LANDLOCK_REQUIRED] = "required", [LANDLOCK_OFF] = "off"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(names[i], text) == 0) {
            options->landlock = (enum landlock_demand)i;
            return true;
        }
    }
    return false;
}

static bool parse_notify(struct options *options, const char *text)
{
    if (strcmp(text, "calls") == 0)
        options->notify = NOTIFY_CALLS;
    else if (strcmp(text, "files") == 0)
        options->notify = NOTIFY_FILES;
    return options->notify != NOTIFY_NOTHING;
}

static bool add_word(struct words *words, const char *word, int most)
{
    if (!words->items)
        words->items = calloc((size_t)most, sizeof *words->items);
    if (!words->items)
        return false;
    words->items[words->count++] = word;
    return true;
}

/* 0 is standard input, which is the channel in a unit; inner.c checks that it is one. */
static bool parse_channel(struct options *options, const char *text)
{
    options->ctl = strcmp(text, "0") == 0 ? 0 : sys_parse_descriptor(text);
    return options->ctl >= 0;
}

static bool parse_valued(struct options *options, const char *name, const char *value, int most)
{
    if (strcmp(name, "--ctl") == 0)
        return parse_channel(options, value);
    if (strcmp(name, "--egress") == 0)
        return (options->egress = value) != NULL;
    if (strcmp(name, "--seccomp") == 0)
        return (options->seccomp = value) != NULL;
    if (strcmp(name, "--end") == 0)
        return (options->end = value) != NULL;
    if (strcmp(name, "--listen") == 0)
        return add_word(&options->listen, value, most);
    if (strcmp(name, "--publish") == 0)
        return add_word(&options->publish, value, most);
    if (strcmp(name, "--probe-write") == 0)
        return add_word(&options->probe_write, value, most);
    if (strcmp(name, "--probe-connect") == 0)
        return add_word(&options->probe_connect, value, most);
    if (strcmp(name, "--landlock-rw") == 0)
        return add_word(&options->landlock_rw, value, most);
    if (strcmp(name, "--landlock-ro") == 0)
        return add_word(&options->landlock_ro, value, most);
    if (strcmp(name, "--landlock") == 0)
        return parse_landlock(options, value);
    if (strcmp(name, "--notify") == 0)
        return parse_notify(options, value);
    if (strcmp(name, "--rlimit") == 0)
        return parse_limit(options, value);
    return false;
}

bool options_parse(struct options *options, int count, char **arguments)
{
    memset(options, 0, sizeof *options);
    options->ctl = -1;
    for (int i = 0; i < count; i++) {
        if (strcmp(arguments[i], "--mdwe") == 0) {
            options->mdwe = true;
        } else if (strcmp(arguments[i], "--unit") == 0) {
            options->unit = true;
        } else if (strcmp(arguments[i], "--nested") == 0) {
            options->nested = true;
        } else if (strcmp(arguments[i], "--") == 0) {
            options->command = arguments + i + 1;
            break;
        } else {
            if (i + 1 == count || !parse_valued(options, arguments[i], arguments[i + 1], count))
                return false;
            i++;
        }
    }
    return options->egress != NULL;
}
