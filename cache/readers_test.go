package cache_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
)

// A stream uses an authority from the View with an SVID of it until its process has read an
// answer without it.
func TestStreamsCountUntilTheReplacementIsRead(t *testing.T) {
	t.Parallel()
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t))
	e := entry("e", "x")
	c.Update([]*cache.Entry{e}, nil)
	put(t, c, svid(e, "A"))
	sub := c.Subscribe(cache.Process{PID: 1, Started: 1}, sel("x"))
	check := func(when string, want ...cache.Usage) {
		t.Helper()
		if got := c.Authorities(); !slices.Equal(got, want) {
			t.Errorf("%s: %+v, want %+v", when, got, want)
		}
	}
	check("subscribed", cache.Usage{Authority: "A", Held: 1})
	sub.View()
	check("on its way", cache.Usage{Authority: "A", Held: 1, Streams: 1})
	put(t, c, svid(e, "B")) // replaced while the old one is being sent
	check("replaced meanwhile", cache.Usage{Authority: "A", Streams: 1}, cache.Usage{Authority: "B", Held: 1})
	sub.Sending()
	sub.Read()
	check("old one read", cache.Usage{Authority: "A", Streams: 1}, cache.Usage{Authority: "B", Held: 1})
	sub.View()
	sub.Sending()
	check("new one sent", cache.Usage{Authority: "A", Streams: 1}, cache.Usage{Authority: "B", Held: 1, Streams: 1})
	sub.Read()
	check("new one read", cache.Usage{Authority: "B", Held: 1, Streams: 1})
	sub.Close()
	sub.Close()
	check("closed, the process goes on", cache.Usage{Authority: "B", Held: 1, Streams: 1})
	c.Sweep(func(cache.Process) cache.Life { return cache.Ended })
	check("the process has ended", cache.Usage{Authority: "B", Held: 1})
}

// No SVID counts after it has expired, neither held nor sent to a stream.
func TestExpiredSVIDsDoNotCount(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := cache.New(cache.Config{})
		c.SetBundle(snapshot(t))
		e := entry("e", "x")
		c.Update([]*cache.Entry{e}, nil)
		put(t, c, svid(e, "A"))
		read, sent, viewed, left := c.Subscribe(cache.Process{PID: 1}, sel("x")), c.Subscribe(cache.Process{PID: 2}, sel("x")),
			c.Subscribe(cache.Process{PID: 3}, sel("x")), c.Subscribe(cache.Process{PID: 4}, sel("x"))
		for _, s := range []*cache.Subscription{read, sent, viewed, left} {
			s.View()
		}
		for _, s := range []*cache.Subscription{read, sent, left} {
			s.Sending()
		}
		read.Read()
		left.Close()
		time.Sleep(time.Hour - time.Second)
		if got, want := c.Authorities(), []cache.Usage{{Authority: "A", Held: 1, Streams: 4}}; !slices.Equal(got, want) {
			t.Errorf("before the end: %+v, want %+v", got, want)
		}
		time.Sleep(time.Second)
		if got := c.Authorities(); len(got) > 0 || c.Held("A") != 0 || len(c.Uses()) != 0 {
			t.Errorf("after the end: %+v, %d held, processes use %v", got, c.Held("A"), c.Uses())
		}
	})
}

// Sweep asks only for processes with ended streams: their uses may have ended with them.
func TestSweepAsksForProcessesWithEndedStreams(t *testing.T) {
	t.Parallel()
	c := cache.New(cache.Config{})
	c.SetBundle(snapshot(t))
	e := entry("e", "x")
	c.Update([]*cache.Entry{e}, nil)
	put(t, c, svid(e, "A"))
	for pid := 1; pid <= 2; pid++ {
		sub := c.Subscribe(cache.Process{PID: pid}, sel("x"))
		sub.View()
		sub.Sending()
		sub.Read()
		if pid == 2 {
			sub.Close()
		}
	}
	var asked []int
	c.Sweep(func(p cache.Process) cache.Life {
		asked = append(asked, p.PID)
		return cache.Running
	})
	if !slices.Equal(asked, []int{2}) {
		t.Errorf("asked for the processes %v, want 2", asked)
	}
}

// After a restart a call counts until it is answered, because what its process uses is
// unknown, but not for longer than the grace. Without a restart it does not count.
func TestUnansweredCallsCountAfterARestart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := cache.New(cache.Config{})
		want := func(when string, n int) {
			t.Helper()
			if got := c.Unanswered(); got != n {
				t.Errorf("%s: %d unanswered, want %d", when, got, n)
			}
		}
		first := c.Subscribe(cache.Process{PID: 1}, nil)
		want("no restart", 0)
		first.Close()
		c.Restore(nil, nil, nil)
		a, b, d := c.Subscribe(cache.Process{PID: 1}, nil), c.Subscribe(cache.Process{PID: 2}, nil), c.Subscribe(cache.Process{PID: 3}, nil)
		want("three calls", 3)
		a.View()
		a.Sending()
		want("one is sent an answer", 3)
		a.Read()
		want("and has read it", 2)
		b.Close()
		b.Close()
		want("one is closed", 1)
		c.Release()
		c.Subscribe(cache.Process{PID: 4}, nil)
		want("one came later", 1)
		time.Sleep(cache.ReconnectGrace)
		want("nothing is signed for it", 0)
		a.Close()
		d.Close()
	})
}

