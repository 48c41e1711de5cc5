package renew_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/renew"
)

// SVIDs that are past half of their life when they arrive, because this node's
// clock is ahead of the server's or because their authority is about to end,
// are renewed with backoff and not as fast as the server answers.
func TestRenewalsOfOldSVIDsBackOff(t *testing.T) {
	const n = 2
	for name, life := range map[string]struct {
		from, to    time.Duration
		least, most int // renewals of one SVID
	}{
		"clock ahead":          {-40 * time.Minute, 20 * time.Minute, 0, 40},
		"clock a little ahead": {-30 * time.Minute, 30 * time.Minute, 0, 40},
		// A pause is at most a quarter of what is left.
		"authority about to end": {-10 * time.Second, 5 * time.Second, 80, 130},
	} {
		t.Run(name, func(t *testing.T) {
			drill(t, n, func(r *rig) {
				r.server.latency = 50 * time.Millisecond
				r.server.item = func(id string, public crypto.PublicKey) (renew.Result, bool) {
					der, err := r.ca.leaf(r.server.ids[id], public, 0, func(c *x509.Certificate) {
						c.NotBefore, c.NotAfter = time.Now().Add(life.from), time.Now().Add(life.to)
					})
					return renew.Result{Chain: [][]byte{der}, Err: err}, true
				}
			}, func(r *rig) {
				from := time.Now()
				r.sleepUntil(from.Add(2 * time.Minute))
				attempts := 0
				for _, c := range r.server.since(from) {
					attempts += len(c.ids)
				}
				if attempts < n*life.least || attempts > n*life.most {
					t.Errorf("%d renewals of %d SVIDs in two minutes, want %d to %d each", attempts, n, life.least, life.most)
				}
				if held := r.cache.Held(r.ca.id); held != n {
					t.Errorf("%d SVIDs held, want %d", held, n)
				}
			})
		})
	}
}

// agentSVID is an agent SVID that next replaces.
type agentSVID struct {
	held     atomic.Pointer[cache.SVID]
	next     func() *cache.SVID
	renewals atomic.Int64
	fails    error
	failsAt  func(try int64) error // instead of fails
}

func (o *agentSVID) Held() *cache.SVID { return o.held.Load() }

func (o *agentSVID) Renew(context.Context) error {
	try := o.renewals.Add(1)
	time.Sleep(100 * time.Millisecond)
	if o.failsAt != nil {
		return o.failsAt(try)
	}
	if o.fails != nil {
		return o.fails
	}
	o.held.Store(o.next())
	return nil
}

// The agent SVID is renewed with backoff, too, if a tainted authority signs it again or
// if it is past half of its life when it arrives.
func TestAgentSVIDRenewalsBackOff(t *testing.T) {
	for name, spoil := range map[string]func(*rig, *cache.SVID){
		"lagging server": func(r *rig, s *cache.SVID) { s.Authority = r.ca.id },
		"clock ahead": func(_ *rig, s *cache.SVID) {
			s.NotBefore, s.NotAfter, s.RenewAt = time.Now().Add(-40*time.Minute), time.Now().Add(20*time.Minute), time.Now().Add(-10*time.Minute)
		},
	} {
		t.Run(name, func(t *testing.T) {
			own, mended := &agentSVID{}, &atomic.Bool{}
			fresh := func(r *rig) *cache.SVID {
				now := time.Now()
				return &cache.SVID{Authority: r.next.id, NotBefore: now, NotAfter: now.Add(time.Hour), RenewAt: now.Add(30 * time.Minute)}
			}
			drill(t, 0, func(r *rig) {
				own.next = func() *cache.SVID {
					s := fresh(r)
					if !mended.Load() {
						spoil(r, s)
					}
					return s
				}
				first := fresh(r)
				first.Authority = r.ca.id
				own.held.Store(first)
				r.cfg.AgentSVID = own
			}, func(r *rig) {
				begin := r.taint()
				r.sleepUntil(begin.Add(5 * time.Minute))
				// From 2 s doubling to 60 s with full jitter, as for any other SVID.
				if n := own.renewals.Load(); n < 5 || n > 40 {
					t.Errorf("%d renewals in five minutes, want some with growing pauses", n)
				}
				mended.Store(true)
				time.Sleep(2 * time.Minute)
				synctest.Wait()
				if s := own.Held(); s.Authority != r.next.id || !s.RenewAt.After(time.Now()) {
					t.Error("not renewed after the server recovered")
				}
			})
		})
	}
}

