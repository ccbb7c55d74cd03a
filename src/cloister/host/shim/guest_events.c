/*
 * What it is: what the guest's kernel says that its run should know: processes killed for want of memory, broken disks.
 * What it is not: a log of the kernel; that is the console's.
 */
#define _GNU_SOURCE
#include "guest_link.h"
#include "guest_root.h"
#include "link.h"
#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RECORD_MAX = 8192 /* CONSOLE_EXT_LOG_MAX, kernel/printk/printk.c */, TEXT_MAX = 240 };

static struct source on_kernel;

static const char *event_of(const char *text)
{
    static const struct {
        const char *words, *event;
    } known[] = {
        {"Out of memory: Killed process", "event=out-of-memory"},
        {"out of memory: Killed process", "event=out-of-memory"},
        {"EXT4-fs error", "event=disk-error"},
        {"I/O error, dev vd", "event=disk-error"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strstr(text, known[i].words))
            return known[i].event;
    return NULL;
}

static void tell(const char *event, const char *text)
{
    struct writer list = {0};
    size_t length = strnlen(text, TEXT_MAX);
    write_u32(&list, 2);
    write_u32(&list, (uint32_t)strlen(event));
    write_bytes(&list, event, strlen(event));
    write_u32(&list, (uint32_t)(strlen("text=") + length));
    write_bytes(&list, "text=", strlen("text="));
    write_bytes(&list, text, length);
    link_send_payload('L', &list);
    free(list.data);
}

/* One record per read(2): numbers, a semicolon, the text, and lines of a dictionary (Documentation/ABI/testing/dev-kmsg). */
static void on_record(struct source *source, uint32_t events)
{
    (void)events;
    char record[RECORD_MAX + 1];
    ssize_t got;
    while ((got = read(source->fd, record, RECORD_MAX)) > 0 || (got < 0 && errno == EPIPE)) {
        if (got < 0)
            continue; /* overwritten before it was read */
        record[got] = 0;
        char *text = strchr(record, ';');
        if (!text)
            continue;
        text[1 + strcspn(text + 1, "\n")] = 0;
        const char *event = event_of(text + 1);
        if (event && !link_full())
            tell(event, text + 1);
    }
}

void guest_events_open(void)
{
    int fd = open(GUEST_DEVICES "/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return; /* outside of a machine the kernel is not ours */
    on_kernel.ready = on_record;
    if (lseek(fd, 0, SEEK_END) < 0 || loop_watch(&on_kernel, fd, LOOP_READ) < 0)
        close(fd);
}
