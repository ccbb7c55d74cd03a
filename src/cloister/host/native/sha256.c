/* SHA-256 (FIPS 180-4), in portable C and, where the processor has them, with its instructions for it.
 *
 * Held against hashlib by tests/unit/host/test_native_audit.py, both ways.
 */
#include "sha256.h"

#include <string.h>

static const uint32_t K[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t right(uint32_t x, int n)
{
	return x >> n | x << (32 - n);
}

static void portable(uint32_t state[8], const uint8_t *data, size_t blocks)
{
	for (; blocks; blocks--, data += 64) {
		uint32_t w[64], v[8];
		for (int i = 0; i < 16; i++)
			w[i] = (uint32_t)data[4 * i] << 24 | (uint32_t)data[4 * i + 1] << 16 | (uint32_t)data[4 * i + 2] << 8 |
			       data[4 * i + 3];
		for (int i = 16; i < 64; i++) {
			uint32_t a = w[i - 15], b = w[i - 2];
			w[i] = w[i - 16] + w[i - 7] + (right(a, 7) ^ right(a, 18) ^ a >> 3) +
			       (right(b, 17) ^ right(b, 19) ^ b >> 10);
		}
		memcpy(v, state, sizeof v);
		for (int i = 0; i < 64; i++) {
			uint32_t e = v[4], a = v[0];
			uint32_t one = v[7] + (right(e, 6) ^ right(e, 11) ^ right(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + K[i] + w[i];
			uint32_t two = (right(a, 2) ^ right(a, 13) ^ right(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
			memmove(v + 1, v, 7 * sizeof *v);
			v[4] += one;
			v[0] = one + two;
		}
		for (int i = 0; i < 8; i++)
			state[i] += v[i];
	}
}

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

/* Intel SDM, SHA256RNDS2: the state is kept as ABEF and CDGH; four rounds per step. */
__attribute__((target("sha,sse4.1"))) static void instructions(uint32_t state[8], const uint8_t *data, size_t blocks)
{
	const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
	__m128i low = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)&state[0]), 0xB1);
	__m128i high = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)&state[4]), 0x1B);
	__m128i abef = _mm_alignr_epi8(low, high, 8), cdgh = _mm_blend_epi16(high, low, 0xF0);
	for (; blocks; blocks--, data += 64) {
		__m128i m[4], old_abef = abef, old_cdgh = cdgh;
		for (int i = 0; i < 4; i++)
			m[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(data + 16 * i)), swap);
		for (int i = 0; i < 16; i++) {
			__m128i now = m[0];
			__m128i k = _mm_add_epi32(now, _mm_loadu_si128((const __m128i *)&K[4 * i]));
			cdgh = _mm_sha256rnds2_epu32(cdgh, abef, k);
			abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(k, 0x0E));
			__m128i next = _mm_add_epi32(_mm_sha256msg1_epu32(now, m[1]), _mm_alignr_epi8(m[3], m[2], 4));
			next = _mm_sha256msg2_epu32(next, m[3]);
			m[0] = m[1], m[1] = m[2], m[2] = m[3], m[3] = next;
		}
		abef = _mm_add_epi32(abef, old_abef);
		cdgh = _mm_add_epi32(cdgh, old_cdgh);
	}
	low = _mm_shuffle_epi32(abef, 0x1B);
	high = _mm_shuffle_epi32(cdgh, 0xB1);
	_mm_storeu_si128((__m128i *)&state[0], _mm_blend_epi16(low, high, 0xF0));
	_mm_storeu_si128((__m128i *)&state[4], _mm_alignr_epi8(high, low, 8));
}

static int has_instructions(void)
{
	static int known = -1;
	unsigned a, b = 0, c, d;
	if (known < 0)
		known = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1) && __builtin_cpu_supports("sse4.1");
	return known;
}

static void add_blocks(uint32_t state[8], const uint8_t *data, size_t blocks)
{
	if (has_instructions())
		instructions(state, data, blocks);
	else
		portable(state, data, blocks);
}
#else
static void add_blocks(uint32_t state[8], const uint8_t *data, size_t blocks)
{
	portable(state, data, blocks);
}
#endif

void sha256_init(struct sha256 *s)
{
	static const uint32_t first[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
					  0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
	memcpy(s->state, first, sizeof first);
	s->length = 0;
}

void sha256_add(struct sha256 *s, const void *data, size_t length)
{
	const uint8_t *from = data;
	size_t kept = s->length % 64;
	s->length += length;
	if (kept) {
		size_t room = 64 - kept, some = length < room ? length : room;
		memcpy(s->block + kept, from, some);
		from += some;
		length -= some;
		if (some < room)
			return;
		add_blocks(s->state, s->block, 1);
	}
	add_blocks(s->state, from, length / 64);
	memcpy(s->block, from + length / 64 * 64, length % 64);
}

void sha256_end(struct sha256 *s, uint8_t digest[32])
{
	uint64_t bits = s->length * 8;
	size_t kept = s->length % 64;
	s->block[kept++] = 0x80;
	if (kept > 56) {
		memset(s->block + kept, 0, 64 - kept);
		add_blocks(s->state, s->block, 1);
		kept = 0;
	}
	memset(s->block + kept, 0, 56 - kept);
	for (int i = 0; i < 8; i++)
		s->block[56 + i] = bits >> (56 - 8 * i);
	add_blocks(s->state, s->block, 1);
	for (int i = 0; i < 32; i++)
		digest[i] = s->state[i / 4] >> (24 - i % 4 * 8);
}

/* For the test that holds the portable form too: the digest of one piece, by it alone. */
void sha256_portable(const void *data, size_t length, uint8_t digest[32])
{
	struct sha256 s;
	sha256_init(&s);
	uint8_t tail[128] = {0};
	size_t rest = length % 64, padded = rest < 56 ? 64 : 128;
	portable(s.state, data, length / 64);
	memcpy(tail, (const uint8_t *)data + length - rest, rest);
	tail[rest] = 0x80;
	for (int i = 0; i < 8; i++)
		tail[padded - 8 + i] = (uint64_t)length * 8 >> (56 - 8 * i);
	portable(s.state, tail, padded / 64);
	for (int i = 0; i < 32; i++)
		digest[i] = s.state[i / 4] >> (24 - i % 4 * 8);
}
