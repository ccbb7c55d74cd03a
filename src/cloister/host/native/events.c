/* From a record of the kernel's side to the JSON of an event (audit/event.py): the same fields in the same order.
 *
 * Texts are hostile: agents choose paths, arguments and names. Lengths are the kernel's, and bounded here again.
 */
#include "events.h"

#include <string.h>
#include <sys/socket.h>
#include <arpa/inet.h>
#include <netinet/in.h>

#include "audit_api.h"
#include "json.h"
#include "sha256.h"

struct part {
	const uint8_t *at;
	size_t length;
};

struct kind {
	const char *name;
	int severity;
};

static const struct kind OF_TYPE[] = {
	[EVENT_EXEC] = {"process.executed", 1},	 [EVENT_FORK] = {"process.forked", 1},
	[EVENT_EXIT] = {"process.exited", 1},	 [EVENT_CONNECT] = {"network.connected", 1},
	[EVENT_SEND] = {"network.sent", 1},	 [EVENT_BIND] = {"network.bound", 1},
	[EVENT_PRIVILEGE] = {"process.uid-changed", 2}, [EVENT_TRACE] = {"process.traced", 3},
	[EVENT_KERNEL] = {"kernel.invoked", 2},	 [EVENT_RING_OP] = {"kernel.invoked", 2},
};
static const struct kind OF_FILE[] = {
	[FILE_OPEN] = {"file.opened", 1},	   [FILE_CREATE] = {"file.created", 1},
	[FILE_MKDIR] = {"file.created", 1},	   [FILE_DELETE] = {"file.deleted", 1},
	[FILE_RENAME] = {"file.renamed", 1},	   [FILE_LINK] = {"file.created", 1},
	[FILE_SYMLINK] = {"file.created", 1},	   [FILE_MODE] = {"file.attributes-changed", 1},
	[FILE_OWNER] = {"file.attributes-changed", 1}, [FILE_TRUNCATE] = {"file.attributes-changed", 1},
	[FILE_MOUNT] = {"file.mounted", 3},	   [FILE_UNMOUNT] = {"file.mounted", 3},
	[FILE_CONNECT] = {"network.connected", 1},
};
static const char *const FILE_ACTS[] = {
	[FILE_OPEN] = "open", [FILE_CREATE] = "create", [FILE_MKDIR] = "mkdir", [FILE_DELETE] = "delete",
	[FILE_RENAME] = "rename", [FILE_LINK] = "link", [FILE_SYMLINK] = "symlink", [FILE_MODE] = "mode",
	[FILE_OWNER] = "owner", [FILE_TRUNCATE] = "truncate", [FILE_MOUNT] = "mount", [FILE_UNMOUNT] = "unmount",
	[FILE_CONNECT] = "connect",
};
static const char *const KERNEL_ACTS[] = {
	[KERNEL_BPF] = "bpf", [KERNEL_MODULE] = "module", [KERNEL_USERNS] = "user-namespace", [KERNEL_PERF] = "perf",
};
static const char *const TIERS[] = {
	[TIER_TRACEPOINT] = "tracepoint", [TIER_CGROUP] = "cgroup", [TIER_LSM] = "lsm", [TIER_FENTRY] = "fentry",
};

#define NAME_OF(TABLE, INDEX) ((INDEX) < sizeof(TABLE) / sizeof *(TABLE) ? (TABLE)[INDEX] : NULL)

void process_uid(const uint8_t *boot_id, uint64_t start, uint32_t pid, char *out)
{
	static const char digits[] = "0123456789abcdef";
	uint8_t digest[32], number[12];
	struct sha256 s;
	for (int i = 0; i < 8; i++)
		number[i] = start >> 8 * i;
	for (int i = 0; i < 4; i++)
		number[8 + i] = pid >> 8 * i;
	sha256_init(&s);
	sha256_add(&s, boot_id, 16);
	sha256_add(&s, number, sizeof number);
	sha256_end(&s, digest);
	for (int i = 0; i < 16; i++) {
		out[2 * i] = digits[digest[i] >> 4];
		out[2 * i + 1] = digits[digest[i] & 15];
	}
}

static char *put_uid(char *p, struct words *words, uint64_t start, uint32_t pid)
{
	struct identity *known = &words->identities[(start >> 7 ^ pid) % IDENTITIES];
	if (known->start != start || known->pid != pid || !known->text[0]) {
		process_uid(words->boot_id, start, pid, known->text);
		known->start = start;
		known->pid = pid;
	}
	memcpy(p, known->text, sizeof known->text);
	return p + sizeof known->text;
}

