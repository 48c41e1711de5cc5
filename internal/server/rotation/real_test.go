package rotation_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/test/memory"
)

var (
	errSuperseded = rotation.ErrSuperseded
	errCanceled   = errors.New("canceled")
)

// fixture has the records of three keysets, to set up any state.
type fixture struct{ records []keyset.Record }

func newFixture(t *testing.T) *fixture {
	memory := new(memory.Keysets)
	d := open(t, keyset.Config{Storage: memory, Now: func() time.Time { return start.Add(-100 * day) }})
	for range 2 {
		_, err := d.Prepare(t.Context())
		check(t, err)
	}
	doc, err := memory.Load(t.Context())
	check(t, err)
	return &fixture{doc.Records}
}

// real is the real code in the state of a model.
type real struct {
	t           *testing.T
	store       *steps
	deployments [2]*keyset.Deployment
	threads     []*thread
	names       map[string]int // of keysets, by ID
}

// thread is a goroutine that pauses at each point until resume.
type thread struct {
	auto   bool
	loads  int
	resume chan struct{}
	paused chan bool // true if the model has no such point
	ended  bool
	err    error
}

type threadKey struct{}

// pause waits at a point. Calls outside a thread do not wait.
func pause(ctx context.Context, load bool) {
	t, ok := ctx.Value(threadKey{}).(*thread)
	if !ok {
		return
	}
	if load {
		t.loads++
	}
	// Only automatic rotation, which loads twice, has a point before a load.
	t.paused <- load && (t.loads == 1 || !t.auto)
	<-t.resume
}

// steps is a storage that pauses before it loads and before and after it saves.
type steps struct {
	memory.Keysets
	saves   []keyset.Change
	failing bool // every call fails
}

func (s *steps) Load(ctx context.Context) (keyset.Document, error) {
	pause(ctx, true)
	if s.failing {
		return keyset.Document{}, errCanceled
	}
	return s.Keysets.Load(ctx)
}

func (s *steps) Save(ctx context.Context, d keyset.Document, c keyset.Change) error {
	pause(ctx, false)
	if s.failing {
		return errCanceled
	}
	if err := s.Keysets.Save(ctx, d, c); err != nil {
		return err
	}
	s.saves = append(s.saves, c)
	pause(ctx, false)
	return nil
}

func (f *fixture) start(t *testing.T, m model) *real {
	r := &real{t: t, store: new(steps), names: map[string]int{}}
	doc := f.document(m.stored, start)
	for i, k := range m.stored.keysets {
		r.names[doc.Records[i].ID] = k.name
	}
	check(t, r.store.Keysets.Save(t.Context(), doc, keyset.Change{}))
	for i := range r.deployments {
		if i > 0 && !slices.ContainsFunc(m.threads, func(t modelThread) bool { return t.on == i }) {
			break
		}
		r.reopen(i)
	}
	r.begin(m.threads)
	return r
}

// reopen starts a process.
func (r *real) reopen(on int) {
	r.deployments[on] = open(r.t, keyset.Config{Storage: r.store, Now: func() time.Time { return start }})
}

// begin starts threads, which wait for resume.
func (r *real) begin(threads []modelThread) {
	r.threads = nil
	for _, mt := range threads {
		th := &thread{resume: make(chan struct{}), paused: make(chan bool), auto: mt.auto}
		r.threads = append(r.threads, th)
		go func() {
			<-th.resume
			th.err = r.do(context.WithValue(context.Background(), threadKey{}, th), mt)
			th.ended = true
			th.paused <- false
		}()
	}
}

// document returns a document with the states of the model.
func (f *fixture) document(m modelDoc, now time.Time) keyset.Document {
	doc := keyset.Document{Version: m.version, Sequence: m.sequence}
	for i, k := range m.keysets {
		rec := f.records[i]
		modelTimes(&rec, k, now)
		doc.Records = append(doc.Records, rec)
	}
	return doc
}

