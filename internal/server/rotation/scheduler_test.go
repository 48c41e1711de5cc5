package rotation_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/refusal"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/test/memory"
)

// rig is a scheduler in a synctest bubble, with keysets of a lifetime of an hour: a
// successor is prepared 560 s before the expiry and activated 40 s later, and the old
// keyset is tainted 40 s after that.
type rig struct {
	*testing.T
	store     *store
	keysets   *keyset.Deployment
	scheduler *rotation.Scheduler
	log       logs
	begin     time.Time
}

func inRig(t *testing.T, p rotation.Policy, f facts, do func(*rig)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &rig{T: t, store: new(store), begin: time.Now()}
		r.keysets = open(t, keyset.Config{Storage: r.store, Lifetime: time.Hour})
		log := slog.New(slog.NewTextHandler(&r.log, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}}))
		var err error
		r.scheduler, err = rotation.New(rotation.Config{Keysets: r.keysets, Policy: p, Facts: f, Log: log})
		check(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- r.scheduler.Run(ctx) }()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
		}()
		synctest.Wait()
		do(r)
	})
}

// until sleeps until just after so many seconds have passed.
func (r *rig) until(seconds int) {
	r.Helper()
	time.Sleep(time.Until(r.begin.Add(time.Duration(seconds)*time.Second + time.Millisecond)))
	synctest.Wait()
}

// expect compares the states of all keysets, the next step, and its time in seconds,
// followed by a comma and what it waits for.
func (r *rig) expect(states, next, at string) {
	r.Helper()
	var got []string
	ids := map[string]string{}
	for i, k := range r.keysets.Status().Keysets {
		got = append(got, strings.ToLower(k.State.String()))
		ids[k.ID] = fmt.Sprint(i)
	}
	if s := strings.Join(got, " "); s != states {
		r.Errorf("after %v: keysets are %q, want %q", time.Since(r.begin), s, states)
	}
	p := r.scheduler.Automatic()
	for id, i := range ids {
		p.Next = strings.ReplaceAll(p.Next, id, i)
	}
	when := fmt.Sprint(int(p.At.Sub(r.begin).Seconds()))
	if p.WaitsFor != "" {
		when += ", " + p.WaitsFor
	}
	if p.Next != next || when != at {
		r.Errorf("after %v: next is %q at %q, want %q at %q", time.Since(r.begin), p.Next, when, next, at)
	}
}

// logged compares the log since the last call.
func (r *rig) logged(want ...string) {
	r.Helper()
	lines := r.log.take()
	if !slices.EqualFunc(lines, want, func(line, want string) bool { return strings.Contains(line, want) }) {
		r.Errorf("after %v the log is\n%s\nwant\n%s", time.Since(r.begin), strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
}

// logs collects lines.
type logs struct {
	mu    sync.Mutex
	lines []string
}

func (l *logs) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, strings.TrimSpace(string(line)))
	return len(line), nil
}

func (l *logs) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := l.lines
	l.lines = nil
	return lines
}

// store is a storage that counts calls and can be made to fail.
type store struct {
	memory.Keysets
	mu         sync.Mutex
	load, save error
	before     func() // before a save, once
	beforeLoad func()
	saves      []keyset.Change
}

func (s *store) set(load, save error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.load, s.save = load, save
}

func (s *store) Load(ctx context.Context) (keyset.Document, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.beforeLoad != nil {
		s.beforeLoad()
	}
	if s.load != nil {
		return keyset.Document{}, s.load
	}
	return s.Keysets.Load(ctx)
}

func (s *store) Save(ctx context.Context, d keyset.Document, c keyset.Change) error {
	s.mu.Lock()
	before := s.before
	s.before = nil
	s.saves = append(s.saves, c)
	err := s.save
	s.mu.Unlock()
	if before != nil {
		before()
	}
	if err != nil {
		return err
	}
	return s.Keysets.Save(ctx, d, c)
}

