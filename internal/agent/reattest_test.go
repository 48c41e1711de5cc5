package agent_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/renewd/renewd/internal/agent"
	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// testNode attests the node by its name, as often as it likes.
type testNode struct{ w *world }

func (testNode) Type() string { return "test" }

func (n testNode) Credential(context.Context) (*node.Credential, error) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	if n.w.noCredential {
		return nil, errors.New("read token_path: no such file")
	}
	return &node.Credential{Payload: []byte("node-1"), Respond: func(c []byte) ([]byte, error) { return c, nil }}, nil
}

// nodeVerifier is the server's side of testNode. It records the attestation among the
// mints, as a renewal of the agent SVID.
type nodeVerifier struct{ w *world }

func (w *world) verifiers() []spireapi.NodeVerifier { return []spireapi.NodeVerifier{nodeVerifier{w}} }

func (nodeVerifier) Type() string { return "test" }

func (v nodeVerifier) Verify(_ context.Context, payload []byte, challenge func([]byte) ([]byte, error)) (spireapi.AttestedNode, error) {
	if _, err := challenge([]byte("nonce")); err != nil {
		return spireapi.AttestedNode{}, err
	}
	v.w.mu.Lock()
	defer v.w.mu.Unlock()
	v.w.mints = append(v.w.mints, mint{at: time.Now()})
	return spireapi.AttestedNode{ID: spiffeid.RequireFromPathf(td, "/spire/agent/test/%s", payload)}, nil
}

// reattestable configures a node that attests again instead of renewing.
func reattestable(w *world) { w.cfg.JoinToken, w.cfg.Attestor = "", testNode{w} }

// attestationsSince returns when the node was attested or its SVID renewed.
func (w *world) attestationsSince(t time.Time) (out []time.Time) {
	for _, m := range w.mintsSince(t) {
		if m.entries == nil {
			out = append(out, m.at)
		}
	}
	return out
}

func (w *world) setCredential(there bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noCredential = !there
}

// A node that attests instead of renewing does so at about half of the agent SVID's life,
// and its workloads notice nothing.
func TestDrillReattestationAtHalfLife(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		reattestable(w)
		w.cfg.RefreshInterval = 10 * time.Minute // rare polls: the test runs for days
	}, func(w *world) {
		w.waitHeld(3)
		s := w.open(1)
		defer s.close()
		began := time.Now()
		life := w.agent.State().OwnExpiry.Sub(began)
		for time.Since(began) < 3*life {
			time.Sleep(10 * time.Minute)
			if left := time.Until(w.agent.State().OwnExpiry); left < life/3 {
				w.t.Fatalf("%v left of the agent SVID's %v", left, life)
			}
			if err := w.fetchX509(2); err != nil {
				w.t.Fatal(err)
			}
		}
		if n := len(w.attestationsSince(began)); n < 5 || n > 8 {
			w.t.Errorf("%d attestations in three lives of the agent SVID", n)
		}
		if id := w.agent.State().OwnID; id != "spiffe://example.org/spire/agent/test/node-1" {
			w.t.Errorf("the node is %s", id)
		}
		s.checkUnbroken()
	})
}

// At a taint the re-attestation is the first of the wave.
func TestDrillReattestationAtTaint(t *testing.T) {
	const entries = 100
	inWorld(t, entries, reattestable, func(w *world) {
		w.waitHeld(entries)
		s := w.open(7)
		defer s.close()
		old, begins := w.rotate()
		w.until("the taint wave is over", 3*time.Minute, func() bool { return settled(w.authority(old)) })
		wave := w.mintsSince(begins.Add(-time.Second))
		if len(wave) == 0 || wave[0].entries != nil || wave[0].at.Before(begins) {
			w.t.Errorf("first of the wave that begins at %v: %+v", begins, wave[:min(len(wave), 3)])
		}
		if n := len(w.attestationsSince(begins)); n != 1 {
			w.t.Errorf("%d attestations in the wave", n)
		}
		w.checkRate(wave)
		s.checkUnbroken()
		if !w.ledger.X509(old.X509AuthorityID, true).Clear {
			w.until("safe to remove", time.Minute, func() bool { return w.ledger.X509(old.X509AuthorityID, true).Clear })
		}
	})
}

