package kubernetes

import (
	"context"
	"errors"
	"sync"
	"time"
)

// requests owns the goroutines that ask.
type requests struct {
	stopping context.Context
	stop     context.CancelFunc

	mu      sync.Mutex // orders start and close
	running sync.WaitGroup
}

func newRequests() *requests {
	r := new(requests)
	r.stopping, r.stop = context.WithCancel(context.Background())
	return r
}

// start runs do in a goroutine. It returns false after close.
func (r *requests) start(do func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopping.Err() != nil {
		return false
	}
	r.running.Go(do)
	return true
}

func (r *requests) close() {
	r.mu.Lock()
	r.stop()
	r.mu.Unlock()
	r.running.Wait()
}

// requestTimeout ends a request that gets no answer.
const requestTimeout = 10 * time.Second

var errClosed = errors.New("the agent is stopping")

// source asks for values of one kind, at most one at a time, with the least time interval
// between two requests. It keeps the last good answer.
type source[T any] struct {
	owner    *requests
	interval time.Duration
	ask      func(context.Context) (T, error)

	mu    sync.Mutex
	held  *answer[T]
	asked time.Time // the start of the last request
	call  *call[T]  // nil if there is none
}

// answer is a value and the start of the request for it.
type answer[T any] struct {
	value T
	asked time.Time
}

// call is a request that is waiting or in flight.
type call[T any] struct {
	done   chan struct{}
	answer *answer[T]
	err    error
}

func newSource[T any](owner *requests, interval time.Duration, ask func(context.Context) (T, error)) *source[T] {
	return &source[T]{owner: owner, interval: interval, ask: ask}
}

// last returns the last good answer, nil if there is none.
func (s *source[T]) last() *answer[T] {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held
}

// isIdle reports whether nothing has been asked for a time.
func (s *source[T]) isIdle(d time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.call == nil && time.Since(s.asked) > d
}

// after returns an answer that was asked for after t: the one that is held, or that of
// the next request, which all callers share. A request does not end with its caller.
func (s *source[T]) after(ctx context.Context, t time.Time) (*answer[T], error) {
	s.mu.Lock()
	if s.held != nil && s.held.asked.After(t) {
		defer s.mu.Unlock()
		return s.held, nil
	}
	if !s.startLocked() {
		s.mu.Unlock()
		return nil, errClosed
	}
	c := s.call
	s.mu.Unlock()
	select {
	case <-c.done:
		return c.answer, c.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// refresh starts a request if the answer that is held was not asked for after t.
func (s *source[T]) refresh(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held != nil && !s.held.asked.After(t) {
		s.startLocked()
	}
}

// startLocked starts a request if there is none. It returns false after the owner's close.
func (s *source[T]) startLocked() bool {
	if s.call != nil {
		return true
	}
	c := &call[T]{done: make(chan struct{})}
	pause := time.Until(s.asked.Add(s.interval))
	if !s.owner.start(func() { s.run(c, pause) }) {
		return false
	}
	s.call = c
	return true
}

func (s *source[T]) run(c *call[T], pause time.Duration) {
	defer close(c.done)
	select {
	case <-time.After(pause):
	case <-s.owner.stopping.Done():
		c.err = errClosed
		return
	}
	ctx, cancel := context.WithTimeout(s.owner.stopping, requestTimeout)
	defer cancel()
	asked := time.Now()
	value, err := s.ask(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked, s.call = asked, nil
	if err != nil {
		c.err = err
		return
	}
	c.answer = &answer[T]{value, asked}
	s.held = c.answer
}