static struct part part_of(const struct event *e, size_t used, int n)
{
	size_t at = 0, length;
	for (int i = 0; i < n; i++)
		at += e->part[i];
	length = e->part[n];
	if (at >= used || !length)
		return (struct part){NULL, 0};
	return (struct part){e->data + at, length < used - at ? length : used - at};
}

/* A string of the kernel's: up to its NUL. */
static struct part text_of(const struct event *e, size_t used, int n)
{
	struct part found = part_of(e, used, n);
	if (found.length)
		found.length = strnlen((const char *)found.at, found.length);
	return found;
}

/* A walked path: its names come from the last to the first, each with a NUL. */
static char *put_walked(char *p, struct part walked)
{
	size_t end = walked.length;
	char *begin = p;
	if (end && !walked.at[end - 1])
		end--;
	while (end) {
		size_t start = end;
		while (start && walked.at[start - 1])
			start--;
		*p++ = '/';
		p = json_escaped(p, walked.at + start, end - start);
		end = start ? start - 1 : 0;
	}
	if (p == begin)
		*p++ = '/';
	return p;
}

static char *put_argv(char *p, struct part argv)
{
	size_t at = 0;
	*p++ = '[';
	while (at < argv.length) {
		size_t length = strnlen((const char *)argv.at + at, argv.length - at);
		if (at)
			*p++ = ',';
		*p++ = '"';
		p = json_escaped(p, argv.at + at, length);
		*p++ = '"';
		at += length + 1;
	}
	*p++ = ']';
	return p;
}

static char *put_process(char *p, struct words *words, const struct event *e, size_t used)
{
	int launched = e->type == EVENT_EXEC;
	size_t name = strnlen(e->comm, sizeof e->comm);
	struct part argv = part_of(e, used, 2);
	p = TEXT(p, ",\"process\":{\"pid\":");
	p = json_unsigned(p, e->pid);
	p = TEXT(p, ",\"uid\":\"");
	p = put_uid(p, words, e->start, e->pid);
	*p++ = '"';
	if (e->ns_pid) {
		p = TEXT(p, ",\"namespace_pid\":");
		p = json_unsigned(p, e->ns_pid);
	}
	if (name) {
		p = TEXT(p, ",\"name\":\"");
		p = json_escaped(p, (const uint8_t *)e->comm, name);
		*p++ = '"';
	}
	if (launched && e->part[0]) {
		p = TEXT(p, ",\"path\":\"");
		p = put_walked(p, part_of(e, used, 0));
		*p++ = '"';
	}
	if (launched && argv.length) {
		p = TEXT(p, ",\"cmd_line\":");
		p = put_argv(p, argv);
	}
	if (launched && e->part[3]) {
		p = TEXT(p, ",\"cwd\":\"");
		p = put_walked(p, part_of(e, used, 3));
		*p++ = '"';
	}
	p = TEXT(p, ",\"user_id\":");
	p = json_unsigned(p, e->uid);
	p = TEXT(p, ",\"parent_uid\":\"");
	p = put_uid(p, words, e->parent_start, e->ppid);
	*p++ = '"';
	if (e->ppid) {
		p = TEXT(p, ",\"parent_pid\":");
		p = json_unsigned(p, e->ppid);
	}
	if (launched && e->flags & FLAG_CUT)
		p = TEXT(p, ",\"truncated\":true");
	*p++ = '}';
	return p;
}

static char *put_target(char *p, struct words *words, const struct event *e)
{
	p = TEXT(p, ",\"target\":{\"pid\":");
	p = json_unsigned(p, (uint32_t)e->args[0]);
	p = TEXT(p, ",\"uid\":\"");
	p = put_uid(p, words, e->args[1], e->args[0]);
	return TEXT(p, "\"}");
}

/* A text as it was asked for, behind the directory that it is relative to. */
static char *put_asked(char *p, struct part text, struct part directory)
{
	if (directory.length && !(text.length && text.at[0] == '/')) {
		char *begin = p;
		p = put_walked(p, directory);
		if (text.length && !(p == begin + 1 && *begin == '/'))
			*p++ = '/';
	}
	return json_escaped(p, text.at, text.length);
}

static char *file_end(char *p, struct part target, int walked, uint64_t flags)
{
	if (target.length) {
		p = TEXT(p, ",\"target\":\"");
		p = walked ? put_walked(p, target) : json_escaped(p, target.at, target.length);
		*p++ = '"';
	}
	if (flags) {
		p = TEXT(p, ",\"flags\":");
		p = json_unsigned(p, flags);
	}
	*p++ = '}';
	return p;
}

