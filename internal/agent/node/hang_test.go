package node_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// blockDisk makes the next read of identity.json block. waited returns when a reader
// is blocked, and answer unblocks it.
func blockDisk(t *testing.T, dir string) (waited, answer func()) {
	t.Helper()
	path := filepath.Join(dir, "identity.json")
	check(t, os.Remove(path), unix.Mkfifo(path, 0o600))
	w := -1
	return func() {
			t.Helper()
			for {
				var err error
				if w, err = unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
					return
				}
				if !errors.Is(err, unix.ENXIO) {
					t.Fatal(err)
				}
				time.Sleep(time.Millisecond) // no reader yet
			}
		}, func() {
			check(t, unix.Close(w))
		}
}

// A disk that does not answer does not block a renewal of the agent SVID or an
// attestation for long. The attestation does not start. The files are written when
// the disk answers again.
func TestHungDiskDuringSync(t *testing.T) {
	t.Parallel()
	s := newState(t, t.TempDir())
	other := newState(t, t.TempDir()).node.Identity()
	waited, answer := blockDisk(t, s.dir)
	synced := make(chan error, 1)
	go func() { synced <- s.Sync() }()
	waited()
	calls := map[string]func() error{
		"no retry": func() error { return s.SaveIdentity(other, false) },
		"attest":   func() error { return s.node.Attest(t.Context(), nil, s.ca.bundle()) },
	}
	failed := make(chan error, len(calls))
	for name, call := range calls {
		go func() {
			err := call()
			if err == nil || !strings.Contains(err.Error(), "does not answer") {
				t.Errorf("%s: %v", name, err)
			}
			failed <- err
		}()
	}
	for range calls {
		<-failed
	}
	if err := s.SaveIdentity(s.node.Identity(), true); err == nil || s.Unsaved()["identity.json"] == nil {
		t.Errorf("with retry: %v, unsaved %v", err, s.Unsaved())
	}
	answer()
	check(t, <-synced, s.Sync(), s.Err(), s.Close())
	s.restart(t, s.dir)
}

// A write that succeeds after SaveIdentity has timed out is undone: presenting that
// identity after a restart would revoke the one in use.
func TestWriteThatEndsAfterTheTimeout(t *testing.T) {
	t.Parallel()
	s := newState(t, t.TempDir())
	other := newState(t, t.TempDir()).node.Identity()
	waited, answer := blockDisk(t, s.dir)
	saved := make(chan error, 1)
	go func() { saved <- s.SaveIdentity(other, false) }()
	waited()
	if err := <-saved; err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("got %v", err)
	}
	answer()
	check(t, s.Sync(), s.Err(), s.Close())
	s.restart(t, s.dir)
}
