package renew_test

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/renew"
	"github.com/renewd/renewd/renew/wave"
)

// rig is a running Renewer between a cache and a fake server, in a bubble.
type rig struct {
	t       *testing.T
	cache   *cache.Cache
	server  *fakeServer
	cfg     renew.Config
	renewer *renew.Renewer
	ca      *ca // signs first
	next    *ca // signs after rotate
	stop    func()
}

// drill runs f in a bubble in which n entries hold an SVID of rig.ca.
func drill(t *testing.T, n int, configure func(*rig), f func(*rig)) {
	synctest.Test(t, func(t *testing.T) {
		r := &rig{t: t, ca: newCA(t, "old"), next: newCA(t, "new")}
		r.cache = cache.New(cache.Config{Limit: n + 1})
		r.server = &fakeServer{signer: r.ca, life: 24 * time.Hour}
		r.cfg = renew.Config{Cache: r.cache, Minter: r.server, MaxDelay: time.Minute, Seed: [32]byte{7}}
		if configure != nil {
			configure(r)
		}
		r.cache.SetBundle(snapshot(t, trusted(r.ca, r.next)...))
		r.cache.Update(r.server.entries(n), nil)
		ctx, cancel := context.WithCancel(t.Context())
		r.renewer = renew.New(r.cfg)
		stopped := make(chan error, 1)
		go func() { stopped <- r.renewer.Run(ctx) }()
		r.stop = sync.OnceFunc(func() {
			cancel()
			if err := <-stopped; err != nil {
				t.Errorf("Run: %v", err)
			}
		})
		synctest.Wait()
		if r.server.signer == r.ca && r.server.down == nil && r.cache.Held(r.ca.id) != n && r.server.item == nil {
			t.Fatalf("%d of %d SVIDs after the first fill", r.cache.Held(r.ca.id), n)
		}
		time.Sleep(time.Second) // so that a time tells the first fill from the rest
		f(r)
		r.stop()
	})
}

// taint marks the old authority and lets the new one sign; it returns when
// the wave is to begin.
func (r *rig) taint() time.Time {
	r.server.set(func() { r.server.signer = r.next })
	return r.mark()
}

func (r *rig) mark() time.Time {
	now := time.Now()
	r.cache.SetBundle(snapshot(r.t, append(tainted(now, r.ca), trusted(r.next)...)...))
	return now.Add(wave.Delay(r.cfg.Seed, r.ca.id, r.cfg.MaxDelay))
}

func (r *rig) sleepUntil(at time.Time) {
	time.Sleep(time.Until(at))
	synctest.Wait()
}

func TestFirstFillsGoInBatches(t *testing.T) {
	drill(t, 1200, nil, func(r *rig) {
		calls := r.server.since(time.Time{})
		if len(calls) != 3 {
			t.Errorf("1200 first fills took %d calls, want 3 of at most 500", len(calls))
		}
	})
}

func TestWaveIsDelayedPacedAndOrdered(t *testing.T) {
	const n = 300
	drill(t, n, nil, func(r *rig) {
		streamed := []int{250, 17, 101}
		for _, i := range streamed {
			sub := r.cache.Subscribe(cache.Process{}, []cache.Selector{selector(i)})
			defer sub.Close()
		}
		start := time.Now()
		begin := r.taint()
		r.sleepUntil(begin.Add(-time.Nanosecond))
		if calls := r.server.since(start); len(calls) != 0 {
			t.Fatalf("%d renewals before the delay of %v was over", len(calls), begin.Sub(start))
		}
		r.sleepUntil(begin.Add(n*50*time.Millisecond + time.Second))
		if held := r.cache.Held(r.ca.id); held != 0 {
			t.Errorf("%d SVIDs still depend on the tainted authority after the wave", held)
		}
		calls := r.server.since(start)
		if len(calls) != n {
			t.Fatalf("%d calls for %d SVIDs: the wave must go one by one", len(calls), n)
		}
		r.paced(20, calls)
		for i := range calls {
			isStreamed := slices.ContainsFunc(streamed, func(s int) bool { return r.server.ids[calls[i].ids[0]].Path() == pathOf(s) })
			if isStreamed != (i < len(streamed)) {
				t.Errorf("renewal %d is %s: those with streams must come first", i, calls[i].ids[0])
			}
		}
	})
}

