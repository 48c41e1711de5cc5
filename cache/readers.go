package cache

import (
	"slices"
	"time"
)

// ReconnectGrace is how long a workload may take to reconnect after its stream has ended.
// The backoffs of gRPC and go-spiffe add up to 144 s.
const ReconnectGrace = 3 * time.Minute

// Process is a process on this node. Started, its start time in clock ticks after boot
// (field 22 of proc_pid_stat(5), 0 if unknown), distinguishes it from others with the
// same PID.
//
// SVIDs sent to a process count as uses of the authorities that signed them. While a
// stream is open, the SVIDs that the process last read on it and those in flight count.
// After the stream has ended, all SVIDs count that it may have delivered, until the
// process has ended, or for [ReconnectGrace] after a stream opened later has read an
// answer without the authority: a process may have several clients, which reconnect one
// after the other. That time restarts when a stream of the process ends before it has
// read an answer. It does not end while an open stream has not read one, or while the
// process is stopped. No SVID counts after its NotAfter.
type Process struct {
	PID     int
	Started uint64
}

// Life is whether a process runs.
type Life int

// The lives of a process. One whose state cannot be read counts as running.
const (
	Running Life = iota
	Stopped      // by a signal or a tracer, until it is resumed
	Ended
)

// Use means that SVIDs signed by an authority can be used, the last of them until
// NotAfter.
type Use struct {
	Authority string    `json:"authority"`
	NotAfter  time.Time `json:"not_after"`
}

// AddUse adds u to uses. If they have the authority, the later NotAfter is kept.
func AddUse(uses []Use, u Use) []Use {
	i := slices.IndexFunc(uses, func(v Use) bool { return v.Authority == u.Authority })
	if i < 0 {
		return append(uses, u)
	}
	if u.NotAfter.After(uses[i].NotAfter) {
		uses[i] = u
	}
	return uses
}

// reader is a process with its streams. Guarded by Cache.mu.
type reader struct {
	open map[*Subscription]struct{}
	past []pastUse
}

// pastUse is the use of one authority by a process through streams that have ended.
type pastUse struct {
	Use
	serial   uint64    // of the last such stream's end, see Cache.serial; 0: before a restart
	replaced time.Time // when ReconnectGrace began; zero: no stream opened later has read an answer without the authority
}

func (c *Cache) nextSerialLocked() uint64 {
	c.serial++
	return c.serial
}

// readerLocked returns the reader of a process, and adds it if there is none.
func (c *Cache) readerLocked(p Process) *reader {
	r := c.readers[p]
	if r == nil {
		r = &reader{open: make(map[*Subscription]struct{}, 1)}
		c.readers[p] = r
	}
	return r
}

// endStreamLocked records what the process can use because of the ended stream.
func (c *Cache) endStreamLocked(s *Subscription) {
	r := c.readers[s.process]
	c.pruneLocked(s.process)
	delete(r.open, s)
	if !s.answered {
		r.restartGrace()
	}
	for _, uses := range [][]Use{s.held, s.sent} {
		for _, u := range uses {
			r.addPast(pastUse{Use: u, serial: c.nextSerialLocked()})
		}
	}
	if len(r.open)+len(r.past) == 0 {
		delete(c.readers, s.process)
	}
}

func (r *reader) addPast(l pastUse) {
	i := slices.IndexFunc(r.past, func(m pastUse) bool { return m.Authority == l.Authority })
	if i < 0 {
		r.past = append(r.past, l)
		return
	}
	if r.past[i].NotAfter.After(l.NotAfter) {
		l.NotAfter = r.past[i].NotAfter
	}
	r.past[i] = l
}

// markReplaced starts ReconnectGrace for the past uses that the answer read by s replaces.
func (r *reader) markReplaced(s *Subscription) {
	for i := range r.past {
		l := &r.past[i]
		if l.replaced.IsZero() && l.serial < s.serial && !slices.ContainsFunc(s.held, func(u Use) bool { return u.Authority == l.Authority }) {
			l.replaced = time.Now()
		}
	}
}

