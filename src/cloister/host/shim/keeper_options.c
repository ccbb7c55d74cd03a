/*
 * What it is: the keeper's command line. What it is not: anything a guest may influence; it comes from the plan.
 */
#define _GNU_SOURCE
#include "keeper.h"
#include "stream.h"
#include "sys.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* `FD:PORT`. */
static bool parse_port(struct keeper_options *options, const char *text)
{
    char *end = NULL;
    if (options->port_count == KEEPER_PORTS_MAX || *text < '0' || *text > '9')
        return false;
    long fd = strtol(text, &end, 10);
    if (*end != ':' || fd < 3 || fd > 65535 || end[1] < '0' || end[1] > '9')
        return false;
    long port = strtol(end + 1, &end, 10);
    if (*end || port < 1 || port > 65535)
        return false;
    options->ports[options->port_count].fd = (int)fd;
    options->ports[options->port_count].port = (uint16_t)port;
    options->port_count++;
    return true;
}

static bool parse_adopt(int64_t *adopt, const char *text)
{
    char *end = NULL;
    long value = *text >= '0' && *text <= '9' && strlen(text) < 10 ? strtol(text, &end, 10) : -1;
    *adopt = value;
    return end && !*end && value >= 0 && value < (long)STREAM_COMMANDS_MAX;
}

/* A name in the box: no way out of it. */
static bool add_socket(struct keeper_options *options, const char *name)
{
    if (options->socket_count == KEEPER_SOCKETS_MAX || !*name || strchr(name, '/') || name[0] == '.')
        return false;
    options->sockets[options->socket_count++] = name;
    return true;
}

static bool parse_bytes(size_t *bytes, const char *text)
{
    char *end = NULL;
    errno = 0;
    unsigned long long value = *text >= '0' && *text <= '9' ? strtoull(text, &end, 10) : 0;
    *bytes = (size_t)value;
    return end && !*end && !errno && value >= 4096 && value <= 1ULL << 30;
}

static bool parse_seconds(int *seconds, const char *text)
{
    char *end = NULL;
    long value = *text >= '0' && *text <= '9' ? strtol(text, &end, 10) : 0;
    *seconds = (int)value;
    return end && !*end && value >= 1 && value <= 3600;
}

static bool parse(struct keeper_options *options, const char *name, const char *value)
{
    if (strcmp(name, "--ctl") == 0)
        return (options->ctl = sys_parse_descriptor(value)) >= 0;
    if (strcmp(name, "--box") == 0)
        return (options->box = value) != NULL;
    if (strcmp(name, "--console") == 0)
        return (options->console = value) != NULL;
    if (strcmp(name, "--console-bytes") == 0)
        return parse_bytes(&options->console_bytes, value);
    if (strcmp(name, "--patience") == 0)
        return parse_seconds(&options->patience_s, value);
    if (strcmp(name, "--vsock") == 0)
        return (options->vsock = value) != NULL;
    if (strcmp(name, "--socket") == 0)
        return add_socket(options, value);
    if (strcmp(name, "--adopt") == 0)
        return parse_adopt(&options->adopt, value);
    if (strcmp(name, "--publish") == 0)
        return parse_port(options, value);
    return false;
}

bool keeper_options_parse(struct keeper_options *options, int count, char **arguments)
{
    *options = (struct keeper_options){.ctl = -1, .adopt = -1};
    int at = 0;
    while (at + 1 < count && strcmp(arguments[at], "--") != 0) {
        if (!parse(options, arguments[at], arguments[at + 1]))
            return false;
        at += 2;
    }
    if (at + 1 >= count)
        return false;
    options->monitor = arguments + at + 1;
    return options->ctl >= 0 && options->box && options->console && options->console_bytes > 0 &&
           options->patience_s > 0;
}