func TestRotation(t *testing.T) {
	settled := new(atomic.Bool)
	f := facts{holding: func(keyset.Keyset) rotation.Holding {
		return rotation.Holding{Agents: 2, X509Safe: settled.Load(), JWTSafe: true}
	}}
	inRig(t, rotation.Policy{}, f, func(r *rig) {
		r.expect("active", "prepare", "3040")
		r.until(3039)
		r.expect("active", "prepare", "3040")
		r.until(3040)
		r.expect("active prepared", "activate 1", "3080")
		r.until(3079)
		r.expect("active prepared", "activate 1", "3080")
		r.until(3080)
		r.expect("prepared active", "taint 0", "3120")
		r.until(3120)
		r.expect("tainted active", "remove 0", "3900, X.509-SVIDs of 2 agents")
		r.logged(
			`msg="automatic rotation step completed" step=prepare keyset_id=`+r.keysets.Active().ID+` reason="active keyset `,
			`msg="automatic rotation step completed" step=activate keyset_id=`+r.keysets.Active().ID,
			`msg="automatic rotation step completed" step=taint keyset_id=`,
		)
		settled.Store(true)
		r.until(3181) // a minute is the longest sleep
		r.expect("active", "prepare", fmt.Sprint(6640-560))
		r.logged(`msg="automatic rotation step completed" step=remove keyset_id=`)
		for _, c := range r.store.saves[1:] {
			if c.Actor != "scheduler" || c.Note == "" {
				r.Errorf("audit record %+v", c)
			}
		}
	})
}

// TestStartAfterExpiry starts a scheduler when the active keyset has long expired.
func TestStartAfterExpiry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := open(t, keyset.Config{Lifetime: time.Hour})
		time.Sleep(100 * day)
		s, err := rotation.New(rotation.Config{Keysets: d, Facts: facts{behind: func() int { return 1 }}})
		check(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = s.Run(ctx) })
		synctest.Wait()
		if k := d.Status().Keysets; len(k) != 2 || k[0].State != keyset.Prepared || !d.Active().ExpiresAt.After(time.Now().Add(50*time.Minute)) {
			t.Errorf("keysets are %v", k)
		}
		time.Sleep(23 * time.Hour) // of rotations
		old := d.Status().Keysets[0].ID
		time.Sleep(time.Hour)
		synctest.Wait()
		if k := d.Status().Keysets; k[0].ID == old {
			t.Errorf("the expired keyset is not removed: %v", k)
		}
		cancel()
		wg.Wait()
	})
}

func TestPaused(t *testing.T) {
	inRig(t, rotation.Policy{Mode: rotation.Paused}, facts{}, func(r *rig) {
		r.until(3000)
		r.expect("active", "prepare", "3040")
		r.logged()
		r.until(7000)
		r.expect("active", "prepare", "3040")
		r.logged(`level=WARN msg="automatic rotation paused, step is due and not carried out" step=prepare reason="active keyset `)
		if p := r.scheduler.Automatic(); p.Mode != "paused" || len(r.store.saves) != 1 {
			r.Errorf("%+v, %d changes", p, len(r.store.saves))
		}
	})
}

func TestOff(t *testing.T) {
	f := facts{behind: func() int { panic("called") }}
	inRig(t, rotation.Policy{Mode: rotation.Off}, f, func(r *rig) {
		r.store.set(errors.New("not called"), nil)
		r.until(7000)
		r.logged()
		if p := r.scheduler.Automatic(); p != (rotation.Preview{Mode: "off"}) || len(r.store.saves) != 1 {
			r.Errorf("%+v, %d changes", p, len(r.store.saves))
		}
	})
}

// TestReload: another policy applies at once, and one that is invalid not at all.
func TestReload(t *testing.T) {
	inRig(t, rotation.Policy{Mode: rotation.Off}, facts{}, func(r *rig) {
		time.Sleep(51 * time.Minute) // the preparation is due
		set := func(p rotation.Policy, keysets int) {
			r.Helper()
			apply, err := r.scheduler.Reload(p)
			check(r, err)
			apply()
			synctest.Wait()
			if got := r.scheduler.Automatic().Mode; got != string(p.Mode) {
				r.Errorf("mode %s, want %s", got, p.Mode)
			}
			if got := len(r.keysets.Status().Keysets); got != keysets {
				r.Errorf("%s: %d keysets, want %d", p.Mode, got, keysets)
			}
		}
		set(rotation.Policy{Mode: rotation.Paused}, 1)
		if _, err := r.scheduler.Reload(rotation.Policy{Mode: rotation.On, TaintThreshold: time.Hour}); err == nil {
			r.Error("an invalid policy is accepted")
		}
		synctest.Wait()
		set(rotation.Policy{Mode: rotation.Paused}, 1)
		set(rotation.Policy{Mode: rotation.On}, 2)
		set(rotation.Policy{Mode: rotation.Off}, 2)
		time.Sleep(5 * time.Minute) // the activation, too
		set(rotation.Policy{Mode: rotation.Off}, 2)
		if id := r.keysets.Active().ID; id != r.keysets.Status().Keysets[0].ID {
			r.Error("a step is carried out although rotation is off")
		}
	})
}

