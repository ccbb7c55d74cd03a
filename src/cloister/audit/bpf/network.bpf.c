/* Network: where sockets connect, send to and bind. At the root of the cgroup tree, below which all agents are.
 *
 * The kernel's own copy of the address is read, so nobody changes it in between. What is recorded is the attempt:
 * another program of the cgroup may refuse it. Always 1 is returned: nothing is refused here.
 */
#include "watching.h"

static __always_inline int record(struct bpf_sock_addr *ctx, u32 type, u32 ring, bool six)
{
	struct control *c = settings();
	struct watch *w = c ? watch_of_current(c) : 0;
	struct draft *d = w ? draft_take(w, ring) : 0;
	if (!d)
		return 1;
	struct event *e = &d->event;
	draft_begin(d, w, current_task(), type, TIER_CGROUP);
	e->args[0] = ctx->family;
	e->args[1] = __builtin_bswap16(ctx->user_port);
	e->args[2] = ctx->protocol;
	u32 *address = (u32 *)e->data;
	if (six) {
		address[0] = ctx->user_ip6[0];
		address[1] = ctx->user_ip6[1];
		address[2] = ctx->user_ip6[2];
		address[3] = ctx->user_ip6[3];
	} else {
		address[0] = ctx->user_ip4;
	}
	e->used = e->part[0] = six ? 16 : 4;
	draft_send(d, c, w, ring);
	return 1;
}

SEC("cgroup/connect4")
int network_connect4(struct bpf_sock_addr *ctx)
{
	return record(ctx, EVENT_CONNECT, RING_CRITICAL, false);
}

SEC("cgroup/connect6")
int network_connect6(struct bpf_sock_addr *ctx)
{
	return record(ctx, EVENT_CONNECT, RING_CRITICAL, true);
}

SEC("cgroup/sendmsg4")
int network_sendmsg4(struct bpf_sock_addr *ctx)
{
	return record(ctx, EVENT_SEND, RING_BULK, false);
}

SEC("cgroup/sendmsg6")
int network_sendmsg6(struct bpf_sock_addr *ctx)
{
	return record(ctx, EVENT_SEND, RING_BULK, true);
}

SEC("cgroup/bind4")
int network_bind4(struct bpf_sock_addr *ctx)
{
	return record(ctx, EVENT_BIND, RING_CRITICAL, false);
}

SEC("cgroup/bind6")
int network_bind6(struct bpf_sock_addr *ctx)
{
	return record(ctx, EVENT_BIND, RING_CRITICAL, true);
}