// do runs the operation of a thread.
func (r *real) do(ctx context.Context, t modelThread) error {
	d := r.deployments[t.on]
	if t.auto {
		s, err := rotation.New(rotation.Config{Keysets: d, Facts: facts{}, Clock: clock.New(func() time.Time { return start }, nil, time.Time{})})
		if err != nil {
			return err
		}
		s.RunDue(ctx)
		return s.Failed()
	}
	switch ctx := keyset.WithActor(ctx, "alice"); t.op.verb {
	case "prepare":
		_, err := d.Prepare(ctx)
		return err
	case "activate":
		return d.Activate(ctx, r.id(t.op.name))
	case "taint":
		return d.Taint(ctx, r.id(t.op.name))
	default:
		return d.Remove(ctx, r.id(t.op.name))
	}
}

func (r *real) id(name int) string {
	for id, n := range r.names {
		if n == name {
			return id
		}
	}
	return "ks_unknown000"
}

// step runs a thread to the next point of the model. The storage also pauses at others.
func (r *real) step(i int) {
	t := r.threads[i]
	known := len(r.store.saves)
	for again := true; again && !t.ended; {
		t.resume <- struct{}{}
		again = <-t.paused
	}
	if len(r.store.saves) > known {
		if c := r.store.saves[known]; c.Operation == "prepare" {
			r.names[c.KeysetID] = len(r.names) + 1
		}
	}
}

// cancel ends all threads.
func (r *real) cancel() {
	r.store.failing = true
	for i, t := range r.threads {
		if !t.ended {
			r.step(i)
		}
	}
}

// differs describes a difference between the real code and the model; empty: none.
func (r *real) differs(m model) string {
	doc, err := r.store.Keysets.Load(context.Background())
	if err != nil {
		return err.Error()
	}
	got := fmt.Sprint(doc.Version, doc.Sequence)
	for _, rec := range doc.Records {
		got += fmt.Sprintf(" %d %v", r.names[rec.ID], rec.State)
		if rec.State != keyset.Active {
			got += fmt.Sprintf(" %q", rec.SteppedDownBy)
		}
	}
	if want := m.stored.text(true); got != want {
		return fmt.Sprintf("stored is %s, want %s", got, want)
	}
	for i, d := range r.deployments {
		if d == nil {
			continue
		}
		s := d.Status()
		got := fmt.Sprint(s.Bundle.Sequence)
		for j, k := range s.Keysets {
			got += fmt.Sprintf(" %d %v", r.names[k.ID], k.State)
			a := s.Bundle.X509[j]
			if a.ID != k.X509AuthorityID || a.Tainted != (k.State == keyset.Tainted) {
				return fmt.Sprintf("published is %v, keysets are %v", s.Bundle, s.Keysets)
			}
			if k.State == keyset.Active && d.Active() != k {
				return fmt.Sprintf("active is %v, keysets are %v", d.Active(), s.Keysets)
			}
		}
		if want := m.inForce[i].text(false); got != want {
			return fmt.Sprintf("process %d has in force %s, want %s", i, got, want)
		}
	}
	for i, t := range m.threads {
		switch th := r.threads[i]; {
		case th.ended != (t.at == atEnd):
			return fmt.Sprintf("thread %d has ended: %v, %v; want %v", i, th.ended, th.err, t.at == atEnd)
		case th.ended && !errors.Is(th.err, t.outcome):
			return fmt.Sprintf("thread %d returned %v, want %v", i, th.err, t.outcome)
		case th.ended && t.outcome == nil && th.err != nil:
			return fmt.Sprintf("thread %d failed: %v", i, th.err)
		}
	}
	return invariants(doc)
}

// text returns the comparable parts of a document, as it is stored or in force.
func (d modelDoc) text(stored bool) string {
	out := fmt.Sprint(d.sequence)
	if stored {
		out = fmt.Sprint(d.version, d.sequence)
	}
	for _, k := range d.keysets {
		out += fmt.Sprintf(" %d %v", k.name, k.state)
		if stored && k.state != keyset.Active {
			by := ""
			if k.signed {
				by = "alice"
			}
			if k.automatic {
				by = "scheduler"
			}
			out += fmt.Sprintf(" %q", by)
		}
	}
	return out
}

// invariants checks what must hold regardless of the model.
func invariants(doc keyset.Document) string {
	active := 0
	ids := map[string]bool{}
	for _, r := range doc.Records {
		if r.State == keyset.Active {
			active++
		}
		ids[r.ID] = true
	}
	if active != 1 || len(ids) != len(doc.Records) {
		return fmt.Sprintf("%d active, %d IDs of %d keysets", active, len(ids), len(doc.Records))
	}
	return ""
}
