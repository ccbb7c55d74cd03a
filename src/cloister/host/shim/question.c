/*
 * What it is: one question of the broker on the user's terminal, answered with one letter.
 * What it is not: a decision; without a terminal, or at its end, the broker's letter for nobody is the answer.
 */
#define _GNU_SOURCE
#include "question.h"
#include "sys.h"
#include "tty.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

/* Letters typed for the agent just before the question appeared must not answer it. */
enum { DEAF_MS = 300 };

enum { KEY_CTRL_C = 3, KEY_CTRL_D = 4 };

/* Open the terminal and switch it to single letters without echo; -1 when nobody can be asked. */
static int open_terminal(void)
{
    struct termios modes;
    int fd = open("/dev/tty", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    if (tty_foreground(fd) && tcgetattr(fd, &modes) == 0) {
        modes.c_lflag &= ~(tcflag_t)(ICANON | ECHO);
        modes.c_cc[VMIN] = 1;
        modes.c_cc[VTIME] = 0;
        if (tty_take(fd, &modes) == 0)
            return fd;
    }
    close(fd);
    return -1;
}

static bool parse(struct question *question, const struct frame *frame, char ***list)
{
    size_t count;
    struct reader reader = frame_reader(frame);
    *list = read_list(&reader, &count);
    if (!read_complete(&reader) || count != 4)
        return false;
    const char *letters = (*list)[1], *fallback = (*list)[2], *nobody = (*list)[3];
    if (strlen(letters) >= sizeof question->letters || strlen(fallback) != 1 || strlen(nobody) != 1)
        return false;
    strcpy(question->letters, letters);
    question->fallback = fallback[0];
    question->nobody = nobody[0];
    return true;
}

int question_put(struct question *question, const struct frame *frame, struct pty *pty)
{
    char **list = NULL;
    memset(question, 0, sizeof *question);
    if (!parse(question, frame, &list)) {
        free(list);
        return -1;
    }
    bool relayed = pty->master >= 0;
    question->own = !relayed;
    question->terminal = relayed ? 0 : open_terminal();
    if (question->terminal < 0 || (relayed && (!pty->input_open || !tty_foreground(0)))) {
        free(list);
        return question->nobody;
    }
    question->open = true;
    pty->hold = relayed;
    question->deaf_until_ms = sys_now_ms() + DEAF_MS;
    (void)!tcflush(question->terminal, TCIFLUSH);
    int out = relayed ? pty->terminal : question->terminal;
    if (relayed)
        (void)!sys_write_all(out, "\r\n\033[0m\033[2K", 10, 1000);
    sys_write_printable(out, list[0], strlen(list[0]), relayed);
    free(list);
    return 0;
}

void question_withdraw(struct question *question, struct pty *pty)
{
    if (!question->open)
        return;
    question->open = false;
    if (question->own) {
        (void)!sys_write_all(question->terminal, "\n", 1, 1000);
        tty_give_back();
        close(question->terminal);
        return;
    }
    (void)!sys_write_all(pty->terminal, "\r\n", 2, 1000);
    pty->hold = false;
    pty_redraw(pty);
}

int question_read(struct question *question, struct pty *pty)
{
    char key = 0;
    ssize_t got = read(question->terminal, &key, 1);
    if (got < 0 && (errno == EINTR || errno == EAGAIN))
        return 0;
    if (got <= 0) {
        question_withdraw(question, pty);
        return question->nobody;
    }
    if (sys_now_ms() < question->deaf_until_ms)
        return 0;
    if (key == '\r' || key == '\n')
        key = question->fallback;
    else if (key == KEY_CTRL_C || key == KEY_CTRL_D)
        key = question->nobody;
    else if (!strchr(question->letters, key))
        return 0;
    question_withdraw(question, pty);
    return key;
}
