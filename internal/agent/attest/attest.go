// Package attest turns the process at the other end of a Unix socket into
// selectors.
//
// A [Peer] is that process, held from the moment its connection is accepted by
// a pidfd, so that another process that is given the same PID later is never
// mistaken for it. An [Attestor] reads one source of truth about a Peer (the
// kernel, the container runtime, ...). [Selectors] asks all of them and then
// makes sure that the process they looked at was the one that called.
//
// The package works on Linux only, like all that it reads.
package attest

import (
	"context"
	"errors"
	"fmt"

	"github.com/renewd/renewd/cache"
)

// Attestor finds selectors of a process. Implementations are safe for
// concurrent use, look at the process by its PID, and need not check whether
// the PID was reused meanwhile: [Selectors] does that after them.
type Attestor interface {
	// Name is the type of its selectors, such as "unix".
	Name() string
	// Attest returns what it knows of the process; nothing to say about it is
	// no error. An error says that selectors which an entry could need were not
	// found out; those that come with it hold nevertheless. The caller does not
	// modify the result.
	Attest(ctx context.Context, p *Peer) ([]cache.Selector, error)
}

// Result is what the attestors found out about one process.
type Result struct {
	Selectors []cache.Selector
	// Partial is nil when every attestor found out all that it can. Otherwise it
	// says what failed: selectors may be missing, so that "no entry matches" is
	// not certain.
	Partial error
}

// Selectors asks the attestors in turn. It fails when the process has ended
// ([ErrGone]), or when attestors failed and no selector was found.
func Selectors(ctx context.Context, p *Peer, attestors []Attestor) (Result, error) {
	var res Result
	var failed []error
	for _, a := range attestors {
		s, err := a.Attest(ctx, p)
		if err != nil {
			failed = append(failed, fmt.Errorf("attestor %s: %w", a.Name(), err))
		}
		if len(res.Selectors) == 0 {
			res.Selectors = s[:len(s):len(s)]
		} else {
			res.Selectors = append(res.Selectors, s...)
		}
	}
	// Only a process that still lives held its PID all the time.
	if err := p.Alive(); err != nil {
		return Result{}, err
	}
	res.Partial = errors.Join(failed...)
	if res.Partial != nil && len(res.Selectors) == 0 {
		return Result{}, res.Partial
	}
	return res, nil
}
