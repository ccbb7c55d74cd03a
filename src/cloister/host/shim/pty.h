/*
 * What it is: the agent's own pty and the relay between it and the user's terminal.
 * What it is not: the agent's session; the inner half makes the pty its controlling terminal.
 */
#ifndef CLOISTER_PTY_H
#define CLOISTER_PTY_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>

struct pty_buffer {
    char data[16384];
    size_t start, end;
};

struct pty {
    int master;   /* -1: no pty */
    int terminal; /* where output goes: stdout, reopened so that we may make it non-blocking */
    bool input_open;
    bool output_open;
    bool hold; /* a question is on the screen: the agent's output waits */
    struct pty_buffer input, output;
};

/* Make the pty and put the user's terminal in raw mode. Returns the slave, or -1 with errno. */
int pty_open(struct pty *pty);

/* Give the agent the size of the user's terminal (the kernel then sends it SIGWINCH). */
void pty_resize(const struct pty *pty);

/* Make a full-screen program draw itself again: the kernel sends SIGWINCH only when the size changes. */
void pty_redraw(const struct pty *pty);

/* Fill three entries (stdin, terminal, master) for poll(2), and afterwards move what can be moved. */
enum { PTY_POLLS = 3 };
void pty_wanted(const struct pty *pty, struct pollfd polls[PTY_POLLS]);
void pty_move(struct pty *pty, const struct pollfd polls[PTY_POLLS]);

/* Bring out what the agent wrote before its end. */
void pty_drain(struct pty *pty);

#endif