// A process may be stopped when one of its clients has reconnected and another has not: the
// grace of the other begins when the process resumes.
func TestGraceBeginsWhenAStoppedProcessResumes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := cache.New(cache.Config{})
		c.SetBundle(snapshot(t))
		e := entry("e", "x")
		c.Update([]*cache.Entry{e}, nil)
		life := cache.Running
		read := func(authority string) *cache.Subscription {
			v := svid(e, authority)
			v.NotAfter = time.Now().Add(time.Hour)
			put(t, c, v)
			s := c.Subscribe(cache.Process{PID: 1, Started: 1}, sel("x"))
			s.View()
			s.Sending()
			s.Read()
			return s
		}
		pass := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(5 * time.Second) {
				c.Sweep(func(cache.Process) cache.Life { return life })
			}
		}
		want := func(when string, counts bool) {
			t.Helper()
			i := slices.IndexFunc(c.Authorities(), func(u cache.Usage) bool { return u.Authority == "A" && u.Streams > 0 })
			if (i >= 0) != counts {
				t.Errorf("%s: %+v, want A counted: %v", when, c.Authorities(), counts)
			}
		}
		read("A").Close()
		defer read("B").Close()
		pass(time.Minute)
		life = cache.Stopped
		pass(10 * time.Minute)
		want("stopped", true)
		life = cache.Running
		pass(cache.ReconnectGrace - 10*time.Second)
		want("resumed", true)
		pass(10 * time.Second)
		want("after its time", false)
	})
}

// In random histories of streams of several processes, with restarts, an authority counts
// exactly while a running process may use an SVID of it by the definition of the model.
func TestProcessesCountAsDefined(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for seed := range uint64(400) {
			m := &readersModel{t: t, seed: seed, r: rand.New(rand.NewPCG(seed, 0)), snapshot: snapshot(t)}
			m.play()
		}
	})
}

// readersModel is one history.
type readersModel struct {
	t         *testing.T
	seed      uint64
	r         *rand.Rand
	snapshot  *bundle.Snapshot
	c         *cache.Cache
	e         *cache.Entry
	processes []*modelProcess
	past      []string
}

type modelProcess struct {
	name    cache.Process
	life    cache.Life
	stopped time.Time // the last look that found it stopped
	streams []*modelStream
}

// modelStream is what one stream delivered to its process: by authority, until when it can
// be used.
type modelStream struct {
	sub    *cache.Subscription
	opened int                  // when, in steps
	ended  int                  // 0 while it is open
	cut    time.Time            // when it ended before it had read an answer
	viewed map[string]time.Time // being put together
	sent   map[string]time.Time // not read yet
	may    map[string]time.Time // what the process may use because of it
	read   []modelAnswer        // the answers that were read
}

type modelAnswer struct {
	at   time.Time
	uses map[string]time.Time
}

func (m *readersModel) play() {
	m.e = entry("e", "x")
	m.begin(nil)
	for i := range 3 {
		m.processes = append(m.processes, &modelProcess{name: cache.Process{PID: i, Started: uint64(i + 1)}})
	}
	for step := 1; step <= 60; step++ {
		p := m.processes[m.r.IntN(len(m.processes))]
		var s *modelStream // open, of p
		for _, o := range p.streams {
			if o.ended == 0 && (s == nil || m.r.IntN(2) == 0) {
				s = o
			}
		}
		op := m.r.IntN(16)
		m.past = append(m.past, fmt.Sprint(op, "/", p.name.PID))
		switch {
		case op < 2:
			v := svid(m.e, []string{"A", "B", "C"}[m.r.IntN(3)])
			v.NotAfter = time.Now().Add(time.Duration(1+m.r.IntN(20)) * time.Minute)
			put(m.t, m.c, v)
		case op < 5 && p.life == cache.Running:
			s := &modelStream{sub: m.c.Subscribe(p.name, sel("x")), opened: step, may: map[string]time.Time{}}
			p.streams = append(p.streams, s)
			m.send(s)
			if m.r.IntN(3) > 0 {
				s.hasRead()
			}
			if m.r.IntN(3) == 0 {
				s.end(step)
			}
		case op == 5 && s != nil:
			s.view()
		case op == 6 && s != nil && s.sent == nil:
			m.send(s)
		case op == 7 && s != nil && s.sent != nil && p.life == cache.Running:
			s.hasRead()
		case op == 8 && s != nil:
			s.end(step)
		case op == 9 && m.r.IntN(4) == 0:
			p.life = cache.Ended
			for _, s := range p.streams {
				s.end(step)
			}
		case op == 10 || op > 13:
			m.c.Sweep(func(name cache.Process) cache.Life { return m.processes[name.PID].life })
			for _, p := range m.processes {
				switch p.life {
				case cache.Ended:
					p.streams = nil
				case cache.Stopped:
					p.stopped = time.Now()
				}
			}
		case op == 11 && m.r.IntN(4) == 0:
			m.restart(step)
		case op >= 12 && p.life == cache.Running:
			p.life = cache.Stopped
		case op >= 12 && p.life == cache.Stopped:
			p.life = cache.Running
		}
		time.Sleep(time.Duration(1+m.r.IntN(90)) * time.Second)
		m.check()
	}
}

