package runbook_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/test/runbooktest"
)

// tainted returns a server with a keyset that was just tainted.
func tainted(t *testing.T) (*runbooktest.Server, string) {
	t.Helper()
	s := runbooktest.NewServer(t)
	old := s.Deployment.Active().ID
	k, err := s.Deployment.Prepare(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Deployment.Activate(t.Context(), k.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Deployment.Taint(t.Context(), old); err != nil {
		t.Fatal(err)
	}
	return s, old
}

// fleet returns three agents after a taint at start. a waits 20 s and renews 100
// SVIDs, 20 per second. b is behind for 5 s and then waits 10 s. c is silent until its
// two SVIDs expire after 70 s.
func fleet(start time.Time) func(string, time.Time) []runbook.Holder {
	return func(_ string, now time.Time) []runbook.Holder {
		var out []runbook.Holder
		past := func(s int) bool { return !now.Before(start.Add(time.Duration(s) * time.Second)) }
		expiry := start.Add(time.Hour)
		if !past(25) {
			h := runbook.Holder{Agent: "spiffe://example.org/agent/a", SVIDs: 100, Reason: "waiting", BeginsAt: start.Add(20 * time.Second), Rate: 20, LatestExpiry: expiry}
			if past(20) {
				h.Reason = "renewing"
				h.SVIDs -= int(now.Sub(h.BeginsAt).Seconds() * 20)
			}
			out = append(out, h)
		}
		if !past(15) {
			h := runbook.Holder{Agent: "spiffe://example.org/agent/b", SVIDs: 1, Reason: "behind", Rate: 20, LatestExpiry: expiry}
			if past(5) {
				h.Reason, h.BeginsAt = "waiting", start.Add(15*time.Second)
			}
			out = append(out, h)
		}
		if !past(70) {
			out = append(out, runbook.Holder{Agent: "spiffe://example.org/agent/c", SVIDs: 2, Reason: "silent", LatestExpiry: start.Add(70 * time.Second), LastReport: start})
		}
		return out
	}
}

func TestWaitFollowsTheWave(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		start := time.Now()
		s.HoldersAt = fleet(start)
		s.JWTExpiry[old] = start.Add(24 * time.Hour)
		var out bytes.Buffer
		r, err := runbook.Wait(t.Context(), s, old, runbook.WaitOptions{Progress: &runbook.Screen{W: &out}})
		if err != nil || !r.Safe || r.Removed || r.X509SVIDs != 0 || len(r.Holders) != 0 {
			t.Fatalf("%+v, %v", r, err)
		}
		if took := time.Since(start); took < 70*time.Second || took > 72*time.Second || r.Waited != took.Seconds() {
			t.Errorf("safe after %v, reported %v s; the last SVID expires after 70 s", took, r.Waited)
		}
		if r.Took != 70 || r.Planned <= 0 || r.Summary() != "The wave took 1m10s, the plan said 55s." || len(r.Remarks) != 2 || r.Remarks[0] != r.Summary() {
			t.Errorf("took %v s, planned %v s: %q", r.Took, r.Planned, r.Remarks)
		}
		if len(r.Remarks) != 2 || !strings.Contains(r.Remarks[1], "expires 2000-01-02 00:00:00 +0000 UTC (in 23h59m)") {
			t.Errorf("no remark about JWT-SVIDs: %q", r.Remarks)
		}
		want := strings.ReplaceAll(`ID: 103 X.509-SVIDs of 3 agents left, done in 6m10s at the latest; /agent/c silent, /agent/b behind, /agent/a waiting
ID: 103 X.509-SVIDs of 3 agents left, done in 6m at the latest; /agent/c silent, /agent/a waiting, /agent/b waiting
ID: 102 X.509-SVIDs of 2 agents left, done in 5m50s at the latest; /agent/c silent, /agent/a renewing
ID: 2 X.509-SVIDs of 1 agent left, done in 5m40s at the latest; /agent/c silent
ID: 2 X.509-SVIDs of 1 agent left, done in 5m30s at the latest; /agent/c silent
ID: 2 X.509-SVIDs of 1 agent left, done in 5m20s at the latest; /agent/c silent
ID: 2 X.509-SVIDs of 1 agent left, done in 5m10s at the latest; /agent/c silent
`, "ID:", old+":")
		if out.String() != want {
			t.Errorf("progress\n%s\nwant\n%s", out.String(), want)
		}
	})
}