// A shorter lifetime that the server sets applies from the half-life on: an SVID that
// expires before the one held is not worse.
func TestShorterLifetimeApplies(t *testing.T) {
	var log strings.Builder
	drill(t, 3, func(r *rig) { r.cfg.Log = logTo(&log) }, func(r *rig) {
		r.server.set(func() { r.server.life = time.Hour })
		from := time.Now()
		r.sleepUntil(from.Add(13*time.Hour + 30*time.Minute)) // half-life is at 10.8 to 13.2 h
		for _, id := range r.cache.SignedBy(r.ca.id) {
			if s := mustItem(t, r.cache, id).SVID; s.NotAfter.After(time.Now().Add(time.Hour)) {
				t.Errorf("the SVID of %s still ends in %v", id, time.Until(s.NotAfter))
			}
		}
		attempts := 0
		for _, c := range r.server.since(from) {
			attempts += len(c.ids)
		}
		if attempts < 3 || attempts > 3*8 {
			t.Errorf("%d renewals of 3 SVIDs, want each at its half-life", attempts)
		}
		if strings.Contains(log.String(), "tainted") {
			t.Errorf("the log names a taint:\n%s", log.String())
		}
	})
}

// A changed entry is minted at once, because its backoff was for the revision before.
func TestChangedEntryDoesNotBackOff(t *testing.T) {
	drill(t, 1, func(r *rig) {
		r.server.item = func(string, crypto.PublicKey) (renew.Result, bool) {
			return renew.Result{Err: errors.New("DNS name is not valid")}, true
		}
	}, func(r *rig) {
		time.Sleep(10 * time.Minute) // the pauses are long by now
		r.server.set(func() { r.server.item = nil })
		mended := *mustItem(t, r.cache, "entry-0000").Entry
		mended.Revision++
		r.cache.Update([]*cache.Entry{&mended}, nil)
		synctest.Wait()
		if r.cache.Held(r.ca.id) != 1 {
			t.Error("the changed entry still waits")
		}
	})
}

// slowAgentSVID blocks the Renewer for a second after each read of the bundle, so that
// the events of that second are all there at once.
type slowAgentSVID struct{ armed, others atomic.Int64 }

func (o *slowAgentSVID) Held() *cache.SVID {
	time.Sleep(time.Second * time.Duration(o.armed.Load()))
	return nil
}
func (*slowAgentSVID) Renew(context.Context) error { return nil }
func (*slowAgentSVID) Minted(error, time.Duration) {}
func (o *slowAgentSVID) Renewed(_ renew.Reason, outcome renew.Outcome) {
	if outcome != renew.OutcomeRenewed {
		o.others.Add(1)
	}
}

// lateBundle is a server whose answer for the second entry is signed by an authority
// that is added to the bundle while the answer is in flight.
type lateBundle struct {
	*rig
	life time.Duration
}

func (m *lateBundle) Mint(ctx context.Context, requests []renew.Request) ([]renew.Result, error) {
	if m.server.signer != m.next && requests[0].EntryID == "entry-0001" {
		time.Sleep(time.Second)
		fresh := newCA(m.t, "fresh at "+time.Now().String())
		m.cache.SetBundle(snapshot(m.t, trusted(m.server.signer, fresh)...))
		csr, err := x509.ParseCertificateRequest(requests[0].CSR)
		if err != nil {
			return nil, err
		}
		m.life -= time.Hour // or else it would be taken for its longer life
		der, err := fresh.leaf(m.server.ids["entry-0001"], csr.PublicKey, m.life, nil)
		return []renew.Result{{Chain: [][]byte{der}, Err: err}}, nil
	}
	return m.server.Mint(ctx, requests)
}

