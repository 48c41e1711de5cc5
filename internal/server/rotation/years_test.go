package rotation_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/test/memory"
)

// TestYears simulates years in steps of hours, with agents that lag or never finish,
// operators who intervene, a server that is down for weeks, and a disk that fails. It
// checks after each step what must always hold.
func TestYears(t *testing.T) {
	t.Parallel()
	const histories, years = 40, 3
	steps, done := 0, map[string]int{}
	for seed := range uint64(histories) {
		w := newWorld(t, seed)
		for end := start.Add(years * 365 * day); w.now.Before(end); {
			w.pass()
			steps++
		}
		for _, c := range w.log {
			done[c.Actor+" "+c.Operation]++
		}
	}
	t.Logf("%d histories of %d years, %d checks: %v", histories, years, steps, done)
}

// world is a deployment, its agents and its operators.
type world struct {
	*testing.T
	seed      uint64
	rand      *rand.Rand
	now       time.Time
	memory    memory.Keysets
	log       []keyset.Change
	failing   int // 1: before the save, 2: after it
	keysets   *keyset.Deployment
	policy    rotation.Policy
	scheduler *rotation.Scheduler

	lag       time.Duration        // of the agents
	published time.Time            // the last change
	settles   map[string]time.Time // when a keyset is safe, by ID
	disturbed time.Time            // the last event that automatic rotation did not cause
	events    int
	replaced  map[string]bool // by automatic rotation, not by operators
	longest   time.Duration   // between two checks
	started   time.Time       // of the process
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{
		T: t, seed: seed, rand: rand.New(rand.NewPCG(seed, 0)), now: start, disturbed: start, settles: map[string]time.Time{}, replaced: map[string]bool{},
	}
	var err error
	w.policy, err = rotation.Policy{
		PreparationThreshold: time.Duration(w.between(7, 45)) * day,
		ActivationThreshold:  time.Duration(w.between(1, 84)) * time.Hour,
		TaintThreshold:       time.Duration(w.between(1, 84)) * time.Hour,
	}.For(keyset.DefaultLifetime)
	if err != nil {
		t.Fatal(err)
	}
	w.longest = 12 * time.Hour
	w.restart()
	return w
}

func (w *world) between(least, most int) int { return least + w.rand.IntN(most-least+1) }

func (w *world) one(of ...int) int { return of[w.rand.IntN(len(of))] }

// Fatalf fails with the history and the day.
func (w *world) Fatalf(format string, args ...any) {
	w.Helper()
	w.T.Fatalf("history %d, day %.2f: %s", w.seed, w.now.Sub(start).Hours()/24, fmt.Sprintf(format, args...))
}

func (w *world) restart() {
	w.started = w.now
	var err error
	w.keysets, err = keyset.Open(context.Background(), keyset.Config{TrustDomain: td, Storage: w, Now: func() time.Time { return w.now }})
	if err != nil {
		w.Fatal(err)
	}
	w.scheduler, err = rotation.New(rotation.Config{Keysets: w.keysets, Policy: w.policy, Facts: w,
		Clock: clock.New(func() time.Time { return w.now }, func() time.Duration { return w.now.Sub(start) }, time.Time{})})
	if err != nil {
		w.Fatal(err)
	}
}

// Load and Save make the world the storage of its deployment.
func (w *world) Load(ctx context.Context) (keyset.Document, error) { return w.memory.Load(ctx) }

func (w *world) Save(ctx context.Context, d keyset.Document, c keyset.Change) error {
	if w.failing == 1 {
		return errors.New("the disk is full")
	}
	before, _ := w.memory.Load(ctx)
	if err := w.memory.Save(ctx, d, c); err != nil {
		return err
	}
	w.checkStep(before, c)
	if w.failing == 2 {
		return errors.New("the disk is gone")
	}
	return nil
}

// Behind and Holding make the world the facts.
func (w *world) Behind() int {
	if w.now.Before(w.published.Add(w.lag)) {
		return 1
	}
	return 0
}

func (w *world) Holding(k keyset.Keyset) rotation.Holding {
	safe := !w.now.Before(w.settles[k.ID])
	return rotation.Holding{Agents: 1, X509Safe: safe, JWTSafe: safe}
}