// Without silent agents the estimate is the end of the slowest agent: its start plus
// its SVIDs at its rate.
func TestWaitEstimates(t *testing.T) {
	t.Parallel()
	in := func(s int) time.Time { return time.Date(2000, 1, 1, 0, 0, s, 0, time.UTC) }
	for name, tt := range map[string]struct {
		holders []runbook.Holder
		want    time.Time
	}{
		"waiting":                        {[]runbook.Holder{{SVIDs: 100, Reason: "waiting", BeginsAt: in(20), Rate: 20}}, in(25)},
		"renewing":                       {[]runbook.Holder{{SVIDs: 40, Reason: "renewing", BeginsAt: in(-20), Rate: 10}}, in(4)},
		"rate not known":                 {[]runbook.Holder{{SVIDs: 40, Reason: "renewing"}}, in(2)},
		"behind":                         {[]runbook.Holder{{SVIDs: 40, Reason: "behind", Rate: 20}}, in(62)},
		"expires before its turn":        {[]runbook.Holder{{SVIDs: 40, Reason: "behind", Rate: 20, LatestExpiry: in(30 - 300)}}, in(30)},
		"expired, but not by all clocks": {[]runbook.Holder{{SVIDs: 40, Reason: "behind", Rate: 20, LatestExpiry: in(30)}}, in(62)},
		"silent":                         {[]runbook.Holder{{SVIDs: 40, Reason: "silent", Rate: 20, LatestExpiry: in(300)}}, in(600)},
		"slowest of several":             {[]runbook.Holder{{SVIDs: 20, Reason: "renewing"}, {SVIDs: 200, Reason: "renewing"}, {SVIDs: 2, Reason: "streams"}}, in(10)},
		"one without estimate":           {[]runbook.Holder{{SVIDs: 20, Reason: "renewing"}, {SVIDs: 2, Reason: "silent"}}, time.Time{}},
		"unidentified":                   {[]runbook.Holder{{Reason: "unidentified"}}, time.Time{}},
		"duplicated":                     {[]runbook.Holder{{SVIDs: 20, Reason: "duplicated"}, {SVIDs: 20, Reason: "duplicated"}}, time.Time{}},
		"settling":                       {[]runbook.Holder{{SVIDs: 40, Reason: "settling", Rate: 20}}, in(0).Add(cache.ReconnectGrace)},
		"only streams left":              {[]runbook.Holder{{Streams: 3, Reason: "streams"}}, in(0)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, old := tainted(t)
				s.HoldersAt = func(string, time.Time) []runbook.Holder { return tt.holders }
				r, err := runbook.Wait(t.Context(), s, old, runbook.WaitOptions{Timeout: time.Nanosecond})
				if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok || !r.Estimated.Equal(tt.want) {
					t.Errorf("estimated %v (%v), want %v", r.Estimated, err, tt.want)
				}
			})
		})
	}
}

// An agent that may never end is shown with a remedy.
func TestWaitShowsRemedy(t *testing.T) {
	t.Parallel()
	for reason, want := range map[string]string{
		"unidentified": "node-1:9090: 0 SVIDs, unidentified: it exports no agent ID (version 1.2); wait until it is attested, or upgrade it\nIt has no known end: an agent is unidentified.\n",
		"duplicated":   "node-1:9090: 0 SVIDs, duplicated: two processes use its identity; evict it, remove data_dir on both nodes and attest each with its own ID\nIt has no known end: an agent is duplicated.\n",
	} {
		synctest.Test(t, func(t *testing.T) {
			s, old := tainted(t)
			s.HoldersAt = func(string, time.Time) []runbook.Holder {
				return []runbook.Holder{{Agent: "node-1:9090", Version: "1.2", Reason: reason}}
			}
			if _, err := runbook.Wait(t.Context(), s, old, runbook.WaitOptions{Timeout: time.Nanosecond}); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v does not say %q", err, want)
			}
		})
	}
}

