/*
 * What it is: unpacking the run's files as they arrive, where they belong in a guest (host/tar_format.py writes them).
 * What it is not: a tar for anybody else; what is not as we write it is refused.
 *
 * The home holds state that an agent has kept: every directory on the way is opened by one name at a time, through no
 * link, and what stands in the way of a file is moved aside. No agent runs yet, so nothing changes meanwhile.
 */
#define _GNU_SOURCE
#include "guest_tar.h"
#include "guest_root.h"
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BLOCK = 512, NAME_SIZE = 1024, ENTRIES_MAX = 20000, TYPE_AT = 156, SUM_AT = 148, SUM_SIZE = 8 };

static const unsigned long long BYTES_MAX = 64ULL << 20;

/* Three places take files. */
struct area {
    const char *top;
    uid_t uid;
    gid_t gid;
    mode_t directory, file, program;
};

enum { HOME, BOX, ETC, AREAS };

static struct {
    const struct guest_words *seed;
    struct area areas[AREAS];
    unsigned char block[BLOCK];
    size_t filled;
    char name[NAME_SIZE + 2]; /* `/`, and the name that a long-name entry gave; empty: none */
    unsigned long long left;  /* bytes of the entry's content still to come */
    bool long_name;           /* the content is a name */
    size_t name_filled;
    int file;                 /* where content goes; -1: it is skipped */
    mode_t mode;
    unsigned entries, zeros;
    unsigned long long bytes;
} self = {.file = -1};

void guest_tar_begin(const struct guest_fields *fields)
{
    if (self.file >= 0)
        close(self.file);
    memset(&self, 0, sizeof self);
    self.file = -1;
    self.seed = &fields->seed;
    self.areas[HOME] = (struct area){fields->home, fields->uid, fields->gid, 0700, 0600, 0700};
    self.areas[BOX] = (struct area){GUEST_BOX, 0, fields->gid, 0750, 0440, 0550};
    self.areas[ETC] = (struct area){"/etc", 0, 0, 0755, 0644, 0755};
}

void guest_tar_renew(void)
{
    static const struct guest_words none;
    struct area box = self.areas[BOX];
    memset(&self, 0, sizeof self);
    self.file = -1;
    self.seed = &none;
    for (size_t i = 0; i < AREAS; i++)
        self.areas[i] = box;
}

static bool is_below(const char *path, const char *top)
{
    size_t length = strlen(top);
    return strncmp(path, top, length) == 0 && path[length] == '/';
}

static const struct area *area_of(const char *path)
{
    for (size_t i = 0; i < AREAS; i++)
        if (is_below(path, self.areas[i].top))
            return &self.areas[i];
    return NULL;
}

/* A directory entry on the way to a place of ours, or that place. */
static bool on_the_way(const char *path)
{
    for (size_t i = 0; i < AREAS; i++)
        if (strcmp(path, self.areas[i].top) == 0 || is_below(self.areas[i].top, path))
            return true;
    return false;
}

/* Whatever has this name gets another one, so that nothing of the agent's is lost. */
static int move_aside(int directory, const char *name)
{
    char aside[NAME_MAX + 1];
    if (unlinkat(directory, name, 0) == 0)
        return 0;
    for (unsigned i = 0; i < 100; i++) {
        if (snprintf(aside, sizeof aside, "%.200s.replaced%u", name, i) >= (int)sizeof aside)
            return -1;
        if (faccessat(directory, aside, F_OK, AT_SYMLINK_NOFOLLOW) < 0 && errno == ENOENT)
            return renameat(directory, name, directory, aside);
    }
    errno = EEXIST;
    return -1;
}

/* Enter the directory `name`, which is made where it is not there; takes `at` over. */
static int enter(int at, const char *name, const struct area *area)
{
    const int look = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    bool made = false;
    int next = openat(at, name, look);
    if (next < 0 && (errno == ENOTDIR || errno == ELOOP) && move_aside(at, name) < 0)
        next = -2;
    if (next == -1) {
        made = mkdirat(at, name, area->directory) == 0;
        next = made ? openat(at, name, look) : -1;
    }
    if (next >= 0 && made && (fchown(next, area->uid, area->gid) < 0 || fchmod(next, area->directory) < 0)) {
        close(next);
        next = -1;
    }
    int saved = errno;
    close(at);
    errno = saved;
    return next < 0 ? -1 : next;
}

