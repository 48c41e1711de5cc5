package server_test

import (
	"slices"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/server/rotation"
)

// TestIdleServerKeepsTheTime: a server to which nothing happens for days stores the time
// all the same. The next process does not doubt a clock that is right.
func TestIdleServerKeepsTheTime(t *testing.T) {
	t.Parallel()
	inClockHistory(t, 1, 90*day, func(h *clockHistory) {
		h.restart(0, 0)
		time.Sleep(10 * day)
		h.restart(time.Minute, 0)
		if s := h.Clock(); s.Doubt != 0 {
			h.t.Errorf("the clock is in doubt: %+v", s)
		}
		h.stop()
	})
}

// TestDoubtIsLogged: the log says once that the clock is in doubt, at a start and at runtime,
// and once that it no longer is.
func TestDoubtIsLogged(t *testing.T) {
	t.Parallel()
	inClockHistory(t, 1, 90*day, func(h *clockHistory) {
		h.config.Rotation.Mode = rotation.Off // it logs what it does not do
		h.restart(0, 0)
		for _, far := range []time.Duration{91 * day, -day} {
			h.restart(0, far)
			for _, off := range []time.Duration{far, 0, far, 0} {
				h.off.Store(int64(off))
				time.Sleep(3 * time.Minute)
			}
			h.stop()
			const doubt = "WARN clock in doubt, automatic rotation waits: compare it with the true time, set it or confirm it with server clock confirm"
			want := []string{doubt, "INFO clock no longer in doubt", doubt, "INFO clock no longer in doubt"}
			if !slices.Equal(h.start.clock, want) {
				h.t.Errorf("%v off: logged %q, want %q", far, h.start.clock, want)
			}
		}
	})
}

// TestNothingIsForgotten: while the clock is a month ahead for a moment, a join token is
// made, which deletes what has expired. An agent and a join token of before are kept.
func TestNothingIsForgotten(t *testing.T) {
	t.Parallel()
	inClockHistory(t, 1, 90*day, func(h *clockHistory) {
		h.restart(0, 0)
		h.entries()
		n := &clockNode{svids: map[string][]*identity{}}
		check(h.t, h.visit(n))
		s := h.Server("default")
		token, err := s.CreateJoinToken(h.t.Context(), time.Hour, "")
		check(h.t, err)
		h.off.Store(int64(30 * day))
		_, err = s.CreateJoinToken(h.t.Context(), time.Hour, "")
		check(h.t, err)
		h.off.Store(0)
		if agents, err := s.Agents(h.t.Context()); err != nil || len(agents) != 1 {
			h.t.Errorf("agents are %v, %v", agents, err)
		}
		check(h.t, h.visit(n))
		check(h.t, h.attestWith(h.t.Context(), new(clockNode), token.Value))
		h.stop()
	})
}

// TestClockStepGivesNoTimeToFetch: an agent that does not report is behind a new bundle
// until it had three minutes to fetch that, whatever the clock shows meanwhile.
func TestClockStepGivesNoTimeToFetch(t *testing.T) {
	t.Parallel()
	inClockHistory(t, 1, 90*day, func(h *clockHistory) {
		h.restart(0, 0)
		h.entries()
		check(h.t, h.visit(&clockNode{svids: map[string][]*identity{}}))
		time.Sleep(time.Hour)
		behind := func(want int) {
			h.t.Helper()
			if f, err := h.Figures(h.t.Context(), "default"); err != nil || f.AgentsBehind != want {
				h.t.Errorf("clock %v off: %d agents are behind, %v, want %d", time.Duration(h.off.Load()), f.AgentsBehind, err, want)
			}
		}
		behind(0)
		h.operate()
		for _, off := range []time.Duration{0, 10 * time.Minute, 12 * time.Hour, 0} {
			h.off.Store(int64(off))
			behind(1)
		}
		time.Sleep(3 * time.Minute)
		behind(0)
		h.stop()
	})
}

// TestAgentRenewsWhileTheClockIsAhead: an agent that renews its agent SVID while the
// server's clock is ten hours ahead is served when that is right again, although the agent
// SVID begins later. So is one that attests while the clock is years ahead.
func TestAgentRenewsWhileTheClockIsAhead(t *testing.T) {
	t.Parallel()
	for name, restart := range map[string]bool{"same process": false, "next process": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inClockHistory(t, 1, 90*day, func(h *clockHistory) {
				right := func() {
					if restart {
						h.restart(0, 0)
					}
					h.off.Store(0)
				}
				h.restart(0, 0)
				h.entries()
				n := &clockNode{svids: map[string][]*identity{}}
				check(h.t, h.visit(n))
				time.Sleep(13 * time.Hour)
				h.off.Store(int64(10 * time.Hour))
				check(h.t, h.visit(n))
				check(h.t, h.visit(n)) // it uses the new agent SVID
				right()
				if begin := n.own.chain[0].NotBefore; time.Until(begin) < 9*time.Hour {
					h.t.Fatalf("the agent SVID begins %v, it is %v", begin, time.Now())
				}
				if err := h.visit(n); err != nil {
					h.t.Errorf("an agent that has renewed: %v", err)
				}
				h.off.Store(int64(5 * 365 * day))
				n = &clockNode{svids: map[string][]*identity{}}
				if err := h.attestNode(h.t.Context(), n); err == nil {
					right()
					if err := h.visit(n); err != nil {
						h.t.Errorf("a new agent: %v", err)
					}
				}
				h.stop()
			})
		})
	}
}

// TestAgentSVIDOfAClockThatWasSetBack: while the server's clock is days behind, agent
// SVIDs begin in its future. It does not accept them, because the ones that it would sign
// have expired when the clock is right again, and each agent would need a join token.
func TestAgentSVIDOfAClockThatWasSetBack(t *testing.T) {
	t.Parallel()
	inClockHistory(t, 1, 90*day, func(h *clockHistory) {
		h.restart(0, 0)
		h.entries()
		time.Sleep(10 * day)
		n := &clockNode{svids: map[string][]*identity{}}
		check(h.t, h.visit(n))
		time.Sleep(13 * time.Hour)
		h.off.Store(int64(-3 * day))
		if err := h.visit(n); err == nil {
			h.t.Errorf("served; the agent SVID has expired %v, it is %v", n.own.chain[0].NotAfter, time.Now())
		}
		h.off.Store(0)
		check(h.t, h.visit(n))
		h.stop()
	})
}

// TestFirstStartWithAWrongClock: the first keyset is made while the clock is wrong. When it is
// right, that keyset has expired or is not yet valid. The server does not know which time was
// right, and is not ready until an operator confirms the clock. A minute later it attests and
// signs.
func TestFirstStartWithAWrongClock(t *testing.T) {
	t.Parallel()
	for name, far := range map[string]time.Duration{"behind": -365 * day, "ahead": 91 * day} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inClockHistory(t, 1, 90*day, func(h *clockHistory) {
				h.restart(0, far)
				h.entries()
				time.Sleep(10 * time.Minute)
				h.off.Store(0)
				time.Sleep(3 * day)
				if s := h.Clock(); s.Doubt.Round(day) != -far || !s.Waits {
					h.t.Errorf("the clock is %+v", s)
				}
				if err := h.Ready(); err == nil {
					h.t.Error("ready")
				}
				if ok, err := h.ConfirmClock(h.t.Context(), time.Now()); !ok || err != nil {
					h.t.Fatalf("not confirmed: %v", err)
				}
				h.checkRecovered("the first start by a wrong clock")
				if err := h.Ready(); err != nil {
					h.t.Error(err)
				}
				h.stop()
			})
		})
	}
}
