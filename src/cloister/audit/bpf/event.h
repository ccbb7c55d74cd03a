/* What the kernel's side writes and the reader reads: one record of a ring, and the maps' values.
 *
 * Shared by the BPF programs and by host/native, so it holds fixed-width fields only, each at its natural
 * alignment. A record is `struct event`, of which only the used part of `data` travels.
 */
#pragma once

#define CALLS 512           /* system call numbers that have a counter of their own */
#define CALL_UNKNOWN 510    /* numbers beyond the table */
#define CALL_COMPAT 511     /* entered by int 0x80 or with x32's bit: numbers of another table */
#define DATA_BYTES 4096
#define DATA_SLACK 1024     /* behind it, so that a masked offset plus one read stays inside */
#define ARGV_BYTES 768
#define TEXT_BYTES 512
#define WALK_BYTES 1024
#define WALK_STEPS 64
#define PARTS 4
#define LEVELS 16
#define NAMESPACES 32     /* depth of pid namespaces at most (pid_namespaces(7)) */
#define DRAFTS 4

enum event_type {
	EVENT_EXEC = 1, /* parts: executable (walk), name as asked, argv, directory (walk) */
	EVENT_FORK,
	EVENT_EXIT,     /* args: code, signal */
	EVENT_CONNECT,  /* args: family, port, protocol; part 0: address */
	EVENT_SEND,
	EVENT_BIND,
	EVENT_CALL,     /* args, ret; parts: text, text, directory (walk), resolved (walk) */
	EVENT_FILE,     /* args: flags or mode; call: enum file_act; parts: walk, walk or text */
	EVENT_PRIVILEGE,/* args: uid before, uid after, gid before, gid after */
	EVENT_TRACE,    /* args: pid and start of the other, mode */
	EVENT_KERNEL,   /* call: enum kernel_act; args as it fits */
	EVENT_RING_OP,  /* args: opcode of io_uring */
};

enum file_act { FILE_OPEN = 1, FILE_CREATE, FILE_MKDIR, FILE_DELETE, FILE_RENAME, FILE_LINK, FILE_SYMLINK, FILE_MODE,
	FILE_OWNER, FILE_TRUNCATE, FILE_MOUNT, FILE_UNMOUNT, FILE_CONNECT };

enum kernel_act { KERNEL_BPF = 1, KERNEL_MODULE, KERNEL_USERNS, KERNEL_PERF };

enum event_flag {
	FLAG_CUT = 1,      /* some text was longer than what is kept */
	FLAG_UNREAD = 2,   /* some text could not be read */
	FLAG_LATE = 4,     /* some text could only be read when the call returned */
	FLAG_CHANGED = 8,  /* a text was another one when the call returned */
	FLAG_COMPAT = 16,  /* entered by another table of system calls */
	FLAG_FAILED = 32,  /* the call failed: ret is -errno */
	FLAG_NO_RET = 64,  /* ret is not known */
};

enum event_tier { TIER_TRACEPOINT = 1, TIER_CGROUP, TIER_LSM, TIER_FENTRY };

enum ring { RING_CRITICAL, RING_BULK, RINGS };

struct event {
	__u32 size;
	__u16 type;
	__u16 call;
	__u64 time;         /* CLOCK_BOOTTIME, ns */
	__u64 seq;          /* per CPU and ring; advances for lost ones too; the first is 1 */
	__u64 start;        /* start_boottime of the process */
	__u64 parent_start;
	__u32 watch;
	__u16 cpu;
	__u8 tier;
	__u8 flags;
	__u32 pid, tid, ns_pid, ppid;
	__u32 uid;
	__u32 used;         /* bytes of data */
	__s64 ret;
	__u64 args[6];
	__u16 part[PARTS];  /* lengths of the parts of data, one behind the other */
	char comm[16];
	__u8 data[];
};

struct watch {              /* value of `watched` */
	__u32 id;           /* never used twice by one sensor */
	__u32 slot;         /* which counters are its */
};

struct control {            /* the only value of `control` */
	__u64 ns_per_byte[RINGS];  /* rate of one watch: 0 is no limit */
	__u64 burst_ns;
	__u64 wake_bytes;
	__u8 levels[LEVELS];       /* depths of watched cgroups below the root, rising; 0 ends the list */
	__u32 namespaces;          /* how many pid namespaces are watched */
	__u32 slots;
};

struct tally {              /* value of `tallies`, per CPU, at slot * RINGS + ring */
	__u64 made;         /* = delivered + dropped + limited */
	__u64 dropped;      /* the ring was full */
	__u64 limited;      /* its watch was over its rate */
};

/* The shape of a system call's event: which arguments are texts and which one the directory of the first (index + 1,
   three bits each; no directory: the working directory), and what else there is to read. */
#define SHAPE_TEXT0(S) ((S) & 7)
#define SHAPE_TEXT1(S) ((S) >> 3 & 7)
#define SHAPE_DIRECTORY(S) ((S) >> 6 & 7)
#define SHAPE_OPENS 0x200     /* returns a descriptor, whose path the kernel knows */
#define SHAPE_ADDRESS 0x400   /* argument 1 is a socket address of argument 2 bytes; Unix sockets only */
#define SHAPE_CRITICAL 0x800  /* for the ring of few and important events */
#define SHAPE_ON 0x1000
#define SHAPE_FAILED 0x2000    /* only when it failed: what succeeds is told elsewhere */

#define NAMESPACE_KEY (1ull << 63)  /* in keys of `watched`: the rest is a pid namespace's inode, not a cgroup's id */