// TestWakesAtOnce: when an operator taints a keyset that automatic rotation replaced, it is
// removed at once.
func TestWakesAtOnce(t *testing.T) {
	inRig(t, rotation.Policy{}, facts{}, func(r *rig) {
		r.until(3085)
		r.expect("prepared active", "taint 0", "3120")
		old := r.keysets.Status().Keysets[0].ID
		check(r, r.keysets.Taint(keyset.WithActor(r.Context(), "alice"), old))
		synctest.Wait()
		r.expect("active", "prepare", "6080")
	})
}

func TestStorageFails(t *testing.T) {
	inRig(t, rotation.Policy{}, facts{}, func(r *rig) {
		r.until(3000)
		r.store.set(nil, errors.New("disk is full"))
		r.until(3160)
		r.expect("active", "prepare", "3163, another attempt: prepare keyset: save: disk is full")
		r.logged(`level=ERROR msg="automatic rotation step failed" step=prepare delay=1s error="prepare keyset: save: disk is full"`)
		// After 0, 1, 3, 7, 15, 31, 63 and 123 seconds.
		if n := len(r.store.saves) - 1; n != 8-1 {
			r.Errorf("%d attempts", n)
		}
		r.store.set(errors.New("disk is gone"), nil)
		r.until(3400)
		r.logged(`level=ERROR msg="automatic rotation step failed" step="" delay=1m0s error="list keysets: load: disk is gone"`)
		r.store.set(nil, nil)
		r.until(3410)
		r.expect("active prepared", "activate 1", "3443")
		r.logged(`msg="automatic rotation step completed" step=prepare`)
		// The next failure is a new one.
		r.store.set(errors.New("disk is gone"), nil)
		r.until(3443)
		r.logged(`msg="automatic rotation step failed" step="" delay=1s error="list keysets: load: disk is gone"`)
	})
}

// TestLostRace: another process commits at the same moment.
func TestLostRace(t *testing.T) {
	inRig(t, rotation.Policy{}, facts{}, func(r *rig) {
		other := open(r, keyset.Config{Storage: &r.store.Keysets, Lifetime: time.Hour})
		r.store.mu.Lock()
		r.store.before = func() {
			if _, err := other.Prepare(r.Context()); err != nil {
				r.Error(err)
			}
		}
		r.store.mu.Unlock()
		r.until(3040)
		r.expect("active", "prepare", "3041, another attempt: "+refusal.ErrBusy.Error())
		r.logged(`level=INFO msg="automatic rotation step delayed, another change of the keysets is in flight" step=prepare delay=1s`)
		r.until(3041)
		// It uses the keyset that the other process prepared.
		r.expect("active prepared", "activate 1", "3080")
		r.until(3080)
		r.expect("prepared active", "taint 0", "3120")
	})
}

