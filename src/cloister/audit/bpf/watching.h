/* What every program does: is this task watched, who is it, and how a record gets into a ring or is counted as lost.
 *
 * All objects declare the same maps; the loader makes them once and gives every object the same ones.
 * Programs may be preempted (LSM, fentry), so a record is drafted in one of a CPU's few drafts, taken by
 * compare-and-swap, and all counters are added to atomically.
 */
#pragma once
#include "core.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "event.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct draft {
	u32 taken;
	u32 pad;
	struct event event; /* its data is `room` */
	u8 room[DATA_BYTES + DATA_SLACK];
};

#define MAP(NAME, TYPE, ENTRIES, KEY, VALUE) \
	struct { \
		__uint(type, TYPE); \
		__uint(max_entries, ENTRIES); \
		__type(key, KEY); \
		__type(value, VALUE); \
	} NAME SEC(".maps")

MAP(watched, BPF_MAP_TYPE_HASH, 1024, u64, struct watch);
MAP(control, BPF_MAP_TYPE_ARRAY, 1, u32, struct control);
MAP(tallies, BPF_MAP_TYPE_PERCPU_ARRAY, 128 * RINGS, u32, struct tally);
MAP(buckets, BPF_MAP_TYPE_ARRAY, 128 * RINGS, u32, u64);
MAP(sequences, BPF_MAP_TYPE_PERCPU_ARRAY, RINGS, u32, u64);
MAP(drafts, BPF_MAP_TYPE_PERCPU_ARRAY, DRAFTS, u32, struct draft);
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 << 20);
} critical SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 16 << 20);
} bulk SEC(".maps");

static __always_inline struct control *settings(void)
{
	u32 zero = 0;
	return bpf_map_lookup_elem(&control, &zero);
}

static __always_inline struct task_struct *current_task(void)
{
	return (struct task_struct *)bpf_get_current_task_btf();
}

static __always_inline struct upid upid_at(struct pid *pid, u32 level)
{
	struct upid found = {};
	if (pid)
		bpf_core_read(&found, sizeof(found), (void *)&pid->numbers[0] + level * sizeof(struct upid));
	return found;
}

/* The watch of the current task: by an ancestor of its cgroup, else by a pid namespace that it is in. */
static __always_inline struct watch *watch_of_current(const struct control *c)
{
	for (int i = 0; i < LEVELS; i++) {
		u32 level = c->levels[i];
		if (!level)
			break;
		u64 id = bpf_get_current_ancestor_cgroup_id(level);
		if (!id)
			break; /* deeper than this task's cgroup */
		struct watch *w = bpf_map_lookup_elem(&watched, &id);
		if (w)
			return w;
	}
	if (!c->namespaces)
		return 0;
	struct pid *pid = BPF_CORE_READ(current_task(), thread_pid);
	u32 depth = pid ? BPF_CORE_READ(pid, level) : 0;
	for (u32 level = 1; level <= NAMESPACES; level++) {
		if (level > depth)
			break;
		struct upid up = upid_at(pid, level);
		u64 key = NAMESPACE_KEY | BPF_CORE_READ(up.ns, ns.inum);
		struct watch *w = bpf_map_lookup_elem(&watched, &key);
		if (w)
			return w;
	}
	return 0;
}

static __always_inline struct tally *tally_of(u32 slot, u32 ring)
{
	u32 key = slot * RINGS + ring;
	return bpf_map_lookup_elem(&tallies, &key);
}

/* Count one more record of this watch, and take a draft for it. None is a loss, and counted as one. */
static __always_inline struct draft *draft_take(const struct watch *w, u32 ring)
{
	struct tally *t = tally_of(w->slot, ring);
	if (t)
		__sync_fetch_and_add(&t->made, 1);
	for (u32 i = 0; i < DRAFTS; i++) {
		u32 key = i;
		struct draft *d = bpf_map_lookup_elem(&drafts, &key);
		if (d && !__sync_val_compare_and_swap(&d->taken, 0, 1))
			return d;
	}
	u32 key = ring;
	u64 *seq = bpf_map_lookup_elem(&sequences, &key);
	if (seq)
		__sync_fetch_and_add(seq, 1);
	if (t)
		__sync_fetch_and_add(&t->dropped, 1);
	return 0;
}

