/*
 * What it is: the kernel's command line as a guest takes it. What it is not: where anything is done about it.
 *
 * The line decides which root is believed, so it is read strictly: one verity table, and no word that would have the
 * kernel, or us, take a root or a first program from anywhere else.
 */
#define _GNU_SOURCE
#include "guest_line.h"

#include <stdlib.h>
#include <string.h>

static const char VERITY[] = "cloister.verity=";
static const char PROBE[] = "cloister.probe";
/* 16 TiB: a table beyond it is a mistake, and nothing computed from it overflows. */
static const unsigned long long BLOCKS_MAX = 1ULL << 32;

static bool begins(const char *word, const char *start)
{
    return strncmp(word, start, strlen(start)) == 0;
}

/* Words that choose a root, a first program, a verity device or the modules in ways that are not ours. */
static bool foreign(const char *word)
{
    static const char *const names[] = {"init=", "rdinit=", "root=", "rootflags=", "rootfstype=", "nfsroot=",
        "dm-mod.", "dm_mod.", "dm_verity.", "dm-verity.", "initrd=", "noinitrd", "module_blacklist=", "modprobe."};
    if (begins(word, "cloister."))
        return true;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (begins(word, names[i]))
            return true;
    return strcmp(word, "--") == 0;
}

/* A decimal number of blocks without sign, space or needless zero; moves `at` behind the colon. 0: none. */
static unsigned long long blocks(char **at)
{
    char *end = NULL;
    if (**at < '1' || **at > '9')
        return 0;
    unsigned long long value = strtoull(*at, &end, 10);
    if (*end != ':' || end - *at > 10 || value > BLOCKS_MAX)
        return 0;
    *at = end + 1;
    return value;
}

/* Exactly 64 lower-case hex digits, then `end`; moves `at` behind it. */
static bool digest(char into[GUEST_DIGEST_SIZE], char **at, char end)
{
    size_t length = strspn(*at, "0123456789abcdef");
    if (length != GUEST_DIGEST_SIZE - 1 || (*at)[length] != end)
        return false;
    memcpy(into, *at, length);
    into[length] = 0;
    *at += length + 1;
    return true;
}

static bool table(struct guest_line *line, char *at)
{
    line->data_blocks = blocks(&at);
    line->hash_start = line->data_blocks ? blocks(&at) : 0;
    return line->hash_start > line->data_blocks && digest(line->root_hash, &at, ':') && digest(line->salt, &at, 0);
}

const char *guest_line_parse(struct guest_line *line, char *text)
{
    char *rest = NULL;
    bool verity = false;
    memset(line, 0, sizeof *line);
    for (char *word = strtok_r(text, " \n", &rest); word; word = strtok_r(NULL, " \n", &rest)) {
        if (begins(word, VERITY)) {
            if (verity)
                return "the command line names two roots";
            verity = true;
            if (!table(line, word + strlen(VERITY)))
                return "the command line has no well-formed cloister.verity=";
        } else if (strcmp(word, PROBE) == 0) {
            line->probe = true;
        } else if (foreign(word) || strchr(word, '"')) {
            return "the command line holds a word that no guest of ours has";
        }
    }
    if (line->probe && verity)
        return "the command line asks for a probe and a root at once";
    return verity || line->probe ? NULL : "the command line names no root (cloister.verity=)";
}
