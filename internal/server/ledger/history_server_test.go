package ledger_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/ledger"
)

// silence is the time without a report after which a node counts as ended if another
// one reports as the same agent.
const silence = 3 * time.Minute

// The lifetimes of SVIDs, shorter than real ones, so that they expire.
const (
	minTTL = 10 * time.Minute
	maxTTL = time.Hour
)

func (s *sim) ttl() time.Duration { return s.between(minTTL, maxTTL).Truncate(time.Second) }

type state int

const (
	prepared state = iota
	active
	tainted
	removed
)

// keyset is never lost: the keysets have their own storage.
type keyset struct {
	server         *server
	authority, key string
	state          state
	safe, met      bool // the ledger's last answer; whether it was ever safe
}

func (k *keyset) taint() {
	if k.state == prepared {
		k.state = tainted
		k.server.publish()
	}
}

// bundle is a published bundle.
type bundle struct {
	sequence uint64
	tainted  map[string]bool // by authority
}

type server struct {
	s       *sim
	up      bool
	life    int           // grows with each restart
	offset  time.Duration // of its clock from the true time
	slow    bool
	trouble bool // storage fails

	memory  *memory
	ledger  *ledger.Ledger
	keysets []*keyset
	removed []*keyset // because they were safe
	made    int
	bundle  *bundle
	calls   map[*call]struct{}

	restored []ledger.Restored // is stored, too
	copied   *copied           // the last copy
}

// copied is a copy of all that was stored.
type copied struct {
	at       time.Time
	rows     map[key]time.Time
	jwt      map[string]time.Time
	keysets  []*keyset
	states   []state
	restored []ledger.Restored
}

// call is a request for SVIDs, with the state of both ends.
type call struct {
	agent   *agent
	entries []string // of X.509-SVIDs
	jwt     bool
	began   time.Time
	open    bool // the agent waits for the answer
	signer  *keyset
	svids   map[string]svid
	expiry  time.Time // of the JWT-SVID
}

type svid struct {
	authority string
	notAfter  time.Time
}

var (
	errDisk    = errors.New("disk full")
	errCrashed = errors.New("crashed")
)

func newServer(s *sim) *server {
	v := &server{s: s, up: true, memory: newMemory(), calls: map[*call]struct{}{}}
	v.memory.hook = v.save
	v.rotate()
	v.open()
	s.after(0, v.sweep)
	return v
}

func (v *server) now() time.Time { return v.s.now.Add(v.offset) }

func (v *server) open() {
	l, err := ledger.Open(v.s.t.Context(), ledger.Config{Storage: v.memory, Restored: v.restored, Clock: clock.New(v.now, v.s.at, time.Time{})})
	check(v.s.t, err)
	v.ledger = l
}

// save checks the ledger while it waits for storage, and makes it fail or crash before
// or after the change is durable.
func (v *server) save(_ ledger.Change, stored bool) error {
	if v.ledger == nil {
		return nil
	}
	v.s.check()
	switch {
	case v.trouble && v.s.happens(4, fmt.Sprint("save failed, stored ", stored)):
		return errDisk
	case v.s.happens(1500, fmt.Sprint("crash in a save, stored ", stored)):
		panic(errCrashed)
	}
	return nil
}

// survives runs f; the server may crash in it.
func (v *server) survives(f func()) {
	defer func() {
		switch x := recover(); x {
		case nil:
		case errCrashed:
			if !v.up {
				v.s.t.Fatal("a server that is down was asked to store something")
			}
			v.crash()
		default:
			panic(x)
		}
	}()
	f()
}

// crash ends the process. It starts again after a while with the data in storage.
func (v *server) crash() {
	if !v.up {
		return
	}
	v.s.met["server restarted"]++
	v.up, v.ledger = false, nil
	v.life++
	for c := range v.calls {
		// SVIDs that were signed and not sent are lost.
		delete(v.calls, c)
	}
	rows := map[string]bool{}
	for k := range v.memory.rows {
		rows[k.agent] = true
	}
	for _, a := range v.s.agents {
		clear(a.spoke)
		if !rows[a.id] {
			a.heard = time.Time{} // its reports are lost
		}
	}
	v.open()
	v.s.after(v.s.between(0, time.Minute), func() { v.up = true })
}

func (v *server) copy() {
	c := &copied{at: v.now(), rows: maps.Clone(v.memory.rows), jwt: maps.Clone(v.memory.jwt), keysets: slices.Clone(v.keysets), restored: v.restored}
	for _, k := range v.keysets {
		c.states = append(c.states, k.state)
	}
	v.copied = c
}

