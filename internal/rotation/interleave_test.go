package rotation_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/keyset"
	"github.com/renewd/renewd/internal/rotation"
)

var errOvertaken = rotation.ErrOvertaken

// TestEveryInterleaving carries out, from every state of up to three keysets,
// every operation of two operators and the step of automatic rotation that is
// due, in every order in which they can come between each other: on one
// deployment, and on two over the same storage, as two processes would. After each
// move it compares the real code with the model: what is stored, what is in
// force in each process, and what each one was answered.
//
// Orders that lead through the same state of the model go on the same way, so
// each way on is tried once.
func TestEveryInterleaving(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	var states, setups, runs, moves atomic.Int64
	t.Cleanup(func() {
		t.Logf("%d states, %d sets of operations, %d interleavings, %d moves", states.Load(), setups.Load(), runs.Load(), moves.Load())
	})
	for _, initial := range initialStates() {
		states.Add(1)
		t.Run(initial.String(), func(t *testing.T) {
			t.Parallel()
			for _, threads := range initial.sets() {
				setups.Add(1)
				x := explorer{t: t, fixture: f, initial: model{stored: initial, inForce: [2]modelDoc{initial, initial}, threads: threads}}
				x.explore()
				runs.Add(int64(x.runs))
				moves.Add(int64(x.moves))
			}
		})
	}
}

// initialStates are all with one to three keysets, one of them active, for each
// two ways to have come there: what is prepared has never signed and the active one
// expires soon, or automatic rotation has replaced the others some time ago.
func initialStates() (all []modelDoc) {
	var add func(keysets []modelKeyset, active bool)
	add = func(keysets []modelKeyset, active bool) {
		if active {
			for _, pressing := range []bool{true, false} {
				d := modelDoc{version: 1, sequence: 4, made: len(keysets), keysets: slices.Clone(keysets)}
				for i := range d.keysets {
					k := &d.keysets[i]
					k.expires = pressing && k.state == keyset.Active
					k.signed = !pressing && k.state != keyset.Active
					k.ours = k.signed
				}
				all = append(all, d)
			}
		}
		if len(keysets) == 3 {
			return
		}
		for _, s := range []keyset.State{keyset.Prepared, keyset.Active, keyset.Tainted} {
			if s != keyset.Active || !active {
				add(append(slices.Clone(keysets), modelKeyset{name: len(keysets) + 1, state: s}), active || s == keyset.Active)
			}
		}
	}
	add(nil, false)
	return all
}

func (d modelDoc) String() string {
	var names []string
	for _, k := range d.keysets {
		names = append(names, k.state.String())
	}
	if d.active().expires {
		names = append(names, "pressing")
	}
	return strings.Join(names, " ")
}

// sets are those who act at the same time: each operation alone and automatic
// rotation alone; and, where the state is not another one's in a different order,
// each two operations that are not refused in any case and automatic rotation in
// one process; and each two operations, and each operation and automatic rotation,
// in two.
func (d modelDoc) sets() (sets [][]modelThread) {
	auto := modelThread{auto: true, at: atLook}
	elsewhere := auto
	elsewhere.on = 1
	sets = append(sets, []modelThread{auto})
	ops := d.operations()
	for i, a := range ops {
		first := modelThread{op: a, at: atBegin}
		sets = append(sets, []modelThread{first})
		if !slices.IsSortedFunc(d.keysets, func(a, b modelKeyset) int { return cmp.Compare(a.state, b.state) }) {
			continue
		}
		sets = append(sets, []modelThread{first, elsewhere})
		for _, b := range ops[i:] {
			second := modelThread{op: b, at: atBegin}
			other := second
			other.on = 1
			if !d.active().expires { // which does not matter to operators
				sets = append(sets, []modelThread{first, other})
			}
			if d.possible(a) && d.possible(b) {
				sets = append(sets, []modelThread{first, second, auto})
			}
		}
	}
	return sets
}

// possible reports whether an operation can come to be allowed while two others
// act.
func (d modelDoc) possible(o op) bool {
	if o.verb == "prepare" {
		return true
	}
	k := d.find(o.name)
	return k != nil && (k.state == keyset.Prepared || (k.state == keyset.Tainted) == (o.verb == "remove"))
}

// operations are all on each keyset, and one on none.
func (d modelDoc) operations() []op {
	ops := []op{{verb: "prepare"}, {"activate", 99}}
	for _, k := range d.keysets {
		ops = append(ops, op{"activate", k.name}, op{"taint", k.name}, op{"remove", k.name})
	}
	return ops
}

// explorer tries all ways from a state of the model.
type explorer struct {
	t       *testing.T
	fixture *fixture
	initial model
	seen    map[string]bool // states of the model whose ways on are being tried
	todo    [][]int         // moves, by thread, that lead to a way on that was not tried
	runs    int
	moves   int
}

func (x *explorer) explore() {
	x.seen, x.todo = map[string]bool{}, [][]int{nil}
	for len(x.todo) > 0 {
		moves := x.todo[len(x.todo)-1]
		x.todo = x.todo[:len(x.todo)-1]
		x.run(moves)
	}
}

