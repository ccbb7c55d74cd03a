/*
 * What it is: the relay between the user's terminal and the master of a pty in the sandbox.
 * What it is not: the maker of that pty, or its session: terminal.c in the inner half is.
 *
 * The master comes from where an agent runs. What is not the master of a pty is refused, and
 * nothing read from it decides anything: it is only shown.
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

/*
 * A pty will come: what is typed until then waits, unseen, and Ctrl-C and Ctrl-Z are still signals to us.
 * 0, or -1 with errno when stdin or stdout is no terminal.
 */
int pty_expect(void);

/*
 * Relay this master, which belongs to us from now on: it gets the modes and the size of the user's terminal, and
 * that one becomes raw. 0, or -1 with errno (EINVAL: it is not the master of a pty).
 */
int pty_adopt(struct pty *pty, int master);

/* Give the agent the size of the user's terminal (the kernel then sends it SIGWINCH). */
void pty_resize(const struct pty *pty);

/* Make a full-screen program draw itself again: the kernel sends SIGWINCH only when the size changes. */
void pty_redraw(const struct pty *pty);

/* Fill three entries (stdin, terminal, master) for poll(2), and afterwards move what can be moved. */
enum { PTY_POLLS = 3 };
void pty_wanted(const struct pty *pty, struct pollfd polls[PTY_POLLS]);
void pty_move(struct pty *pty, const struct pollfd polls[PTY_POLLS]);

/* Bring out what the agent wrote before its end; bounded, since others inside may go on writing. */
void pty_drain(struct pty *pty);

#endif