static char *put_call_file(char *p, const struct event *e, size_t used, const struct call *call)
{
	struct part text = text_of(e, used, 0), resolved = part_of(e, used, 3);
	if (!(call->shape & SHAPE_ADDRESS) && (text.length || resolved.length || e->part[0])) {
		p = TEXT(p, ",\"file\":{\"path\":\"");
		p = resolved.length ? put_walked(p, resolved) : put_asked(p, text, part_of(e, used, 2));
		*p++ = '"';
		if (resolved.length)
			p = TEXT(p, ",\"resolved\":true");
		p = file_end(p, text_of(e, used, 1), 0, call->flags_at < 6 ? (uint32_t)e->args[call->flags_at] : 0);
	}
	return p;
}

/* A socket address of the Unix family: a path, or an abstract name behind a NUL. */
static char *put_unix(char *p, struct part address)
{
	struct part name = {address.at + 2, address.length > 2 ? address.length - 2 : 0};
	p = TEXT(p, ",\"endpoint\":{\"path\":\"");
	if (name.length && !name.at[0]) {
		*p++ = '@';
		p = json_escaped(p, name.at + 1, name.length - 1);
	} else if (name.length) {
		p = json_escaped(p, name.at, strnlen((const char *)name.at, name.length));
	}
	return TEXT(p, "\",\"protocol\":\"unix\"}");
}

static char *put_endpoint(char *p, const struct event *e, size_t used)
{
	struct part address = part_of(e, used, 0);
	char text[INET6_ADDRSTRLEN] = "";
	if (address.length == 4)
		inet_ntop(AF_INET, address.at, text, sizeof text);
	else if (address.length == 16)
		inet_ntop(AF_INET6, address.at, text, sizeof text);
	p = TEXT(p, ",\"endpoint\":{\"ip\":\"");
	p = json_copy(p, text);
	*p++ = '"';
	if (e->args[1]) {
		p = TEXT(p, ",\"port\":");
		p = json_unsigned(p, e->args[1]);
	}
	if (e->args[2] == IPPROTO_TCP)
		p = TEXT(p, ",\"protocol\":\"tcp\"");
	else if (e->args[2] == IPPROTO_UDP)
		p = TEXT(p, ",\"protocol\":\"udp\"");
	*p++ = '}';
	return p;
}

static char *put_object(char *p, struct words *words, const struct event *e, size_t used, const struct call *call)
{
	struct part first = part_of(e, used, 0), second = part_of(e, used, 1);
	if (e->type == EVENT_TRACE)
		return put_target(p, words, e);
	if (e->type == EVENT_EXEC && second.length) {
		p = TEXT(p, ",\"file\":{\"path\":\"");
		p = json_escaped(p, second.at, strnlen((const char *)second.at, second.length));
		return TEXT(p, "\"}");
	}
	if (e->type == EVENT_CALL && call->shape & SHAPE_ADDRESS && first.length)
		return put_unix(p, first);
	if (e->type == EVENT_CALL)
		return put_call_file(p, e, used, call);
	if (e->type == EVENT_FILE && e->call == FILE_CONNECT)
		return put_unix(p, first);
	if (e->type == EVENT_FILE) {
		p = TEXT(p, ",\"file\":{\"path\":\"");
		p = put_walked(p, first);
		p = TEXT(p, "\",\"resolved\":true");
		return file_end(p, e->call == FILE_SYMLINK ? text_of(e, used, 1) : second, e->call != FILE_SYMLINK,
				(uint32_t)e->args[0]);
	}
	if (e->type == EVENT_CONNECT || e->type == EVENT_SEND || e->type == EVENT_BIND)
		return put_endpoint(p, e, used);
	return p;
}

static char *detail(char *p, const char *begin, const char *name)
{
	if (p != begin)
		*p++ = ',';
	*p++ = '"';
	p = json_copy(p, name);
	return TEXT(p, "\":");
}

static char *detail_text(char *p, const char *begin, const char *name, const char *value)
{
	p = detail(p, begin, name);
	*p++ = '"';
	p = json_escaped(p, (const uint8_t *)value, strlen(value));
	*p++ = '"';
	return p;
}

static char *call_details(char *p, const char *begin, const struct event *e, const struct call *call)
{
	static const char *const arguments[] = {"a0", "a1", "a2", "a3", "a4", "a5"};
	if (call->name[0])
		p = detail_text(p, begin, "call", call->name);
	else
		p = json_unsigned(detail(p, begin, "number"), e->call);
	if (!(e->flags & FLAG_NO_RET) && e->ret > 0)
		p = json_signed(detail(p, begin, "result"), e->ret);
	if (SHAPE_TEXT0(call->shape) || call->shape & SHAPE_ADDRESS)
		return p;
	for (int i = 0; i < 6; i++)
		p = json_unsigned(detail(p, begin, arguments[i]), e->args[i]);
	return p;
}

