/* JSON text as msgspec writes it: UTF-8 stays, control characters, quotes and backslashes are escaped. */
#include "json.h"

#include <string.h>

char *json_copy(char *p, const char *text)
{
	size_t length = strlen(text);
	memcpy(p, text, length);
	return p + length;
}

char *json_unsigned(char *p, uint64_t value)
{
	char digits[20];
	int n = 0;
	do
		digits[n++] = '0' + value % 10;
	while (value /= 10);
	while (n)
		*p++ = digits[--n];
	return p;
}

char *json_signed(char *p, int64_t value)
{
	if (value >= 0)
		return json_unsigned(p, value);
	*p++ = '-';
	return json_unsigned(p, -(uint64_t)value);
}

/* The length of the well-formed sequence that begins here (Unicode 15, table 3-7); 0 for none. */
static size_t sequence(const uint8_t *s, size_t left)
{
	uint8_t low = 0x80, high = 0xbf;
	size_t length = s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf5 ? 4 : 0;
	if (!length || left < length)
		return 0;
	if (s[0] == 0xe0)
		low = 0xa0;
	else if (s[0] == 0xed)
		high = 0x9f;
	else if (s[0] == 0xf0)
		low = 0x90;
	else if (s[0] == 0xf4)
		high = 0x8f;
	if (s[1] < low || s[1] > high)
		return 0;
	for (size_t i = 2; i < length; i++)
		if ((s[i] & 0xc0) != 0x80)
			return 0;
	return length;
}

static char *control(char *p, uint8_t c)
{
	static const char digits[] = "0123456789abcdef";
	static const char letters[] = "btn?fr"; /* 8 to 13; 11 has none */
	*p++ = '\\';
	if (c >= 8 && c <= 13 && c != 11) {
		*p++ = letters[c - 8];
		return p;
	}
	memcpy(p, "u00", 3);
	p[3] = digits[c >> 4];
	p[4] = digits[c & 15];
	return p + 5;
}

char *json_escaped(char *p, const uint8_t *text, size_t length)
{
	static const char digits[] = "0123456789abcdef";
	for (size_t i = 0; i < length;) {
		uint8_t c = text[i];
		size_t many;
		if (c >= 0x80) {
			many = sequence(text + i, length - i);
			if (many) {
				memcpy(p, text + i, many);
				p += many;
				i += many;
				continue;
			}
			memcpy(p, "\\\\x", 3);
			p[3] = digits[c >> 4];
			p[4] = digits[c & 15];
			p += 5;
		} else if (c < 0x20) {
			p = control(p, c);
		} else {
			if (c == '"' || c == '\\')
				*p++ = '\\';
			*p++ = c;
		}
		i++;
	}
	return p;
}