// TestSuperseded: between the decision of automatic rotation and its mutation something
// changes. The states of the keysets still allow the step, but it must not be done.
func TestSuperseded(t *testing.T) {
	t.Parallel()
	alice := keyset.WithActor(t.Context(), "alice")
	for name, c := range map[string]struct {
		steps int // done before
		then  func(t *testing.T, other *keyset.Deployment, unsafe, behind *atomic.Bool)
	}{
		"prepare": {0, func(t *testing.T, other *keyset.Deployment, _, _ *atomic.Bool) {
			_, err := other.Prepare(alice)
			check(t, err)
		}},
		"activate": {1, func(_ *testing.T, _ *keyset.Deployment, _, behind *atomic.Bool) { behind.Store(true) }},
		"taint": {2, func(t *testing.T, other *keyset.Deployment, _, _ *atomic.Bool) {
			old, now := other.Status().Keysets[0].ID, other.Active().ID
			check(t, other.Activate(alice, old))
			check(t, other.Activate(alice, now)) // so that alice has replaced the old one
		}},
		"remove": {3, func(_ *testing.T, _ *keyset.Deployment, unsafe, _ *atomic.Bool) { unsafe.Store(true) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			now := start
			wall := func() time.Time { return now }
			uptime := func() time.Duration { return now.Sub(start) }
			var unsafe, behind atomic.Bool
			f := facts{
				behind: func() int {
					if behind.Load() {
						return 1
					}
					return 0
				},
				holding: func(keyset.Keyset) rotation.Holding {
					return rotation.Holding{X509Safe: !unsafe.Load(), JWTSafe: true}
				},
			}
			st := new(store)
			d := open(t, keyset.Config{Storage: st, Now: wall})
			var log logs
			s, err := rotation.New(rotation.Config{Keysets: d, Facts: f, Clock: clock.New(wall, uptime, time.Time{}), Log: slog.New(slog.NewTextHandler(&log, nil))})
			check(t, err)
			for _, to := range []int{76, 77, 78, 78}[:c.steps+1] {
				now = start.Add(time.Duration(to) * day)
				if len(st.saves)-1 < c.steps {
					s.RunDue(t.Context())
				}
			}
			if p := s.Automatic(); len(st.saves)-1 != c.steps || !strings.HasPrefix(p.Next, name) || p.At.After(now) {
				t.Fatalf("next after %d steps: %+v", len(st.saves)-1, p)
			}
			log.take()
			other := open(t, keyset.Config{Storage: &st.Keysets, Now: wall})
			loads := 0
			st.mu.Lock()
			st.beforeLoad = func() {
				if loads++; loads == 2 {
					c.then(t, other, &unsafe, &behind)
				}
			}
			st.mu.Unlock()
			s.RunDue(t.Context())
			if !errors.Is(s.Failed(), rotation.ErrSuperseded) || len(st.saves)-1 != c.steps {
				t.Errorf("%v, %d changes", s.Failed(), len(st.saves)-1)
			}
			if lines := log.take(); len(lines) > 0 {
				t.Errorf("logged %v", lines)
			}
			now = now.Add(time.Second)
			if s.RunDue(t.Context()); s.Failed() != nil || len(st.saves)-1 != c.steps {
				t.Errorf("then %v, %d changes", s.Failed(), len(st.saves)-1)
			}
		})
	}
}

// TestClockSetBack: a clock that is set back does not prolong the pause after a failure.
func TestClockSetBack(t *testing.T) {
	t.Parallel()
	now := start.Add(100 * day)
	wall := func() time.Time { return now }
	st := new(store)
	d := open(t, keyset.Config{Storage: st, Now: func() time.Time { return start }})
	s, err := rotation.New(rotation.Config{Keysets: d, Facts: facts{}, Clock: clock.New(wall, nil, time.Time{})})
	check(t, err)
	st.set(errors.New("disk is gone"), nil)
	if pause := s.RunDue(t.Context()); pause != time.Second || s.Failed() == nil {
		t.Errorf("pause is %v after %v", pause, s.Failed())
	}
	st.set(nil, nil)
	if pause := s.RunDue(t.Context()); pause != time.Second || s.Failed() == nil {
		t.Errorf("pause is %v after %v", pause, s.Failed())
	}
	now = start.Add(100*day - 4*time.Minute)
	if s.RunDue(t.Context()); s.Failed() != nil || len(d.Status().Keysets) != 2 {
		t.Errorf("still pausing: %v", s.Failed())
	}
}

// TestPreviewWhileRunning is for the race detector.
func TestPreviewWhileRunning(t *testing.T) {
	inRig(t, rotation.Policy{}, facts{}, func(r *rig) {
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 400 {
					if p := r.scheduler.Automatic(); p.Mode != "on" || p.Next == "" {
						r.Errorf("%+v", p)
					}
					time.Sleep(10 * time.Second)
				}
			})
		}
		wg.Wait()
		if len(r.store.saves) != 5 {
			r.Errorf("%d changes", len(r.store.saves))
		}
	})
}

func TestNewRejects(t *testing.T) {
	t.Parallel()
	d := open(t, keyset.Config{Lifetime: time.Hour})
	for name, c := range map[string]rotation.Config{
		"no keysets": {Facts: facts{}},
		"no facts":   {Keysets: d},
		"thresholds": {Keysets: d, Facts: facts{}, Policy: rotation.Policy{PreparationThreshold: day}},
	} {
		if _, err := rotation.New(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
