/*
 * What it is: how a service is told to end, and how somebody waits for that: a Unix socket; who connects asks for the
 * end, and hears of it when the connection closes, as it does with the service's last breath.
 * What it is not: a way to kill; that is systemd's, when the time it gives is over.
 */
#define _GNU_SOURCE
#include "ending.h"
#include "loop.h"
#include "sys.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { BACKLOG = 16, WAITING_MAX = 16 };

static struct source on_client;
static void (*on_asked)(void);
static int waiting;

static bool parse(struct sockaddr_un *address, const char *path)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    errno = EINVAL;
    size_t length = strlen(path);
    if (length == 0 || length >= sizeof address->sun_path)
        return false;
    memcpy(address->sun_path, path, length);
    return true;
}

/* The accepted connection is kept, and never read: its end is ours. Who comes when there are enough has had his say. */
static void accept_client(struct source *source, uint32_t events)
{
    (void)events;
    int client = accept4(source->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (client < 0)
        return;
    if (waiting < WAITING_MAX)
        waiting++;
    else
        close(client);
    on_asked();
}

bool ending_open(const char *path, void (*asked)(void))
{
    struct sockaddr_un address;
    struct stat about;
    if (!parse(&address, path))
        return false;
    if (lstat(path, &about) == 0 && S_ISSOCK(about.st_mode) && unlink(path) < 0)
        return false;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return false;
    on_asked = asked;
    on_client.ready = accept_client;
    const mode_t before = umask(0117);
    bool good = bind(fd, (struct sockaddr *)&address, sizeof address) == 0;
    umask(before);
    if (good && listen(fd, BACKLOG) == 0 && loop_watch(&on_client, fd, LOOP_READ) == 0)
        return true;
    int saved = errno;
    close(fd);
    errno = saved;
    return false;
}

int ending_main(const char *path)
{
    struct sockaddr_un address;
    char byte;
    int fd = parse(&address, path) ? socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0) : -1;
    if (fd < 0)
        return EXIT_CLOISTER;
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        /* Nobody there, or nobody any more: it has ended already. */
        return errno == ENOENT || errno == ECONNREFUSED ? 0 : EXIT_CLOISTER;
    ssize_t count;
    do
        count = read(fd, &byte, 1);
    while (count > 0 || (count < 0 && errno == EINTR));
    return 0;
}
