package agent_test

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

// Streams keep valid SVIDs, and one join token suffices, in random histories of full
// disks, removed or moved folders, clock steps, outages, rotations and restarts. A minute
// after the last fault everything is on disk, and a restart in an outage serves it.
//
// RENEWD_SEED replays one history; RENEWD_HISTORIES sets how many there are.
func TestDiskAndClockFaultsNeverRemoveAnIdentity(t *testing.T) {
	histories := 3
	if n, err := strconv.Atoi(os.Getenv("RENEWD_HISTORIES")); err == nil {
		histories = n
	}
	if seed, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		diskHistory(t, seed)
		return
	}
	base := rand.Uint64()
	for i := range histories {
		diskHistory(t, base+uint64(i))
	}
}

func diskHistory(t *testing.T, seed uint64) {
	const n, steps = 4, 40
	t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
		var logs logBuffer
		r := rand.New(rand.NewPCG(seed, 0))
		inWorldWithRuntimeDir(t, n, func(w *world) {
			w.cfg.TaintDelay, w.cfg.Log = 5*time.Second, slog.New(slog.NewTextHandler(&logs, nil))
			if r.IntN(2) == 0 {
				w.skew = -time.Duration(r.IntN(60)) * time.Second // at the first start
			}
		}, func(w *world) {
			defer os.RemoveAll(w.cfg.DataDir + ".old")
			w.waitHeld(n)
			var streams []*stream
			reopen := func() {
				for _, s := range streams {
					s.close()
				}
				streams = nil
				for i := range n {
					streams = append(streams, w.open(i))
				}
			}
			defer func() {
				for _, s := range streams {
					s.close()
				}
			}()
			answered := func(when string) {
				w.until(when, 30*time.Second, func() bool {
					for _, s := range streams {
						if _, ok := s.last(); !ok {
							return false
						}
					}
					return true
				})
			}
			restart := func() {
				// State that is only in memory is lost with a restart.
				if w.agent.Unsaved()["identity.json"] != nil {
					return
				}
				w.stopAgent()
				w.startAgent()
				reopen()
				answered("answered after a restart")
			}
			reopen()
			answered("answered at first")
			right := func() {
				w.freeDisk()
				w.stepClock(0)
				w.set(func(f *faults) { f.down = false })
			}
			var past []string
			for range steps {
				op := r.IntN(10)
				past = append(past, fmt.Sprint(op))
				switch op {
				case 0:
					w.check(os.MkdirAll(w.cfg.DataDir, 0o700))
					w.fillDisk()
				case 1:
					w.freeDisk()
				case 2:
					w.check(os.RemoveAll(w.cfg.DataDir))
				case 3:
					w.check(os.MkdirAll(w.cfg.DataDir, 0o700))
					w.check(os.RemoveAll(w.cfg.DataDir + ".old"))
					w.check(os.Rename(w.cfg.DataDir, w.cfg.DataDir+".old"))
				case 4: // a lag of any size, or ahead by less than SVIDs have left
					skew := -time.Duration(r.Int64N(int64(72 * time.Hour)))
					if r.IntN(2) == 0 {
						skew = time.Duration(r.Int64N(int64(8 * time.Hour)))
					}
					w.stepClock(skew)
				case 5:
					down := r.IntN(2) == 0
					w.set(func(f *faults) { f.down = down })
				case 6:
					restart()
				case 7:
					// An operator rotates when there are no faults.
					right()
					time.Sleep(time.Minute)
					old, _ := w.rotate()
					w.until("settled", 3*time.Minute, func() bool { return settled(w.authority(old)) })
					w.check(w.server.Keysets().Remove(w.t.Context(), old.ID))
				case 8:
					right()
				case 9:
					w.check(os.RemoveAll(w.cfg.RuntimeDir))
				}
				time.Sleep(time.Duration(r.IntN(120)) * time.Second)
				synctest.Wait()
				for i, s := range streams {
					last, ok := s.last()
					if !ok || s.end != nil || last.expiry.Before(time.Now()) {
						w.t.Fatalf("stream %d after %v: got an answer: %v, valid until %v, ended with %v", i, past, ok, last.expiry, s.end)
					}
				}
			}
			right()
			time.Sleep(time.Minute)
			w.check(w.agent.Ready())
			w.set(func(f *faults) { f.down = true })
			restart()
			w.set(func(f *faults) { f.down = false })
			time.Sleep(30 * time.Second)
			w.check(w.agent.Ready())
			w.attestedOnce(&logs)
			for _, s := range streams {
				s.checkUnbroken()
			}
		})
	})
}
