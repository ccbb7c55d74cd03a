/* From a record of the kernel's side to the JSON of an event. */
#pragma once
#include <linux/types.h>
#include <stddef.h>
#include <stdint.h>

#include "../../audit/bpf/event.h"

#define OBJECT_BYTES (1 << 16) /* no event is longer: texts of a record are below 4 KiB, six bytes of JSON at most each */
#define FIELDS_BYTES 4096
#define NAME_BYTES 32

struct call {
	char name[NAME_BYTES];
	char kind[NAME_BYTES];
	uint8_t severity, flags_at;
	uint16_t shape;
};

#define IDENTITIES 1024

struct identity {
	uint64_t start;
	uint32_t pid;
	char text[32];
};

struct words {
	uint8_t boot_id[16];
	int64_t anchor; /* CLOCK_REALTIME minus CLOCK_BOOTTIME, ns */
	struct call calls[CALLS];
	struct identity identities[IDENTITIES];
};

/* Write the event; returns its length. `fields` are those of its watch. `out` has OBJECT_BYTES + FIELDS_BYTES. */
size_t event_json(struct words *words, const struct event *e, size_t size, const char *fields, size_t fields_length,
		  char *out);
