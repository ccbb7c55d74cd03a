/* The hash chain of the log: {"seq":N, the event's fields, "hash":"H"}, H over the previous H and the line before it.
 *
 * The form stands in ARCHITECTURE.md, "The audit"; its twin in Python is audit/chain.py. No file and no state:
 * who writes the lines decides whether they count.
 */
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "audit_api.h"
#include "chain.h"
#include "sha256.h"

size_t chain_line(char *line, size_t length, uint64_t *seq, uint8_t *hash)
{
	static const char digits[] = "0123456789abcdef";
	char *p = line, number[20];
	uint64_t rest = ++*seq;
	int n = 0;
	struct sha256 s;
	memcpy(p, "{\"seq\":", 7);
	p += 7;
	do
		number[n++] = '0' + rest % 10;
	while (rest /= 10);
	while (n)
		*p++ = number[--n];
	*p++ = ',';
	memmove(p, line + LINE_HEAD + 1, length - 2); /* without its braces */
	p += length - 2;
	sha256_init(&s);
	sha256_add(&s, hash, 32);
	sha256_add(&s, line, p - line);
	sha256_end(&s, hash);
	memcpy(p, ",\"hash\":\"", 9);
	p += 9;
	for (int i = 0; i < 32; i++) {
		*p++ = digits[hash[i] >> 4];
		*p++ = digits[hash[i] & 15];
	}
	memcpy(p, "\"}\n", 3);
	return p + 3 - line;
}

int64_t chain_lines(const char *objects, size_t length, uint64_t *seq, uint8_t *hash, char *out, size_t room)
{
	size_t at = 0, filled = 0;
	while (at < length) {
		const char *end = memchr(objects + at, '\n', length - at);
		size_t one = (end ? (size_t)(end - objects) : length) - at;
		if (one < 3 || objects[at] != '{' || objects[at + one - 1] != '}')
			return -EINVAL;
		if (room - filled < one + LINE_MORE)
			return -ENOBUFS;
		memcpy(out + filled + LINE_HEAD, objects + at, one);
		filled += chain_line(out + filled, one, seq, hash);
		at += one + (end != NULL);
	}
	return (int64_t)filled;
}
