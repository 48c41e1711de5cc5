package store_test

import (
	"testing"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/store"
)

// TestHeartbeat: each commit stores the time for the next process, but not the time of a
// clock that has just gone ahead or was set back.
func TestHeartbeat(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	var up, off time.Duration
	now := func() time.Time { return start.Add(up + off) }
	heartbeat := func(want time.Time, then func(*store.Store)) {
		t.Helper()
		s, err := store.Open(path, options())
		if err != nil {
			t.Fatal(err)
		}
		s.SetClock(clock.New(now, func() time.Duration { return up }, s.Heartbeat()))
		defer closed(t, s)
		if got := s.Heartbeat(); !got.Equal(want) {
			t.Errorf("after %v, %v off: heartbeat is %v, want %v", up, off, got, want)
		}
		then(s)
	}
	beat := func(s *store.Store) {
		if err := s.StoreHeartbeat(t.Context()); err != nil {
			t.Error(err)
		}
	}
	heartbeat(time.Time{}, func(s *store.Store) {
		up = time.Hour
		if err := update(t.Context(), s.Deployment("default"), 1, "1"); err != nil {
			t.Error(err)
		}
	})
	heartbeat(start.Add(time.Hour), func(s *store.Store) { up = 2 * time.Hour; beat(s) })
	off = 91 * 24 * time.Hour
	heartbeat(start.Add(2*time.Hour), beat)
	off = -91 * 24 * time.Hour
	heartbeat(start.Add(2*time.Hour), func(s *store.Store) { up += time.Hour; beat(s) })
	off = 0
	heartbeat(start.Add(3*time.Hour), beat)
}