// An answer is compared by a bundle that is no older than the one that verified it.
func TestAnswerOfAuthorityAddedInFlight(t *testing.T) {
	slow := &slowAgentSVID{}
	drill(t, 2, func(r *rig) {
		r.server.signer = r.next
		r.cfg.Minter, r.cfg.BatchSize, r.cfg.AgentSVID, r.cfg.Observer = &lateBundle{r, 20 * time.Hour}, 1, slow, slow
	}, func(r *rig) {
		slow.armed.Store(1)
		r.server.set(func() { r.server.latency = 500 * time.Millisecond })
		for range 12 { // which of two things it looks at first is left to chance
			signer := newCA(t, "signer at "+time.Now().String())
			r.server.set(func() { r.server.signer = signer })
			r.cache.SetBundle(snapshot(t, trusted(signer)...))
			r.sleepUntil(time.Now().Add(time.Minute))
		}
		if n := slow.others.Load(); n != 0 {
			t.Errorf("%d of 12 valid answers were not accepted", n)
		}
	})
}

// overtaken is a server whose answer to one call comes after the answers to later ones.
type overtaken struct {
	*rig
	calls atomic.Int64
}

func (m *overtaken) Mint(ctx context.Context, requests []renew.Request) ([]renew.Result, error) {
	if m.calls.Add(1) != 2 {
		return m.server.Mint(ctx, requests)
	}
	csr, err := x509.ParseCertificateRequest(requests[0].CSR)
	if err != nil {
		return nil, err
	}
	answer := m.sign(m.ca, csr.PublicKey, nil)
	time.Sleep(10 * time.Second)
	return []renew.Result{answer}, nil
}

// An entry that is deleted and created is minted again while the answer to the first
// call is in flight. That answer is compared with the SVID held when it arrives.
func TestLateAnswerDoesNotReplaceABetterSVID(t *testing.T) {
	drill(t, 1, func(r *rig) { r.cfg.Minter = &overtaken{rig: r} }, func(r *rig) {
		changed := *mustItem(t, r.cache, "entry-0000").Entry
		changed.Revision++
		changed.X509TTL = time.Hour
		r.cache.Update([]*cache.Entry{&changed}, nil) // the answer is late
		synctest.Wait()
		r.taint()
		r.cache.Update(nil, []string{changed.ID})
		synctest.Wait()
		r.cache.Update([]*cache.Entry{&changed}, nil)
		r.sleepUntil(time.Now().Add(9 * time.Second))
		if r.cache.Held(r.next.id) != 1 {
			r.t.Fatal("not minted again")
		}
		for range 20 {
			r.sleepUntil(time.Now().Add(100 * time.Millisecond))
			if r.cache.Held(r.next.id) != 1 {
				r.t.Fatal("the late answer of a tainted authority replaced a trusted SVID")
			}
		}
	})
}

// An outage of hours is one warning about the agent SVID.
func TestAgentSVIDFailureIsLoggedOnce(t *testing.T) {
	own := &agentSVID{fails: errors.New("server is unreachable")}
	own.held.Store(&cache.SVID{NotAfter: time.Now(), RenewAt: time.Now()})
	var log strings.Builder
	drill(t, 0, func(r *rig) { r.cfg.AgentSVID, r.cfg.Log = own, slog.New(slog.NewTextHandler(&log, nil)) }, func(*rig) {
		time.Sleep(3 * time.Hour)
	})
	if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "unreachable") {
		t.Errorf("%d warnings in three hours, want one:\n%.500s", n, log.String())
	}
	if n := own.renewals.Load(); n < 100 {
		t.Errorf("%d tries in three hours", n)
	}
}

// Two failures that differ in a time or a port are of one kind; one of another kind is
// logged again.
func TestAgentSVIDFailureIsLoggedOncePerKind(t *testing.T) {
	own := &agentSVID{failsAt: func(try int64) error {
		if try > 50 {
			return errors.New("no space left on device")
		}
		return fmt.Errorf("read tcp 127.0.0.1:%d->127.0.0.1:8081: reset after %v at %s", 30000+try,
			time.Duration(try)*17*time.Second, time.Now().Format(time.RFC3339))
	}}
	own.held.Store(&cache.SVID{NotAfter: time.Now(), RenewAt: time.Now()})
	var log strings.Builder
	drill(t, 0, func(r *rig) { r.cfg.AgentSVID, r.cfg.Log = own, slog.New(slog.NewTextHandler(&log, nil)) }, func(*rig) {
		time.Sleep(3 * time.Hour)
	})
	if n := strings.Count(log.String(), "level=WARN"); n != 2 || !strings.Contains(log.String(), "reset") || !strings.Contains(log.String(), "no space") {
		t.Errorf("%d warnings in three hours, want one of each of two kinds:\n%.500s", n, log.String())
	}
}
