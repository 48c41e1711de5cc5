package agent_test

import (
	"crypto/x509"
	"net/url"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	svidpb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/internal/server/keyset"
)

const (
	svids = 120
	open  = 30
)

// inWorldWithStreams runs f in a world of svids entries with open streams on the first ones.
func inWorldWithStreams(t *testing.T, configure func(*world), f func(w *world, streams []*stream)) {
	inWorld(t, svids, configure, func(w *world) {
		w.waitHeld(svids)
		var streams []*stream
		for i := range open {
			s := w.open(i)
			defer s.close()
			streams = append(streams, s)
		}
		f(w, streams)
	})
}

// waveFinished waits for the end of the wave. It checks that every stream had valid
// SVIDs all the time, and the rate.
func waveFinished(w *world, old keyset.Keyset, since time.Time, limit time.Duration, streams []*stream) {
	w.t.Helper()
	w.until("settled", limit, func() bool { return settled(w.authority(old)) })
	w.checkRate(w.mintsSince(since))
	for _, s := range streams {
		s.checkUnbroken()
		if last, _ := s.last(); slices.Contains(last.authorities, old.X509AuthorityID) {
			w.t.Error("a stream still has an SVID of the tainted authority")
		}
	}
}

func TestDrillServerDownFromBeforeTheTaint(t *testing.T) {
	inWorldWithStreams(t, nil, func(w *world, streams []*stream) {
		old := w.activate()
		w.set(func(f *faults) { f.down = true })
		w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
		time.Sleep(10 * time.Minute)
		if err := w.fetchX509(svids - 1); err != nil {
			w.t.Errorf("a new caller during the outage: %v, want the SVID held", err)
		}
		back := time.Now()
		w.set(func(f *faults) { f.down = false })
		w.waveBegins(old)
		waveFinished(w, old, back, 3*time.Minute, streams)
	})
}

func TestDrillServerDownInMidWave(t *testing.T) {
	inWorldWithStreams(t, nil, func(w *world, streams []*stream) {
		old, begins := w.rotate()
		time.Sleep(time.Until(begins.Add(2 * time.Second)))
		w.set(func(f *faults) { f.down = true })
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		left := w.authority(old).Held
		if left < 60 || left > 100 {
			w.t.Errorf("%d SVIDs are left in mid-wave, want about 80 of %d", left, svids)
		}
		back := time.Now()
		// Answers take half a second: 20 a second need several at a time.
		w.set(func(f *faults) { f.down, f.latency = false, 500*time.Millisecond })
		waveFinished(w, old, begins, 3*time.Minute, streams)
		// At most 3.6 s until the agent reconnects, 5 s until the next probe and half a second
		// for its answer, then 20 a second, and the answer to the last one.
		if took, limit := time.Since(back), 10*time.Second+time.Duration(left)*50*time.Millisecond; took > limit {
			w.t.Errorf("%d SVIDs took %v after the server was back, want %v at most", left, took, limit)
		}
	})
}

func TestDrillSlowServer(t *testing.T) {
	inWorldWithStreams(t, nil, func(w *world, streams []*stream) {
		old := w.activate()
		w.set(func(f *faults) { f.latency = 30*time.Second - time.Millisecond })
		w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
		since := time.Now()
		w.until("taint seen", 3*time.Minute, func() bool { return w.authority(old).State.Tainted() })
		waveFinished(w, old, since, 30*time.Minute, streams)
	})
}

// forge returns a fault that replaces each certificate by a changed copy, signed by the
// active keyset.
func forge(w *world, change func(*x509.Certificate)) func(*faults) {
	by := w.record(w.server.Keysets().Active().ID)
	return func(f *faults) {
		f.garble = func(_ *svidpb.BatchNewX509SVIDRequest, res *svidpb.BatchNewX509SVIDResponse) *svidpb.BatchNewX509SVIDResponse {
			for _, r := range res.Results {
				if r.Svid != nil {
					leaf, err := x509.ParseCertificate(r.Svid.CertChain[0])
					w.check(err)
					r.Svid.CertChain[0] = signWith(by, leaf, change)
				}
			}
			return res
		}
	}
}

