package store_test

import (
	"reflect"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/internal/server/store"
)

// TestLostTimesEnd: each restore is stored until everything that is not known because of
// it has expired, by a clock that is not in doubt.
func TestLostTimesEnd(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	var up, off time.Duration
	o := options()
	o.Now = func() time.Time { return start.Add(up + off) }
	path := newPath(t)
	var s *store.Store
	reopen := func() {
		t.Helper()
		if s != nil {
			closed(t, s)
		}
		var err error
		if s, err = store.Open(path, o); err != nil {
			t.Fatal(err)
		}
		s.SetClock(clock.New(o.Now, func() time.Duration { return up }, s.Heartbeat()))
	}
	restore := func(after time.Duration) {
		t.Helper()
		copied := copyOf(t, s)
		up += after
		closed(t, s)
		s, path = nil, copied
		reopen()
	}
	pass := func(d time.Duration) {
		t.Helper()
		up += d
		if err := s.StoreHeartbeat(t.Context()); err != nil {
			t.Fatal(err)
		}
		reopen()
	}
	at := func(n int) time.Time { return start.Add(time.Duration(n) * time.Hour).UTC() }
	want := func(what string, lost []spireapi.Lost, restored ...time.Time) {
		t.Helper()
		if got := s.Lost(); !reflect.DeepEqual(got, lost) {
			t.Errorf("%s: lost times %v, want %v", what, got, lost)
		}
		var copied []time.Time
		for _, r := range s.Deployment("default").Restored() {
			copied = append(copied, r.CopiedAt)
		}
		if !reflect.DeepEqual(copied, restored) {
			t.Errorf("%s: restored from copies of %v, want %v", what, copied, restored)
		}
	}

	reopen()
	keysetsAt(t, s.Deployment("default"), start, 9*day)
	restore(time.Hour)
	first := spireapi.Lost{From: at(0), To: at(1)}
	want("once", []spireapi.Lost{first}, at(0))
	pass(5 * day)
	restore(time.Hour)
	second := spireapi.Lost{From: at(121), To: at(122)}
	want("twice", []spireapi.Lost{first, second}, at(0), at(121))

	off = 91 * day
	reopen()
	want("a clock that is ahead", []spireapi.Lost{first, second}, at(0), at(121))
	off = 0
	// Seven days after the first restore the X.509-SVIDs of its lost time have expired.
	// Its JWT-SVIDs expire with the keyset, not before those of the second.
	pass(2*day + 2*time.Hour)
	want("the first has ended", []spireapi.Lost{second}, at(0), at(121))
	pass(3*day - time.Hour)
	want("the keyset has ended", []spireapi.Lost{second}, at(121))
	pass(3 * day)
	want("all has ended", nil)
	if got := s.Deployment("default").Restored(); !reflect.DeepEqual(got, []ledger.Restored(nil)) {
		t.Errorf("%+v", got)
	}
	closed(t, s)
}
