package agent_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

// withTrustFile runs f in a world whose agent reads its bundle and join token from files.
func withTrustFile(t *testing.T, n int, f func(*world)) {
	dir := t.TempDir()
	inWorld(t, n, func(w *world) {
		w.cfg.TrustBundle, w.cfg.TrustBundleFile = nil, filepath.Join(dir, "bundle.pem")
		w.cfg.JoinTokenFile = filepath.Join(dir, "token")
		w.check(os.WriteFile(w.cfg.JoinTokenFile, []byte(w.cfg.JoinToken), 0o600))
		w.cfg.JoinToken = ""
		w.writeTrust(w.server.BundlePEM())
	}, f)
}

// writeTrust replaces the operator's file as configuration management does.
func (w *world) writeTrust(pems ...[]byte) {
	temp := w.cfg.TrustBundleFile + ".new"
	w.check(os.WriteFile(temp, slices.Concat(pems...), 0o600))
	w.check(os.Rename(temp, w.cfg.TrustBundleFile))
}

func (w *world) writeToken() {
	token, err := w.server.CreateJoinToken(w.t.Context(), time.Hour, "")
	w.check(err)
	w.check(os.WriteFile(w.cfg.JoinTokenFile, []byte(token.Value), 0o600))
}

// newServer replaces the server by one with the same entries and new keysets, or those of
// keys.
func (w *world) newServer(keys *keyset.Deployment, n int) {
	w.stopServer()
	if keys == nil {
		w.storage = new(memory.Keysets)
		var err error
		keys, err = keyset.Open(w.t.Context(), keyset.Config{TrustDomain: td, Storage: w.storage})
		w.check(err)
	}
	var err error
	w.ledger, err = ledger.Open(w.t.Context(), ledger.Config{Storage: memory.Ledger{}})
	w.check(err)
	w.server, err = spireapi.New(spireapi.Config{
		TrustDomain: td, Keysets: keys, Storage: memory.NewServer(), Ledger: w.ledger, NodeVerifiers: w.verifiers(), Options: []grpc.ServerOption{grpc.ChainUnaryInterceptor(w.intercept), grpc.ChainStreamInterceptor(w.delayStream)},
	})
	w.check(err)
	w.setEntries(entriesFor(n))
	w.startServer()
}

// stolenKeys returns a copy of the keysets that the server has now.
func (w *world) stolenKeys() *keyset.Deployment {
	doc, err := w.storage.Load(w.t.Context())
	w.check(err)
	var copied memory.Keysets
	doc.Version = 1
	w.check(copied.Save(w.t.Context(), doc, keyset.Change{}))
	keys, err := keyset.Open(w.t.Context(), keyset.Config{TrustDomain: td, Storage: &copied})
	w.check(err)
	return keys
}

// renewedBy reports whether the active keyset has signed all n SVIDs held.
func (w *world) renewedBy(n int) bool { return w.authority(w.server.Keysets().Active()).Held == n }

// A server has lost all its keys and has new ones. The operator writes its bundle into
// trust_bundle_file: the agent, running or restarted, trusts the file because the bundle in
// force does not verify the server. Until the server has answered, workloads keep the
// bundle from before.
func TestDrillTrustBundleFileAfterTheLossOfAllKeys(t *testing.T) {
	const running = -1
	for name, stopped := range map[string]time.Duration{"running": running, "stopped": 0, "stopped until the agent SVID has ended": 30 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			withTrustFile(t, 3, func(w *world) {
				var log strings.Builder
				w.unchecked = true
				w.waitHeld(3)
				w.stopAgent()
				w.cfg.Log = syncedLog(&log)
				w.startAgent()
				time.Sleep(time.Minute)
				before := w.agent.Bundle().Own
				w.newServer(nil, 3)
				time.Sleep(10 * time.Minute)
				if now := w.agent.Bundle().Own; now != before {
					t.Fatalf("with the old file the bundle is %v", now.X509())
				}
				if stopped != running {
					w.stopAgent()
					time.Sleep(stopped)
				}
				w.writeToken()
				w.writeTrust(w.server.BundlePEM())
				if stopped != running {
					w.startAgent()
				}
				w.until("all is signed by the new server", 3*time.Minute, func() bool { return w.renewedBy(3) })
				w.stopAgent()
				if n := strings.Count(log.String(), "server verified with the changed trust_bundle_file"); n != 1 {
					t.Errorf("the use of the file is logged %d times", n)
				}

				// These keys are rotated, too. The file's authorities have been adopted, so
				// a removed one does not return.
				w.startAgent()
				adopted := w.server.Keysets()
				impostor := w.stolenKeys()
				old := w.activate()
				w.check(adopted.Taint(w.t.Context(), old.ID))
				w.until("the taint wave is over", 3*time.Minute, func() bool { return settled(w.authority(old)) })
				w.check(adopted.Remove(w.t.Context(), old.ID))
				w.until("the removal is seen", time.Minute, func() bool { return len(w.agent.Bundle().Own.X509()) == 1 })
				in := w.agent.Bundle().Own
				w.newServer(impostor, 3)
				for range 2 {
					time.Sleep(2 * time.Minute)
					if now := w.agent.Bundle().Own; now.Sequence() != in.Sequence() {
						t.Errorf("a server with a removed key is trusted: bundle %d instead of %d", now.Sequence(), in.Sequence())
					}
					w.stopAgent()
					w.startAgent()
				}
			})
		})
	}
}