// checkStep checks a step that was committed.
func (w *world) checkStep(before keyset.Document, c keyset.Change) {
	w.log = append(w.log, c)
	if c.Operation != "activate" {
		w.published = w.now
		w.lag = time.Duration(w.one(0, 1, 1, 30, 24*365)) * time.Hour
	}
	if c.Operation == "taint" {
		w.settles[c.KeysetID] = w.now.Add(time.Duration(w.one(0, 1, 50, 24*365)) * time.Hour)
	}
	var k, active keyset.Record
	for _, r := range before.Records {
		if r.ID == c.KeysetID {
			k = r
		}
		if r.State == keyset.Active {
			active = r
		}
	}
	automatic := c.Actor == rotation.Actor
	left := active.ExpiresAt.Sub(w.now)
	expired := !w.now.Before(k.ExpiresAt.Add(5*time.Minute + day))
	p := w.policy
	switch {
	case c.Operation == "activate":
		w.replaced[active.ID] = automatic
		delete(w.replaced, k.ID)
		if automatic && left > 0 {
			age := w.now.Sub(k.IssuedAt)
			if left > (p.PreparationThreshold-p.ActivationThreshold)/2 && w.Behind() > 0 {
				w.Fatalf("%s: activated with agents behind, %v before the end", c.Note, left)
			}
			if age < p.ActivationThreshold && age < left {
				w.Fatalf("%s: activated at an age of %v, %v before the end", c.Note, age, left)
			}
			if left > p.PreparationThreshold-p.ActivationThreshold {
				w.Fatalf("%s: activated %v before the end", c.Note, left)
			}
		}
	case !automatic:
	case c.Operation == "prepare":
		if left > p.PreparationThreshold {
			w.Fatalf("%s: prepared %v before the end", c.Note, left)
		}
	case c.Operation == "taint":
		if !expired && (!w.replaced[k.ID] || w.now.Before(k.SteppedDownAt.Add(p.TaintThreshold))) {
			w.Fatalf("%s: tainted %s, stepped down by %q at %v", c.Note, k.ID, k.SteppedDownBy, k.SteppedDownAt)
		}
	case c.Operation == "remove":
		if !expired && (!w.replaced[k.ID] || !w.Holding(keyset.Keyset{ID: k.ID}).X509Safe) {
			w.Fatalf("%s: removed %s, stepped down by %q", c.Note, k.ID, k.SteppedDownBy)
		}
	}
}

// pass advances the time by hours or simulates an event, and runs automatic rotation.
func (w *world) pass() {
	w.failing = 0
	step := time.Duration(w.between(1, 12)) * time.Hour
	up := true
	switch w.between(0, 199) {
	case 0: // the server is down
		step = time.Duration(w.between(1, 120)) * day
		w.event()
	case 1, 2:
		w.operate()
	case 3:
		w.failing = w.between(1, 2)
		up = false
		w.event()
	}
	w.now = w.now.Add(step)
	if step > w.longest {
		w.disturbed = w.now
		w.restart()
	}
	for range 20 {
		commits := len(w.log)
		w.scheduler.RunDue(context.Background())
		if len(w.log) == commits {
			break
		}
		if w.failing != 0 {
			w.now = w.now.Add(2 * time.Minute) // the pause after it
		}
	}
	if up {
		w.checkInvariants()
	}
}

func (w *world) event() { w.disturbed, w.events = w.now, w.events+1 }

// operate carries out a random operation of an operator.
func (w *world) operate() {
	ctx := keyset.WithActor(context.Background(), "alice")
	all := w.keysets.Status().Keysets
	id := all[w.rand.IntN(len(all))].ID
	switch w.between(0, 3) {
	case 0:
		_, _ = w.keysets.Prepare(ctx)
	case 1:
		_ = w.keysets.Activate(ctx, id)
	case 2:
		_ = w.keysets.Taint(ctx, id)
	case 3:
		_ = w.keysets.Remove(ctx, id)
	}
	w.event()
}

// checkInvariants checks what must hold after automatic rotation has run.
func (w *world) checkInvariants() {
	all, err := w.keysets.List(context.Background())
	if err != nil {
		w.Fatal(err)
	}
	p := w.policy
	undisturbed := w.now.Sub(w.disturbed)
	active := w.keysets.Active()
	left := active.ExpiresAt.Sub(w.now)
	if left <= 0 {
		w.Fatalf("the active keyset expired %v ago and was not replaced: %v", -left, all)
	}
	if undisturbed > p.PreparationThreshold && left < (p.PreparationThreshold-p.ActivationThreshold)/2-w.longest {
		w.Fatalf("the active keyset expires in %v, undisturbed for %v: %v", left, undisturbed, all)
	}
	for _, k := range all {
		// A day of uptime, plus the time between two checks.
		safe := k.State != keyset.Tainted || w.Holding(k).X509Safe
		if w.now.After(k.ExpiresAt.Add(5*time.Minute+day+w.longest)) && w.now.Sub(w.started) > day+w.longest && safe {
			w.Fatalf("keyset %v has expired and is not removed", k)
		}
		// At the first check after it is due.
		if k.SteppedDownBy != rotation.Actor {
			continue
		}
		if k.State == keyset.Prepared && w.now.Sub(k.SteppedDownAt) >= p.TaintThreshold {
			w.Fatalf("keyset %v was replaced and is not tainted", k)
		}
		if k.State == keyset.Tainted && w.Holding(k).X509Safe {
			w.Fatalf("keyset %v is safe to remove and not removed", k)
		}
	}
	prepared, activated := 0, 0
	for _, c := range w.log {
		switch {
		case c.Operation == "activate":
			activated++
		case c.Operation == "prepare" && c.Actor == rotation.Actor:
			prepared++
		}
	}
	if prepared > activated+w.events+1 {
		w.Fatalf("%d keysets prepared, %d activated, %d events", prepared, activated, w.events)
	}
	if i := slices.IndexFunc(all, func(k keyset.Keyset) bool { return k == active }); i < 0 {
		w.Fatalf("active is %v of %v", active, all)
	}
}
