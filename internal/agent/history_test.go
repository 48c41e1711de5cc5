package agent_test

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// Neither the agent nor the server reports a tainted authority as safe to remove while
// an SVID in use chains to it: in random histories of keyset operations, outages,
// lagging replicas, streams and entry changes. The test reads the SVIDs of the
// workloads and of the cache, not the figures under test.
//
// RENEWD_SEED replays one history; RENEWD_HISTORIES sets how many there are.
func TestSafeToRemoveIsNeverReportedTooEarly(t *testing.T) {
	histories := 12
	if n, err := strconv.Atoi(os.Getenv("RENEWD_HISTORIES")); err == nil {
		histories = n
	}
	if seed, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		history(t, seed, &tally{})
		return
	}
	base := rand.Uint64()
	var sum tally
	t.Run("histories", func(t *testing.T) {
		for i := range histories {
			history(t, base+uint64(i), &sum)
		}
	})
	// The histories must reach the state under test.
	if safe, cleared := sum.safe.Load(), sum.cleared.Load(); histories >= 12 && (safe == 0 || cleared == 0) {
		t.Errorf("safe to remove: %d times for the agent, %d keysets for the server; want some", safe, cleared)
	}
}

// entries is the number of entries in a history.
const entries = 40

// tally counts how often the agent reported an authority as safe, and how many keysets
// the server did.
type tally struct{ safe, cleared atomic.Int64 }

// history runs one history in a subtest.
func history(t *testing.T, seed uint64, sum *tally) {
	t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
		const steps = 60
		inWorld(t, entries, func(w *world) {
			w.cfg.TaintDelay, w.cfg.EntryRemovalDelay, w.unchecked = 20*time.Second, time.Second, true
			// The ledger does not know of a replica that signs with a tainted authority,
			// so half of the histories have no replica; in those the agent reports often.
			if w.lags = seed%2 == 0; !w.lags {
				w.cfg.RefreshInterval = 200 * time.Millisecond
			}
		}, func(w *world) {
			w.waitHeld(entries)
			w.cleared, w.signers = map[string]bool{}, map[string]string{}
			defer func() { sum.cleared.Add(int64(len(w.cleared))) }()
			r := rand.New(rand.NewPCG(seed, 0))
			streams := map[int]*stream{}
			defer func() {
				for _, s := range streams {
					s.close()
				}
			}()
			known := map[string]keyset.Keyset{w.server.Keysets().Active().ID: w.server.Keysets().Active()}
			for range steps {
				switch r.IntN(9) {
				case 0: // rotate one step further than operators should at once
					next, err := w.server.Keysets().Prepare(w.t.Context())
					w.check(err)
					known[next.ID] = next
					time.Sleep(time.Duration(r.IntN(8)) * time.Second)
					w.check(w.server.Keysets().Activate(w.t.Context(), next.ID))
				case 1:
					w.mutate(r, known, keyset.Prepared, w.server.Keysets().Taint)
				case 2: // remove what is safe, as an operator does
					w.mutate(r, safeOnly(w, known), keyset.Tainted, w.server.Keysets().Remove)
				case 3:
					down := r.IntN(2) == 0
					w.set(func(f *faults) { f.down = down })
				case 4:
					latency := time.Duration(r.IntN(3)) * time.Second
					w.set(func(f *faults) { f.latency = latency })
				case 5:
					if !w.lags {
						break
					}
					var lag *keyset.Record
					if doc, err := w.storage.Load(w.t.Context()); err == nil && r.IntN(2) == 0 {
						lag = &doc.Records[r.IntN(len(doc.Records))]
					}
					w.set(func(f *faults) { f.lag = lag })
				case 6:
					i := r.IntN(entries)
					if s := streams[i]; s != nil {
						s.close()
						delete(streams, i)
					} else {
						// Several identities, so that pushes are delayed and a
						// stream is often behind the cache.
						streams[i] = w.open(i, (i+1)%entries, (i+2)%entries, (i+3)%entries)
					}
				case 7:
					present := entriesFor(entries)
					for i := range present {
						if r.IntN(20) == 0 {
							present[i].Hint = fmt.Sprint(r.IntN(100))
						}
					}
					if r.IntN(2) == 0 {
						present = append([]spireapi.Entry(nil), present[r.IntN(5):]...)
					}
					w.setEntries(present)
				case 8: // time passes
				}
				for range 1 + r.IntN(30) {
					pause := time.Duration(r.IntN(800)) * time.Millisecond
					if r.IntN(2) == 0 {
						pause /= 20
					}
					time.Sleep(pause)
					synctest.Wait()
					sum.safe.Add(int64(w.checkSafe(known, streams)))
				}
			}
		})
	})
}