// After a taint at its root a nested SPIRE server publishes a JWT key twice. An agent below
// it still renews SVIDs after a later taint.
func TestDrillTaintBesideAKeyPublishedTwice(t *testing.T) {
	inWorld(t, 20, nil, func(w *world) {
		w.waitHeld(20)
		s := w.open(1, 2)
		defer s.close()
		w.set(func(f *faults) {
			f.bundle = func(b *types.Bundle) {
				again := proto.CloneOf(b.JwtAuthorities[0])
				again.Tainted = true
				b.JwtAuthorities = append(b.JwtAuthorities, again, &types.JWTKey{KeyId: "odd"})
				b.X509Authorities = append(b.X509Authorities, &types.X509Certificate{Asn1: []byte("x")})
			}
		})
		old, begins := w.rotate()
		w.until("the taint wave is over", 3*time.Minute, func() bool { return settled(w.authority(old)) })
		if time.Now().Before(begins) {
			w.t.Error("no renewal was needed")
		}
		s.checkUnbroken()
		for _, l := range w.agent.State().LeftOut {
			if want := map[string]int{"own x509": 1, "own jwt": 1}[l.Bundle+" "+l.Type]; l.Count != want {
				w.t.Errorf("left out %+v, want %d", l, want)
			}
		}
		time.Sleep(time.Minute)
		w.check(w.server.Keysets().Remove(w.t.Context(), old.ID))
		time.Sleep(time.Minute)
		s.checkUnbroken()
	})
}

// holds fails the test when the agent trusts the server that runs now.
func (w *world) holds() {
	w.t.Helper()
	in := w.agent.Bundle().Own
	for range 2 {
		time.Sleep(3 * time.Minute)
		if now := w.agent.Bundle().Own; now.Sequence() != in.Sequence() {
			w.t.Errorf("a server with a removed key is trusted: bundle %d instead of %d", now.Sequence(), in.Sequence())
		}
		w.stopAgent()
		w.startAgent()
	}
}

// A file written in mid-rotation has the authorities of the bundle in force. They are not
// new, and one that the server removes afterwards does not return with the file.
func TestDrillTrustBundleFileWrittenInMidRotation(t *testing.T) {
	for name, remove := range map[string]func(w *world, remove func()){
		"running": func(_ *world, remove func()) { remove() },
		"stopped": func(w *world, remove func()) {
			w.stopAgent()
			remove()
			w.startAgent()
		},
		"file away for a while": func(w *world, remove func()) {
			w.activate() // the bundle changes after the file was written
			time.Sleep(time.Minute)
			w.check(os.Rename(w.cfg.TrustBundleFile, w.cfg.TrustBundleFile+".away"))
			remove()
			time.Sleep(time.Minute)
			w.stopAgent()
			w.startAgent()
			time.Sleep(time.Minute)
			w.check(os.Rename(w.cfg.TrustBundleFile+".away", w.cfg.TrustBundleFile))
		},
	} {
		t.Run(name, func(t *testing.T) {
			withTrustFile(t, 1, func(w *world) {
				w.unchecked = true
				w.waitHeld(1)
				keys := w.server.Keysets()
				w.activate()
				stolen := w.stolenKeys() // of an authority that the first file did not have
				old := w.activate()
				w.check(keys.Taint(w.t.Context(), old.ID))
				w.until("the taint wave is over", 3*time.Minute, func() bool { return settled(w.authority(old)) })
				w.writeTrust(w.server.BundlePEM())
				remove(w, func() { w.check(keys.Remove(w.t.Context(), old.ID)) })
				w.until("the removal is seen", time.Minute, func() bool {
					b := w.agent.Bundle()
					if b == nil {
						return false
					}
					_, in := b.Own.X509Authority(old.X509AuthorityID)
					return !in
				})
				w.newServer(stolen, 1)
				w.holds()
			})
		})
	}
}