// Control characters in text from an agent are replaced.
func TestWaitShowsNoControlCharacters(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		s.HoldersAt = func(string, time.Time) []runbook.Holder {
			return []runbook.Holder{{Agent: "node\x1b[2J", Version: "1.2\x1b]0;x\a\r\nsafe", SVIDs: 2, Reason: "behind"}}
		}
		var out bytes.Buffer
		_, err := runbook.Wait(t.Context(), s, old, runbook.WaitOptions{Timeout: time.Second, Progress: &runbook.Screen{W: &out}})
		want := "node\uFFFD[2J: 2 SVIDs, behind: it has not applied the taint yet (version 1.2\uFFFD]0;x\uFFFD\uFFFD\uFFFDsafe)"
		if err == nil || !strings.Contains(err.Error(), want) || strings.ContainsAny(out.String()+err.Error(), "\x1b\a\r") {
			t.Errorf("got %q\n%q", err, out.String())
		}
	})
}

// Expired SVIDs count for five more minutes, because clocks differ. After that there is
// no known reason.
func TestJustExpired(t *testing.T) {
	t.Parallel()
	for ago, want := range map[time.Duration]struct{ progress, remark string }{
		time.Minute:     {"JWT-SVIDs expired 1999-12-31 23:59:00 +0000 UTC (1m ago), but clocks may differ", "signed expired 1999-12-31 23:59:00 +0000 UTC (1m"},
		6 * time.Minute: {"expiry of JWT-SVIDs not known", "that are still valid. Removal ends them"},
	} {
		synctest.Test(t, func(t *testing.T) {
			s, old := tainted(t)
			s.JWTExpiry[old] = time.Now().Add(-ago)
			s.HoldersAt = func(string, time.Time) []runbook.Holder {
				return []runbook.Holder{{Agent: "a", SVIDs: 1, Reason: "silent", LatestExpiry: time.Now().Add(-ago)}}
			}
			var out bytes.Buffer
			_, err := runbook.Wait(t.Context(), unsafeJWT{s}, old, runbook.WaitOptions{For: runbook.All, Timeout: time.Second, Progress: &runbook.Screen{W: &out}})
			if !strings.HasSuffix(out.String(), "; "+want.progress+"\n") {
				t.Errorf("%v: progress %q, want %q", ago, out.String(), want.progress)
			}
			if err == nil || !strings.Contains(err.Error(), want.remark) || !strings.Contains(err.Error(), "silent: no report yet, the last expired 1999-12-31") {
				t.Errorf("%v: %v", ago, err)
			}
			s.HoldersAt = nil
			if d, err := runbook.Remove(t.Context(), s, old, false, time.Now()); err != nil || len(d.Remarks) != 1 || !strings.Contains(d.Remarks[0], "wherever nodes are made") {
				t.Errorf("%v: remarks of a safe removal %q, %v", ago, d.Remarks, err)
			}
		})
	}
}

// unsafeJWT reports every JWT key as not safe.
type unsafeJWT struct{ *runbooktest.Server }

func (u unsafeJWT) Status(ctx context.Context) (runbook.Status, error) {
	s, err := u.Server.Status(ctx)
	for i := range s.Keysets {
		s.Keysets[i].JWTSafe = false
	}
	return s, err
}

// SVIDs in flight have no agent yet, and are shown.
func TestSignatureInFlight(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		s.HoldersAt = func(string, time.Time) []runbook.Holder {
			return []runbook.Holder{{SVIDs: 2, Reason: "signing"}, {Agent: "spiffe://example.org/agent/a", SVIDs: 1, Reason: "renewing", Rate: 0.5}}
		}
		var out bytes.Buffer
		_, err := runbook.Wait(t.Context(), s, old, runbook.WaitOptions{Timeout: time.Second, Progress: &runbook.Screen{W: &out}})
		want := old + ": 3 X.509-SVIDs of 1 agent left, done in about 2s; /agent/a renewing, 2 SVIDs being signed\n"
		if out.String() != want {
			t.Errorf("progress %q, want %q", out.String(), want)
		}
		want = "3 X.509-SVIDs of 1 agent depend on it.\n  spiffe://example.org/agent/a: 1 SVID, renewing\n  2 SVIDs being signed: agent not known yet\n"
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	})
}

