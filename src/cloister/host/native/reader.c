/* The reader of the two rings: records become lines of the log, in batches, and are taken only when those were written.
 *
 * A BPF ring buffer as the kernel documents it (Documentation/bpf/ringbuf.rst): one page with the consumer's
 * position, one with the producer's, then the data, mapped twice in a row so that no record is ever split. This
 * process needs the two descriptors and no privilege. Nothing that an agent does can make a record wrong; lengths
 * are checked all the same.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "audit_api.h"
#include "chain.h"
#include "events.h"

#define CPUS 1024
#define WATCHES 4096
#define TEE_BYTES (1 << 20)
#define BUSY 0x80000000u    /* BPF_RINGBUF_BUSY_BIT: being written */
#define DISCARDED 0x40000000u
#define RECORD_HEADER 8

struct sequence {
	uint64_t first, last, seen;
};

struct ring_view {
	uint8_t *consumer, *producer;
	const uint8_t *data;
	size_t consumer_size, producer_size;
	uint64_t mask;
	uint64_t at; /* behind what was taken and not committed */
	uint64_t delivered;
	struct sequence sequences[CPUS];
};

struct named {
	uint32_t id, length;
	char *fields;
};

struct reader {
	struct ring_view rings[RINGS];
	struct words words;
	struct named watches[WATCHES]; /* by id, open addressing; ids are never used twice */
	uint32_t stranger;
	uint64_t tee_types;
	size_t teed;
	char *tee;
};

static int map_ring(struct ring_view *ring, int fd, uint64_t size)
{
	long page = sysconf(_SC_PAGESIZE);
	if (!size || size & (size - 1))
		return -EINVAL;
	ring->mask = size - 1;
	ring->consumer_size = page;
	ring->producer_size = page + 2 * size;
	ring->consumer = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (ring->consumer == MAP_FAILED)
		return -errno;
	ring->producer = mmap(NULL, ring->producer_size, PROT_READ, MAP_SHARED, fd, page);
	if (ring->producer == MAP_FAILED) {
		int failed = -errno;
		munmap(ring->consumer, page);
		return failed;
	}
	ring->data = ring->producer + page;
	ring->at = *(uint64_t *)ring->consumer;
	return 0;
}

static void unmap_ring(struct ring_view *ring)
{
	munmap(ring->consumer, ring->consumer_size);
	munmap(ring->producer, ring->producer_size);
}

reader *reader_open(int critical, uint64_t critical_size, int bulk, uint64_t bulk_size, const uint8_t *boot_id)
{
	reader *r = calloc(1, sizeof *r);
	if (!r || !(r->tee = malloc(TEE_BYTES))) {
		free(r);
		errno = ENOMEM;
		return NULL;
	}
	memcpy(r->words.boot_id, boot_id, sizeof r->words.boot_id);
	int failed = critical < 0 ? 0 : map_ring(&r->rings[RING_CRITICAL], critical, critical_size);
	if (!failed && bulk >= 0) {
		failed = map_ring(&r->rings[RING_BULK], bulk, bulk_size);
		if (failed)
			unmap_ring(&r->rings[RING_CRITICAL]);
	}
	if (failed) {
		free(r->tee);
		free(r);
		errno = -failed;
		return NULL;
	}
	return r;
}

void reader_close(reader *r)
{
	for (int i = 0; i < RINGS; i++)
		if (r->rings[i].consumer)
			unmap_ring(&r->rings[i]);
	for (int i = 0; i < WATCHES; i++)
		free(r->watches[i].fields);
	free(r->tee);
	free(r);
}

/* The place of an id, or the free place where it belongs; NULL when there is no place. */
static struct named *find(reader *r, uint32_t id)
{
	for (uint32_t i = 0; i < WATCHES; i++) {
		struct named *n = &r->watches[(id + i) % WATCHES];
		if (n->id == id || !n->id)
			return n;
	}
	return NULL;
}

int reader_watch(reader *r, uint32_t id, const char *fields, size_t length)
{
	if (!id || length > FIELDS_BYTES || (length && fields[length - 1] != ','))
		return -EINVAL;
	struct named *n = find(r, id);
	if (!n)
		return -ENOSPC;
	char *copy = malloc(length + 1);
	if (!copy)
		return -ENOMEM;
	memcpy(copy, fields, length);
	free(n->fields);
	*n = (struct named){id, length, copy};
	return 0;
}

void reader_forget(reader *r, uint32_t id)
{
	struct named *n = find(r, id);
	if (!id || !n || n->id != id)
		return;
	free(n->fields);
	*n = (struct named){0, 0, NULL};
	/* What was put behind it because its place was taken moves up. */
	for (uint32_t i = (n - r->watches + 1) % WATCHES; r->watches[i].id; i = (i + 1) % WATCHES) {
		struct named moved = r->watches[i];
		r->watches[i] = (struct named){0, 0, NULL};
		*find(r, moved.id) = moved;
	}
}

int reader_call(reader *r, uint32_t number, const char *name, const char *kind, int severity, int shape, int flags_at)
{
	if (number >= CALLS || strlen(name) >= NAME_BYTES || strlen(kind) >= NAME_BYTES)
		return -EINVAL;
	struct call *call = &r->words.calls[number];
	strcpy(call->name, name);
	strcpy(call->kind, kind);
	call->severity = severity;
	call->shape = shape;
	call->flags_at = flags_at;
	return 0;
}

