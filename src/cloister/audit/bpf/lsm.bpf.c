/* The hooks of files as LSM programs: where `bpf` is among the active LSMs (/sys/kernel/security/lsm). */
#define HOOK "lsm/"
#define PROGRAM(NAME) lsm_##NAME
#define TIER TIER_LSM
#include "hooks.h"