func TestDrillWrongAnswers(t *testing.T) {
	garble := func(change func(*svidpb.BatchNewX509SVIDResponse)) func(*world) func(*faults) {
		return func(*world) func(*faults) {
			return func(f *faults) {
				f.garble = func(_ *svidpb.BatchNewX509SVIDRequest, res *svidpb.BatchNewX509SVIDResponse) *svidpb.BatchNewX509SVIDResponse {
					change(res)
					return res
				}
			}
		}
	}
	spoil := func(change func(*x509.Certificate)) func(*world) func(*faults) {
		return func(w *world) func(*faults) { return forge(w, change) }
	}
	for name, fault := range map[string]func(*world) func(*faults){
		"broken DER": garble(func(r *svidpb.BatchNewX509SVIDResponse) {
			for _, x := range r.Results {
				x.Svid.CertChain[0] = x.Svid.CertChain[0][:40]
			}
		}),
		"missing items": garble(func(r *svidpb.BatchNewX509SVIDResponse) { r.Results = nil }),
		"empty items": garble(func(r *svidpb.BatchNewX509SVIDResponse) {
			for i := range r.Results {
				r.Results[i] = &svidpb.BatchNewX509SVIDResponse_Result{}
			}
		}),
		"wrong SPIFFE ID": spoil(func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/other"}}
		}),
		"key mismatch": func(w *world) func(*faults) {
			by, err := x509.ParseCertificate(w.record(w.server.Keysets().Active().ID).CA)
			w.check(err)
			return forge(w, func(c *x509.Certificate) { c.PublicKey = by.PublicKey })
		},
		"expired": spoil(func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		}),
		"not in the bundle": func(w *world) func(*faults) {
			unknown := w.unknown()
			return func(f *faults) { f.lag = unknown }
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorldWithStreams(t, nil, func(w *world, streams []*stream) {
				old, begins := w.rotate()
				time.Sleep(time.Until(begins.Add(2 * time.Second)))
				synctest.Wait()
				before := w.authority(old).Held
				w.set(fault(w))
				time.Sleep(3 * time.Minute)
				synctest.Wait()
				if after := w.authority(old).Held; after != before {
					w.t.Errorf("%d of %d SVIDs were replaced by wrong answers", before-after, before)
				}
				w.set(func(f *faults) { *f = faults{} })
				waveFinished(w, old, begins, 4*time.Minute, streams)
			})
		})
	}
}

// A server signs with an authority that its bundle lacks. The agent fetches the bundle
// hardly more often than usual, however many SVIDs are affected.
func TestDrillUnknownSigner(t *testing.T) {
	const svids = 100
	inWorld(t, svids, nil, func(w *world) {
		w.waitHeld(svids)
		unknown := w.unknown()
		w.set(func(f *faults) { f.lag = unknown })
		changed := entriesFor(svids)
		for i := range changed {
			changed[i].DNSNames = []string{"changed.example.org"}
		}
		w.setEntries(changed)
		time.Sleep(time.Minute)
		asked := func() int {
			synctest.Wait()
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.bundleCalls
		}
		before, from := asked(), time.Now()
		time.Sleep(2 * time.Minute)
		// 5 s ±10 % usually.
		if n := asked() - before; n > 30 {
			w.t.Errorf("%d bundle fetches in two minutes, want about 24", n)
		}
		if n := len(w.mintsSince(from)); n < svids {
			w.t.Errorf("%d mints in two minutes: the test does not reach the state", n)
		}
	})
}