// After a restore unknown SVIDs are shown with their latest expiry, also when the known
// agents have replaced theirs.
func TestWaitAfterARestore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		copied, end := time.Now().Add(-time.Hour), time.Now().Add(6*24*time.Hour)
		unknown := runbook.Holder{Reason: "restored", LastReport: copied, LatestExpiry: end}
		s.HoldersAt = func(_ string, now time.Time) []runbook.Holder {
			switch {
			case !now.Before(end.Add(5 * time.Minute)):
				return nil
			case now.Before(time.Date(2000, 1, 1, 0, 0, 10, 0, time.UTC)):
				return []runbook.Holder{unknown, {Agent: "spiffe://example.org/agent/a", SVIDs: 3, Reason: "renewing"}}
			}
			return []runbook.Holder{unknown}
		}
		var out bytes.Buffer
		o := runbook.WaitOptions{Timeout: 15 * time.Second, Interval: 10 * time.Second, Progress: &runbook.Screen{W: &out}}
		r, err := runbook.Wait(t.Context(), s, old, o)
		want := old + ": 3 known X.509-SVIDs of 1 agent left, done in 6d1h at the latest; restored from a copy of 1999-12-31 23:00:00 +0000 UTC; SVIDs signed since then are not known, /agent/a renewing\n" +
			old + ": 0 known X.509-SVIDs left, done in 6d1h at the latest; restored from a copy of 1999-12-31 23:00:00 +0000 UTC; SVIDs signed since then are not known\n"
		if out.String() != want {
			t.Errorf("progress %q\nwant %q", out.String(), want)
		}
		want = "0 known X.509-SVIDs depend on it.\n  restored from a copy of 1999-12-31 23:00:00 +0000 UTC; SVIDs signed since then are not known\n" +
			"It ends at the latest 2000-01-07 00:05:00 +0000 UTC (in 6d1h), when the unknown SVIDs have expired by all clocks.\n"
		if err == nil || !strings.Contains(err.Error(), want) || r.Safe {
			t.Errorf("got %v\nwant %s", err, want)
		}
		if r, err := runbook.Wait(t.Context(), s, old, runbook.WaitOptions{Interval: time.Minute}); err != nil || !r.Safe || time.Now().Before(end) {
			t.Errorf("%+v, %v at %v", r, err, time.Now())
		}
	})
}

// A failed poll is shown and repeated.
func TestWaitRetriesFailedPolls(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		start := time.Now()
		s.HoldersAt = func(_ string, now time.Time) []runbook.Holder {
			if now.Sub(start) < 10*time.Second {
				return []runbook.Holder{{Agent: "spiffe://example.org/agent/a", SVIDs: 1, Reason: "renewing"}}
			}
			return nil
		}
		s.Before = func(call, _ string) error {
			if after := time.Since(start); call == "status" && after > 0 && after < 30*time.Second {
				return errors.New("connection refused")
			}
			return nil
		}
		var out bytes.Buffer
		r, err := runbook.Wait(t.Context(), s, old, runbook.WaitOptions{Progress: &runbook.Screen{W: &out}})
		if err != nil || !r.Safe || time.Since(start) != 30*time.Second {
			t.Errorf("%+v, %v after %v", r, err, time.Since(start))
		}
		if got := strings.Count(out.String(), old+": no answer, retrying: connection refused\n"); got != 3 {
			t.Errorf("shown %d times:\n%s", got, out.String())
		}
	})
}

// A first poll that fails is repeated like the others, within the timeout.
func TestWaitRetriesTheFirstPoll(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		start := time.Now()
		s.Before = func(string, string) error {
			if time.Since(start) < 20*time.Second {
				return errors.New("connection refused")
			}
			return nil
		}
		var out bytes.Buffer
		r, err := runbook.Wait(t.Context(), s, old, runbook.WaitOptions{Timeout: time.Minute, Progress: &runbook.Screen{W: &out}})
		if err != nil || !r.Safe || time.Since(start) != 20*time.Second || !strings.HasPrefix(out.String(), old+": no answer, retrying: connection refused\n") {
			t.Errorf("%+v, %v after %v\n%s", r, err, time.Since(start), out.String())
		}
		start = time.Now()
		_, err = runbook.Wait(t.Context(), s, old, runbook.WaitOptions{Timeout: 10 * time.Second})
		if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok || !strings.Contains(err.Error(), "The server has not answered: connection refused") {
			t.Errorf("the server never answers: %v", err)
		}
	})
}