// run begins anew, makes the moves, and goes on until all have ended or the way
// on is one that was tried.
func (x *explorer) run(moves []int) {
	x.runs++
	r := x.fixture.start(x.t, x.initial)
	m := x.initial.clone()
	var made []int
	for {
		var can []int
		for i, t := range m.threads {
			if t.at != atEnd {
				can = append(can, i)
			}
		}
		if len(can) == 0 {
			return
		}
		next := can[0]
		if len(made) < len(moves) {
			next = moves[len(made)]
		} else {
			at := fmt.Sprint(m)
			if x.seen[at] {
				r.giveUp()
				return
			}
			x.seen[at] = true
			for _, other := range can[1:] {
				x.todo = append(x.todo, append(slices.Clone(made), other))
			}
		}
		known := len(made) < len(moves)-1 // from an earlier run
		made = append(made, next)
		m.step(next)
		r.step(next)
		if known {
			continue
		}
		x.moves++
		if wrong := r.differs(m); wrong != "" {
			x.t.Fatalf("%+v, moves %v: %s", x.initial.threads, made, wrong)
		}
	}
}

// fixture is what is needed to set up any state.
type fixture struct{ records []keyset.Record }

func newFixture(t *testing.T) *fixture {
	memory := new(keyset.Memory)
	d := open(t, keyset.Config{Storage: memory})
	for range 2 {
		_, err := d.Prepare(t.Context())
		check(t, err)
	}
	doc, err := memory.Load(t.Context())
	check(t, err)
	return &fixture{doc.Records}
}

// real is the real code in the place of a model.
type real struct {
	t           *testing.T
	store       *steps
	deployments [2]*keyset.Deployment
	threads     []*thread
	names       map[string]int // of keysets, by ID
}

// thread is a goroutine that waits at a point until it is told to go on.
type thread struct {
	auto   bool
	loads  int
	goOn   chan struct{}
	paused chan bool // here and whether the model has no such point, or at the end
	ended  bool
	err    error
}

type threadKey struct{}

// pause waits at a point. Calls of nobody's thread do not wait.
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
	<-t.goOn
}

// steps is a storage that pauses before it loads and before and after it saves.
type steps struct {
	keyset.Memory
	saves []keyset.Change
	over  bool // every call fails
}

var errOver = errors.New("over")

func (s *steps) Load(ctx context.Context) (keyset.Document, error) {
	pause(ctx, true)
	if s.over {
		return keyset.Document{}, errOver
	}
	return s.Memory.Load(ctx)
}

func (s *steps) Save(ctx context.Context, d keyset.Document, c keyset.Change) error {
	pause(ctx, false)
	if s.over {
		return errOver
	}
	if err := s.Memory.Save(ctx, d, c); err != nil {
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
	check(t, r.store.Memory.Save(t.Context(), doc, keyset.Change{}))
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

// begin has threads wait to be told to go on.
func (r *real) begin(threads []modelThread) {
	r.threads = nil
	for _, mt := range threads {
		th := &thread{goOn: make(chan struct{}), paused: make(chan bool), auto: mt.auto}
		r.threads = append(r.threads, th)
		go func() {
			<-th.goOn
			th.err = r.do(context.WithValue(context.Background(), threadKey{}, th), mt)
			th.ended = true
			th.paused <- false
		}()
	}
}

// document is one with the states of the model.
func (f *fixture) document(m modelDoc, now time.Time) keyset.Document {
	doc := keyset.Document{Version: m.version, Sequence: m.sequence}
	for i, k := range m.keysets {
		rec := f.records[i]
		modelTimes(&rec, k, now)
		doc.Records = append(doc.Records, rec)
	}
	return doc
}

// do is what a thread does.
func (r *real) do(ctx context.Context, t modelThread) error {
	d := r.deployments[t.on]
	if t.auto {
		s, err := rotation.New(rotation.Config{Keysets: d, Facts: facts{}, Now: func() time.Time { return start }})
		if err != nil {
			return err
		}
		s.Look(ctx)
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

// step lets a thread go on to its next point. The storage also pauses where the
// model has no point.
func (r *real) step(i int) {
	t := r.threads[i]
	known := len(r.store.saves)
	for again := true; again && !t.ended; {
		t.goOn <- struct{}{}
		again = <-t.paused
	}
	if len(r.store.saves) > known {
		if c := r.store.saves[known]; c.Operation == "prepare" {
			r.names[c.KeysetID] = len(r.names) + 1
		}
	}
}

// giveUp ends all threads.
func (r *real) giveUp() {
	r.store.over = true
	for i, t := range r.threads {
		if !t.ended {
			r.step(i)
		}
	}
}

// differs says in what the real code is not as the model; empty: in nothing.
func (r *real) differs(m model) string {
	doc, err := r.store.Memory.Load(context.Background())
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
			return fmt.Sprintf("thread %d was answered %v, want %v", i, th.err, t.outcome)
		case th.ended && t.outcome == nil && th.err != nil:
			return fmt.Sprintf("thread %d failed: %v", i, th.err)
		}
	}
	return invariants(doc)
}

// text is what of a document can be compared: as it is stored, or in force.
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
			if k.ours {
				by = "scheduler"
			}
			out += fmt.Sprintf(" %q", by)
		}
	}
	return out
}

// invariants holds whatever the model says.
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
