/*
 * What it is: the kernel's command line as a guest takes it. What it is not: where anything is done about it.
 */
#ifndef CLOISTER_GUEST_LINE_H
#define CLOISTER_GUEST_LINE_H

#include <stdbool.h>

/* A SHA-256, or the salt of a tree, in hex, with the NUL. */
enum { GUEST_DIGEST_SIZE = 65 };

struct guest_line {
    bool probe; /* `cloister.probe`: say hello and power off; then nothing else of ours is there */
    unsigned long long data_blocks, hash_start; /* of 4,096 bytes */
    char root_hash[GUEST_DIGEST_SIZE];
    char salt[GUEST_DIGEST_SIZE];
};

/* Take `text` apart, which is changed: NULL, or what is wrong with it. Whatever names another root or init is wrong. */
const char *guest_line_parse(struct guest_line *line, char *text);

#endif
