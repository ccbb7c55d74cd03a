/* System calls: each one is counted per watch; those with a shape are events as well, written when they return.
 *
 * What a call's texts are is read when it begins, since the agent may change them, and once more when it returns:
 * a page that was not there yet is there then, and a text that changed is marked. Where a call gave a descriptor, its
 * path is the kernel's own. Calls of another table (int 0x80, x32) have numbers of their own and are only marked.
 * These two tracepoints cost every process of the host a little, so they are attached only while something is watched.
 */
#include "text.h"

#define PENDING_TEXT 512

struct pending {
	u32 call; /* + 1; 0 is none */
	u16 length[2];
	u64 begun;
	u64 args[6];
	char text[2][PENDING_TEXT];
};

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct pending);
} pending SEC(".maps");
MAP(counts, BPF_MAP_TYPE_PERCPU_ARRAY, 128 * CALLS, u32, u64);

const volatile u16 shapes[CALLS] = {};

static __always_inline u32 number_of(struct task_struct *t, long id)
{
#if defined(__TARGET_ARCH_x86)
	/* TS_COMPAT of arch/x86/include/asm/thread_info.h; __X32_SYSCALL_BIT. */
	if (BPF_CORE_READ(t, thread_info.status) & 2 || id & 0x40000000)
		return CALL_COMPAT;
#elif defined(__TARGET_ARCH_arm64)
	/* TIF_32BIT of arch/arm64/include/asm/thread_info.h. */
	if (BPF_CORE_READ(t, thread_info.flags) & (1 << 22))
		return CALL_COMPAT;
#endif
	return id < 0 || id >= CALL_UNKNOWN ? CALL_UNKNOWN : id;
}

static __always_inline void read_args(u64 *args, struct pt_regs *regs)
{
#if defined(__TARGET_ARCH_arm64)
	args[0] = BPF_CORE_READ(regs, orig_x0);
	args[1] = BPF_CORE_READ(regs, regs[1]);
	args[2] = BPF_CORE_READ(regs, regs[2]);
	args[3] = BPF_CORE_READ(regs, regs[3]);
	args[4] = BPF_CORE_READ(regs, regs[4]);
	args[5] = BPF_CORE_READ(regs, regs[5]);
#else
	args[0] = BPF_CORE_READ(regs, di);
	args[1] = BPF_CORE_READ(regs, si);
	args[2] = BPF_CORE_READ(regs, dx);
	args[3] = BPF_CORE_READ(regs, r10);
	args[4] = BPF_CORE_READ(regs, r8);
	args[5] = BPF_CORE_READ(regs, r9);
#endif
}

/* The argument that a shape names by its index + 1. */
static __always_inline u64 argument(const u64 *args, u32 named)
{
	switch (named) {
	case 1: return args[0];
	case 2: return args[1];
	case 3: return args[2];
	case 4: return args[3];
	case 5: return args[4];
	}
	return 0;
}

static __always_inline void read_text(struct pending *p, u32 n, u64 from)
{
	long got = bpf_probe_read_user_str(p->text[n & 1], PENDING_TEXT, (void *)from);
	p->length[n & 1] = got > 0 ? got : 0;
}

static __always_inline u32 address_length(u64 given)
{
	return given < 110 ? given : 110; /* sizeof(struct sockaddr_un), unix(7) */
}

SEC("tp_btf/sys_enter")
int BPF_PROG(calls_enter, struct pt_regs *regs, long id)
{
	struct control *c = settings();
	struct watch *w = c ? watch_of_current(c) : 0;
	if (!w)
		return 0;
	struct task_struct *t = current_task();
	u32 number = number_of(t, id) & (CALLS - 1), key = w->slot * CALLS + number;
	u64 *count = bpf_map_lookup_elem(&counts, &key);
	if (count)
		__sync_fetch_and_add(count, 1);
	u32 shape = shapes[number];
	if (!shape)
		return 0;
	struct pending *p = bpf_task_storage_get(&pending, bpf_get_current_task_btf(), 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!p) {
		struct tally *lost = tally_of(w->slot, shape & SHAPE_CRITICAL ? RING_CRITICAL : RING_BULK);
		if (lost) {
			__sync_fetch_and_add(&lost->made, 1);
			__sync_fetch_and_add(&lost->dropped, 1);
		}
		return 0;
	}
	p->call = number + 1;
	p->begun = bpf_ktime_get_boot_ns();
	p->length[0] = p->length[1] = 0;
	read_args(p->args, regs);
	if (number >= CALL_UNKNOWN)
		p->args[5] = id; /* nothing else tells which one it was */
	if (SHAPE_TEXT0(shape))
		read_text(p, 0, argument(p->args, SHAPE_TEXT0(shape)));
	if (SHAPE_TEXT1(shape))
		read_text(p, 1, argument(p->args, SHAPE_TEXT1(shape)));
	if (shape & SHAPE_ADDRESS) {
		u32 length = address_length(p->args[2]) & 127;
		if (!bpf_probe_read_user(p->text[0], length, (void *)p->args[1]))
			p->length[0] = length;
	}
	return 0;
}


