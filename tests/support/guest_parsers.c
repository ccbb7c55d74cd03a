/*
 * What it is: what PID 1 of a guest parses, callable from a test: the kernel's command line, the fields of a run, its tar.
 * What it is not: part of the product.
 *
 * `line` and `fields` take cases from standard input, each behind its u32 length, and answer each with one line. `tar
 * SIZE SEED` takes one whole tar in pieces of SIZE bytes, for the home /home/alice of whoever runs this.
 */
#define _GNU_SOURCE
#include "../../src/cloister/host/shim/guest_fields.h"
#include "../../src/cloister/host/shim/guest_line.h"
#include "../../src/cloister/host/shim/guest_tar.h"

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char *next(size_t *length)
{
    uint32_t size;
    if (fread(&size, sizeof size, 1, stdin) != 1)
        return NULL;
    /* Exactly as large as it is, so that a read behind it is seen. */
    char *data = malloc((size_t)size + 1);
    if (!data || fread(data, 1, size, stdin) != size)
        exit(3);
    data[size] = 0;
    *length = size;
    return data;
}

static void on_line(char *text)
{
    struct guest_line line;
    const char *wrong = guest_line_parse(&line, text);
    if (wrong)
        printf("no: %s\n", wrong);
    else
        printf("ok %d %llu %llu %s %s\n", line.probe, line.data_blocks, line.hash_start, line.root_hash, line.salt);
}

static void on_fields(char *text, size_t length)
{
    struct guest_fields fields;
    char *words[1024];
    size_t count = 0;
    for (size_t at = 0; at < length && count < 1024; at += strlen(text + at) + 1)
        words[count++] = text + at;
    const char *wrong = guest_fields_read(&fields, words, count);
    if (wrong)
        printf("no: %s\n", wrong);
    else
        printf("ok %u %u %d %s %s\n", fields.uid, fields.gid, fields.fresh, fields.home ? fields.home : "",
               fields.workspace ? fields.workspace : "");
}

static int on_tar(size_t piece, const char *seed)
{
    struct guest_fields fields = {.home = "/home/alice", .uid = getuid(), .gid = getgid()};
    char *buffer = malloc(piece);
    const char *wrong = NULL;
    size_t got;
    if (*seed)
        fields.seed.items[fields.seed.count++] = seed;
    guest_tar_begin(&fields);
    while (buffer && !wrong && (got = fread(buffer, 1, piece, stdin)) > 0)
        wrong = guest_tar_take(buffer, got);
    if (!wrong)
        wrong = guest_tar_take(NULL, 0);
    free(buffer);
    printf("%s%s\n", wrong ? "no: " : "ok", wrong ? wrong : "");
    return wrong != NULL;
}

int main(int count, char **arguments)
{
    char *data;
    size_t length = 0;
    if (count == 4 && strcmp(arguments[1], "tar") == 0)
        return on_tar(strtoul(arguments[2], NULL, 10), arguments[3]);
    while (count == 2 && (data = next(&length))) {
        if (strcmp(arguments[1], "line") == 0)
            on_line(data);
        else
            on_fields(data, length);
        free(data);
    }
    return 0;
}
