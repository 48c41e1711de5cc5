package agent_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/server"
)

func TestCaseBundleIsNotSavedAgain(t *testing.T) {
	keeping(t, 1, nil, func(w *world) {
		w.fill(1)
		block := filepath.Join(w.cfg.DataDir, "bundle.json.tmp", "x")
		w.check(os.MkdirAll(block, 0o700)) // the disk is full for a moment
		w.activate()
		e := entryFor(0)
		e.Hint = "changed" // minted again, by the new authority
		w.enter([]server.Entry{e})
		time.Sleep(20 * time.Second)
		w.check(os.RemoveAll(filepath.Dir(block))) // there is room again
		time.Sleep(10 * time.Minute)
		w.set(func(f *faults) { f.down = true })
		w.stopAgent()
		w.startAgent()
		time.Sleep(time.Second)
		s := w.open(0)
		defer s.close()
		time.Sleep(20 * time.Second) // w.read fails the test when SVID and bundle do not go together
	})
}
