package renew

import (
	"time"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// State is where the X.509-SVID of one entry is in its life on this node.
type State int

// The states. ARCHITECTURE.md draws what leads from one to the other.
const (
	StateWaiting    State = iota // none is held, and the first mint waits for its turn or for a trust bundle
	StateMinting                 // the server has been asked for it
	StateFresh                   // valid, and not due
	StateDue                     // valid, and its renewal waits for its turn
	StateBackingOff              // the last attempt did not renew it, and the next one waits for its pause
	StateStale                   // valid, its authority is tainted, and its renewal waits for the node's delay
	StateExpired                 // expired, and not replaced
)

// States lists every State.
var States = []State{StateWaiting, StateMinting, StateFresh, StateDue, StateBackingOff, StateStale, StateExpired}

var stateNames = [...]string{"waiting", "minting", "fresh", "due", "backing_off", "stale", "expired"}

// String returns the name that logs, metrics and "agent status" use.
func (s State) String() string { return stateNames[s] }

// reasonNotDue is the reason of a transition to StateFresh without a mint.
const reasonNotDue = "not_due"

// nextState decides the state of an item at now. svid is the newest one, or nil; due is
// when the item may be minted, its pause included.
func (r *Renewer) nextState(it *item, svid *cache.SVID, due, now time.Time) State {
	switch {
	case it.inFlight:
		return StateMinting
	case svid != nil && !svid.NotAfter.After(now):
		return StateExpired
	case due.After(now) && due.Equal(it.retry):
		return StateBackingOff
	case svid == nil:
		return StateWaiting
	case !due.After(now):
		return StateDue
	}
	if trust, _ := r.snapshot.State(svid.Authority); trust == bundle.Tainted {
		return StateStale
	}
	return StateFresh
}

// move puts an item in a state, counts it there and logs the transition. Its reason
// is the outcome of a mint that has ended, or why the item is due.
func (r *Renewer) move(it *item, to State) {
	from := it.state
	if from == to {
		return
	}
	it.state = to
	r.mu.Lock()
	r.states[from]--
	r.states[to]++
	r.mu.Unlock()
	reason := string(it.reason)
	switch {
	case from == StateMinting:
		reason = string(it.outcome)
	case to == StateFresh:
		reason = reasonNotDue
	}
	r.cfg.Log.Debug("X.509-SVID state changed", "spiffe_id", it.entry.SPIFFEID.String(), "entry_id", it.entryID,
		"from", from.String(), "to", to.String(), "reason", reason)
}

// count adds n to the items in a state.
func (r *Renewer) count(s State, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.states[s] += n
}

// States counts the entries whose X.509-SVID is to be held, by its state. It may be
// called at any time.
func (r *Renewer) States() map[State]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[State]int, len(States))
	for i, n := range r.states {
		out[State(i)] = n
	}
	return out
}