// restartGrace restarts ReconnectGrace for clients that could not reconnect until now.
func (r *reader) restartGrace() {
	for i := range r.past {
		if l := &r.past[i]; !l.replaced.IsZero() {
			l.replaced = time.Now()
		}
	}
}

// expired reports whether a past use counts no longer.
func (r *reader) expired(l pastUse, now time.Time) bool {
	return !l.NotAfter.After(now) || !l.replaced.IsZero() && time.Since(l.replaced) >= ReconnectGrace && !r.unanswered()
}

// unanswered reports whether a stream is open that has not read an answer.
func (r *reader) unanswered() bool {
	for s := range r.open {
		if !s.answered {
			return true
		}
	}
	return false
}

// pruneLocked drops the expired past uses of a process, and the process if none is left.
func (c *Cache) pruneLocked(p Process) {
	r, now := c.readers[p], c.now()
	if r == nil {
		return
	}
	r.past = slices.DeleteFunc(r.past, func(l pastUse) bool { return r.expired(l, now) })
	if len(r.open)+len(r.past) == 0 {
		delete(c.readers, p)
	}
}

// Sweep drops the uses of processes that have ended, and all others that count no longer.
// It calls state for processes with ended streams, with no lock held. The uses of a
// process count for [ReconnectGrace] after the last Sweep that found it stopped.
func (c *Cache) Sweep(state func(Process) Life) {
	lives := make(map[Process]Life)
	c.mu.Lock()
	for p, r := range c.readers {
		if len(r.past) > 0 {
			lives[p] = Running
		}
	}
	c.mu.Unlock()
	for p := range lives {
		lives[p] = state(p)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for p, life := range lives {
		c.pruneLocked(p)
		r := c.readers[p]
		switch {
		case r == nil:
		case life == Stopped:
			r.restartGrace()
		case life == Ended:
			r.past = nil
			c.pruneLocked(p)
		}
	}
}

// uses returns the uses of a stream that count now.
func (s *Subscription) uses(now time.Time) []Use {
	var out []Use
	for _, uses := range [][]Use{s.held, s.sent, s.viewed} {
		for _, u := range uses {
			if u.NotAfter.After(now) {
				out = AddUse(out, u)
			}
		}
	}
	return out
}

// Uses returns what each process can use now because of its streams. The map is the
// caller's.
func (c *Cache) Uses() map[Process][]Use {
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make(map[Process][]Use, len(c.readers))
	for p, r := range c.readers {
		var all []Use
		for s := range r.open {
			for _, u := range s.uses(now) {
				all = AddUse(all, u)
			}
		}
		for _, l := range r.past {
			if !r.expired(l, now) {
				all = AddUse(all, l.Use)
			}
		}
		if len(all) > 0 {
			out[p] = all
		}
	}
	return out
}

// countUsesLocked counts, by authority, the open streams whose process can use an SVID that
// it signed, and the processes that can because of ended streams alone.
func (c *Cache) countUsesLocked(now time.Time) map[string]int {
	out := make(map[string]int)
	for _, r := range c.readers {
		for s := range r.open {
			for _, u := range s.uses(now) {
				out[u.Authority]++
			}
		}
		for _, l := range r.past {
			if !r.expired(l, now) && !r.streams(l.Authority, now) {
				out[l.Authority]++
			}
		}
	}
	return out
}

// streams reports whether an open stream of the process uses the authority.
func (r *reader) streams(authority string, now time.Time) bool {
	for s := range r.open {
		if slices.ContainsFunc(s.uses(now), func(u Use) bool { return u.Authority == authority }) {
			return true
		}
	}
	return false
}

// Unanswered counts the open streams of workloads that have reconnected to a restarted
// agent and have not read an answer. What they use is unknown, unless it was restored.
// Each counts for [ReconnectGrace] at most.
func (c *Cache) Unanswered() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, r := range c.readers {
		for s := range r.open {
			if s.returned && !s.answered && time.Since(s.opened) < ReconnectGrace {
				n++
			}
		}
	}
	return n
}
