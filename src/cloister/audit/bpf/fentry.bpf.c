/* The same at the entry of the functions that call the LSMs: where BPF is no LSM, but trampolines are allowed. */
#define HOOK "fentry/security_"
#define PROGRAM(NAME) fentry_##NAME
#define TIER TIER_FENTRY
#include "hooks.h"
