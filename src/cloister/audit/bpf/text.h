/* Text of a record: strings of user space, and paths, walked from their end to the root of the task.
 *
 * A walked path is its names from the last to the first, each with a NUL: the reader turns it round. Masks
 * keep the verifier sure that a write stays inside; the budgets keep the masks from ever mattering.
 */
#pragma once
#include "watching.h"

#define ROOM(E, OFFSET) ((E)->data + ((OFFSET) & (DATA_BYTES - 1)))

/* Append a string of user space as part `n`. */
static __always_inline long put_user_text(struct event *e, u32 n, u64 from)
{
	u32 at = e->used;
	long got = bpf_probe_read_user_str(ROOM(e, at), TEXT_BYTES, (void *)from);
	if (got <= 0) {
		e->flags |= FLAG_UNREAD;
		return got ? got : -14;
	}
	if (got == TEXT_BYTES)
		e->flags |= FLAG_CUT;
	e->part[n] = got;
	e->used = at + got;
	return got;
}

static __always_inline void put_kernel_text(struct event *e, u32 n, const void *from)
{
	u32 at = e->used;
	long got = bpf_probe_read_kernel_str(ROOM(e, at), TEXT_BYTES, from);
	if (got <= 0) {
		e->flags |= FLAG_UNREAD;
		return;
	}
	if (got == TEXT_BYTES)
		e->flags |= FLAG_CUT;
	e->part[n] = got;
	e->used = at + got;
}

struct place {
	struct vfsmount *mount;
	struct dentry *dentry;
};

/* Append the names from a place up to the root of the current task, as part `n`; 64 names at most. */
static __noinline int walk(struct event *e, u32 n, struct place *from)
{
	struct fs_struct *fs = BPF_CORE_READ(current_task(), fs);
	struct vfsmount *root_mount = BPF_CORE_READ(fs, root.mnt), *vfs = from->mount;
	struct dentry *root = BPF_CORE_READ(fs, root.dentry), *dentry = from->dentry;
	u32 begin = e->used, at = begin;
	int i;
	for (i = 0; i < WALK_STEPS; i++) {
		struct mount *m = (void *)vfs - bpf_core_field_offset(struct mount, mnt);
		struct dentry *parent = BPF_CORE_READ(dentry, d_parent);
		if (!dentry || !vfs || (dentry == root && vfs == root_mount))
			break;
		if (dentry == BPF_CORE_READ(vfs, mnt_root)) {
			struct mount *above = BPF_CORE_READ(m, mnt_parent);
			if (above == m)
				break;
			dentry = BPF_CORE_READ(m, mnt_mountpoint);
			vfs = (void *)above + bpf_core_field_offset(struct mount, mnt);
			continue;
		}
		if (at - begin > WALK_BYTES) {
			i = WALK_STEPS;
			break;
		}
		long got = bpf_probe_read_kernel_str(ROOM(e, at), 256, BPF_CORE_READ(dentry, d_name.name));
		if (got <= 0)
			break;
		at += got;
		if (dentry == parent)
			break;
		dentry = parent;
	}
	if (i >= WALK_STEPS)
		e->flags |= FLAG_CUT;
	/* The root itself is one empty name, so that it is told from nothing. */
	if (at == begin) {
		*ROOM(e, at) = 0;
		at++;
	}
	e->part[n & (PARTS - 1)] = at - begin;
	e->used = at;
	return 0;
}

static __always_inline void put_walk(struct event *e, u32 n, const struct path *path)
{
	struct place from = {BPF_CORE_READ(path, mnt), BPF_CORE_READ(path, dentry)};
	walk(e, n, &from);
}