func pathOf(i int) string { return spiffeid.RequireFromPathf(td, "/workload/%d", i).Path() }

// A stream that opens in mid-wave moves its SVID to the front: the token is
// taken before the choice is made.
func TestStreamOpenedInMidWaveGoesNext(t *testing.T) {
	drill(t, 100, nil, func(r *rig) {
		begin := r.taint()
		r.sleepUntil(begin.Add(1010 * time.Millisecond))
		opened := time.Now()
		left := ""
		for _, id := range r.cache.SignedBy(r.ca.id) {
			left = max(left, id)
		}
		item, _ := r.cache.Item(left)
		sub := r.cache.Subscribe(cache.Process{}, item.Entry.Selectors)
		defer sub.Close()
		r.sleepUntil(opened.Add(60 * time.Millisecond))
		calls := r.server.since(opened)
		if len(calls) == 0 || calls[0].ids[0] != left {
			t.Fatalf("after the stream opened %v was renewed, want %s", calls, left)
		}
	})
}

func TestHalfLifeDoesNotWaitBehindTheWave(t *testing.T) {
	drill(t, 2000, nil, func(r *rig) {
		begin := r.taint()
		r.sleepUntil(begin.Add(time.Second))
		// An entry that changes in mid-wave and one that is new are minted at
		// once, on top of the rate.
		changed := *mustItem(t, r.cache, "entry-1999").Entry
		changed.Revision++
		changed.X509TTL = time.Hour
		fresh := changed
		fresh.ID = "fresh"
		r.server.set(func() { r.server.ids["fresh"] = fresh.SPIFFEID })
		at := time.Now()
		r.cache.Update([]*cache.Entry{&changed, &fresh}, nil)
		synctest.Wait()
		var got []string
		for _, c := range r.server.since(at) {
			got = append(got, c.ids...)
		}
		if !slices.Contains(got, "fresh") || !slices.Contains(got, "entry-1999") {
			t.Errorf("minted at once in mid-wave: %v, want fresh and entry-1999", got)
		}
	})
}

func mustItem(t *testing.T, c *cache.Cache, id string) cache.Item {
	t.Helper()
	item, ok := c.Item(id)
	if !ok {
		t.Fatalf("entry %s is not held", id)
	}
	return item
}

func TestHalfLivesAreSpreadAndBatched(t *testing.T) {
	drill(t, 400, nil, func(r *rig) {
		start := time.Now()
		time.Sleep(10 * time.Hour)
		synctest.Wait()
		if calls := r.server.since(start.Add(1)); len(calls) != 0 {
			t.Fatalf("%d renewals before any half-life", len(calls))
		}
		r.sleepUntil(start.Add(13*time.Hour + 13*time.Minute))
		total := 0
		for _, c := range r.server.since(start.Add(1)) {
			total += len(c.ids)
		}
		if total != 400 {
			t.Errorf("%d SVIDs renewed around their half-life, want each of 400 once", total)
		}
	})
}

func TestRemovalRenewsTheRestAtOnce(t *testing.T) {
	drill(t, 600, nil, func(r *rig) {
		sub := r.cache.Subscribe(cache.Process{}, []cache.Selector{selector(599)})
		defer sub.Close()
		r.server.set(func() { r.server.signer = r.next })
		at := time.Now()
		r.cache.SetBundle(snapshot(t, trusted(r.next)...))
		synctest.Wait()
		if held := r.cache.Held(r.ca.id); held != 0 {
			t.Errorf("%d SVIDs of the removed authority are left", held)
		}
		alone := 0
		for _, c := range r.server.since(at) {
			if slices.Equal(c.ids, []string{"entry-0599"}) {
				alone++
			}
		}
		if calls := r.server.since(at); len(calls) != 3 || alone != 1 {
			t.Errorf("%d calls, %d of them with the streamed SVID alone; want one, and two batches", len(calls), alone)
		}
	})
}

