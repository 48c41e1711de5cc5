package wave

import (
	"slices"
	"time"
)

// Pace is how fast SVIDs may be asked for, so that the server is asked for at
// most limit in any one second, by its own clock and whatever the network does.
//
// A request reaches the server at some time between its sending and its answer;
// when is not known. So an SVID holds one of limit places from its sending until
// a second after its answer, and none is sent without a free place: the SVID
// n+limit is sent no sooner than a second after the n-th answer.
//
// That is enough. Of limit+1 SVIDs that arrive within less than a second, take
// the one that was sent last: each of the others was answered, at the earliest,
// when it arrived, so it still held its place, and none was free. And it takes no
// less: what holds a place may arrive within a second of what is sent now.
//
// An SVID whose answer is slow takes its own place from the others and no more.
// Answers that take L seconds let limit/(1+L) SVIDs a second through.
//
// A Pace is not safe for concurrent use. All times must be read from one
// monotonic clock.
type Pace struct {
	limit int
	sent  int     // without an answer yet
	ended []ended // answered within the last second, oldest first
}

// ended is how many SVIDs were answered at a time.
type ended struct {
	at time.Time
	n  int
}

// NewPace returns a Pace for limit SVIDs a second, at least 1. It begins as if so
// many had been answered at now: a process before this one may have sent them.
func NewPace(limit int, now time.Time) *Pace {
	return &Pace{limit: limit, ended: []ended{{now, limit}}}
}

// Wait is how long after now, without further answers, n places are free; zero
// means that n SVIDs may be sent. It reports false while that is up to an answer.
func (p *Pace) Wait(n int, now time.Time) (d time.Duration, ok bool) {
	for len(p.ended) > 0 && now.Sub(p.ended[0].at) >= time.Second {
		p.ended = p.ended[1:]
	}
	free := p.limit - p.sent
	for _, e := range p.ended {
		free -= e.n
	}
	for _, e := range p.ended {
		if free >= n {
			break
		}
		free += e.n
		d = e.at.Add(time.Second).Sub(now)
	}
	return d, free >= n
}

// Send takes places for n SVIDs that are sent now.
func (p *Pace) Send(n int) { p.sent += n }

// Answer takes in that n SVIDs that were sent were answered at the time given, or
// that their answer is no longer waited for. Answers may be told of late and in
// any order.
func (p *Pace) Answer(n int, at time.Time) {
	p.sent -= n
	i := len(p.ended)
	for i > 0 && at.Before(p.ended[i-1].at) {
		i--
	}
	p.ended = slices.Insert(p.ended, i, ended{at, n})
}