/* Whether two texts of a length differ: in words of eight bytes, which keeps the verifier's work small. */
static __noinline int differ(const char *a, const char *b, u32 length)
{
	u32 words = length / 8;
	for (u32 i = 0; i < PENDING_TEXT / 8; i++) {
		if (i >= words)
			break;
		if (*(const u64 *)(a + 8 * i) != *(const u64 *)(b + 8 * i))
			return 1;
	}
	for (u32 i = 0; i < 8; i++) {
		u32 at = (words * 8 + i) & (PENDING_TEXT - 1);
		if (words * 8 + i >= length)
			break;
		if (a[at] != b[at])
			return 1;
	}
	return 0;
}

/* Put text `n`: as it was at the call's begin, or, where it could not be read then, as it is now. */
static __noinline int put_text(struct event *e, struct pending *p, u32 n, u64 from)
{
	u32 before = e->used, was = p->length[n & 1];
	long got = bpf_probe_read_user_str(ROOM(e, before), PENDING_TEXT, (void *)from);
	u32 now = got > 0 ? got : 0;
	if (!was && !now) {
		e->flags |= FLAG_UNREAD;
		return 0;
	}
	if (was && (was != now || differ((const char *)ROOM(e, before), p->text[n & 1], was))) {
		/* The kernel may have seen either: what it was first is told, and that it changed. */
		if (now)
			e->flags |= FLAG_CHANGED;
		bpf_probe_read_kernel(ROOM(e, before), PENDING_TEXT, p->text[n & 1]);
	}
	if (!was)
		e->flags |= FLAG_LATE;
	now = was ? was : now;
	if (now >= PENDING_TEXT)
		e->flags |= FLAG_CUT;
	e->part[n & (PARTS - 1)] = now;
	e->used = before + now;
	return 0;
}

/* The path of a descriptor of the current task; nothing where there is none. */
static __noinline int put_descriptor(struct event *e, u32 n, u32 descriptor)
{
	struct fdtable *table = BPF_CORE_READ(current_task(), files, fdt);
	struct file *file = 0;
	if (descriptor >= BPF_CORE_READ(table, max_fds))
		return 0;
	struct file **files = BPF_CORE_READ(table, fd);
	bpf_probe_read_kernel(&file, sizeof(file), files + descriptor);
	if (!file)
		return 0;
	struct place from = {BPF_CORE_READ(file, f_path.mnt), BPF_CORE_READ(file, f_path.dentry)};
	return walk(e, n, &from);
}

static __always_inline void put_directory(struct event *e, struct pending *p, u32 shape)
{
	struct fs_struct *fs = BPF_CORE_READ(current_task(), fs);
	s32 descriptor = SHAPE_DIRECTORY(shape) ? (s32)argument(p->args, SHAPE_DIRECTORY(shape)) : -100;
	if (!e->part[0] || e->data[0] == '/')
		return;
	if (descriptor == -100) { /* AT_FDCWD */
		struct place from = {BPF_CORE_READ(fs, pwd.mnt), BPF_CORE_READ(fs, pwd.dentry)};
		walk(e, 2, &from);
	} else {
		put_descriptor(e, 2, descriptor);
	}
}

static __always_inline void describe(struct event *e, struct pending *p, u32 shape, long ret)
{
	if (shape & SHAPE_ADDRESS) {
		u32 length = p->length[0] & 127;
		if (!length)
			e->flags |= FLAG_UNREAD;
		bpf_probe_read_kernel(e->data, length, p->text[0]);
		e->part[0] = e->used = length;
		return;
	}
	if (SHAPE_TEXT0(shape))
		put_text(e, p, 0, argument(p->args, SHAPE_TEXT0(shape)));
	if (SHAPE_TEXT1(shape))
		put_text(e, p, 1, argument(p->args, SHAPE_TEXT1(shape)));
	if (shape & SHAPE_OPENS && ret >= 0)
		put_descriptor(e, 3, ret);
	else if (SHAPE_TEXT0(shape))
		put_directory(e, p, shape);
}

SEC("tp_btf/sys_exit")
int BPF_PROG(calls_exit, struct pt_regs *regs, long ret)
{
	struct pending *p = bpf_task_storage_get(&pending, bpf_get_current_task_btf(), 0, 0);
	if (!p || !p->call)
		return 0;
	u32 number = (p->call - 1) & (CALLS - 1), shape = shapes[number];
	p->call = 0;
	if (shape & SHAPE_FAILED && ret >= 0)
		return 0;
	/* Addresses of other families are told by the programs of cgroups, from the kernel's own copy. */
	if (shape & SHAPE_ADDRESS && p->length[0] >= 2 && *(u16 *)p->text[0] != 1)
		return 0;
	struct control *c = settings();
	struct watch *w = c ? watch_of_current(c) : 0;
	u32 ring = shape & SHAPE_CRITICAL ? RING_CRITICAL : RING_BULK;
	struct draft *d = w ? draft_take(w, ring) : 0;
	if (!d)
		return 0;
	struct event *e = &d->event;
	draft_begin(d, w, current_task(), EVENT_CALL, TIER_TRACEPOINT);
	e->time = p->begun;
	e->call = number;
	e->ret = ret;
	if (ret < 0 && ret > -4096)
		e->flags |= FLAG_FAILED;
	if (number == CALL_COMPAT)
		e->flags |= FLAG_COMPAT;
	__builtin_memcpy(e->args, p->args, sizeof(e->args));
	describe(e, p, shape, ret);
	draft_send(d, c, w, ring);
	return 0;
}
