/* The little that Python cannot ask libbpf for itself: its words, and an object from memory. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>

static char said[1 << 14];
static size_t length;

static int keep(enum libbpf_print_level level, const char *format, va_list arguments)
{
	char line[2048];
	int wrote;
	if (level == LIBBPF_DEBUG)
		return 0;
	wrote = vsnprintf(line, sizeof line, format, arguments);
	size_t many = wrote < 0 ? 0 : (size_t)wrote < sizeof line ? (size_t)wrote : sizeof line - 1;
	if (length + many >= sizeof said) {
		size_t half = sizeof said / 2;
		memmove(said, said + length - (length < half ? length : half), length < half ? length : half);
		length = length < half ? length : half;
	}
	memcpy(said + length, line, many);
	length += many;
	said[length] = 0;
	return 0;
}

const char *loader_said(void)
{
	length = 0;
	return said;
}

struct bpf_object *loader_open(const void *image, size_t size)
{
	libbpf_set_print(keep);
	said[length = 0] = 0;
	return bpf_object__open_mem(image, size, NULL);
}

int64_t loader_misses(int program)
{
	struct bpf_prog_info info;
	__u32 size = sizeof info;
	memset(&info, 0, sizeof info);
	if (bpf_obj_get_info_by_fd(program, &info, &size))
		return -errno;
	return (int64_t)info.recursion_misses;
}
