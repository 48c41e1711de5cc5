// Package attest turns the process at the other end of a Unix socket into
// selectors.
//
// A [Peer] is that process. A pidfd holds it from the moment that its connection is
// accepted, so that no later process with the same PID is mistaken for it. An
// [Attestor] reads one source about a Peer (the kernel, the container runtime, ...).
// [Selectors] calls all of them side by side and then checks that the process is still
// the caller.
//
// The package works on Linux only.
package attest

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/renewd/renewd/cache"
)

// Attestor finds selectors of a process. Implementations are safe for
// concurrent use, identify the process by its PID, and need not check whether
// the PID was reused: [Selectors] does that after them. They return soon after ctx ends;
// [Limit] makes one return that may not.
type Attestor interface {
	// Name is the type of its selectors, such as "unix".
	Name() string
	// Attest returns the selectors of the process; none is not an error. An error
	// means that selectors which an entry could need are missing. The selectors
	// returned with it are valid. The caller does not modify the result.
	Attest(ctx context.Context, p *Peer) ([]cache.Selector, error)
}

// Finding is what one attestor found out about a process.
type Finding struct {
	Attestor  string           // its name, the type of its selectors
	Selectors []cache.Selector // not to be modified
	Took      time.Duration
	// Err is nil if the attestor succeeded. Otherwise selectors of its type may be
	// missing.
	Err error
}

// Findings are the outcome of the attestation of one process: one Finding for each
// attestor, in the order of the attestors.
type Findings []Finding

// Selectors returns all selectors that were found. The caller does not modify them.
func (f Findings) Selectors() []cache.Selector {
	if len(f) == 1 {
		return f[0].Selectors
	}
	var all []cache.Selector
	for _, one := range f {
		all = append(all, one.Selectors...)
	}
	return all
}

// Missing returns the types of which selectors may be missing, because their attestors
// failed; nil if there is none.
func (f Findings) Missing() []string {
	var types []string
	for _, one := range f {
		if one.Err != nil && !slices.Contains(types, one.Attestor) {
			types = append(types, one.Attestor)
		}
	}
	return types
}

// Selectors calls the attestors side by side and returns when all have answered. One that
// fails does not affect the others. Its only error is that the process has exited
// ([ErrGone]), or that this cannot be checked: then nothing that was found counts.
func Selectors(ctx context.Context, p *Peer, attestors []Attestor) (Findings, error) {
	found := make(Findings, len(attestors))
	if len(attestors) == 1 { // as on most nodes: costs no goroutine
		found[0] = find(ctx, p, attestors[0])
	} else {
		var all sync.WaitGroup
		for i, a := range attestors {
			all.Go(func() { found[i] = find(ctx, p, a) })
		}
		all.Wait()
	}
	// Only a process that is still alive had its PID all the time.
	if err := p.Alive(); err != nil {
		return nil, err
	}
	return found, nil
}

func find(ctx context.Context, p *Peer, a Attestor) Finding {
	start := time.Now()
	s, err := a.Attest(ctx, p)
	return Finding{Attestor: a.Name(), Selectors: s, Took: time.Since(start), Err: err}
}