// restore ends the process and discards all that was stored since the copy: new keysets
// are gone, taints and removals are undone, and the SVIDs signed since are unknown.
func (v *server) restore() {
	c := v.copied
	if c == nil || !v.up {
		return
	}
	v.memory.rows, v.memory.jwt = maps.Clone(c.rows), maps.Clone(c.jwt)
	unknown := ledger.Restored{CopiedAt: c.at, X509: map[string]time.Time{}, JWT: map[string]time.Time{}}
	v.restored = append(slices.Clip(c.restored), unknown)
	v.keysets = slices.Clone(c.keysets)
	for i, k := range v.keysets {
		k.state, k.safe = c.states[i], false
		v.removed = slices.DeleteFunc(v.removed, func(r *keyset) bool { return r == k })
		end := v.now().Add(maxTTL)
		unknown.X509[k.authority], unknown.JWT[k.key] = end, end
	}
	v.publish()
	v.crash()
}

func (v *server) heal() { v.trouble, v.slow, v.offset = false, false, 0 }

func (v *server) sweep() {
	v.s.after(time.Minute, v.sweep)
	if v.up {
		_, _ = ledger.Sweep(v.ledger, v.s.t.Context())
	}
}

func (v *server) in(st state) (out []*keyset) {
	for _, k := range v.keysets {
		if k.state == st {
			out = append(out, k)
		}
	}
	return out
}

func (v *server) active() *keyset { return v.in(active)[0] }

func (v *server) activate(k *keyset) {
	for _, old := range v.in(active) {
		old.state = prepared
	}
	k.state = active
}

// rotate prepares a keyset and activates it.
func (v *server) rotate() {
	v.made++
	k := &keyset{server: v, authority: fmt.Sprint("A", v.made), key: fmt.Sprint("J", v.made)}
	v.keysets = append(v.keysets, k)
	v.activate(k)
	v.publish()
}

func (v *server) remove(k *keyset) {
	k.state = removed
	for i := range v.keysets {
		if v.keysets[i] == k {
			v.keysets = append(v.keysets[:i:i], v.keysets[i+1:]...)
			break
		}
	}
	v.publish()
	_ = v.ledger.Removed(v.s.t.Context(), k.authority, k.key)
}

func (v *server) publish() {
	b := &bundle{tainted: map[string]bool{}}
	if v.bundle != nil {
		b.sequence = v.bundle.sequence + 1
	}
	for _, k := range v.keysets {
		b.tainted[k.authority] = k.state == tainted
	}
	v.bundle = b
}

// reaches reports whether a request of the agent arrives and is authorized.
func (v *server) reaches(a *agent) bool {
	return v.up && !a.partitioned && !a.evicted && !a.destroyed
}

// delay returns how long one step of a call takes.
func (v *server) delay() time.Duration {
	if v.slow {
		return v.s.between(0, 40*time.Second)
	}
	return v.s.between(0, 100*time.Millisecond)
}

// mint serves a call in the steps of the server, with other events in between.
func (v *server) mint(c *call) {
	s, life := v.s, v.life
	if !v.reaches(c.agent) {
		return
	}
	l := v.ledger
	end := l.Begin()
	v.calls[c] = struct{}{}
	step := func(f func()) {
		s.after(v.delay(), func() {
			if v.life == life {
				f()
			}
		})
	}
	step(func() {
		c.signer = v.active()
		step(func() {
			defer end()
			err := v.give(l, c)
			if err != nil || c.agent.partitioned || s.happens(20, "answer lost") {
				delete(v.calls, c)
				return
			}
			s.after(v.delay(), func() {
				delete(v.calls, c)
				if c.open {
					c.agent.take(c)
				}
			})
		})
	})
}

func (v *server) give(l *ledger.Ledger, c *call) error {
	ttl := c.agent.ttl
	if v.s.happens(4, "short life") {
		ttl = minTTL // the entry has changed
	}
	notAfter := v.now().Add(ttl).Truncate(time.Second)
	if c.jwt {
		c.expiry = notAfter
		return l.RecordJWT(v.s.t.Context(), c.signer.key, notAfter)
	}
	c.svids = map[string]svid{}
	var rows []ledger.Row
	for _, e := range c.entries {
		c.svids[e] = svid{c.signer.authority, notAfter}
		rows = append(rows, row(c.signer.authority, c.agent.id, e, notAfter))
	}
	return l.RecordX509(v.s.t.Context(), rows...)
}

// report stores a report of an agent.
func (v *server) report(a *agent, r ledger.Report) error {
	ctx, stop := context.WithCancel(v.s.t.Context())
	defer stop()
	if v.s.happens(20, "report given up on") {
		stop()
	}
	if a.cloned && !slices.Contains(v.ledger.Duplicated(), a.id) {
		// Of two nodes, the one that does not report counts as ended.
		for _, b := range v.s.agents {
			if b != a && b.id == a.id && v.s.now.Sub(b.heard) >= silence {
				b.unknown()
			}
		}
	}
	err := v.ledger.Report(ctx, a.id, r)
	if ctx.Err() == nil {
		v.s.touched[a], a.heard = true, v.s.now
		clear(a.spoke)
		for _, x := range r.Authorities {
			a.spoke[x.Authority] = x.Pending+x.Streams > 0
		}
	}
	return err
}
