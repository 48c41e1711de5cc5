package attest

import (
	"context"
	"fmt"
	"time"

	"github.com/renewd/renewd/cache"
)

// maxCalls is how many calls of a [Limited] attestor may be in flight. It bounds what a
// program that no longer answers costs, and what callers can demand of one that does.
const maxCalls = 32

// Limited is an attestor that always answers within its limit. Make it with [Limit].
type Limited struct {
	attestor Attestor
	limit    time.Duration
	calls    chan struct{} // one element for each call in flight
}

// Limit returns an attestor that answers as a does, and fails if a takes longer than limit.
// That includes the wait for a turn: 32 calls of a are in flight at a time. A call
// that ignores its context goes on unattended, and its result is dropped.
func Limit(a Attestor, limit time.Duration) *Limited {
	return &Limited{attestor: a, limit: limit, calls: make(chan struct{}, maxCalls)}
}

// Name returns the attestor's name.
func (l *Limited) Name() string { return l.attestor.Name() }

// Attest implements [Attestor].
func (l *Limited) Attest(ctx context.Context, p *Peer) ([]cache.Selector, error) {
	limited, cancel := context.WithTimeout(ctx, l.limit)
	defer cancel()
	select {
	case l.calls <- struct{}{}:
	case <-limited.Done():
		return nil, l.late(ctx, fmt.Sprintf("%d earlier calls have not ended", maxCalls))
	}
	type answer struct {
		selectors []cache.Selector
		err       error
	}
	answered := make(chan answer, 1)
	go func() {
		defer func() { <-l.calls }()
		s, err := l.attestor.Attest(limited, p)
		answered <- answer{s, err}
	}()
	select {
	case a := <-answered:
		if a.err != nil && limited.Err() != nil {
			return a.selectors, l.late(ctx, a.err.Error())
		}
		return a.selectors, a.err
	case <-limited.Done():
		return nil, l.late(ctx, "no answer")
	}
}

// late returns the error of a call that was not answered in time.
func (l *Limited) late(ctx context.Context, why string) error {
	if ctx.Err() != nil {
		return ctx.Err() // the caller gave up first
	}
	return fmt.Errorf("not answered within %v: %s", l.limit, why)
}
