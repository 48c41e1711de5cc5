package agent_test

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// fillDisk makes every write to data_dir fail, also for root.
func (w *world) fillDisk() {
	for _, temp := range w.tempFiles() {
		w.check(os.MkdirAll(filepath.Join(temp, "x"), 0o700))
	}
}

// freeDisk undoes fillDisk.
func (w *world) freeDisk() {
	for _, temp := range w.tempFiles() {
		w.check(os.RemoveAll(temp))
	}
}

// tempFiles returns the paths of the files that are renamed after a write.
func (w *world) tempFiles() []string {
	out := []string{filepath.Join(w.cfg.DataDir, "identity.json.probe")}
	for _, name := range node.Files {
		out = append(out, filepath.Join(w.cfg.DataDir, name+".tmp"))
	}
	return out
}

// hideRuntimeDir moves runtime_dir away, and makes every write to its path fail, also for
// root.
func (w *world) hideRuntimeDir() {
	w.check(os.Rename(w.cfg.RuntimeDir, w.hiddenRuntimeDir()))
	w.check(os.WriteFile(w.cfg.RuntimeDir, nil, 0o600))
}

// showRuntimeDir undoes hideRuntimeDir.
func (w *world) showRuntimeDir() {
	w.check(os.Remove(w.cfg.RuntimeDir))
	w.check(os.Rename(w.hiddenRuntimeDir(), w.cfg.RuntimeDir))
}

func (w *world) hiddenRuntimeDir() string { return w.cfg.RuntimeDir + ".hidden" }

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) count(text string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Count(b.text.String(), text)
}

// attestedOnce fails the test unless the node has attested exactly once.
func (w *world) attestedOnce(logs *logBuffer) {
	w.t.Helper()
	if n := logs.count("node attested"); n != 1 {
		w.t.Errorf("the node has attested %d times, with one token", n)
	}
}

// A bundle that could not be written is written when there is room: a restart in an
// outage finds SVIDs and a bundle that match.
func TestDrillDiskFullForAMoment(t *testing.T) {
	inWorldWithRuntimeDir(t, 1, nil, func(w *world) {
		w.waitHeld(1)
		w.fillDisk()
		w.activate()
		e := entryFor(0)
		e.DNSNames = []string{"changed.example.org"} // minted again, by the new authority
		w.setEntries([]spireapi.Entry{e})
		time.Sleep(20 * time.Second)
		if err := w.agent.Ready(); err == nil || !strings.Contains(err.Error(), "data_dir: bundle.json: ") || w.gauge("renewd_data_dir_unsaved", "bundle.json") != 1 {
			w.t.Errorf("an unsaved bundle is not reported: %v", err)
		}
		w.freeDisk()
		time.Sleep(10 * time.Second)
		if err := w.agent.Ready(); err != nil || w.gauge("renewd_data_dir_unsaved", "bundle.json") != 0 {
			w.t.Errorf("with room again: %v", err)
		}
		w.set(func(f *faults) { f.down = true })
		w.stopAgent()
		w.startAgent()
		time.Sleep(time.Second)
		s := w.open(0)
		defer s.close()
		time.Sleep(20 * time.Second) // streams verify what they read
		s.checkUnbroken()
	})
}

// The agent SVID is renewed after any change of data_dir, and a restart finds it and
// needs no token.
func TestDrillDataDirReplaced(t *testing.T) {
	for name, replace := range map[string]func(w *world, dir string){
		"removed":                func(w *world, dir string) { w.check(os.RemoveAll(dir)) },
		"removed and made again": func(w *world, dir string) { w.check(os.RemoveAll(dir)); w.check(os.Mkdir(dir, 0o700)) },
		"moved":                  func(w *world, dir string) { w.check(os.Rename(dir, dir+".old")) },
	} {
		t.Run(name, func(t *testing.T) {
			var logs logBuffer
			inWorld(t, 1, func(w *world) { w.cfg.Log, w.cfg.TaintDelay = slog.New(slog.NewTextHandler(&logs, nil)), 0 }, func(w *world) {
				defer os.RemoveAll(w.cfg.DataDir + ".old")
				w.waitHeld(1)
				replace(w, w.cfg.DataDir)
				old, _ := w.rotate()
				w.until("everything is renewed", time.Minute, func() bool { return settled(w.authority(old)) })
				w.check(w.agent.Ready())
				w.check(w.server.Keysets().Remove(w.t.Context(), old.ID))
				time.Sleep(10 * time.Second)
				w.stopAgent()
				w.startAgent()
				w.waitHeld(1)
				w.attestedOnce(&logs)
			})
		})
	}
}

