/* Operations of io_uring, which are no system calls. The tracepoint has one of two names: each is a program of its own. */
#include "watching.h"

static __always_inline int record(struct io_kiocb *request)
{
	struct control *c = settings();
	struct watch *w = c ? watch_of_current(c) : 0;
	struct draft *d = w ? draft_take(w, RING_BULK) : 0;
	if (!d)
		return 0;
	draft_begin(d, w, current_task(), EVENT_RING_OP, TIER_TRACEPOINT);
	d->event.args[0] = BPF_CORE_READ(request, opcode);
	draft_send(d, c, w, RING_BULK);
	return 0;
}

SEC("tp_btf/io_uring_submit_req")
int BPF_PROG(rings_submit, struct io_kiocb *request)
{
	return record(request);
}

SEC("tp_btf/io_uring_submit_sqe")
int BPF_PROG(rings_submit_before_6_4, struct io_kiocb *request)
{
	return record(request);
}
