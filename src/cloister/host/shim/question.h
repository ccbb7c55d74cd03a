/*
 * What it is: one question of the broker on the user's terminal, answered with one letter.
 * What it is not: a decision; without a terminal, or at its end, the broker's letter for nobody is the answer.
 */
#ifndef CLOISTER_QUESTION_H
#define CLOISTER_QUESTION_H

#include "frame.h"
#include "pty.h"

#include <stdbool.h>
#include <stdint.h>

struct question {
    bool open;
    int terminal; /* where the letter comes from */
    bool own;     /* opened and switched to single letters by us, not relayed to a pty */
    char letters[32];
    char fallback; /* Enter */
    char nobody;   /* Ctrl-C, Ctrl-D, and nobody there to answer */
    int64_t deaf_until_ms;
};

/*
 * Put the question. Returns the answer when there is one at once (nobody can be asked), 0 when
 * it has to be waited for, -1 when the frame is malformed.
 */
int question_put(struct question *question, const struct frame *frame, struct pty *pty);

/* Read one letter: the answer, or 0 when it was none of the allowed ones. */
int question_read(struct question *question, struct pty *pty);

/* Take the question off the terminal unanswered. */
void question_withdraw(struct question *question, struct pty *pty);

#endif
