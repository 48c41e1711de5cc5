package ledger_test

import (
	"maps"
	"slices"
	"time"

	"github.com/renewd/renewd/internal/server/ledger"
)

// workload receives SVIDs on a stream and holds the last ones.
type workload struct {
	entries []string
	holds   map[string]svid
	open    bool
	viewed  map[string]svid // being sent
	sent    map[string]svid // by the present process of the agent; nil: none
	pushing bool
}

// push sends a workload its SVIDs, once the agent has all of them.
func (a *agent) push(w *workload) {
	if !w.open || w.pushing {
		return
	}
	life := a.life
	w.pushing = true
	hold := a.s.between(0, time.Second)
	if a.slow {
		hold *= 30
	}
	a.s.after(hold, func() {
		if a.life != life {
			return
		}
		w.pushing = false
		view := map[string]svid{}
		for _, e := range w.entries {
			v, ok := a.cache[e]
			if !ok {
				return // the stream waits
			}
			view[e] = v
		}
		a.s.touched[a] = true
		w.pushing, w.viewed = true, view
		a.s.after(a.s.between(0, 2*time.Second), func() {
			if a.life != life {
				return
			}
			w.pushing, w.holds, w.sent, w.viewed = false, view, view, nil
			a.follow(w)
		})
	})
}

// follow sends again if an SVID has changed meanwhile.
func (a *agent) follow(w *workload) {
	for e, v := range w.sent {
		if a.cache[e] != v {
			a.push(w)
			return
		}
	}
}

// report sends a report, after a change and once a minute. As far as the agent knows, at
// most one report is in flight.
func (a *agent) report() {
	s := a.s
	if a.bundle == nil || a.reporting {
		return
	}
	r := a.newReport()
	if r.Sequence == a.last.Sequence && slices.Equal(r.Authorities, a.last.Authorities) && s.now.Sub(a.lastReported) < time.Minute {
		return
	}
	a.reporting = true
	a.reports++
	r.Process, r.Number = a.process, uint64(a.reports)
	life, n := a.life, a.reports
	delay := s.between(0, 300*time.Millisecond)
	if s.happens(10, "report late") {
		delay = s.between(0, time.Minute)
	}
	lost := s.happens(10, "report lost")
	s.after(delay, func() {
		// The connection ends with the process, and loses the report.
		if lost || a.life != life || !s.server.reaches(a) || s.server.report(a, r) != nil {
			return
		}
		if !s.happens(10, "report's answer lost") && a.reports == n && a.reporting {
			a.reporting, a.last, a.lastReported = false, r, s.now
		}
	})
	s.after(10*time.Second, func() {
		if a.reports == n && a.life == life {
			a.reporting = false
		}
	})
}

// newReport counts in the same way as an agent.
func (a *agent) newReport() ledger.Report {
	r := ledger.Report{Sequence: a.bundle.sequence, Rate: 0.4}
	ids := slices.Collect(maps.Keys(a.bundle.tainted))
	for _, v := range a.cache {
		if _, ok := a.bundle.tainted[v.authority]; !ok {
			ids = append(ids, v.authority)
		}
	}
	slices.Sort(ids)
	for _, id := range slices.Compact(ids) {
		mark, trusted := a.bundle.tainted[id]
		if trusted && !mark {
			continue
		}
		of := func(m map[string]svid) bool {
			for _, v := range m {
				if v.authority == id {
					return true
				}
			}
			return false
		}
		x := ledger.AuthorityReport{Authority: id, Tainted: mark, BeginsAt: a.seen[id].Add(a.delays[id])}
		for _, v := range a.cache {
			if v.authority == id {
				x.Pending++
			}
		}
		for c := range a.calls {
			if !c.began.After(a.seen[id]) {
				x.Pending += len(c.entries)
			}
		}
		waiting := false
		for _, w := range a.workloads {
			if w.open && (of(w.sent) || of(w.viewed)) {
				x.Streams++
			}
			waiting = waiting || (w.open && w.sent == nil)
		}
		x.Settled = mark && x.Pending+x.Streams == 0 && !of(a.disk.cache) && !waiting && a.s.now.Sub(a.started) >= reconnects
		r.Authorities = append(r.Authorities, x)
	}
	return r
}