func (m *readersModel) begin(uses map[cache.Process][]cache.Use) {
	m.c = cache.New(cache.Config{})
	m.c.SetBundle(m.snapshot)
	if uses != nil {
		m.c.Restore(nil, nil, uses)
	}
	m.c.Update([]*cache.Entry{m.e}, nil)
}

// restart ends all streams. An answer that is not sent yet may have been sent.
func (m *readersModel) restart(step int) {
	uses := m.c.Uses()
	for _, p := range m.processes {
		left := &modelStream{opened: step, ended: step, may: map[string]time.Time{}}
		for _, s := range p.streams {
			for id := range s.may {
				later(left.may, s.may, id)
			}
			if s.ended == 0 {
				for id := range s.viewed {
					later(left.may, s.viewed, id)
				}
			}
		}
		p.streams = []*modelStream{left}
	}
	m.begin(uses)
}

func later(into, from map[string]time.Time, id string) {
	if from[id].After(into[id]) {
		into[id] = from[id]
	}
}

func (s *modelStream) view() {
	s.viewed = map[string]time.Time{}
	for _, id := range s.sub.View().Identities {
		s.viewed[id.SVID.Authority] = id.SVID.NotAfter
	}
}

func (m *readersModel) send(s *modelStream) {
	s.view()
	if got := len(s.sub.Sending()); got != len(s.viewed) {
		m.t.Fatalf("seed %d: an answer with SVIDs of %d authorities is said to use %d", m.seed, len(s.viewed), got)
	}
	for id := range s.viewed {
		later(s.may, s.viewed, id)
	}
	s.sent, s.viewed = s.viewed, nil
}

func (s *modelStream) hasRead() {
	s.sub.Read()
	s.read = append(s.read, modelAnswer{time.Now(), s.sent})
	s.may, s.sent = maps.Clone(s.sent), nil
}

func (s *modelStream) end(step int) {
	if s.ended == 0 {
		s.sub.Close()
		s.ended, s.viewed = step, nil
		if len(s.read) == 0 {
			s.cut = time.Now()
		}
	}
}

// replaced: a stream opened after the end of the last one that delivered an SVID of the
// authority has read an answer without it, and other clients have had time to reconnect:
// none waits for its first answer or was disconnected within the grace while it did, and
// the process was not stopped within the grace.
func (m *readersModel) replaced(p *modelProcess, id string) bool {
	last, cut := -1, p.stopped
	for _, s := range p.streams {
		if _, may := s.may[id]; may && s.ended > 0 {
			last = max(last, s.ended)
		}
		if s.ended == 0 && len(s.read) == 0 {
			return false
		}
		if s.cut.After(cut) {
			cut = s.cut
		}
	}
	return last >= 0 && time.Since(cut) >= cache.ReconnectGrace && slices.ContainsFunc(p.streams, func(s *modelStream) bool {
		return s.opened > last && slices.ContainsFunc(s.read, func(answer modelAnswer) bool {
			_, has := answer.uses[id]
			return !has && time.Since(answer.at) >= cache.ReconnectGrace
		})
	})
}

func (m *readersModel) check() {
	m.t.Helper()
	want, used := map[string]int{}, map[string]bool{}
	for _, p := range m.processes {
		for _, id := range []string{"A", "B", "C"} {
			open, left, replaced := 0, 0, m.replaced(p, id)
			for _, s := range p.streams {
				if replaced && s.ended > 0 {
					delete(s.may, id)
				}
				may := s.may[id].After(time.Now())
				switch {
				case s.ended == 0 && (may || s.viewed[id].After(time.Now())):
					open++
				case s.ended > 0 && may:
					left = 1
				}
			}
			if n := max(open, left); n > 0 {
				want[id] += n
				used[id] = true
			}
		}
	}
	got := map[string]int{}
	for _, u := range m.c.Authorities() {
		if u.Streams > 0 {
			got[u.Authority] = u.Streams
		}
	}
	if !maps.Equal(got, want) {
		m.t.Fatalf("seed %d after %v: counted are %v, want %v", m.seed, m.past, got, want)
	}
	for _, uses := range m.c.Uses() {
		for _, u := range uses {
			if !used[u.Authority] {
				m.t.Fatalf("seed %d after %v: a process uses %v, counted are %v", m.seed, m.past, u, want)
			}
		}
	}
}
