// Package attest turns the process at the other end of a Unix socket into
// selectors.
//
// A [Peer] is that process. A pidfd holds it from the moment that its connection is
// accepted, so that no later process with the same PID is mistaken for it. An
// [Attestor] reads one source about a Peer (the kernel, the container runtime, ...).
// [Selectors] calls all of them and then checks that the process is still the caller.
//
// The package works on Linux only.
package attest

import (
	"context"
	"errors"
	"fmt"

	"github.com/renewd/renewd/cache"
)

// Attestor finds selectors of a process. Implementations are safe for
// concurrent use, identify the process by its PID, and need not check whether
// the PID was reused: [Selectors] does that after them.
type Attestor interface {
	// Name is the type of its selectors, such as "unix".
	Name() string
	// Attest returns the selectors of the process; none is not an error. An error
	// means that selectors which an entry could need are missing. The selectors
	// returned with it are valid. The caller does not modify the result.
	Attest(ctx context.Context, p *Peer) ([]cache.Selector, error)
}

// Result is the outcome of the attestation of one process.
type Result struct {
	Selectors []cache.Selector
	// Partial is nil if every attestor succeeded. Otherwise selectors may be missing,
	// so that "no entry matches" is not certain.
	Partial error
}

// Selectors calls the attestors in turn. It fails if the process has exited
// ([ErrGone]), or if attestors failed and no selector was found.
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
	// Only a process that is still alive had its PID all the time.
	if err := p.Alive(); err != nil {
		return Result{}, err
	}
	res.Partial = errors.Join(failed...)
	if res.Partial != nil && len(res.Selectors) == 0 {
		return Result{}, res.Partial
	}
	return res, nil
}
