package server_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/keyset"
)

// restored restores a backup on a machine whose clock is wrong.
func (h *clockHistory) restored(data []byte, off time.Duration) {
	h.t.Helper()
	h.stop()
	check(h.t, os.WriteFile(filepath.Join(h.config.DataDir, server.FileName), data, 0o600))
	h.restart(0, off)
}

func (h *clockHistory) backup() []byte {
	h.t.Helper()
	var data bytes.Buffer
	check(h.t, h.Backup(h.t.Context(), &data))
	return data.Bytes()
}

// TestRestoreByAClockThatIsBehind: the time of a restore follows the clock when it is
// corrected. Until then the server takes a part of the lost time for its own.
func TestRestoreByAClockThatIsBehind(t *testing.T) {
	t.Parallel()
	t.Run("an agent that renewed in the lost time", func(t *testing.T) {
		inClockHistory(t, 1, 90*day, func(h *clockHistory) {
			h.restart(0, 0)
			h.entries()
			n := &clockNode{svids: map[string][]*identity{}}
			check(h.t, h.visit(n))
			data := h.backup()
			time.Sleep(13 * time.Hour)
			check(h.t, h.visit(n))
			check(h.t, h.visit(n)) // it uses the new SVID
			time.Sleep(time.Hour)
			h.restored(data, -5*time.Hour)
			time.Sleep(time.Minute)
			h.off.Store(0)
			if err := h.visit(n); err != nil {
				h.t.Errorf("agent rejected: %v", err)
			}
			h.stop()
		})
	})
	// SVIDs signed in the lost time count until they expire.
	for name, restart := range map[string]bool{"same process": false, "next process": true} {
		t.Run(name, func(t *testing.T) {
			inClockHistory(t, 1, 90*day, func(h *clockHistory) {
				h.restart(0, 0)
				h.entries()
				n := &clockNode{svids: map[string][]*identity{}}
				h.nodes = append(h.nodes, n)
				check(h.t, h.visit(n))
				data := h.backup()
				for range 6 * 4 {
					time.Sleep(6 * time.Hour)
					check(h.t, h.visit(n))
				}
				n.svids["long"] = nil // it starts again
				check(h.t, h.visit(n))
				h.restored(data, -5*day)
				old := h.Server("default").Keysets().Active()
				h.operate()
				check(h.t, h.Server("default").Keysets().Taint(keyset.WithActor(h.t.Context(), "unix:uid:0"), old.ID))
				h.off.Store(0)
				if ok, err := h.ConfirmClock(h.t.Context(), time.Now()); !ok || err != nil {
					h.t.Fatalf("confirm: %v, %v", ok, err)
				}
				if restart {
					h.restart(0, 0)
				}
				for range 2*24 + 12 { // seven days after what the clock showed at the restore
					time.Sleep(time.Hour)
					h.checkInvariants()
				}
				h.stop()
			})
		})
	}
}
