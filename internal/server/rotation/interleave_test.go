package rotation_test

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/renewd/renewd/internal/server/keyset"
)

// TestEveryInterleaving runs, from every state of up to three keysets, every pair of
// operations of two operators and the due step of automatic rotation, in every
// interleaving: on one deployment, and on two with the same storage, like two processes.
// After each move it compares the real code with the model: what is stored, what is in
// force in each process, and the result of each operation.
//
// Interleavings that reach the same state of the model continue in the same way, so each
// continuation is tried once.
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

// initialStates returns all states with one to three keysets, one of them active, in two
// variants each: urgent, in which the prepared keysets have never signed and the active
// one expires soon; and another in which automatic rotation has replaced the others.
func initialStates() (all []modelDoc) {
	var add func(keysets []modelKeyset, active bool)
	add = func(keysets []modelKeyset, active bool) {
		if active {
			for _, urgent := range []bool{true, false} {
				d := modelDoc{version: 1, sequence: 4, made: len(keysets), keysets: slices.Clone(keysets)}
				for i := range d.keysets {
					k := &d.keysets[i]
					k.expires = urgent && k.state == keyset.Active
					k.signed = !urgent && k.state != keyset.Active
					k.automatic = k.signed
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
		names = append(names, "urgent")
	}
	return strings.Join(names, " ")
}

// sets returns the sets of threads to interleave: each operation alone and automatic
// rotation alone. States that are a permutation of another one have no more. For the
// others: in one process, automatic rotation and each two operations that can succeed; in
// two processes, each two operations, and each operation and automatic rotation.
func (d modelDoc) sets() (sets [][]modelThread) {
	auto := modelThread{auto: true, at: atDecide}
	autoOther := auto
	autoOther.on = 1
	sets = append(sets, []modelThread{auto})
	ops := d.operations()
	for i, a := range ops {
		first := modelThread{op: a, at: atBegin}
		sets = append(sets, []modelThread{first})
		if !slices.IsSortedFunc(d.keysets, func(a, b modelKeyset) int { return cmp.Compare(a.state, b.state) }) {
			continue
		}
		sets = append(sets, []modelThread{first, autoOther})
		for _, b := range ops[i:] {
			second := modelThread{op: b, at: atBegin}
			other := second
			other.on = 1
			if !d.active().expires { // for operators both variants are the same
				sets = append(sets, []modelThread{first, other})
			}
			if d.possible(a) && d.possible(b) {
				sets = append(sets, []modelThread{first, second, auto})
			}
		}
	}
	return sets
}

// possible reports whether an operation can become allowed by two others.
func (d modelDoc) possible(o op) bool {
	if o.verb == "prepare" {
		return true
	}
	k := d.find(o.name)
	return k != nil && (k.state == keyset.Prepared || (k.state == keyset.Tainted) == (o.verb == "remove"))
}

// operations returns all operations on each keyset, and one on a keyset that does not
// exist.
func (d modelDoc) operations() []op {
	ops := []op{{verb: "prepare"}, {"activate", 99}}
	for _, k := range d.keysets {
		ops = append(ops, op{"activate", k.name}, op{"taint", k.name}, op{"remove", k.name})
	}
	return ops
}

// explorer tries all interleavings from a state of the model.
type explorer struct {
	t       *testing.T
	fixture *fixture
	initial model
	seen    map[string]bool // states of the model that were reached
	todo    [][]int         // sequences of moves, by thread, whose continuation was not tried
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

// run starts from the initial state, makes the moves, and continues until all threads have
// ended or a state was reached before.
func (x *explorer) run(moves []int) {
	x.runs++
	r := x.fixture.start(x.t, x.initial)
	m := x.initial.clone()
	var made []int
	for {
		var runnable []int
		for i, t := range m.threads {
			if t.at != atEnd {
				runnable = append(runnable, i)
			}
		}
		if len(runnable) == 0 {
			return
		}
		next := runnable[0]
		if len(made) < len(moves) {
			next = moves[len(made)]
		} else {
			at := fmt.Sprint(m)
			if x.seen[at] {
				r.cancel()
				return
			}
			x.seen[at] = true
			for _, other := range runnable[1:] {
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