static char *put_details(char *p, const struct event *e, const struct call *call)
{
	static const struct {
		int flag;
		const char *name;
	} marks[] = {{FLAG_CUT, "cut"}, {FLAG_UNREAD, "unread"}, {FLAG_LATE, "late"}, {FLAG_CHANGED, "changed"},
		     {FLAG_COMPAT, "compat"}};
	char *opened = p;
	p = TEXT(p, ",\"details\":{");
	char *begin = p;
	if (e->type == EVENT_CALL) {
		p = call_details(p, begin, e, call);
	} else if (e->type == EVENT_EXIT) {
		p = json_unsigned(detail(p, begin, "code"), e->args[0]);
		if (e->args[1])
			p = json_unsigned(detail(p, begin, "signal"), e->args[1]);
	} else if (e->type == EVENT_FILE && NAME_OF(FILE_ACTS, e->call)) {
		p = detail_text(p, begin, "act", FILE_ACTS[e->call]);
	} else if (e->type == EVENT_KERNEL && NAME_OF(KERNEL_ACTS, e->call)) {
		p = detail_text(p, begin, "act", KERNEL_ACTS[e->call]);
		p = json_unsigned(detail(p, begin, "a0"), e->args[0]);
	} else if (e->type == EVENT_RING_OP) {
		p = detail_text(p, begin, "act", "io_uring");
		p = json_unsigned(detail(p, begin, "opcode"), e->args[0]);
	} else if (e->type == EVENT_PRIVILEGE) {
		static const char *const names[] = {"uid_before", "uid_after", "gid_before", "gid_after"};
		for (int i = 0; i < 4; i++)
			p = json_unsigned(detail(p, begin, names[i]), e->args[i]);
	} else if (e->type == EVENT_TRACE) {
		p = json_unsigned(detail(p, begin, "mode"), e->args[2]);
	}
	if (e->tid != e->pid && e->type != EVENT_EXIT)
		p = json_unsigned(detail(p, begin, "thread"), e->tid);
	for (size_t i = 0; i < sizeof marks / sizeof *marks; i++)
		if (e->flags & marks[i].flag)
			p = TEXT(detail(p, begin, marks[i].name), "true");
	if (p == begin)
		return opened;
	*p++ = '}';
	return p;
}

size_t event_json(struct words *words, const struct event *e, size_t size, const char *fields, size_t fields_length,
		  char *out)
{
	static const struct call nothing;
	static const struct kind unknown = {"kernel.invoked", 2};
	size_t used = e->used < size - sizeof *e ? e->used : size - sizeof *e;
	const struct call *call = e->type == EVENT_CALL && e->call < CALLS ? &words->calls[e->call] : &nothing;
	struct kind kind = unknown;
	char *p = out;
	if (e->type == EVENT_CALL && call->kind[0])
		kind = (struct kind){call->kind, call->severity};
	else if (e->type == EVENT_FILE && e->call && e->call < sizeof OF_FILE / sizeof *OF_FILE)
		kind = OF_FILE[e->call];
	else if (e->type != EVENT_CALL && e->type < sizeof OF_TYPE / sizeof *OF_TYPE && OF_TYPE[e->type].name)
		kind = OF_TYPE[e->type];
	p = TEXT(p, "{\"time\":");
	p = json_signed(p, (int64_t)e->time + words->anchor);
	p = TEXT(p, ",\"kind\":\"");
	p = json_copy(p, kind.name);
	p = TEXT(p, "\",");
	memcpy(p, fields, fields_length);
	p += fields_length - 1; /* its last comma, or that of kind, comes with what follows */

	if (kind.severity > 1) {
		p = TEXT(p, ",\"severity_id\":");
		p = json_unsigned(p, kind.severity);
	}
	if (e->flags & FLAG_FAILED) {
		p = TEXT(p, ",\"error\":");
		p = json_unsigned(p, -e->ret);
	}
	p = put_process(p, words, e, used);
	p = put_object(p, words, e, used, call);
	p = TEXT(p, ",\"tier\":\"");
	p = json_copy(p, NAME_OF(TIERS, e->tier) ? TIERS[e->tier] : "");
	p = TEXT(p, "\",\"source\":\"sensor\"");
	p = put_details(p, e, call);
	*p++ = '}';
	return p - out;
}
