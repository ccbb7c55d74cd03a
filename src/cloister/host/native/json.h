/* JSON text, written forwards into a buffer that is large enough: who calls has counted the worst case. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#define TEXT(P, LITERAL) (__builtin_memcpy(P, LITERAL, sizeof(LITERAL) - 1), (P) + sizeof(LITERAL) - 1)

char *json_copy(char *p, const char *text);
char *json_unsigned(char *p, uint64_t value);
char *json_signed(char *p, int64_t value);
/* Without quotes: six bytes at most become of one. Bytes that are no UTF-8 stand as Python's backslashreplace has them. */
char *json_escaped(char *p, const uint8_t *text, size_t length);