// A server that keeps signing with the tainted authority is asked with backoff, and
// its answers do not count as renewed.
func TestRenewalsBackOffWhileTheServerLags(t *testing.T) {
	drill(t, 10, nil, func(r *rig) {
		begin := r.mark() // the signer stays
		const lag = 5 * time.Minute
		r.sleepUntil(begin.Add(lag))
		attempts := 0
		for _, c := range r.server.since(begin) {
			attempts += len(c.ids)
		}
		// From 2 s doubling to 60 s with full jitter: about 14 tries in five
		// minutes each, never more than one a second.
		if attempts < 10*2 || attempts > 10*40 {
			t.Errorf("%d attempts for 10 SVIDs in %v", attempts, lag)
		}
		if held := r.cache.Held(r.ca.id); held != 10 {
			t.Errorf("%d SVIDs depend on the tainted authority, want 10", held)
		}
		r.server.set(func() { r.server.signer = r.next })
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if held := r.cache.Held(r.ca.id); held != 0 {
			t.Errorf("%d SVIDs still depend on the tainted authority", held)
		}
	})
}

// An SVID of a trusted authority is not replaced by one of a tainted authority.
func TestTaintedAnswerDoesNotReplaceATrustedSVID(t *testing.T) {
	drill(t, 1, nil, func(r *rig) {
		r.cache.SetBundle(snapshot(t, append(trusted(r.ca), tainted(time.Now(), r.next)...)...))
		r.server.set(func() { r.server.signer = r.next })
		time.Sleep(15 * time.Hour) // past half-life: renewals come back tainted
		synctest.Wait()
		if r.cache.Held(r.ca.id) != 1 {
			t.Error("the trusted SVID was replaced by a tainted one at half of its life")
		}
		time.Sleep(8 * time.Hour) // its last tenth: better a tainted SVID than none
		synctest.Wait()
		if r.cache.Held(r.next.id) != 1 {
			t.Error("the SVID expired although a tainted one was available")
		}
	})
}

func TestOutageClosesOneGate(t *testing.T) {
	drill(t, 200, nil, func(r *rig) {
		begin := r.taint()
		r.server.set(func() { r.server.down = errors.New("connection refused") })
		r.sleepUntil(begin.Add(10 * time.Minute))
		tries := len(r.server.since(begin))
		// With pauses uniform in [0, 5 s] ten minutes have about 240 tries.
		if tries > 400 {
			t.Errorf("%d tries in a ten-minute outage", tries)
		}
		probes := r.server.since(begin.Add(10 * time.Second))
		for i := 1; i < len(probes); i++ {
			if d := probes[i].at.Sub(probes[i-1].at); d < 100*time.Millisecond {
				t.Errorf("a probe came %v after the one before", d)
			}
		}
		if held := r.cache.Held(r.ca.id); held != 200 {
			t.Errorf("%d SVIDs held through the outage, want all 200", held)
		}
		back := time.Now()
		r.server.set(func() { r.server.down = nil })
		r.sleepUntil(back.Add(5*time.Second + 200*50*time.Millisecond + time.Second))
		if held := r.cache.Held(r.ca.id); held != 0 {
			t.Errorf("%d SVIDs left 16 s after the server came back", held)
		}
		r.paced(20, r.server.since(back))
	})
}