// The re-attestation fails for a while: the node keeps the agent SVID held, with which new
// SVIDs are minted, and it is replaced before it ends. When it has ended nevertheless, the
// node comes back by itself.
func TestDrillReattestationThatFails(t *testing.T) {
	for name, tt := range map[string]struct {
		fails, works func(*world)
		minting      bool // in the meantime
	}{
		"token file missing": {func(w *world) { w.setCredential(false) }, func(w *world) { w.setCredential(true) }, true},
		"server down": {
			func(w *world) { w.set(func(f *faults) { f.down = true }) }, func(w *world) { w.set(func(f *faults) { f.down = false }) }, false,
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, 1, func(w *world) {
				reattestable(w)
				w.cfg.RefreshInterval = 10 * time.Minute
			}, func(w *world) {
				w.setEntries([]spireapi.Entry{{
					ID: entryID(0), SPIFFEID: entryFor(0).SPIFFEID, Selectors: entryFor(0).Selectors, X509TTL: 7 * 24 * time.Hour,
				}})
				w.waitHeld(1)
				s := w.open(0)
				defer s.close()
				expiry := w.agent.State().OwnExpiry
				life := time.Until(expiry)
				tt.fails(w)
				time.Sleep(life * 9 / 10)
				if now := w.agent.State().OwnExpiry; !now.Equal(expiry) {
					w.t.Fatalf("the agent SVID held is that until %v, not until %v", now, expiry)
				}
				if tt.minting {
					w.setEntries(append(entriesFor(2)[1:], entryFor(0)))
					w.until("a new entry's SVID", 15*time.Minute, func() bool { return w.fetchX509(1) == nil })
				}
				tt.works(w)
				w.until("re-attested", 20*time.Minute, func() bool { return w.agent.State().OwnExpiry.After(expiry) })
				if !time.Now().Before(expiry) {
					w.t.Error("the agent SVID had ended")
				}

				expiry = w.agent.State().OwnExpiry
				tt.fails(w)
				time.Sleep(time.Until(expiry) + 5*time.Minute)
				if err := w.fetchX509(0); err != nil {
					w.t.Errorf("without an agent SVID: %v", err)
				}
				tt.works(w)
				w.until("attested again", 15*time.Minute, func() bool { return w.agent.State().OwnExpiry.After(expiry) })
				s.checkUnbroken()
			})
		})
	}
}

// A node was off for a month, in which all keys were replaced. With a current source of
// trust and a rebootstrap it comes back by itself, and without one it says what to do.
func TestDrillNodeThatWasOffForAMonth(t *testing.T) {
	for name, tt := range map[string]struct {
		mode  agent.Rebootstrap
		stale bool // the source has the old bundle
		back  bool
	}{
		"never":  {agent.RebootstrapNever, false, false},
		"auto":   {agent.RebootstrapAuto, false, true},
		"always": {agent.RebootstrapAlways, false, true},
		"stale":  {agent.RebootstrapAuto, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			var log strings.Builder
			inWorld(t, 2, func(w *world) {
				reattestable(w)
				w.cfg.TrustBundle, w.cfg.TrustSource, w.cfg.Rebootstrap = nil, &source{bundle: w.trust()}, tt.mode
			}, func(w *world) {
				w.unchecked = true
				w.waitHeld(2)
				time.Sleep(time.Minute)
				w.stopAgent()
				for range 2 {
					old := w.activate()
					w.check(w.server.Keysets().Taint(w.t.Context(), old.ID))
					w.check(w.server.Keysets().Remove(w.t.Context(), old.ID))
					time.Sleep(15 * 24 * time.Hour)
				}
				src := &source{bundle: w.cfg.TrustSource.(*source).bundle}
				if !tt.stale {
					src.bundle = w.trust()
				}
				w.cfg.TrustSource, w.cfg.Log = src, syncedLog(&log)
				w.startAgent()
				began := time.Now()
				if tt.back {
					w.until("all SVIDs held again", 20*time.Minute, func() bool { return w.renewedBy(2) })
					if took := time.Since(began); took < 10*time.Minute {
						w.t.Errorf("back after %v, before the delay was over", took)
					}
				} else {
					time.Sleep(30 * time.Minute)
					if err := w.fetchX509(0); !isCode(err, codes.Unavailable) {
						w.t.Errorf("got %v, want Unavailable", err)
					}
				}
				asked := src.requests()
				switch n := len(asked); {
				case tt.mode == agent.RebootstrapNever && n > 0:
					w.t.Errorf("the source was asked %d times", n)
				case tt.back && (n < 1 || n > 5 || !asked[0].Rebootstrap || asked[0].Attempt != 1):
					w.t.Errorf("the source was asked %+v", asked)
				case tt.stale && (n < 10 || n > 60):
					w.t.Errorf("the source was asked %d times in twenty minutes", n)
				}
				w.stopAgent()
				text := log.String()
				for line, want := range map[string]bool{
					"server not verified by the bundle in force: ":                        tt.mode == agent.RebootstrapNever,
					"asking the source of the trust bundle after the delay\" delay=10m0s": tt.mode != agent.RebootstrapNever,
					"server verified with the trust bundle of its source":                 tt.back,
				} {
					if n := strings.Count(text, line); n > 0 != want || want && tt.back && n > 2 {
						w.t.Errorf("%q is logged %d times", line, n)
					}
				}
				// The bundle that has verified the server is stored.
				if tt.back {
					w.startAgent()
					w.until("all SVIDs held after a restart", time.Minute, func() bool { return w.renewedBy(2) })
				}
			})
		})
	}
}

