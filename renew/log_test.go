package renew_test

import (
	"context"
	"crypto"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/renew"
)

// logged returns the lines of a log at info level and above, each cut to level, message
// and one attribute, or none.
func (r *rig) logged(log *strings.Builder, attr string) []string {
	synctest.Wait()
	text := log.String()
	r.renewer.States() // whose lock orders the read before what is logged later
	var out []string
	for line := range strings.Lines(text) {
		if strings.Contains(line, "level=DEBUG") {
			continue
		}
		_, line, _ = strings.Cut(strings.TrimSuffix(line, "\n"), "level=")
		i := strings.Index(line, `msg="`) + len(`msg="`)
		said := line[:i+strings.Index(line[i:], `"`)+1]
		if _, value, ok := strings.Cut(line, attr+"="); ok && attr != "" {
			value, _, _ = strings.Cut(value, " ")
			said += " " + attr + "=" + value
		}
		out = append(out, said)
	}
	return out
}

func (r *rig) wantLogged(log *strings.Builder, attr string, want ...string) {
	r.t.Helper()
	got := r.logged(log, attr)
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		r.t.Errorf("logged\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// The failures of several entries are one warning, at the first of them, and one line when
// renewals work.
func TestFailuresAreLoggedOnce(t *testing.T) {
	var log strings.Builder
	drill(t, 3, func(r *rig) { r.cfg.Log = logTo(&log) }, func(r *rig) {
		r.server.set(func() {
			r.server.item = func(id string, _ crypto.PublicKey) (renew.Result, bool) {
				return renew.Result{Err: errors.New("not now")}, true
			}
		})
		begin := r.taint()
		r.sleepUntil(begin.Add(200 * time.Millisecond))
		const tainted, failed = `INFO msg="authority tainted, renewals scheduled" svids=3`, `WARN msg="X.509-SVID renewal failed"`
		r.wantLogged(&log, "svids", tainted, failed)
		r.sleepUntil(begin.Add(10 * time.Minute))
		r.wantLogged(&log, "svids", tainted, failed)
		r.server.set(func() { r.server.item = nil })
		r.sleepUntil(time.Now().Add(2 * time.Minute))
		r.wantLogged(&log, "svids", tainted, failed, `INFO msg="renewals recovered"`, `INFO msg="no X.509-SVID depends on the tainted authority"`)
	})
}

// An outage is one warning with the number of SVIDs that wait, when a second one has
// failed, and one line at its end. The first failure may be the fault of its SVID.
func TestOutageIsLoggedOnce(t *testing.T) {
	var log strings.Builder
	drill(t, 10, func(r *rig) { r.cfg.Log = logTo(&log) }, func(r *rig) {
		r.server.set(func() { r.server.down = errors.New("connection refused") })
		begin := r.taint()
		r.sleepUntil(begin.Add(10 * time.Minute))
		const tainted, failed, outage = `INFO msg="authority tainted, renewals scheduled"`, `WARN msg="X.509-SVID renewal failed"`, `WARN msg="server not answering, renewals paused"`
		r.wantLogged(&log, "waiting", tainted, failed, outage+" waiting=9")
		r.server.set(func() { r.server.down = nil })
		r.sleepUntil(time.Now().Add(time.Minute))
		r.wantLogged(&log, "", tainted, failed, outage, `INFO msg="server recovered, renewals resumed"`,
			`INFO msg="renewals recovered"`, `INFO msg="no X.509-SVID depends on the tainted authority"`)
	})
}

// The removal of an authority is a warning only if SVIDs depend on it.
func TestRemovalIsLogged(t *testing.T) {
	var log strings.Builder
	drill(t, 2, func(r *rig) { r.cfg.Log = logTo(&log) }, func(r *rig) {
		r.cache.SetBundle(snapshot(r.t, trusted(r.ca)...))
		r.wantLogged(&log, "svids")
		r.server.set(func() { r.server.signer = r.next })
		r.cache.SetBundle(snapshot(r.t, trusted(r.next)...))
		r.wantLogged(&log, "svids", `WARN msg="authority removed while X.509-SVIDs depend on it, renewing at once" svids=2`)
	})
}

// short is a server that leaves out the last answer.
type short struct{ *fakeServer }

func (s short) Mint(ctx context.Context, requests []renew.Request) ([]renew.Result, error) {
	results, err := s.fakeServer.Mint(ctx, requests)
	if len(results) > 1 {
		results = results[:len(results)-1]
	}
	return results, err
}

// An answer that does not match the requests is none.
func TestShortAnswer(t *testing.T) {
	drill(t, 2, func(r *rig) {
		r.cfg.Minter = short{r.server}
		r.server.item = func(string, crypto.PublicKey) (renew.Result, bool) { return renew.Result{}, false }
	}, func(r *rig) {
		r.sleepUntil(time.Now().Add(time.Minute))
		if held := r.cache.Held(r.ca.id); held != 2 {
			t.Errorf("%d of 2 SVIDs are held, want both from calls of one", held)
		}
	})
}

// A wrong answer counts as rejected, an error as failed.
func TestOutcomesOfWrongAnswers(t *testing.T) {
	for want, answer := range map[renew.Outcome]renew.Result{
		renew.OutcomeRejected: {},
		renew.OutcomeFailed:   {Err: errors.New("not now")},
	} {
		var seen outcomes
		drill(t, 1, func(r *rig) {
			r.cfg.Observer = &seen
			r.server.item = func(string, crypto.PublicKey) (renew.Result, bool) { return answer, true }
		}, func(r *rig) {
			r.sleepUntil(time.Now().Add(time.Minute))
			if seen.of[want] < 5 || len(seen.of) != 1 {
				t.Errorf("outcomes %v, want %s alone", seen.of, want)
			}
		})
	}
}
