/* One line of the log from one JSON object, in place. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define LINE_HEAD 32 /* room before the object's fields: {"seq":18446744073709551615, */
#define LINE_MORE 128 /* all that a line has and its object has not */

/* The object stands at `line + LINE_HEAD`; the line begins at `line` afterwards. Returns its length, newline included. */
size_t chain_line(char *line, size_t length, uint64_t *seq, uint8_t *hash);