// A server that cannot be verified for less than the delay, such as one that answers in
// place of the real one, does not make the agent ask for another bundle.
func TestRebootstrapWaitsForTheDelay(t *testing.T) {
	inWorld(t, 1, func(w *world) {
		reattestable(w)
		w.cfg.TrustBundle, w.cfg.TrustSource, w.cfg.Rebootstrap = nil, &source{bundle: w.trust()}, agent.RebootstrapAuto
	}, func(w *world) {
		w.unchecked = true
		w.waitHeld(1)
		src, real, served := w.cfg.TrustSource.(*source), w.server, w.agent.Bundle().Own
		w.newServer(nil, 1)
		impostor := w.server
		src.set(w.trust())
		for range 6 {
			time.Sleep(9 * time.Minute)
			w.stopServer()
			w.server = real
			w.startServer()
			time.Sleep(time.Minute)
			w.stopServer()
			w.server = impostor
			w.startServer()
		}
		if n := len(src.requests()); n != 1 || w.agent.Bundle().Own != served {
			w.t.Errorf("the source was asked %d times, want once at the start", n)
		}
		// It stays.
		w.until("all is signed by the new server", 15*time.Minute, func() bool { return w.renewedBy(1) })
	})
}

// At the first start the source is asked until it answers, and again at once while its
// answer does not verify the server.
func TestFirstBundleFromASource(t *testing.T) {
	inWorld(t, 1, func(w *world) {
		reattestable(w)
		src := &source{err: errors.New("no answer")}
		w.cfg.TrustBundle, w.cfg.TrustSource = nil, src
		other, trust := otherTrust(w), w.trust()
		time.AfterFunc(10*time.Minute, func() { src.set(other) })
		time.AfterFunc(20*time.Minute, func() { src.set(trust) })
	}, func(w *world) {
		time.Sleep(9 * time.Minute)
		src := w.cfg.TrustSource.(*source)
		failed := src.requests()
		for i, r := range failed {
			if r.Attempt != i+1 || r.Rebootstrap || !r.Since.Equal(failed[0].Since) {
				w.t.Errorf("request %d is %+v", i, r)
			}
		}
		if n := len(failed); n < 5 || n > 30 {
			w.t.Errorf("the source was asked %d times in 9 minutes", n)
		}
		if n := len(w.attestationsSince(time.Time{})); n > 0 {
			w.t.Errorf("%d attestations without a bundle", n)
		}
		w.until("all SVIDs held", 15*time.Minute, func() bool { return w.held() == 1 })
		if r := src.requests(); r[len(r)-1].Rebootstrap {
			w.t.Errorf("the last request is %+v", r[len(r)-1])
		}
		// The source is no longer asked.
		n := len(src.requests())
		time.Sleep(time.Hour)
		w.stopAgent()
		w.startAgent()
		time.Sleep(time.Hour)
		if now := len(src.requests()); now != n {
			w.t.Errorf("the source was asked %d times more", now-n)
		}
	})
}

// With a join token the node could not attest again: auto leaves the bundle in force, and
// always ends the agent.
func TestRebootstrapOfANodeThatCannotAttestAgain(t *testing.T) {
	inWorld(t, 1, func(w *world) {
		w.cfg.TrustBundle, w.cfg.TrustSource, w.cfg.Rebootstrap = nil, &source{bundle: w.trust()}, agent.RebootstrapAuto
	}, func(w *world) {
		var log strings.Builder
		w.unchecked = true
		w.waitHeld(1)
		w.stopAgent()
		w.cfg.Log = syncedLog(&log)
		w.startAgent()
		time.Sleep(time.Minute)
		before := w.agent.Bundle().Own
		w.newServer(nil, 1)
		src := w.cfg.TrustSource.(*source)
		src.set(w.trust())
		n := len(src.requests())
		time.Sleep(time.Hour)
		if len(src.requests()) != n || w.agent.Bundle().Own != before {
			w.t.Error("the agent has asked for a bundle that it cannot attest with")
		}
		w.stopAgent()
		if !strings.Contains(log.String(), "rebootstrap not possible, the server does not let this node attest again") {
			w.t.Errorf("no line says why: %s", log.String())
		}
		w.cfg.Rebootstrap = agent.RebootstrapAlways
		if _, err := agent.New(w.cfg); err == nil || !strings.Contains(err.Error(), "rebootstrap is always") {
			w.t.Errorf("got %v", err)
		}
		w.check(os.RemoveAll(w.cfg.DataDir))
		token, err := w.server.CreateJoinToken(w.t.Context(), time.Hour, "")
		w.check(err)
		w.cfg.JoinToken = token.Value
		w.cfg.Listener = newPairListener()
		a, err := agent.New(w.cfg)
		w.check(err)
		if err := a.Run(w.t.Context()); err == nil || !strings.Contains(err.Error(), "rebootstrap is always") {
			w.t.Errorf("got %v", err)
		}
	})
}
