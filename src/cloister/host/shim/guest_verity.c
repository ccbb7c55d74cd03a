/*
 * What it is: a dm-verity device, by three ioctls (Linux, Documentation/admin-guide/device-mapper/verity.rst).
 * What it is not: libdevmapper or veritysetup; no superblock on the disk is read, so none is believed.
 */
#define _GNU_SOURCE
#include "guest_verity.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { BLOCK = 4096, SECTORS_PER_BLOCK = 8 };

static const char CONTROL[] = "/dev/mapper/control";
static const char NAME[] = "cloister-root";

/* The ioctl's fixed head, one target, and the words of the target. */
struct request {
    struct dm_ioctl head;
    struct dm_target_spec target;
    char words[1024];
};

static void request_reset(struct request *request, unsigned flags)
{
    memset(request, 0, sizeof *request);
    request->head.version[0] = 4;
    request->head.data_size = sizeof *request;
    request->head.data_start = sizeof request->head;
    request->head.flags = flags;
    memcpy(request->head.name, NAME, sizeof NAME);
}

/* `panic_on_corruption`: a block that is not what was signed ends the machine; no error is left to be ignored. */
static bool request_table(struct request *request, const char *disk, const struct guest_line *line)
{
    request->head.target_count = 1;
    request->target.length = line->data_blocks * SECTORS_PER_BLOCK;
    memcpy(request->target.target_type, "verity", sizeof "verity");
    int length = snprintf(request->words, sizeof request->words,
        "1 %s %s %d %d %llu %llu sha256 %s %s 1 panic_on_corruption", disk, disk, BLOCK, BLOCK, line->data_blocks,
        line->hash_start, line->root_hash, line->salt);
    if (length < 0 || length >= (int)sizeof request->words)
        return false;
    request->target.next = (uint32_t)(sizeof request->target + (((size_t)length + 8) & ~(size_t)7));
    return true;
}

const char *guest_verity_open(const char *disk, const struct guest_line *line)
{
    struct request request;
    const char *wrong = NULL;
    int control = open(CONTROL, O_RDWR | O_CLOEXEC);
    if (control < 0)
        return "device mapper";
    request_reset(&request, DM_READONLY_FLAG);
    if (ioctl(control, DM_DEV_CREATE, &request) < 0)
        wrong = "the verity device";
    request_reset(&request, DM_READONLY_FLAG);
    if (!wrong && (!request_table(&request, disk, line) || ioctl(control, DM_TABLE_LOAD, &request) < 0))
        wrong = "the verity table";
    request_reset(&request, 0); /* without DM_SUSPEND_FLAG it resumes: the table is live from now on */
    if (!wrong && ioctl(control, DM_DEV_SUSPEND, &request) < 0)
        wrong = "activating the verity table";
    int saved = errno;
    close(control);
    errno = saved;
    return wrong;
}
