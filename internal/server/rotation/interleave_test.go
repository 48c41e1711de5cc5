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
