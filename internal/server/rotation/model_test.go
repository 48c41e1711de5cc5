package rotation_test

import (
	"slices"
	"time"

	"github.com/renewd/renewd/internal/refusal"
	"github.com/renewd/renewd/internal/server/keyset"
)

// This file is a small model of the keysets of a deployment and of the threads that change
// them. It splits each mutation at the points where other threads can run. real_test.go
// compares the real code with it.

// modelKeyset is a keyset. Keysets are named by numbers, in order of issue.
type modelKeyset struct {
	name      int
	state     keyset.State
	signed    bool // was active and was replaced
	automatic bool // was replaced by automatic rotation
	recent    bool // issued or replaced in this run, so that no step is due
	expires   bool // soon, so that a successor is due
}

// modelDoc is what is stored.
type modelDoc struct {
	version, sequence uint64
	made              int // number of keysets ever prepared
	keysets           []modelKeyset
}

func (d modelDoc) find(name int) *modelKeyset {
	for i := range d.keysets {
		if d.keysets[i].name == name {
			return &d.keysets[i]
		}
	}
	return nil
}

func (d modelDoc) active() *modelKeyset {
	i := slices.IndexFunc(d.keysets, func(k modelKeyset) bool { return k.state == keyset.Active })
	return &d.keysets[i]
}

// op is an operation.
type op struct {
	verb string // prepare, activate, taint, remove; empty: none
	name int    // of the keyset; 0: none
}

// apply returns the document after an operation, or the error if it is not allowed.
func (d modelDoc) apply(o op, automatic bool) (modelDoc, error) {
	next := modelDoc{d.version + 1, d.sequence + 1, d.made, slices.Clone(d.keysets)}
	if o.verb == "prepare" {
		next.made++
		next.keysets = append(next.keysets, modelKeyset{name: next.made, state: keyset.Prepared, recent: true})
		return next, nil
	}
	k := next.find(o.name)
	if k == nil {
		return d, refusal.ErrNotFound
	}
	rejected := map[string]map[keyset.State]error{
		"activate": {keyset.Active: refusal.ErrActivateActive, keyset.Tainted: refusal.ErrActivateTainted},
		"taint":    {keyset.Active: refusal.ErrTaintActive, keyset.Tainted: refusal.ErrTaintTainted},
		"remove":   {keyset.Active: refusal.ErrRemoveActive, keyset.Prepared: refusal.ErrRemovePrepared},
	}
	if err := rejected[o.verb][k.state]; err != nil {
		return d, err
	}
	switch o.verb {
	case "activate":
		old := next.active()
		old.state, old.signed, old.automatic, old.recent = keyset.Prepared, true, automatic, true
		k.state, k.signed, k.automatic = keyset.Active, false, false
		next.sequence--
	case "taint":
		k.state = keyset.Tainted
	case "remove":
		next.keysets = slices.DeleteFunc(next.keysets, func(k modelKeyset) bool { return k.name == o.name })
	}
	return next, nil
}

// decide returns the step of automatic rotation when every condition holds and every
// keyset that is not recent is past its thresholds.
func (d modelDoc) decide() op {
	if d.active().expires {
		i := slices.IndexFunc(d.keysets, func(k modelKeyset) bool {
			return k.state == keyset.Prepared && !k.signed && !k.expires
		})
		switch {
		case i < 0:
			return op{verb: "prepare"}
		case !d.keysets[i].recent:
			return op{"activate", d.keysets[i].name}
		}
	}
	for _, k := range d.keysets {
		if k.state == keyset.Prepared && k.automatic && !k.recent {
			return op{"taint", k.name}
		}
	}
	for _, k := range d.keysets {
		if k.state == keyset.Tainted && k.automatic {
			return op{"remove", k.name}
		}
	}
	return op{}
}

// point is where a thread is paused: what it does next. Between two points no other
// thread can change the result: between the begin of a mutation and its load only another
// process can store something, with the same result as before the begin.
type point int

const (
	atDecide point = iota // read the keysets, decide and begin; automatic rotation only
	atBegin               // begin a mutation and load
	atLoad                // automatic rotation only: its decision can be superseded
	atSave
	atPublish
	atEnd
)

// modelThread is an operator with an operation, or automatic rotation.
type modelThread struct {
	on      int // index of its deployment: 0 or 1
	auto    bool
	op      op
	at      point
	loaded  modelDoc
	next    modelDoc
	outcome error
}

// model is the whole state. A deployment is a process: it has in force what it read or
// committed last, and carries out one mutation at a time.
type model struct {
	stored  modelDoc
	inForce [2]modelDoc
	busy    [2]bool
	threads []modelThread
}

func (m model) clone() model {
	m.threads = slices.Clone(m.threads)
	return m
}

func (m *model) learn(on int, d modelDoc) {
	if d.version > m.inForce[on].version {
		m.inForce[on] = d
	}
}

// step runs a thread to its next point.
func (m *model) step(i int) {
	t := &m.threads[i]
	end := func(err error) {
		t.outcome, t.at = err, atEnd
		t.loaded, t.next = modelDoc{}, modelDoc{}
		m.busy[t.on] = false
	}
	switch t.at {
	case atDecide:
		m.learn(t.on, m.stored)
		if t.op = m.stored.decide(); t.op.verb == "" {
			t.at = atEnd
			return
		}
		fallthrough
	case atBegin:
		if m.busy[t.on] {
			t.outcome, t.at = refusal.ErrBusy, atEnd
			return
		}
		m.busy[t.on] = true
		if t.auto {
			t.at = atLoad
			return
		}
		fallthrough
	case atLoad:
		m.learn(t.on, m.stored)
		next, err := m.stored.apply(t.op, t.auto)
		switch {
		case err != nil:
			end(err)
		case t.auto && m.stored.decide() != t.op:
			end(errSuperseded)
		default:
			t.loaded, t.next, t.at = m.stored, next, atSave
		}
	case atSave:
		if m.stored.version != t.loaded.version {
			end(refusal.ErrBusy)
			return
		}
		m.stored, t.at = t.next, atPublish
	case atPublish:
		m.learn(t.on, t.next)
		end(nil)
	}
}

// modelTimes sets the times of a keyset so that the fields of k are true at now.
func modelTimes(r *keyset.Record, k modelKeyset, now time.Time) {
	r.State, r.IssuedAt, r.ExpiresAt = k.state, now.Add(-30*day), now.Add(80*day)
	if k.expires {
		r.ExpiresAt = now.Add(5 * day)
	}
	if k.signed {
		r.SteppedDownAt, r.SteppedDownBy = now.Add(-5*day), "alice"
		if k.automatic {
			r.SteppedDownBy = "scheduler"
		}
	}
	if k.state == keyset.Tainted {
		r.TaintedAt = now.Add(-4 * day)
	}
}
