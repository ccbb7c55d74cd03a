/*
 * What it is: a guest that stands still while its machine is kept: asked for it, waited for, told to go on. Where the
 * monitor makes the channel (vsock), it is met again by another connection first.
 * What it is not: the keeping; the broker has the monitor do that, between the guest's answer and the word to go on.
 *
 *   broker `Q` ──▶ `Q` ──▶ guest's `Q` ──▶ (kept) ──▶ broker `Q` 0 ──▶ CONNECT, `I` ──▶ guest's `I` ──▶ `Q` 0
 *
 * By its documents Firecracker has a guest forget its connections when it keeps it. Its own end of ours may stay open
 * all the same, or be closed at once; so whatever it did, ours is closed and made anew. Nothing is lost by that: each end
 * had read all that the other one had sent. The guest is hostile: on a new connection it says the session's nonce, and
 * nothing else, before anything goes on.
 */
#define _GNU_SOURCE
#include "keeper.h"
#include "link.h"
#include "stream.h"
#include "sys.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { AGAIN_WITHIN_S = 30 };

/* MOVES, ASKED to stand still, STANDS; then it is CALLED, by another connection, and MET there. */
enum state { MOVES, ASKED, STANDS, CALLED, MET };

static struct still {
    enum state state;
    unsigned owed;  /* answers that are still to come: the broker may have changed its mind */
    bool once_more; /* the broker wants it to stand still again, as soon as it has gone on */
    int64_t until_ms;
    uint8_t nonce[LINK_NONCE];
} self;

/* Behind the question nothing leaves: a guest that is kept has read whole frames only, and owes no answer. */
static void ask(void)
{
    self.owed++;
    self.state = ASKED;
    stream_hold(true);
    link_send('Q', NULL, 0, NULL, 0);
    link_gate(true);
}

static void go_on(void)
{
    struct writer payload = {0};
    struct timespec now = {0};
    (void)clock_gettime(CLOCK_REALTIME, &now);
    uint64_t time_ns = (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
    write_u8(&payload, 0);
    write_u32(&payload, (uint32_t)time_ns);
    write_u32(&payload, (uint32_t)(time_ns >> 32));
    self.state = MOVES;
    link_gate(false);
    link_send_payload('Q', &payload);
    free(payload.data);
    stream_hold(false);
}

void keeper_still_ask(bool still)
{
    if (keeper_still_waiting()) {
        self.once_more = still;
    } else if (still) {
        ask();
    } else if (self.state == STANDS && !keeper_agent_ended() && keeper_monitor_call()) {
        link_part();
        self.state = CALLED;
        self.until_ms = sys_now_ms() + keeper_patience_ms(AGAIN_WITHIN_S);
    } else {
        go_on();
    }
}

bool keeper_still_answered(const struct reader *payload)
{
    if (self.owed == 0 || payload->left > 0)
        keeper_liar("a rest that was not asked for");
    if (--self.owed > 0 || self.state != ASKED)
        return false;
    if (!link_gate_reached())
        keeper_liar("a rest before it was asked for");
    self.state = STANDS;
    return true;
}

bool keeper_still_lost(void)
{
    if (!link_parted())
        return false; /* it was no clean end */
    if (self.state == STANDS)
        return keeper_monitor_has_calls();
    if (self.state != MET)
        return false;
    self.state = CALLED; /* the guest's kernel was told late to forget its connections */
    return keeper_monitor_call();
}

bool keeper_still_reached(int fd, const uint8_t *nonce)
{
    if (self.state != CALLED)
        return false;
    if (link_rejoin(fd) < 0)
        keeper_end(EXIT_CLOISTER);
    self.state = MET;
    memcpy(self.nonce, nonce, sizeof self.nonce);
    link_send_first('I', self.nonce, sizeof self.nonce);
    return true;
}

bool keeper_still_meets(uint8_t type, struct reader *payload)
{
    if (self.state != MET)
        return false;
    if (type != 'I' || payload->left != sizeof self.nonce || memcmp(payload->at, self.nonce, sizeof self.nonce) != 0)
        keeper_liar("another word than its session's on a new connection");
    go_on();
    if (self.once_more)
        ask();
    self.once_more = false;
    return true;
}

void keeper_still_tick(void)
{
    if (keeper_still_waiting() && sys_now_ms() >= self.until_ms)
        keeper_fail("guest-silent", "the guest was kept, and could not be met again within %d s",
                    keeper_patience_ms(AGAIN_WITHIN_S) / 1000);
}

bool keeper_still_waiting(void)
{
    return self.state == CALLED || self.state == MET;
}
