/* Processes: launched, forked, ended. Stable tracepoints, which cost only who launches, forks or ends. */
#include "text.h"

SEC("tp_btf/sched_process_exec")
int BPF_PROG(process_exec, struct task_struct *p, int old_pid, struct linux_binprm *bprm)
{
	struct control *c = settings();
	struct watch *w = c ? watch_of_current(c) : 0;
	struct draft *d = w ? draft_take(w, RING_CRITICAL) : 0;
	if (!d)
		return 0;
	struct event *e = &d->event;
	draft_begin(d, w, p, EVENT_EXEC, TIER_TRACEPOINT);
	struct mm_struct *mm = BPF_CORE_READ(p, mm);
	put_walk(e, 0, &BPF_CORE_READ(mm, exe_file)->f_path);
	put_kernel_text(e, 1, BPF_CORE_READ(bprm, filename));
	u64 begin = BPF_CORE_READ(mm, arg_start), length = BPF_CORE_READ(mm, arg_end) - begin;
	if (length > ARGV_BYTES) {
		length = ARGV_BYTES;
		e->flags |= FLAG_CUT;
	}
	u32 at = e->used;
	if (bpf_probe_read_user(ROOM(e, at), length & (DATA_SLACK - 1), (void *)begin)) {
		e->flags |= FLAG_UNREAD;
	} else {
		e->part[2] = length;
		e->used = at + length;
	}
	put_walk(e, 3, &BPF_CORE_READ(p, fs)->pwd);
	draft_send(d, c, w, RING_CRITICAL);
	return 0;
}

SEC("tp_btf/sched_process_fork")
int BPF_PROG(process_fork, struct task_struct *parent, struct task_struct *child)
{
	struct control *c = settings();
	struct watch *w = c ? watch_of_current(c) : 0;
	/* A thread is no process. */
	if (!w || BPF_CORE_READ(child, pid) != BPF_CORE_READ(child, tgid))
		return 0;
	struct draft *d = draft_take(w, RING_CRITICAL);
	if (!d)
		return 0;
	draft_begin(d, w, child, EVENT_FORK, TIER_TRACEPOINT);
	draft_send(d, c, w, RING_CRITICAL);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(process_exit, struct task_struct *p)
{
	struct control *c = settings();
	struct watch *w = c ? watch_of_current(c) : 0;
	/* The last thread ends the process, which need not be the first one. */
	if (!w || BPF_CORE_READ(p, signal, live.counter))
		return 0;
	struct draft *d = draft_take(w, RING_CRITICAL);
	if (!d)
		return 0;
	draft_begin(d, w, BPF_CORE_READ(p, group_leader), EVENT_EXIT, TIER_TRACEPOINT);
	u32 code = BPF_CORE_READ(p, signal, group_exit_code);
	if (!code)
		code = BPF_CORE_READ(p, exit_code);
	d->event.args[0] = (code >> 8) & 0xff;
	d->event.args[1] = code & 0x7f;
	draft_send(d, c, w, RING_CRITICAL);
	return 0;
}
