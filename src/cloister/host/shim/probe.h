/*
 * What it is: the self-probe: before the agent gets control, what must be denied is tried and
 * what must work is done once. What it is not: proof of everything; `cloister prove` is the battery.
 */
#ifndef CLOISTER_PROBE_H
#define CLOISTER_PROBE_H

#include "frame.h"
#include "options.h"

/* Try everything; false when any result is not what the policy promised. */
bool probe_run(const struct options *options, struct writer *findings);

/* Add `nameobject=result`, for example `write:` + `/usr` + `denied`. */
void probe_note(struct writer *findings, const char *name, const char *object, const char *result);

/* The findings as text, with spaces between them, as far as they fit. */
void probe_list(const struct writer *findings, char *text, size_t size);

/* Send the findings as frame `P`. Errors are left to the next send: the broker is gone then. */
void probe_tell(struct channel *broker, struct writer *findings);

#endif
