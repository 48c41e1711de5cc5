package wave

import (
	"slices"
	"time"
)

// Pace limits requests for SVIDs so that at most limit of them reach the server in any
// second of the server's clock, whatever the network does.
//
// A request reaches the server at an unknown time between its sending and its answer.
// So an SVID holds one of limit places from its sending until a second after its
// answer, and none is sent without a free place: the SVID n+limit is sent no sooner
// than a second after the n-th answer.
//
// That is sufficient. Of limit+1 SVIDs that arrive within less than a second, take the
// one that was sent last. Each of the others was answered when it arrived or later, so
// it still held its place, and none was free. It is also necessary: an SVID that holds
// a place may arrive within a second of one that is sent now.
//
// An SVID whose answer is slow holds one place. With answers after L seconds, limit/(1+L)
// SVIDs a second are sent.
//
// A Pace is not safe for concurrent use. All times must be read from one
// monotonic clock.
type Pace struct {
	limit int
	sent  int     // without an answer yet
	ended []ended // answered within the last second, oldest first
}

// ended is a number of SVIDs that were answered at the same time.
type ended struct {
	at time.Time
	n  int
}

// NewPace returns a Pace for limit SVIDs a second, at least 1. It begins as if limit
// SVIDs had been answered at now, because a previous process may have sent them.
func NewPace(limit int, now time.Time) *Pace {
	return &Pace{limit: limit, ended: []ended{{now, limit}}}
}

// Wait returns how long after now n places are free if no answer comes meanwhile; zero
// means that n SVIDs may be sent now. It reports false if that depends on an answer.
func (p *Pace) Wait(n int, now time.Time) (d time.Duration, ok bool) {
	for len(p.ended) > 0 && now.Sub(p.ended[0].at) >= time.Second {
		p.ended = p.ended[1:]
	}
	free := p.limit - p.sent
	for _, e := range p.ended {
		free -= e.n
	}
	for i := 0; free < n && i < len(p.ended); i++ {
		free += p.ended[i].n
		d = p.ended[i].at.Add(time.Second).Sub(now)
	}
	return d, free >= n
}

// Send records that n SVIDs are sent now.
func (p *Pace) Send(n int) { p.sent += n }

// Answer records that n of the SVIDs sent were answered at the given time, or that the
// caller stopped waiting for them. Calls may be late and in any order.
func (p *Pace) Answer(n int, at time.Time) {
	p.sent -= n
	i := len(p.ended)
	for i > 0 && at.Before(p.ended[i-1].at) {
		i--
	}
	p.ended = slices.Insert(p.ended, i, ended{at, n})
}
