package rotation_test

import (
	"testing"
)

// TestEveryCrash crashes at each point of every operation and of automatic rotation, in
// every state of up to three keysets, and opens the keysets again. They must be in the
// state before the step or after it, and automatic rotation must continue from there.
func TestEveryCrash(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	crashes := 0
	for _, initial := range initialStates() {
		threads := []modelThread{{auto: true, at: atDecide}}
		for _, o := range initial.operations() {
			threads = append(threads, modelThread{op: o, at: atBegin})
		}
		for _, thread := range threads {
			for points := range 5 {
				m := model{stored: initial, inForce: [2]modelDoc{initial}, threads: []modelThread{thread}}
				r := f.start(t, m)
				m = m.clone()
				for range points {
					m.step(0)
					r.step(0)
				}
				ended := m.threads[0].at == atEnd
				r.reopen(0)
				m.inForce[0] = m.stored
				if wrong := r.differs(m); wrong != "" {
					t.Fatalf("%v, %+v, crash after %d points: %s", initial, thread, points, wrong)
				}
				r.cancel()
				r.store.failing = false

				// The next process continues.
				m.busy[0], m.threads = false, []modelThread{{auto: true, at: atDecide}}
				r.begin(m.threads)
				for m.threads[0].at != atEnd {
					m.step(0)
					r.step(0)
					if wrong := r.differs(m); wrong != "" {
						t.Fatalf("%v, %+v, crash after %d points, then automatic rotation: %s", initial, thread, points, wrong)
					}
				}
				crashes++
				if ended {
					break
				}
			}
		}
	}
	t.Logf("%d crashes", crashes)
}