// If the server hangs, the wait still ends by its timeout.
func TestWaitServerHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		start := time.Now()
		s.HoldersAt = func(string, time.Time) []runbook.Holder {
			return []runbook.Holder{{Agent: "a", SVIDs: 1, Reason: "signing"}}
		}
		hung := &hangingServer{Server: s, since: start}
		r, err := runbook.Wait(t.Context(), hung, old, runbook.WaitOptions{Timeout: 100 * time.Second})
		if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok || r.Safe || time.Since(start) != 100*time.Second {
			t.Errorf("%+v, %v after %v", r, err, time.Since(start))
		}
		if hung.polls != 4 { // at 2, 34, 66, 98 s
			t.Errorf("%d polls", hung.polls)
		}
	})
}

type hangingServer struct {
	*runbooktest.Server
	since time.Time
	polls int
}

func (h *hangingServer) Status(ctx context.Context) (runbook.Status, error) {
	if time.Now().After(h.since) {
		h.polls++
		<-ctx.Done()
		return runbook.Status{}, ctx.Err()
	}
	return h.Server.Status(ctx)
}

// Unknown figures are not safe, whatever the other fields say.
func TestWaitUnknownIsNotSafe(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		optimist := &optimist{Server: s}
		for _, f := range []runbook.Scope{runbook.X509, runbook.JWT, runbook.All} {
			r, err := runbook.Wait(t.Context(), optimist, old, runbook.WaitOptions{For: f, Timeout: time.Minute})
			notSafe, ok := errors.AsType[*runbook.NotSafeError](err)
			if !ok || r.Safe || r.X509SVIDs != -1 || r.Unknown != "Prometheus is down" {
				t.Errorf("for %s: %+v, %v", f, r, err)
				continue
			}
			if f != runbook.JWT && !strings.Contains(notSafe.Message, "not known: Prometheus is down") {
				t.Errorf("for %s: %s", f, notSafe.Message)
			}
		}
	})
}

type optimist struct{ *runbooktest.Server }

func (l *optimist) Status(ctx context.Context) (runbook.Status, error) {
	s, err := l.Server.Status(ctx)
	for i := range s.Keysets {
		s.Keysets[i].Unknown, s.Keysets[i].X509Safe, s.Keysets[i].JWTSafe = "Prometheus is down", true, true
	}
	return s, err
}

func TestWaitFor(t *testing.T) {
	t.Parallel()
	for f, want := range map[runbook.Scope]time.Duration{runbook.X509: time.Minute, runbook.JWT: time.Hour, runbook.All: time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			s, old := tainted(t)
			start := time.Now()
			s.JWTExpiry[old] = start.Add(time.Hour)
			s.HoldersAt = func(_ string, now time.Time) []runbook.Holder {
				if now.Before(start.Add(time.Minute)) {
					return []runbook.Holder{{Agent: "a", SVIDs: 1, Reason: "renewing"}}
				}
				return nil
			}
			r, err := runbook.Wait(t.Context(), s, old, runbook.WaitOptions{For: f})
			if err != nil || !r.Safe || time.Since(start) != want {
				t.Errorf("for %s: %+v, %v after %v, want %v", f, r, err, time.Since(start), want)
			}
		})
	}
}

// Wait fails at once for a keyset that is not tainted.
func TestWaitRejectsKeyset(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := runbooktest.NewServer(t)
		active := s.Deployment.Active().ID
		k, err := s.Deployment.Prepare(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for id, want := range map[string]string{
			active:      "it is Active: activate another keyset, then taint " + active,
			k.ID:        "it is Prepared, and agents keep what it signed: run keysetctl taint " + k.ID,
			"ks_nosuch": "there is no keyset ks_nosuch: it was removed, or the ID is mistyped; run keysetctl list",
		} {
			r, err := runbook.Wait(t.Context(), s, id, runbook.WaitOptions{})
			if err == nil || err.Error() != "wait for keyset "+id+": "+want || r.Safe {
				t.Errorf("%s: %+v, %v", id, r, err)
			}
		}
		permanent := &runbook.PermanentError{Err: errors.New("there is no deployment b")}
		s.Before = func(string, string) error { return fmt.Errorf("read: %w", permanent) }
		if _, err := runbook.Wait(t.Context(), s, active, runbook.WaitOptions{}); err == nil || err.Error() != "wait for keyset "+active+": read: there is no deployment b" {
			t.Errorf("what no repetition mends: %v", err)
		}
	})
}

