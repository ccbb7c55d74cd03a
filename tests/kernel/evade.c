/* Ways around watchers of system calls, one per word of the command line; each prints its word and what came of it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static int unmapped_page(const char *target)
{
	char name[] = "/tmp/cloister-evade-XXXXXX", page[4096] = {0};
	int file = mkstemp(name);
	strcpy(page, target);
	if (file < 0 || write(file, page, sizeof page) != sizeof page)
		return -errno;
	char *text = mmap(NULL, sizeof page, PROT_READ, MAP_PRIVATE, file, 0);
	int opened = syscall(SYS_openat, AT_FDCWD, text, O_RDONLY);
	unlink(name);
	return opened;
}

static int ring(const char *target)
{
	struct io_uring_params p;
	memset(&p, 0, sizeof p);
	int fd = syscall(SYS_io_uring_setup, 4, &p);
	if (fd < 0)
		return -errno;
	size_t size = p.sq_off.array + p.sq_entries * 4, replies = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
	char *sq = mmap(0, size, 3, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQ_RING);
	char *cq = mmap(0, replies, 3, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_CQ_RING);
	struct io_uring_sqe *e = mmap(0, p.sq_entries * sizeof *e, 3, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQES);
	memset(e, 0, sizeof *e);
	e->opcode = IORING_OP_OPENAT;
	e->fd = AT_FDCWD;
	e->addr = (uintptr_t)target;
	e->open_flags = O_RDONLY;
	unsigned *tail = (unsigned *)(sq + p.sq_off.tail), *order = (unsigned *)(sq + p.sq_off.array);
	order[0] = 0;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	syscall(SYS_io_uring_enter, fd, 1, 1, IORING_ENTER_GETEVENTS, 0, 0);
	return ((struct io_uring_cqe *)(cq + p.cq_off.cqes))->res;
}

static int other_table(void)
{
#ifdef __x86_64__
	long answer;
	__asm__ volatile("int $0x80" : "=a"(answer) : "a"(20L) : "memory", "r8", "r9", "r10", "r11");
	return answer;
#else
	return getpid();
#endif
}

static char shared[64];
static volatile int done;

static void *rewrite(void *unused)
{
	(void)unused;
	while (!done) {
		memcpy(shared, "/etc/passwd", 12);
		memcpy(shared, "/etc/hosts\0", 12);
	}
	return NULL;
}

static int race(void)
{
	pthread_t thread;
	int opened = 0;
	memcpy(shared, "/etc/hosts\0", 12);
	if (pthread_create(&thread, NULL, rewrite, NULL))
		return -1;
	for (int i = 0; i < 3000; i++) {
		int fd = syscall(SYS_openat, AT_FDCWD, shared, O_RDONLY | O_NOATIME);
		char link[64], path[64] = "";
		if (fd < 0)
			continue;
		snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
		if (syscall(SYS_readlink, link, path, sizeof path - 1) > 0 && !strcmp(path, "/etc/passwd"))
			opened++;
		close(fd);
	}
	done = 1;
	pthread_join(thread, NULL);
	return opened;
}

static int flood(long many)
{
	for (long i = 0; i < many; i++)
		syscall(SYS_openat, AT_FDCWD, "/nowhere/at/all", O_RDONLY);
	return 0;
}

static void *outlive(void *unused)
{
	(void)unused;
	usleep(50000);
	exit(7);
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		long result = 0;
		if (!strcmp(argv[i], "unmapped"))
			result = unmapped_page("/etc/shells");
		else if (!strcmp(argv[i], "ring"))
			result = ring("/etc/group");
		else if (!strcmp(argv[i], "other-table"))
			result = other_table();
		else if (!strcmp(argv[i], "race"))
			result = race();
		else if (!strcmp(argv[i], "relative"))
			result = openat(open("/tmp", O_DIRECTORY | O_RDONLY), "../etc/services", O_RDONLY);
		else if (!strncmp(argv[i], "flood=", 6))
			result = flood(atol(argv[i] + 6));
		else if (!strcmp(argv[i], "leader-ends-first")) {
			pthread_t thread;
			pthread_create(&thread, NULL, outlive, NULL);
			syscall(SYS_exit, 0);
		}
		printf("%s %ld\n", argv[i], result);
		fflush(stdout);
	}
	return 0;
}
