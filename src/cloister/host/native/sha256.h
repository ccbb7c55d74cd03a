/* SHA-256 of FIPS 180-4: a hash, no key, no secret. Here because a line of the log is hashed where it is built. */
#pragma once
#include <stddef.h>
#include <stdint.h>

struct sha256 {
	uint32_t state[8];
	uint64_t length;
	uint8_t block[64];
};

void sha256_init(struct sha256 *s);
void sha256_add(struct sha256 *s, const void *data, size_t length);
void sha256_end(struct sha256 *s, uint8_t digest[32]);
