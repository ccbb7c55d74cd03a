/*
 * What it is: the fields of the frame `B` that make a booted guest the place of one run (ARCHITECTURE.md, "The link").
 * What it is not: where anything is done about them.
 */
#define _GNU_SOURCE
#include "guest_fields.h"

#include <stdlib.h>
#include <string.h>

enum { ID_MAX = 0x7ffffffe, GUEST_UMASK_GIVEN = 01000 };

static bool number(const char *text, unsigned long long most, unsigned long long *into)
{
    char *end = NULL;
    size_t length = strspn(text, "0123456789");
    if (length == 0 || length > 19 || text[length])
        return false;
    *into = strtoull(text, &end, 10);
    return *into <= most;
}

/* Only characters of `allowed`, at least one, at most `most`. */
static bool made_of(const char *text, const char *allowed, size_t most)
{
    size_t length = strspn(text, allowed);
    return length > 0 && length <= most && text[length] == 0;
}

#define LOWER "abcdefghijklmnopqrstuvwxyz"
#define UPPER "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#define DIGITS "0123456789"
#define HEX "0123456789abcdef"

static int nibble(char digit)
{
    return digit <= '9' ? digit - '0' : digit - 'a' + 10;
}

static bool entropy(struct guest_fields *fields, const char *text)
{
    if (strlen(text) != 2 * GUEST_ENTROPY || !made_of(text, HEX, 2 * GUEST_ENTROPY))
        return false;
    for (size_t i = 0; i < GUEST_ENTROPY; i++)
        fields->entropy[i] = guest_fields_byte(text + 2 * i);
    return true;
}

bool guest_fields_relative(const char *path)
{
    size_t total = strlen(path);
    if (total == 0 || total >= PATH_MAX / 2)
        return false;
    for (const char *part = path;; part++) {
        size_t length = strcspn(part, "/");
        if (length == 0 || length > NAME_MAX || (length <= 2 && strncmp(part, "..", length) == 0))
            return false;
        part += length;
        if (!*part)
            return true;
    }
}

static bool absolute(const char *path)
{
    return *path == '/' && guest_fields_relative(path + 1);
}

static bool add(struct guest_words *words, const char *value, bool good)
{
    if (!good || words->count == GUEST_WORDS_MAX)
        return false;
    words->items[words->count++] = value;
    return true;
}

static bool stands(const char *value)
{
    size_t length = strspn(value, HEX);
    return length % 2 == 0 && value[length] == ':' && guest_fields_relative(value + length + 1);
}

unsigned char guest_fields_byte(const char *text)
{
    return (unsigned char)(nibble(text[0]) << 4 | nibble(text[1]));
}

/* Fields that may come more than once, and those that others read. False: not one of these, or malformed. */
static bool repeated(struct guest_fields *fields, const char *name, const char *value)
{
    if (strcmp(name, "state") == 0)
        return add(&fields->state, value, guest_fields_relative(value));
    if (strcmp(name, "ro") == 0)
        return add(&fields->read_only, value, guest_fields_relative(value));
    if (strcmp(name, "mask") == 0)
        return add(&fields->mask, value, guest_fields_relative(value));
    if (strcmp(name, "stand") == 0)
        return add(&fields->stand, value, stands(value));
    if (strcmp(name, "seed") == 0)
        return add(&fields->seed, value, absolute(value));
    return strcmp(name, "socket") == 0 || strcmp(name, "proxy") == 0;
}

static bool octal(const char *text, mode_t *into)
{
    if (*into || strlen(text) != 3 || !made_of(text, "01234567", 3))
        return false;
    *into = (mode_t)(GUEST_UMASK_GIVEN | (text[0] - '0') << 6 | (text[1] - '0') << 3 | (text[2] - '0'));
    return true;
}

static bool id(const char *text, unsigned *into)
{
    unsigned long long value = 0;
    if (*into != 0 || !number(text, ID_MAX, &value) || value == 0)
        return false; /* never root; never twice */
    *into = (unsigned)value;
    return true;
}

/* A text field, once. */
static bool text(const char **into, const char *value, bool good)
{
    if (*into || !good)
        return false;
    *into = value;
    return true;
}

static bool single(struct guest_fields *fields, const char *name, const char *value)
{
    if (strcmp(name, "hostname") == 0)
        return text(&fields->hostname, value, made_of(value, LOWER UPPER DIGITS "-.", 63));
    if (strcmp(name, "machine_id") == 0)
        return text(&fields->machine_id, value, strlen(value) == 32 && made_of(value, HEX, 32));
    if (strcmp(name, "user") == 0)
        return text(&fields->user, value, made_of(value, LOWER UPPER DIGITS "_.-", 32) && *value != '-');
    if (strcmp(name, "home") == 0)
        return text(&fields->home, value, absolute(value));
    if (strcmp(name, "workspace") == 0)
        return text(&fields->workspace, value, absolute(value));
    if (strcmp(name, "address") == 0)
        return text(&fields->address, value, made_of(value, DIGITS "./", 18));
    if (strcmp(name, "gateway") == 0)
        return text(&fields->gateway, value, made_of(value, DIGITS ".", 15));
    if (strcmp(name, "mac") == 0)
        return text(&fields->mac, value, strlen(value) == 17 && made_of(value, HEX ":", 17));
    if (strcmp(name, "uid") == 0)
        return id(value, &fields->uid);
    if (strcmp(name, "gid") == 0)
        return id(value, &fields->gid);
    if (strcmp(name, "umask") == 0)
        return octal(value, &fields->umask);
    if (strcmp(name, "tmpfs") == 0)
        return fields->tmpfs == 0 && number(value, 1ULL << 50, &fields->tmpfs);
    if (strcmp(name, "nested") == 0)
        return !fields->nested && (fields->nested = strcmp(value, "1") == 0);
    if (strcmp(name, "time_ns") == 0)
        return fields->time_ns == 0 && number(value, 1ULL << 62, &fields->time_ns);
    return false;
}

const char *guest_fields_read(struct guest_fields *fields, char *const *words, size_t count)
{
    static char name[32];
    bool random = false;
    memset(fields, 0, sizeof *fields);
    for (size_t i = 0; i < count; i++) {
        const char *equal = strchr(words[i], '=');
        size_t length = equal ? (size_t)(equal - words[i]) : 0;
        if (length == 0 || length >= sizeof name)
            return "a field without a name";
        memcpy(name, words[i], length);
        name[length] = 0;
        bool good;
        if (strcmp(name, "entropy") == 0) {
            good = !random && entropy(fields, equal + 1);
            random = true;
        } else {
            good = single(fields, name, equal + 1) || repeated(fields, name, equal + 1);
        }
        if (!good)
            return name;
    }
    fields->umask = fields->umask ? fields->umask & 0777 : 022;
    fields->fresh = random && fields->time_ns != 0;
    return NULL;
}
