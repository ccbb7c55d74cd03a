/* The kernel's types, as far as the programs read them. CO-RE: the loader moves each field to where this kernel has it,
 * so only names count here, not the order or what lies between. Names are of Linux 6.1 to 6.18.
 */
#pragma once
#include <linux/types.h>
#include <linux/bpf.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s32 s32;
typedef __s64 s64;
typedef _Bool bool;
#define true 1
#define false 0

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

#if defined(__TARGET_ARCH_arm64)
struct pt_regs {
	u64 regs[31];
	u64 orig_x0;
	s32 syscallno;
};
#else
struct pt_regs {
	unsigned long r10, r9, r8, dx, si, di, orig_ax;
};
#endif

struct ns_common { unsigned int inum; };
struct pid_namespace { struct ns_common ns; };
struct upid {
	int nr;
	struct pid_namespace *ns;
};
struct pid {
	unsigned int level;
	struct upid numbers[1];
};
struct mm_struct {
	unsigned long arg_start, arg_end;
	struct file *exe_file;
};
typedef struct { unsigned int val; } kuid_t;
typedef struct { unsigned int val; } kgid_t;
struct cred { kuid_t uid, euid; kgid_t gid, egid; };
struct thread_info {
	unsigned long flags;
	u32 status;
};
struct qstr { const unsigned char *name; };
struct dentry {
	struct dentry *d_parent;
	struct qstr d_name;
};
struct vfsmount { struct dentry *mnt_root; };
struct mount {
	struct mount *mnt_parent;
	struct dentry *mnt_mountpoint;
	struct vfsmount mnt;
};
struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
};
struct fs_struct { struct path root, pwd; };
struct inode { unsigned short i_mode; };
struct file {
	struct path f_path;
	unsigned int f_flags;
};
struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};
struct files_struct { struct fdtable *fdt; };
typedef struct { int counter; } atomic_t;
struct signal_struct {
	atomic_t live;
	int group_exit_code;
};
struct task_struct {
	struct thread_info thread_info;
	int pid, tgid;
	struct task_struct *real_parent, *group_leader;
	u64 start_boottime;
	struct mm_struct *mm;
	const struct cred *cred;
	char comm[16];
	struct pid *thread_pid;
	int exit_code;
	struct fs_struct *fs;
	struct files_struct *files;
	struct signal_struct *signal;
};
struct linux_binprm {
	const char *filename;
	struct file *file;
};
struct sockaddr { u16 sa_family; };
struct io_kiocb { u8 opcode; };

#pragma clang attribute pop