// Corrupt files prevent no start and cost no token.
func TestDrillStartWithDamagedFiles(t *testing.T) {
	var logs logBuffer
	inWorld(t, 1, func(w *world) { w.cfg.Log = slog.New(slog.NewTextHandler(&logs, nil)) }, func(w *world) {
		w.waitHeld(1)
		w.stopAgent()
		for _, name := range []string{"bundle.json", "federated.json", "seed"} {
			w.check(os.WriteFile(filepath.Join(w.cfg.DataDir, name), []byte("{"), 0o600))
		}
		w.startAgent()
		w.waitHeld(1)
		w.attestedOnce(&logs)
		if n := logs.count("moved aside"); n != 3 {
			w.t.Errorf("%d files moved aside", n)
		}
		w.stopAgent()
		w.startAgent()
		w.waitHeld(1)
	})
}

// An agent SVID is renewed at half of its lifetime, whatever this node's clock shows.
// With a clock that is behind it would expire, and with one ahead it would be renewed all
// the time.
func TestAgentSVIDIsRenewedInTimeByAWrongClock(t *testing.T) {
	for _, skew := range []time.Duration{-72 * time.Hour, 5 * time.Hour} {
		t.Run(skew.String(), func(t *testing.T) {
			var logs logBuffer
			inWorld(t, 0, func(w *world) {
				w.skew, w.cfg.RefreshInterval, w.cfg.Log = skew, 10*time.Minute, slog.New(slog.NewTextHandler(&logs, nil))
			}, func(w *world) {
				time.Sleep(28 * time.Hour)
				if n := len(w.mintsSince(time.Time{})); n != 2 {
					w.t.Errorf("%d renewals of an agent SVID with a lifetime of a day, in 28 hours", n)
				}
				if left := time.Until(w.agent.State().OwnExpiry); left < 10*time.Hour {
					w.t.Errorf("the agent SVID expires in %v", left)
				}
				w.attestedOnce(&logs)
				w.stopAgent()
				w.startAgent()
				time.Sleep(time.Minute)
				w.attestedOnce(&logs)
				if n := len(w.mintsSince(time.Time{})); n > 3 {
					w.t.Errorf("%d renewals after a restart", n)
				}
			})
		})
	}
}

// Each failed check is on a separate line. A short outage of the server fails none.
func TestReadyNamesFailedChecks(t *testing.T) {
	inWorld(t, 0, func(w *world) {
		w.cfg.RefreshInterval = time.Minute
		w.set(func(f *faults) { f.down = true })
	}, func(w *world) {
		w.setEntries(entriesFor(1))
		ready := func(when string, names ...string) {
			w.t.Helper()
			synctest.Wait()
			var got []string
			if err := w.agent.Ready(); err != nil {
				for line := range strings.SplitSeq(err.Error(), "\n") {
					name, reason, _ := strings.Cut(line, ": ")
					if reason == "" {
						w.t.Errorf("%s: %q", when, line)
					}
					got = append(got, name)
				}
			}
			if strings.Join(got, " ") != strings.Join(names, " ") {
				w.t.Errorf("%s: %v, want %v", when, got, names)
			}
		}
		ready("at the start", "starting", "agent_svid")
		w.set(func(f *faults) { f.down = false })
		w.waitHeld(1)
		ready("running")
		w.set(func(f *faults) { f.down = true })
		time.Sleep(3 * time.Minute)
		ready("3 minutes without the server")
		time.Sleep(3 * time.Minute)
		ready("6 minutes without the server", "entries", "bundle")
		w.stepClock(30 * time.Hour)
		time.Sleep(2 * time.Minute)
		ready("everything has expired, by a clock that is ahead", "agent_svid", "x509_svids", "entries", "bundle")
		w.set(func(f *faults) { f.down = false })
		w.stepClock(0)
		time.Sleep(2 * time.Minute)
		ready("server is back and the clock right")
	})
}

// The authority of the agent SVID on disk is not safe to remove although another one
// signed the agent SVID in use: a restarted agent would have no valid identity.
func TestUnsavedAgentSVIDIsNotSettled(t *testing.T) {
	inWorld(t, 0, func(w *world) { w.cfg.RefreshInterval, w.cfg.TaintDelay = 10*time.Minute, 0 }, func(w *world) {
		time.Sleep(17 * time.Hour)
		w.fillDisk()
		keys, before := w.server.Keysets(), w.agent.State().OwnExpiry
		old := keys.Active()
		next, err := keys.Prepare(w.t.Context())
		w.check(err)
		time.Sleep(15 * time.Minute) // the agent has the bundle
		w.check(keys.Activate(w.t.Context(), next.ID))
		w.check(keys.Taint(w.t.Context(), old.ID))
		for tries := 0; !w.agent.State().OwnExpiry.After(before); tries++ {
			if time.Sleep(10 * time.Minute); tries > 100 {
				w.t.Fatal("the agent SVID is not renewed while it is not on disk")
			}
		}
		for range 10 {
			time.Sleep(time.Minute)
			if a := w.authority(old); settled(a) {
				w.t.Fatalf("safe to remove: %+v, unsaved %v", a, w.agent.Unsaved())
			}
		}
		w.freeDisk()
		time.Sleep(10 * time.Minute)
		if a := w.authority(old); !settled(a) {
			w.t.Errorf("with the agent SVID on disk: %+v, unsaved %v", a, w.agent.Unsaved())
		}
	})
}