/* Say who: `t` is the process that it is about. */
static __always_inline void draft_begin(struct draft *d, const struct watch *w, struct task_struct *t, u32 type, u32 tier)
{
	struct event *e = &d->event;
	struct task_struct *leader = BPF_CORE_READ(t, group_leader), *parent = BPF_CORE_READ(t, real_parent);
	struct pid *pid = BPF_CORE_READ(t, thread_pid);
	e->type = type;
	e->call = 0;
	e->time = bpf_ktime_get_boot_ns();
	e->watch = w->id;
	e->cpu = bpf_get_smp_processor_id();
	e->tier = tier;
	e->flags = 0;
	e->pid = BPF_CORE_READ(t, tgid);
	e->tid = BPF_CORE_READ(t, pid);
	e->start = BPF_CORE_READ(leader, start_boottime);
	e->ppid = BPF_CORE_READ(parent, tgid);
	e->parent_start = BPF_CORE_READ(parent, group_leader, start_boottime);
	e->ns_pid = upid_at(pid, BPF_CORE_READ(pid, level)).nr;
	e->uid = BPF_CORE_READ(t, cred, uid.val);
	e->used = 0;
	e->ret = 0;
	__builtin_memset(e->args, 0, sizeof(e->args));
	__builtin_memset(e->part, 0, sizeof(e->part));
	BPF_CORE_READ_STR_INTO(&e->comm, t, comm);
}

/* Whether a watch is over its rate: a virtual clock that each byte moves on (GCRA), never more than a burst ahead. */
static __always_inline bool limited(const struct control *c, u32 slot, u32 ring, u64 now, u32 size)
{
	u64 rate = c->ns_per_byte[ring & 1];
	u32 key = slot * RINGS + ring;
	volatile u64 *due = bpf_map_lookup_elem(&buckets, &key);
	if (!rate || !due)
		return false;
	u64 cost = size * rate;
	for (int i = 0; i < 4; i++) {
		u64 old = *due;
		if (old > now + c->burst_ns)
			return true;
		u64 next = (old > now ? old : now) + cost;
		if (__sync_val_compare_and_swap(due, old, next) == old)
			return false;
	}
	__sync_fetch_and_add(due, cost);
	return false;
}

/* Send a draft, or count why not; the draft is free afterwards. */
static __always_inline void draft_send(struct draft *d, const struct control *c, const struct watch *w, u32 ring)
{
	struct event *e = &d->event;
	struct tally *t = tally_of(w->slot, ring);
	u32 key = ring;
	u64 *seq = bpf_map_lookup_elem(&sequences, &key);
	u32 size = sizeof(*e) + (e->used & (DATA_BYTES - 1));
	e->size = size;
	e->seq = seq ? __sync_fetch_and_add(seq, 1) + 1 : 0;
	if (limited(c, w->slot, ring, e->time, size)) {
		if (t)
			__sync_fetch_and_add(&t->limited, 1);
	} else {
		long failed;
		if (ring == RING_CRITICAL) {
			failed = bpf_ringbuf_output(&critical, e, size, 0);
		} else {
			/* A wakeup per record costs more than the record. The reader looks by itself as well. */
			u64 waiting = bpf_ringbuf_query(&bulk, BPF_RB_AVAIL_DATA);
			bool wake = waiting >= c->wake_bytes && waiting < c->wake_bytes + 2 * DATA_BYTES;
			failed = bpf_ringbuf_output(&bulk, e, size, wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
		}
		if (failed && t)
			__sync_fetch_and_add(&t->dropped, 1);
	}
	/* Given back last, by an atomic: a plain store might be moved before what it guards. */
	__sync_lock_test_and_set(&d->taken, 0);
}