// A wait ends when the keyset is removed or the context is canceled.
func TestWaitEndsEarly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		s.HoldersAt = fleet(time.Now())
		time.AfterFunc(5*time.Second, func() { _ = s.Deployment.Remove(context.Background(), old) })
		r, err := runbook.Wait(t.Context(), s, old, runbook.WaitOptions{})
		if err != nil || !r.Removed || r.Safe || r.String() != "Keyset "+old+" was removed during the wait." {
			t.Errorf("%+v, %v", r, err)
		}

		s, old = tainted(t)
		s.HoldersAt = fleet(time.Now())
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(5*time.Second, func() { cancel(errors.New("interrupt signal received")) })
		r, err = runbook.Wait(ctx, s, old, runbook.WaitOptions{})
		if err == nil || r.Safe || !strings.Contains(err.Error(), "interrupt signal received") || runbook.Remedy(err) != "" {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

// A rotation waits for the agents before it activates and taints, and until the keyset
// is safe before it removes it.
func TestRotateWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := runbooktest.NewServer(t)
		old := s.Deployment.Active().ID
		s.Agents = 3
		var published, tainted time.Time
		var took []string
		s.Behind = func(now time.Time) int {
			if now.Sub(published) < 7*time.Second {
				return 1
			}
			return 0
		}
		s.HoldersAt = func(id string, now time.Time) []runbook.Holder {
			if id == old && (tainted.IsZero() || now.Sub(tainted) < time.Minute) {
				return []runbook.Holder{{Agent: "a", SVIDs: 5, Reason: "renewing"}}
			}
			return nil
		}
		start := time.Now()
		s.After = func(call, id string) error {
			took = append(took, fmt.Sprintf("%s after %v", call, time.Since(start)))
			start = time.Now()
			switch call {
			case "prepare":
				published = time.Now()
			case "taint":
				tainted, published = time.Now(), time.Now()
			case "activate":
				published = time.Now() // as if an agent had come back with an old bundle
			}
			return nil
		}
		var out bytes.Buffer
		r, err := runbook.Rotate(t.Context(), s, runbook.RotateOptions{Wait: runbook.WaitOptions{Progress: &runbook.Screen{W: &out}}})
		if err != nil || !r.Complete {
			t.Fatalf("%+v, %v", r, err)
		}
		if got := strings.Join(took, ", "); got != "prepare after 0s, activate after 8s, taint after 8s, remove after 1m0s" {
			t.Error(got)
		}
		if !strings.Contains(out.String(), "1 of 3 agents has not applied trust bundle 2 yet\n") {
			t.Error(out.String())
		}
	})
}

// If agents do not apply the bundle, or that is not known, the rotation waits until the
// timeout.
func TestRotateTimeout(t *testing.T) {
	t.Parallel()
	for name, behind := range map[string]int{"1 of 3 agents has not applied": 1, "It is not known which agents": -1} {
		synctest.Test(t, func(t *testing.T) {
			s := runbooktest.NewServer(t)
			s.Agents = 3
			s.Behind = func(time.Time) int { return behind }
			start := time.Now()
			r, err := runbook.Rotate(t.Context(), s, runbook.RotateOptions{Wait: runbook.WaitOptions{Timeout: time.Minute}})
			if _, ok := errors.AsType[*runbook.NotSafeError](err); !ok || r.Complete || !strings.Contains(err.Error(), name) {
				t.Errorf("%+v, %v", r, err)
			}
			if len(s.Calls()) != 1 || time.Since(start) != time.Minute {
				t.Errorf("%v after %v", s.Calls(), time.Since(start))
			}
		})
	}
}

// If somebody else completes a rotation while Rotate waits, Rotate is complete and starts
// no new one.
func TestRotateFinishedByOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, old := tainted(t)
		s.HoldersAt = fleet(time.Now())
		time.AfterFunc(5*time.Second, func() { _ = s.Deployment.Remove(context.Background(), old) })
		r, err := runbook.Rotate(t.Context(), s, runbook.RotateOptions{})
		if err != nil || !r.Complete || len(s.Calls()) != 0 {
			t.Errorf("%+v, %v, %v", r, err, s.Calls())
		}
	})
}