/* Open the directory that holds `path`, and point `last` at the name in it. */
static int open_parent(const char *path, const struct area *area, const char **last)
{
    char part[NAME_MAX + 1];
    const char *at = path + strlen(area->top) + 1;
    int directory = open(area->top, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    for (size_t length; directory >= 0 && at[length = strcspn(at, "/")]; at += length + 1) {
        memcpy(part, at, length); /* guest_fields_relative has bounded it */
        part[length] = 0;
        directory = enter(directory, part, area);
    }
    *last = at;
    return directory;
}

static bool is_seed(const char *path, int directory, const char *name)
{
    struct stat about;
    for (size_t i = 0; i < self.seed->count; i++)
        if (strcmp(self.seed->items[i], path) == 0)
            return fstatat(directory, name, &about, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(about.st_mode);
    return false;
}

static const char *open_file(const char *path, const struct area *area, bool program)
{
    const char *name = NULL;
    int directory = open_parent(path, area, &name);
    if (directory < 0)
        return "tar: a directory";
    const char *wrong = NULL;
    if (!is_seed(path, directory, name)) {
        struct stat about;
        bool there = fstatat(directory, name, &about, AT_SYMLINK_NOFOLLOW) == 0;
        if (!there || move_aside(directory, name) == 0)
            self.file = openat(directory, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        self.mode = program ? area->program : area->file;
        if (self.file < 0 || fchown(self.file, area->uid, area->gid) < 0)
            wrong = "tar: a file";
    }
    int saved = errno;
    close(directory);
    errno = saved;
    return wrong;
}

static const char *make_directory(const char *path)
{
    const char *name = NULL;
    const struct area *area = area_of(path);
    if (!area)
        return on_the_way(path) ? NULL : "tar: a directory in a place that is not the run's";
    int directory = open_parent(path, area, &name);
    if (directory >= 0)
        directory = enter(directory, name, area);
    if (directory < 0)
        return "tar: a directory";
    close(directory);
    return NULL;
}

/* An octal field that ends in NUL; all ones: it is none. */
static unsigned long long octal(const unsigned char *field, size_t length)
{
    unsigned long long value = 0;
    for (size_t i = 0; i + 1 < length; i++) {
        if (field[i] < '0' || field[i] > '7')
            return ~0ULL;
        value = value << 3 | (unsigned long long)(field[i] - '0');
    }
    return field[length - 1] == 0 ? value : ~0ULL;
}

static bool sum_is_good(const unsigned char *block)
{
    unsigned sum = 0;
    for (size_t i = 0; i < BLOCK; i++)
        sum += i >= SUM_AT && i < SUM_AT + SUM_SIZE ? ' ' : block[i];
    /* Six digits, NUL, space. */
    return octal(block + SUM_AT, 7) == sum && block[SUM_AT + 7] == ' ';
}

/* `/` and the name of this header, or of the long-name entry before it; NULL: it is none. */
static const char *entry_path(const unsigned char *block)
{
    if (!*self.name) {
        size_t length = strnlen((const char *)block, 100);
        self.name[0] = '/';
        memcpy(self.name + 1, block, length);
        self.name[length + 1] = 0;
    }
    return guest_fields_relative(self.name + 1) ? self.name : NULL;
}

static const char *on_header(const unsigned char *block)
{
    unsigned long long size = octal(block + 124, 12), mode = octal(block + 100, 8);
    unsigned char type = block[TYPE_AT];
    if (memcmp(block + 257, "ustar", 6) != 0 || !sum_is_good(block) || size > BYTES_MAX)
        return "tar: a header that is not of our making";
    if (++self.entries > 2 * ENTRIES_MAX || (self.bytes += size) > 2 * BYTES_MAX)
        return "tar: it is too large";
    self.left = size;
    self.long_name = type == 'L' && !*self.name;
    if (self.long_name) {
        self.name_filled = 0;
        return size >= 2 && size <= NAME_SIZE + 1 ? NULL : "tar: a name that is too long";
    }
    const char *path = entry_path(block);
    const char *wrong = path ? NULL : "tar: a name that is no path";
    if (!wrong && type == '5')
        wrong = size == 0 ? make_directory(path) : "tar: a directory with content";
    else if (!wrong && type == '0')
        wrong = area_of(path) ? open_file(path, area_of(path), mode & 0100)
                              : "tar: a file in a place that is not the run's";
    else if (!wrong)
        wrong = "tar: neither file nor directory";
    self.name[0] = 0;
    return wrong;
}

/* The entry's content is complete. */
static const char *finish(void)
{
    int file = self.file;
    self.file = -1;
    if (self.long_name) {
        self.long_name = false;
        bool good = self.name[self.name_filled] == 0 && strlen(self.name) + 1 == self.name_filled + 1;
        return good ? NULL : "tar: a name that is no path";
    }
    if (file < 0)
        return NULL;
    int result = fchmod(file, self.mode);
    return close(file) < 0 || result < 0 ? "tar: a file" : NULL;
}

static const char *on_content(const unsigned char *block)
{
    size_t length = self.left < BLOCK ? (size_t)self.left : BLOCK;
    if (self.long_name) {
        self.name[0] = '/';
        memcpy(self.name + 1 + self.name_filled, block, length);
        self.name_filled += length;
    } else if (self.file >= 0 && sys_write_all(self.file, (const char *)block, length, 1000) < 0) {
        return "tar: writing a file";
    }
    self.left -= length;
    return self.left == 0 ? finish() : NULL;
}

static const char *on_block(void)
{
    static const unsigned char zeros[BLOCK];
    errno = EINVAL;
    if (self.left > 0)
        return on_content(self.block);
    if (memcmp(self.block, zeros, BLOCK) == 0)
        return ++self.zeros > 2 ? "tar: something stands behind its end" : NULL;
    if (self.zeros > 0)
        return "tar: something stands behind its end";
    const char *wrong = on_header(self.block);
    return wrong || self.left > 0 ? wrong : finish();
}

const char *guest_tar_take(const void *piece, size_t length)
{
    const unsigned char *at = piece;
    if (length == 0) {
        errno = EINVAL;
        return self.zeros == 2 && self.filled == 0 ? NULL : "tar: it is cut off";
    }
    while (length > 0) {
        size_t room = BLOCK - self.filled, part = length < room ? length : room;
        memcpy(self.block + self.filled, at, part);
        self.filled += part;
        at += part;
        length -= part;
        if (self.filled < BLOCK)
            return NULL;
        self.filled = 0;
        const char *wrong = on_block();
        if (wrong)
            return wrong;
    }
    return NULL;
}
