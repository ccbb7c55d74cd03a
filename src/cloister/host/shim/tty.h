/*
 * What it is: the modes of the user's terminal: the run's change and a question's over it, undone at
 * every exit path, fatal signals included. What it is not: the relay of bytes; pty.c does that.
 */
#ifndef CLOISTER_TTY_H
#define CLOISTER_TTY_H

#include <stdbool.h>
#include <termios.h>

/* Restore the terminal, then die, on every signal that would kill us without warning. */
int tty_guard(void);

/* Remember the modes of `fd`, and set `wanted` unless it is NULL; -1 when two changes are in force. */
int tty_take(int fd, const struct termios *wanted);

/* Restore what was taken last, and forget it. Does nothing when nothing was taken, or in the background. */
void tty_give_back(void);

/* Restore for the time we are stopped; tty_resume sets the wanted modes again. */
void tty_suspend(void);
void tty_resume(void);

/* Whether our process group is in the foreground of this terminal. */
bool tty_foreground(int fd);

/* Stop, as a program that needs the terminal does, until we are in its foreground. */
void tty_await_foreground(int fd);

/* Stop this process as the shell's job control expects; returns after SIGCONT. */
void tty_stop_self(void);

#endif