// All SVIDs held are renewed a moment before the streams get them, because pushes are
// delayed: in that moment the authority is not safe to remove.
func TestSafeWaitsForStreams(t *testing.T) {
	const n = 8
	inWorld(t, n, func(w *world) { w.cfg.TaintDelay, w.cfg.RefreshInterval = time.Second, 20*time.Millisecond }, func(w *world) {
		w.waitHeld(n)
		s := w.open(0, 1, 2, 3, 4, 5, 6, 7)
		defer s.close()
		old, _ := w.rotate()
		behind := 0
		w.until("settled", time.Minute, func() bool {
			for range 20 {
				synctest.Wait()
				a := w.authority(old)
				last, _ := s.last()
				hangs := slices.Contains(last.authorities, old.X509AuthorityID)
				if hangs && settled(a) {
					w.t.Fatalf("settled while a stream still has an SVID of it: %+v", a)
				}
				if hangs && w.ledger.X509(old.X509AuthorityID, a.State.Tainted()).Clear {
					w.t.Fatalf("the server calls it safe while a stream still has an SVID of it: %+v", a)
				}
				if hangs && a.Held == 0 {
					behind++
				}
				time.Sleep(5 * time.Millisecond)
			}
			return settled(w.authority(old))
		})
		if behind == 0 {
			w.t.Error("the stream was never behind the cache: the test does not reach the state")
		}
	})
}

// An SVID requested before the taint may be signed by the tainted authority. Until it has
// arrived the authority is not safe to remove.
func TestSafeWaitsForAnswersInFlight(t *testing.T) {
	inWorld(t, 1, func(w *world) { w.cfg.TaintDelay = 1000 * time.Hour }, func(w *world) {
		w.waitHeld(1)
		old := w.activate()
		w.setEntries(nil)
		w.until("nothing held", 4*time.Minute, func() bool { return w.held() == 0 })
		lagging := w.record(old.ID)
		w.set(func(f *faults) { f.lag, f.signing = lagging, 20*time.Second })
		asked := time.Now()
		w.setEntries(entriesFor(1))
		w.until("SVID asked for", 10*time.Second, func() bool { return len(w.mintsSince(asked)) > 0 })
		w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
		w.waveBegins(old)
		if a := w.authority(old); a.Held != 0 || a.Pending != 2 {
			w.t.Errorf("with an answer in flight: %+v, want the agent SVID and the answer pending", a)
		}
		w.until("answer arrived", 30*time.Second, func() bool { return w.authority(old).Held == 1 })
	})
}

// mutate applies op to a random keyset in the given state.
func (w *world) mutate(r *rand.Rand, known map[string]keyset.Keyset, state keyset.State, op func(context.Context, string, ...keyset.Check) error) {
	w.t.Helper()
	list, err := w.server.Keysets().List(w.t.Context())
	w.check(err)
	var fit []keyset.Keyset
	for _, k := range list {
		if _, ok := known[k.ID]; ok && k.State == state {
			fit = append(fit, k)
		}
	}
	if len(fit) > 0 {
		w.check(op(w.t.Context(), fit[r.IntN(len(fit))].ID))
	}
}

func safeOnly(w *world, known map[string]keyset.Keyset) map[string]keyset.Keyset {
	out := map[string]keyset.Keyset{}
	for id, k := range known {
		if settled(w.authority(k)) {
			out[id] = k
		}
	}
	return out
}

// checkSafe fails the test if an authority that is reported as safe is in use. It returns
// how many the agent reports.
func (w *world) checkSafe(known map[string]keyset.Keyset, streams map[int]*stream) (safe int) {
	w.t.Helper()
	truth := map[string]string{}
	for i, s := range streams {
		s.mu.Lock()
		if n := len(s.updates); n > 0 && s.end == nil {
			for _, a := range s.updates[n-1].authorities {
				truth[a] = fmt.Sprintf("the stream of workload %d", i)
			}
		}
		s.mu.Unlock()
	}
	for i := range entries {
		view := w.agent.Cache().Match([]cache.Selector{{Type: "test", Value: fmt.Sprint(i)}})
		for _, id := range view.Identities {
			truth[w.signer(id.SVID.Leaf)] = "the cache for " + id.Entry.ID
		}
	}
	for _, k := range w.server.Keysets().Status().Keysets {
		if w.lags || k.State != keyset.Tainted || !w.ledger.X509(k.X509AuthorityID, true).Clear {
			continue
		}
		w.cleared[k.ID] = true
		if who, hangs := truth[k.X509AuthorityID]; hangs {
			w.t.Fatalf("the server calls keyset %s safe to remove, but %s still has an SVID of it: %+v", k.ID, who, w.authority(k))
		}
	}
	for _, k := range known {
		a := w.authority(k)
		if !settled(a) {
			continue
		}
		safe++
		if who, hangs := truth[k.X509AuthorityID]; hangs {
			w.t.Fatalf("keyset %s is settled, but %s still has an SVID of it: %+v", k.ID, who, a)
		}
	}
	return safe
}

// signer returns the authority that signed a certificate. It caches the answers.
func (w *world) signer(der []byte) string {
	id, known := w.signers[string(der)]
	if !known {
		cert, err := x509.ParseCertificate(der)
		w.check(err)
		id = hex.EncodeToString(cert.AuthorityKeyId)
		w.signers[string(der)] = id
	}
	return id
}