// A file that was old at the bootstrap has authorities that the server had removed before.
func TestDrillOldTrustBundleFileAtTheStart(t *testing.T) {
	withTrustFile(t, 1, func(w *world) {
		w.unchecked = true
		w.waitHeld(1)
		w.stopAgent()
		stolen := w.stolenKeys()
		keys := w.server.Keysets()
		old := w.activate()
		w.writeTrust(w.server.BundlePEM())
		w.check(keys.Taint(w.t.Context(), old.ID))
		w.check(keys.Remove(w.t.Context(), old.ID))
		w.check(os.RemoveAll(w.cfg.DataDir))
		w.writeToken()
		w.startAgent()
		w.waitHeld(1)
		w.newServer(stolen, 1)
		w.holds()
	})
}

// A file from before a rotation verifies nothing at the first start. The log names the file,
// the authorities in it and the remedy, which helps the waiting agent.
func TestDrillTrustBundleFileFromBeforeARotation(t *testing.T) {
	withTrustFile(t, 1, func(w *world) {
		w.unchecked = true
		w.waitHeld(1)
		w.stopAgent()
		file := w.server.BundlePEM()
		old := w.activate()
		keys := w.server.Keysets()
		w.check(keys.Taint(w.t.Context(), old.ID))
		w.check(keys.Remove(w.t.Context(), old.ID))
		w.check(os.RemoveAll(w.cfg.DataDir))
		w.writeTrust(file)
		w.writeToken()
		var log strings.Builder
		w.cfg.Log = syncedLog(&log)
		w.startAgent()
		time.Sleep(time.Minute)
		w.writeTrust(w.server.BundlePEM())
		w.waitHeld(1)
		w.stopAgent()
		active := keys.Active()
		for _, want := range []string{
			"authority " + active.X509AuthorityID + ", which signed the server's certificate, is not in trust_bundle_file " + w.cfg.TrustBundleFile,
			"it has " + old.X509AuthorityID + " until " + old.ExpiresAt.UTC().Format(time.RFC3339),
			"server bundle > " + w.cfg.TrustBundleFile,
		} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("the log lacks %q", want)
			}
		}
		if t.Failed() {
			t.Log(log.String())
		}
	})
}

// A node was bootstrapped insecurely and gets a file later. The file's authorities are
// trusted then; before that no other server is.
func TestDrillTrustBundleFileAfterAnInsecureBootstrap(t *testing.T) {
	dir := t.TempDir()
	inWorld(t, 1, func(w *world) {
		w.cfg.TrustBundle, w.cfg.InsecureBootstrap = nil, true
	}, func(w *world) {
		w.unchecked = true
		w.waitHeld(1)
		before := w.agent.Bundle().Own
		w.newServer(nil, 1)
		w.stopAgent()
		w.startAgent()
		time.Sleep(3 * time.Minute)
		if now := w.agent.Bundle().Own; !now.Equal(before) {
			t.Fatalf("with a stored bundle any server is trusted: %v", now.X509())
		}
		w.stopAgent()
		w.cfg.InsecureBootstrap, w.cfg.TrustBundleFile = false, filepath.Join(dir, "bundle.pem")
		w.cfg.JoinToken, w.cfg.JoinTokenFile = "", filepath.Join(dir, "token")
		w.writeToken()
		w.writeTrust(w.server.BundlePEM())
		w.startAgent()
		w.until("all is signed by the new server", 3*time.Minute, func() bool { return w.renewedBy(1) })
	})
}
