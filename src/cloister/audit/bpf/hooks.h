/* Files, as the kernel itself sees them: one program per hook, for LSM and, where BPF is none, for fentry.
 *
 * The including file says which: PROGRAM(security hook, arguments…) opens a program. Paths are walked from the objects
 * that the kernel works on, so there is nothing to change in between, and io_uring comes by here as well. What failed
 * before its hook is told by the system calls (SHAPE_FAILED). Nothing is refused here.
 */
#include "text.h"

#define HOOKED(NAME, ...) BPF_PROG(NAME, __VA_ARGS__) /* so that NAME is expanded first */

static __always_inline struct draft *begin(struct control **c, struct watch **w, u32 act)
{
	*c = settings();
	*w = *c ? watch_of_current(*c) : 0;
	struct draft *d = *w ? draft_take(*w, RING_BULK) : 0;
	if (!d)
		return 0;
	draft_begin(d, *w, current_task(), EVENT_FILE, TIER);
	d->event.call = act;
	d->event.flags |= FLAG_NO_RET;
	return d;
}

static __noinline int one_place(struct vfsmount *mount, struct dentry *dentry, u32 act, u64 mode)
{
	struct control *c;
	struct watch *w;
	struct draft *d = begin(&c, &w, act);
	if (!d)
		return 0;
	struct place from = {mount, dentry};
	d->event.args[0] = mode;
	walk(&d->event, 0, &from);
	draft_send(d, c, w, RING_BULK);
	return 0;
}

static __always_inline int two_places(struct place *first, struct place *second, u32 act)
{
	struct control *c;
	struct watch *w;
	struct draft *d = begin(&c, &w, act);
	if (!d)
		return 0;
	walk(&d->event, 0, first);
	walk(&d->event, 1, second);
	draft_send(d, c, w, RING_BULK);
	return 0;
}

SEC(HOOK "file_open")
int HOOKED(PROGRAM(file_open), struct file *file)
{
	return one_place(BPF_CORE_READ(file, f_path.mnt), BPF_CORE_READ(file, f_path.dentry), FILE_OPEN,
			 BPF_CORE_READ(file, f_flags));
}

SEC(HOOK "path_mknod")
int HOOKED(PROGRAM(path_mknod), const struct path *dir, struct dentry *dentry, u16 mode)
{
	return one_place(BPF_CORE_READ(dir, mnt), dentry, FILE_CREATE, mode);
}

SEC(HOOK "path_mkdir")
int HOOKED(PROGRAM(path_mkdir), const struct path *dir, struct dentry *dentry, u16 mode)
{
	return one_place(BPF_CORE_READ(dir, mnt), dentry, FILE_MKDIR, mode);
}

SEC(HOOK "path_unlink")
int HOOKED(PROGRAM(path_unlink), const struct path *dir, struct dentry *dentry)
{
	return one_place(BPF_CORE_READ(dir, mnt), dentry, FILE_DELETE, 0);
}

SEC(HOOK "path_rmdir")
int HOOKED(PROGRAM(path_rmdir), const struct path *dir, struct dentry *dentry)
{
	return one_place(BPF_CORE_READ(dir, mnt), dentry, FILE_DELETE, 0);
}

SEC(HOOK "path_truncate")
int HOOKED(PROGRAM(path_truncate), const struct path *path)
{
	return one_place(BPF_CORE_READ(path, mnt), BPF_CORE_READ(path, dentry), FILE_TRUNCATE, 0);
}

SEC(HOOK "path_chmod")
int HOOKED(PROGRAM(path_chmod), const struct path *path, u16 mode)
{
	return one_place(BPF_CORE_READ(path, mnt), BPF_CORE_READ(path, dentry), FILE_MODE, mode);
}

SEC(HOOK "path_chown")
int HOOKED(PROGRAM(path_chown), const struct path *path)
{
	return one_place(BPF_CORE_READ(path, mnt), BPF_CORE_READ(path, dentry), FILE_OWNER, 0);
}

SEC(HOOK "path_rename")
int HOOKED(PROGRAM(path_rename), const struct path *old_dir, struct dentry *old, const struct path *new_dir,
	     struct dentry *new)
{
	struct place first = {BPF_CORE_READ(old_dir, mnt), old}, second = {BPF_CORE_READ(new_dir, mnt), new};
	return two_places(&first, &second, FILE_RENAME);
}

SEC(HOOK "path_link")
int HOOKED(PROGRAM(path_link), struct dentry *old, const struct path *new_dir, struct dentry *new)
{
	/* Both are of one mount (link(2), EXDEV). */
	struct place first = {BPF_CORE_READ(new_dir, mnt), new}, second = {BPF_CORE_READ(new_dir, mnt), old};
	return two_places(&first, &second, FILE_LINK);
}

SEC(HOOK "path_symlink")
int HOOKED(PROGRAM(path_symlink), const struct path *dir, struct dentry *dentry, const char *text)
{
	struct control *c;
	struct watch *w;
	struct draft *d = begin(&c, &w, FILE_SYMLINK);
	if (!d)
		return 0;
	struct place from = {BPF_CORE_READ(dir, mnt), dentry};
	walk(&d->event, 0, &from);
	put_kernel_text(&d->event, 1, text);
	draft_send(d, c, w, RING_BULK);
	return 0;
}
