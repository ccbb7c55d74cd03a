/* One kind of system call, many times; prints nanoseconds of CPU time and of time per call. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double clock_now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static double now(void)
{
	struct timespec t;
	struct rusage children;
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	getrusage(RUSAGE_CHILDREN, &children);
	double theirs = children.ru_utime.tv_sec + children.ru_stime.tv_sec +
			(children.ru_utime.tv_usec + children.ru_stime.tv_usec) / 1e6;
	return t.tv_sec + t.tv_nsec / 1e9 + theirs;
}

int main(int argc, char **argv)
{
	long many = argc > 2 ? atol(argv[2]) : 0;
	double began = now(), clock_began = clock_now();
	for (long i = 0; i < many; i++) {
		if (!strcmp(argv[1], "getppid")) {
			syscall(SYS_getppid);
		} else if (!strcmp(argv[1], "openat")) {
			close(syscall(SYS_openat, AT_FDCWD, "/etc/hostname", O_RDONLY));
		} else if (!strcmp(argv[1], "failing-openat")) {
			syscall(SYS_openat, AT_FDCWD, "/nowhere", O_RDONLY);
		} else {
			char *command[] = {"/bin/true", NULL}, *nothing[] = {NULL};
			pid_t child;
			if (!posix_spawn(&child, command[0], NULL, NULL, command, nothing))
				waitpid(child, NULL, 0);
		}
	}
	printf("%.1f %.1f\n", (now() - began) / many * 1e9, (clock_now() - clock_began) / many * 1e9);
	return 0;
}