// A replica that lags behind the taint signs with the old authority for five minutes.
func TestDrillLaggingServer(t *testing.T) {
	inWorldWithStreams(t, nil, func(w *world, streams []*stream) {
		lagging := w.record(w.server.Keysets().Active().ID)
		w.set(func(f *faults) { f.lag = lagging })
		old, begins := w.rotate()
		until := begins.Add(5 * time.Minute)
		for time.Now().Before(until) {
			time.Sleep(100 * time.Millisecond)
			if settled(w.authority(old)) {
				w.t.Fatal("settled while the server still signs with the tainted authority")
			}
		}
		attempts := map[string]int{}
		for _, m := range w.mintsSince(begins) {
			for _, id := range m.entries {
				attempts[id]++
			}
		}
		for id, n := range attempts {
			// Pauses of up to 2, 4, ... 60 s: about 12 in five minutes.
			if n > 40 {
				w.t.Errorf("%s was tried %d times in five minutes", id, n)
			}
		}
		w.set(func(f *faults) { f.lag = nil })
		waveFinished(w, old, begins, 4*time.Minute, streams)
	})
}

// SVIDs that depend on a removed authority are renewed at once, the most urgent first. The
// agent SVID must have been renewed before: a server accepts no client whose authority was
// removed.
func TestDrillRemovedInMidWave(t *testing.T) {
	const svids, open = 300, 250 // more with streams than the wave renews until the agent has the removal
	inWorld(t, svids, nil, func(w *world) {
		w.waitHeld(svids)
		var streams []*stream
		for i := range open {
			s := w.open(i)
			defer s.close()
			streams = append(streams, s)
		}
		old, begins := w.rotate()
		time.Sleep(time.Until(begins.Add(10 * time.Millisecond)))
		at := time.Now()
		w.check(w.server.Keysets().Remove(w.t.Context(), old.ID))
		w.until("removal seen", 10*time.Second, func() bool { return !w.authority(old).State.Tainted() })
		w.until("no SVID depends on the removed authority", time.Second, func() bool {
			a := w.authority(old)
			return a.Held+a.Pending+a.Streams == 0
		})
		// One call for those with streams, one for the others.
		var kinds []int
		for _, m := range w.mintsSince(at) {
			if len(m.entries) > 1 {
				kinds = append(kinds, idleKind(m.entries[0], open))
				if slices.ContainsFunc(m.entries, func(id string) bool { return idleKind(id, open) != kinds[len(kinds)-1] }) {
					w.t.Error("SVIDs with and without streams went in one call")
				}
			}
		}
		slices.Sort(kinds)
		if !slices.Equal(kinds, []int{0, 1}) {
			w.t.Errorf("the rest went in batches of kind %v, want one with streams and one without", kinds)
		}
		for _, s := range streams {
			s.checkUnbroken()
		}
	})
}

// idleKind returns 1 for an entry that is not one of the first n, which have streams.
func idleKind(id string, n int) int {
	if id < entryID(n) {
		return 0
	}
	return 1
}

// Until the first sync callers get Unavailable. The entries of a new node arrive within a
// second of when the server has them.
func TestDrillStart(t *testing.T) {
	inWorld(t, 0, func(w *world) { w.set(func(f *faults) { f.down = true }) }, func(w *world) {
		ask := func(when string) {
			w.t.Helper()
			if err := w.fetchX509(0); !isCode(err, codes.Unavailable) {
				w.t.Errorf("%s: %v, want Unavailable", when, err)
			}
		}
		ask("server down")
		time.Sleep(time.Minute)
		ask("server still down")
		w.set(func(f *faults) { f.down = false })
		w.until("attested", 10*time.Second, func() bool { return w.agent.Bundle() != nil })
		ask("server knows no entries of this node yet")
		time.Sleep(3 * time.Second)
		ask("server knows no entries of this node yet")
		w.setEntries(entriesFor(3))
		time.Sleep(time.Second)
		if err := w.fetchX509(0); err != nil {
			w.t.Errorf("a second after the server knew the entries: %v", err)
		}
		if err := w.fetchX509(99); !isCode(err, codes.PermissionDenied) {
			w.t.Errorf("a caller that no entry matches: %v, want PermissionDenied", err)
		}
	})
}
