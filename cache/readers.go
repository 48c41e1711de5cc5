package cache

import (
	"slices"
	"time"
)

// ReconnectGrace is how long a workload whose stream ended may take to come back:
// gRPC's backoff and that of go-spiffe add up to 144 s.
const ReconnectGrace = 3 * time.Minute

// Process is a process on this node, told apart from all others that have had its
// PID. Started is its start time in clock ticks after boot (field 22 of
// proc_pid_stat(5)), 0 where that is not known.
//
// What streams have handed to a process counts against the authorities that signed
// it: while a stream is open, what the process has read last on it and what is on
// its way; after the stream has ended, all that it may have been handed. The latter
// counts until the process has ended, or for [ReconnectGrace] after a stream that it
// opened later has read an answer without the authority: a process may have several
// clients, which come back one after the other. That time begins again when a stream
// of the process ends before it has read an answer, and does not end while one is
// open that has not, or while the process is stopped. Nothing counts beyond its
// NotAfter.
type Process struct {
	PID     int
	Started uint64
}

// Life is what a process does.
type Life int

// The lives of a process. One that cannot be looked at counts as running.
const (
	Running Life = iota
	Stopped      // by a signal or a tracer, until it is resumed
	Ended
)

// Use says that SVIDs signed by an authority can be used, the last of them until
// NotAfter.
type Use struct {
	Authority string    `json:"authority"`
	NotAfter  time.Time `json:"not_after"`
}

// AddUse adds u to uses, in place if they have the authority, keeping the later end.
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

// reader is what is known of one process. Guarded by Cache.mu.
type reader struct {
	open map[*Subscription]struct{}
	left []leftover
}

// leftover is what streams that have ended left to a process, by authority.
type leftover struct {
	Use
	serial   uint64    // of the last such end: see Cache.serial; 0: in the agent process before
	replaced time.Time // from when ReconnectGrace runs; zero: no stream opened later has read an answer without the authority
}

func (c *Cache) next() uint64 {
	c.serial++
	return c.serial
}

// reader returns what is known of a process, and begins to know it.
func (c *Cache) reader(p Process) *reader {
	r := c.readers[p]
	if r == nil {
		r = &reader{open: make(map[*Subscription]struct{}, 1)}
		c.readers[p] = r
	}
	return r
}

// leave notes what an ended stream leaves to its process.
func (c *Cache) leave(s *Subscription) {
	r := c.readers[s.process]
	c.prune(s.process)
	delete(r.open, s)
	if !s.answered {
		r.wait()
	}
	for _, uses := range [][]Use{s.held, s.sent} {
		for _, u := range uses {
			r.leave(leftover{Use: u, serial: c.next()})
		}
	}
	if len(r.open)+len(r.left) == 0 {
		delete(c.readers, s.process)
	}
}

func (r *reader) leave(l leftover) {
	i := slices.IndexFunc(r.left, func(m leftover) bool { return m.Authority == l.Authority })
	if i < 0 {
		r.left = append(r.left, l)
		return
	}
	if r.left[i].NotAfter.After(l.NotAfter) {
		l.NotAfter = r.left[i].NotAfter
	}
	r.left[i] = l
}

// replaced notes what the process does not need any longer once s has read.
func (r *reader) replaced(s *Subscription) {
	for i := range r.left {
		l := &r.left[i]
		if l.replaced.IsZero() && l.serial < s.serial && !slices.ContainsFunc(s.held, func(u Use) bool { return u.Authority == l.Authority }) {
			l.replaced = time.Now()
		}
	}
}

// wait gives clients that could not come back until now the time to do so.
func (r *reader) wait() {
	for i := range r.left {
		if l := &r.left[i]; !l.replaced.IsZero() {
			l.replaced = time.Now()
		}
	}
}

// over reports whether what was left can be forgotten.
func (r *reader) over(l leftover, now time.Time) bool {
	return !l.NotAfter.After(now) || !l.replaced.IsZero() && time.Since(l.replaced) >= ReconnectGrace && !r.waiting()
}

// waiting reports whether a stream is open that has not read an answer.
func (r *reader) waiting() bool {
	for s := range r.open {
		if !s.answered {
			return true
		}
	}
	return false
}

// prune forgets what is over of a process, and the process when nothing is left.
func (c *Cache) prune(p Process) {
	r, now := c.readers[p], c.now()
	if r == nil {
		return
	}
	r.left = slices.DeleteFunc(r.left, func(l leftover) bool { return r.over(l, now) })
	if len(r.open)+len(r.left) == 0 {
		delete(c.readers, p)
	}
}

// Sweep forgets what processes that have ended were left, and whatever else has come
// to be over. It calls look for processes whose streams have ended, with no lock held.
// What a process was left is not over before [ReconnectGrace] after the last Sweep that
// found it stopped.
func (c *Cache) Sweep(look func(Process) Life) {
	lives := make(map[Process]Life)
	c.mu.Lock()
	for p, r := range c.readers {
		if len(r.left) > 0 {
			lives[p] = Running
		}
	}
	c.mu.Unlock()
	for p := range lives {
		lives[p] = look(p)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for p, life := range lives {
		c.prune(p)
		r := c.readers[p]
		switch {
		case r == nil:
		case life == Stopped:
			r.wait()
		case life == Ended:
			r.left = nil
			c.prune(p)
		}
	}
}

// uses are those of a stream that count now.
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

// Uses returns what each process can use now, as far as streams handed it out. The
// map is the caller's.
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
		for _, l := range r.left {
			if !r.over(l, now) {
				all = AddUse(all, l.Use)
			}
		}
		if len(all) > 0 {
			out[p] = all
		}
	}
	return out
}

// using counts, by authority, the open streams whose process can use an SVID that it
// signed, and the processes that can because of streams that have ended.
func (c *Cache) using(now time.Time) map[string]int {
	out := make(map[string]int)
	for _, r := range c.readers {
		for s := range r.open {
			for _, u := range s.uses(now) {
				out[u.Authority]++
			}
		}
		for _, l := range r.left {
			if !r.over(l, now) && !r.streams(l.Authority, now) {
				out[l.Authority]++
			}
		}
	}
	return out
}

// streams reports whether an open stream of the process counts against the authority.
func (r *reader) streams(authority string, now time.Time) bool {
	for s := range r.open {
		if slices.ContainsFunc(s.uses(now), func(u Use) bool { return u.Authority == authority }) {
			return true
		}
	}
	return false
}

// Unanswered counts the open streams of workloads that came back to a restarted agent
// and have read nothing yet. What they use is not known, unless it was restored. One
// counts for [ReconnectGrace] at most.
func (c *Cache) Unanswered() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, r := range c.readers {
		for s := range r.open {
			if s.early && !s.answered && time.Since(s.opened) < ReconnectGrace {
				n++
			}
		}
	}
	return n
}