void reader_tee(reader *r, uint64_t types)
{
	r->tee_types = types;
}

static int64_t now(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

/* The next record from `at` on: NULL at the end, and where the kernel still writes. `next` is behind it. */
static const struct event *record_at(const struct ring_view *ring, uint64_t at, uint64_t *next, size_t *size)
{
	uint64_t end = __atomic_load_n((uint64_t *)ring->producer, __ATOMIC_ACQUIRE);
	while (at < end) {
		const uint8_t *header = ring->data + (at & ring->mask);
		uint32_t word = __atomic_load_n((const uint32_t *)header, __ATOMIC_ACQUIRE);
		if (word & BUSY)
			return NULL;
		*size = word & ~(BUSY | DISCARDED);
		at += (*size + RECORD_HEADER + 7) & ~7ull;
		if (word & DISCARDED || *size < sizeof(struct event))
			continue;
		*next = at;
		return (const struct event *)(header + RECORD_HEADER);
	}
	return NULL;
}

static size_t take_one(reader *r, const struct event *e, size_t size, const struct named *n, char *out, uint64_t *seq,
		       uint8_t *hash)
{
	size_t object = event_json(&r->words, e, size, n ? n->fields : "", n ? n->length : 0, out + LINE_HEAD);
	size_t line = chain_line(out, object, seq, hash);
	if (r->tee_types >> (e->type & 63) & 1 && r->teed + line <= TEE_BYTES) {
		memcpy(r->tee + r->teed, out, line);
		r->teed += line;
	}
	return line;
}

int64_t reader_take(reader *r, uint64_t *seq, uint8_t *hash, char *out, size_t room, int any)
{
	size_t filled = 0;
	r->stranger = 0;
	r->teed = 0;
	r->words.anchor = now(CLOCK_REALTIME) - now(CLOCK_BOOTTIME);
	for (int i = 0; i < RINGS; i++) {
		struct ring_view *ring = &r->rings[i];
		const struct event *e;
		size_t size;
		uint64_t next;
		if (!ring->consumer)
			continue;
		ring->at = *(uint64_t *)ring->consumer;
		while (room - filled >= LINE_MORE + OBJECT_BYTES + FIELDS_BYTES && (e = record_at(ring, ring->at, &next, &size))) {
			struct named *n = find(r, e->watch);
			if (n && (!n->id || !e->watch))
				n = NULL;
			if (!n && !any) {
				r->stranger = e->watch;
				break;
			}
			filled += take_one(r, e, size, n, out + filled, seq, hash);
			ring->at = next;
		}
	}
	return (int64_t)filled;
}

static void account(struct ring_view *ring, const struct event *e)
{
	struct sequence *s = &ring->sequences[e->cpu % CPUS];
	ring->delivered++;
	if (!s->seen++) {
		s->first = s->last = e->seq;
		return;
	}
	/* Programs may be preempted between their number and the ring, so numbers can come in another order. */
	if (e->seq > s->last)
		s->last = e->seq;
	else if (e->seq < s->first)
		s->first = e->seq;
}

void reader_commit(reader *r)
{
	for (int i = 0; i < RINGS; i++) {
		struct ring_view *ring = &r->rings[i];
		if (!ring->consumer)
			continue;
		uint64_t at = *(uint64_t *)ring->consumer, next;
		size_t size;
		while (at < ring->at) {
			const struct event *e = record_at(ring, at, &next, &size);
			if (!e)
				break;
			account(ring, e);
			at = next;
		}
		__atomic_store_n((uint64_t *)ring->consumer, ring->at, __ATOMIC_RELEASE);
	}
}

uint64_t reader_waiting(const reader *r)
{
	uint64_t waiting = 0;
	for (int i = 0; i < RINGS; i++)
		if (r->rings[i].consumer)
			waiting += __atomic_load_n((uint64_t *)r->rings[i].producer, __ATOMIC_ACQUIRE) -
				   *(uint64_t *)r->rings[i].consumer;
	return waiting;
}

uint32_t reader_stranger(const reader *r)
{
	return r->stranger;
}

const char *reader_teed(const reader *r, size_t *length)
{
	*length = r->teed;
	return r->tee;
}

void reader_counts(const reader *r, uint64_t *delivered, uint64_t *missing)
{
	for (int i = 0; i < RINGS; i++) {
		delivered[i] = r->rings[i].delivered;
		missing[i] = 0;
		for (int cpu = 0; cpu < CPUS; cpu++) {
			const struct sequence *s = &r->rings[i].sequences[cpu];
			if (s->seen)
				missing[i] += s->last - s->first + 1 - s->seen;
		}
	}
}

int64_t reader_format(reader *r, const uint8_t *record, size_t length, char *out, size_t room)
{
	const struct event *e = (const struct event *)record;
	if (length < sizeof *e || room < OBJECT_BYTES + FIELDS_BYTES)
		return -EINVAL;
	struct named *n = find(r, e->watch);
	if (n && (!n->id || !e->watch))
		n = NULL;
	return (int64_t)event_json(&r->words, e, length, n ? n->fields : "", n ? n->length : 0, out);
}