func TestWrongAnswersKeepTheSVIDHeld(t *testing.T) {
	unknown := func(t *testing.T) *ca { return newCA(t, "unknown") }
	for _, tt := range []struct {
		name   string
		answer func(t *testing.T, r *rig, public crypto.PublicKey) renew.Result
		says   string
	}{
		{"item error", func(*testing.T, *rig, crypto.PublicKey) renew.Result {
			return renew.Result{Err: errors.New("entry not found")}
		}, "entry not found"},
		{"no certificate", func(*testing.T, *rig, crypto.PublicKey) renew.Result { return renew.Result{} }, "without a certificate"},
		{"broken DER", func(*testing.T, *rig, crypto.PublicKey) renew.Result {
			return renew.Result{Chain: [][]byte{{0x30, 0x03, 1, 2, 3}}}
		}, "parse certificate"},
		{"wrong SPIFFE ID", func(t *testing.T, r *rig, public crypto.PublicKey) renew.Result {
			return r.sign(r.next, public, func(c *x509.Certificate) { c.URIs = []*url.URL{td.ID().URL()} })
		}, "instead of"},
		{"other key", func(t *testing.T, r *rig, _ crypto.PublicKey) renew.Result {
			return r.sign(r.next, r.next.key.Public(), nil)
		}, "another key"},
		{"expired", func(t *testing.T, r *rig, public crypto.PublicKey) renew.Result {
			return r.sign(r.next, public, func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
			})
		}, "expired"},
		{"CA certificate", func(t *testing.T, r *rig, public crypto.PublicKey) renew.Result {
			return r.sign(r.next, public, func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true })
		}, "CA"},
		{"unknown authority", func(t *testing.T, r *rig, public crypto.PublicKey) renew.Result {
			return r.sign(unknown(t), public, nil)
		}, "not in the trust bundle"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var log strings.Builder
			drill(t, 1, func(r *rig) { r.cfg.Log = logTo(&log) }, func(r *rig) {
				before := mustItem(t, r.cache, "entry-0000").SVID
				r.server.set(func() {
					r.server.item = func(_ string, public crypto.PublicKey) (renew.Result, bool) {
						return tt.answer(t, r, public), true
					}
				})
				begin := r.taint()
				r.sleepUntil(begin.Add(time.Minute))
				if after := mustItem(t, r.cache, "entry-0000").SVID; after != before {
					t.Error("a wrong answer replaced the SVID held")
				}
				if got := len(r.server.since(begin)); got < 2 || got > 30 {
					t.Errorf("%d attempts in a minute, want a few with backoff", got)
				}
				text := log.String()
				r.renewer.States() // whose lock orders the read before what is logged later
				if !strings.Contains(text, tt.says) {
					t.Errorf("log does not have %q:\n%s", tt.says, text)
				}
				r.server.set(func() { r.server.item = nil })
				time.Sleep(2 * time.Minute)
				synctest.Wait()
				if r.cache.Held(r.next.id) != 1 {
					t.Error("not renewed after the server recovered")
				}
			})
		})
	}
}

func (r *rig) sign(by *ca, public crypto.PublicKey, mutate func(*x509.Certificate)) renew.Result {
	der, err := by.leaf(r.server.ids["entry-0000"], public, time.Hour, mutate)
	return renew.Result{Chain: [][]byte{der}, Err: err}
}

// One bad item in a batch does not affect the others, and a stream with other
// identities does not wait for it.
func TestItemErrorsAreHandledPerItem(t *testing.T) {
	drill(t, 5, func(r *rig) {
		r.server.item = func(id string, _ crypto.PublicKey) (renew.Result, bool) {
			return renew.Result{Err: errors.New("no such entry")}, id == "entry-0003"
		}
	}, func(r *rig) {
		if held := r.cache.Held(r.ca.id); held != 4 {
			t.Errorf("%d SVIDs held, want 4", held)
		}
		var all []cache.Selector
		for i := range 5 {
			all = append(all, selector(i))
		}
		v := r.cache.Match(all)
		if v.Matched != 5 || v.Waiting != 0 || len(v.Identities) != 4 {
			t.Errorf("view has %d matched, %d waiting, %d identities; want 5, 0, 4", v.Matched, v.Waiting, len(v.Identities))
		}
	})
}

func TestEveryKeyType(t *testing.T) {
	for _, kt := range renew.KeyTypes {
		drill(t, 2, func(r *rig) { r.cfg.KeyType = kt }, func(r *rig) {
			s := mustItem(t, r.cache, "entry-0000").SVID
			key, err := x509.ParsePKCS8PrivateKey(s.Key)
			if err != nil {
				t.Fatalf("%s: %v", kt, err)
			}
			cert, err := x509.ParseCertificate(s.Leaf)
			if err != nil {
				t.Fatal(err)
			}
			if !key.(crypto.Signer).Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(cert.PublicKey) {
				t.Errorf("%s: key and certificate do not match", kt)
			}
		})
	}
	if _, err := renew.KeyType("dsa").Generate(); err == nil {
		t.Error("an unknown key type must be an error")
	}
}
