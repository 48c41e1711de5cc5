package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/bootstrap"
)

// TrustSource publishes the trust bundle for the node's first connection.
type TrustSource interface {
	// Fetch asks for the bundle. It returns within a minute.
	Fetch(context.Context, bootstrap.Request) (*bundle.Bundle, error)
}

// Rebootstrap says what the agent does when the bundle in force does not verify the server
// any longer, such as on a node that was off while all keys were replaced. The names and
// meanings are those of spire-agent's rebootstrap_mode (SPIRE 1.16).
type Rebootstrap string

const (
	// RebootstrapNever keeps the bundle in force.
	RebootstrapNever Rebootstrap = "never"
	// RebootstrapAuto asks the source again, if the server lets the node attest again
	// without an operator.
	RebootstrapAuto Rebootstrap = "auto"
	// RebootstrapAlways asks the source again. The agent ends when the server does not
	// let the node attest again.
	RebootstrapAlways Rebootstrap = "always"
)

// rebootstrapper asks the source again while the server cannot be verified.
type rebootstrapper struct {
	mu sync.Mutex
	// since is when the server was first not verified, with a monotonic clock reading;
	// zero while the bundle in force verifies it.
	since time.Time
	// trust is the source's last answer, nil before the first one since then.
	trust *bundle.Bundle
	// verified is set when trust has verified the server at the last handshake.
	verified bool
	unknown  chan struct{} // wakes runRebootstrap
}

// source returns what publishes the trust bundle, nil for an insecure bootstrap.
func (a *Agent) source() TrustSource {
	switch {
	case a.cfg.TrustBundleFile != "":
		return bootstrap.File{Path: a.cfg.TrustBundleFile, TrustDomain: a.cfg.TrustDomain}
	case a.cfg.TrustSource != nil:
		return a.cfg.TrustSource
	}
	return nil
}

// bootstrapping reports whether the node has not received a bundle from a server yet: it
// trusts what its source says.
func (a *Agent) bootstrapping() bool { return a.firstTrust && a.applied.Load() == nil }

// describeTrust is the Trust of the upstream client. A bundle from before a rotation is the
// usual reason why a new node cannot verify its server.
func (a *Agent) describeTrust() (name, remedy string) {
	switch file := a.cfg.TrustBundleFile; {
	case !a.bootstrapping():
		return "the trust bundle in force", "check server_address, and if all its keys were replaced give its bundle in trust_bundle_file or set rebootstrap"
	case file != "":
		return "trust_bundle_file " + file, fmt.Sprintf("check server_address, and if the keys were rotated since the file was written, write it again with \"server bundle > %s\" at the server, or set trust_bundle_url", file)
	}
	return "the bundle of trust_bundle_url", "check server_address, and that the URL has the server's current bundle"
}

// verifyOtherwise is the VerifyOtherwise of the upstream client: it verifies the server
// with authorities that are new in trust_bundle_file, and with what the source says after
// the delay.
func (a *Agent) verifyOtherwise(verify func(*bundle.Bundle) error) bool {
	if trust, verified := a.newOperatorTrust(); trust != nil && verify(trust) == nil {
		verified()
		a.serverVerified()
		return true
	}
	r := &a.rebootstrap
	r.mu.Lock()
	if r.since.IsZero() {
		r.since = time.Now()
	}
	trust, before := r.trust, r.verified
	r.mu.Unlock()
	ok := trust != nil && verify(trust) == nil
	r.mu.Lock()
	r.verified = ok
	r.mu.Unlock()
	switch {
	case ok && !before:
		a.log.Warn("server verified with the trust bundle of its source, the bundle in force lacks its authority", "authority_ids", authorityIDs(trust))
	case !ok && a.cfg.Rebootstrap == RebootstrapNever && !a.bootstrapping():
		a.lines.Note(slog.LevelWarn, "server not verified by the bundle in force: check server_address, and if all its keys were replaced give its bundle in trust_bundle_file or set rebootstrap", "server")
	}
	select {
	case r.unknown <- struct{}{}:
	default:
	}
	return ok
}

func authorityIDs(b *bundle.Bundle) []string {
	ids := make([]string, 0, len(b.X509()))
	for _, x := range b.X509() {
		ids = append(ids, x.ID)
	}
	return ids
}

// serverVerified is the Verified of the upstream client.
func (a *Agent) serverVerified() {
	r := &a.rebootstrap
	r.mu.Lock()
	over := !r.since.IsZero()
	r.since, r.trust, r.verified = time.Time{}, nil, false
	r.mu.Unlock()
	if over {
		a.lines.Over("server", "server verified by the bundle in force")
	}
}

// unverified returns since when the server is not verified, zero if it is.
func (r *rebootstrapper) unverified() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.verified {
		return time.Time{}
	}
	return r.since
}

// runRebootstrap asks the source while the server is not verified, until ctx is done: at
// once while the node is bootstrapping, otherwise as [Config.Rebootstrap] says. It returns
// an error if the configuration wants a rebootstrap that is not possible.
func (a *Agent) runRebootstrap(ctx context.Context) error {
	if a.source() == nil {
		return nil
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.rebootstrap.unknown:
		}
		since := a.rebootstrap.unverified()
		if since.IsZero() {
			continue
		}
		again := !a.bootstrapping()
		if !again && a.cfg.TrustSource == nil {
			continue // verifyOtherwise reads trust_bundle_file
		}
		if again {
			if wanted, err := a.wantsRebootstrap(); !wanted || err != nil {
				if err != nil {
					return err
				}
				continue
			}
			left := a.cfg.RebootstrapDelay - time.Since(since)
			if left > 0 {
				a.log.Warn("server not verified by the bundle in force, asking the source of the trust bundle after the delay", "delay", left.Round(time.Second).String())
				if pause(ctx, left) != nil {
					return nil
				}
			}
		}
		if a.rebootstrap.unverified().Equal(since) {
			a.askUntilVerified(ctx, since, again)
		}
	}
}

// wantsRebootstrap reports whether the source may be asked for another bundle than the one
// in force.
func (a *Agent) wantsRebootstrap() (bool, error) {
	id := a.node.Identity()
	switch {
	case a.cfg.Rebootstrap == RebootstrapNever:
		return false, nil
	case id == nil || id.Reattestable:
		return true, nil
	case a.cfg.Rebootstrap == RebootstrapAlways:
		return false, errNotReattestable
	}
	a.lines.Note(slog.LevelWarn, "rebootstrap not possible, the server does not let this node attest again: give the server's bundle in trust_bundle_file", "server")
	return false, nil
}

// errNotReattestable ends an agent that always wants to rebootstrap.
var errNotReattestable = errors.New("rebootstrap is always, but the server does not let this node attest again: use a node_attestation that it accepts again, such as x509pop or k8s_psat, or set rebootstrap to auto or never")

// checkReattestable returns an error if the node has an identity with which
// RebootstrapAlways is not possible.
func (a *Agent) checkReattestable() error {
	if id := a.node.Identity(); a.cfg.Rebootstrap == RebootstrapAlways && id != nil && !id.Reattestable {
		return errNotReattestable
	}
	return nil
}

// askUntilVerified asks the source until its answer or the bundle in force verifies the
// server, or ctx is done.
func (a *Agent) askUntilVerified(ctx context.Context, since time.Time, again bool) {
	pace := newSourcePace()
	for attempt := 1; a.rebootstrap.unverified().Equal(since); attempt++ {
		b, err := a.ask(ctx, bootstrap.Request{Rebootstrap: again, Attempt: attempt, Since: since})
		if err == nil {
			a.rebootstrap.mu.Lock()
			if a.rebootstrap.since.Equal(since) {
				a.rebootstrap.trust = b
			}
			a.rebootstrap.mu.Unlock()
		}
		if pause(ctx, pace.NextBackOff()) != nil {
			return
		}
	}
}

// ask asks the source once and logs the outcome.
func (a *Agent) ask(ctx context.Context, r bootstrap.Request) (*bundle.Bundle, error) {
	b, err := a.source().Fetch(ctx, r)
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		a.lines.Note(slog.LevelWarn, "trust bundle not received from its source, trying again", "source", "attempt", r.Attempt, "error", err)
		return nil, err
	}
	a.lines.Over("source", "source of the trust bundle recovered")
	a.log.Info("trust bundle received from its source", "attempt", r.Attempt, "authority_ids", authorityIDs(b))
	bundle.LogLeftOut(a.log, a.cfg.TrustDomain, nil, b.LeftOut())
	return b, nil
}

// firstBundle returns the source's first answer. It asks until there is one.
func (a *Agent) firstBundle(ctx context.Context) (*bundle.Bundle, error) {
	pace, since := newSourcePace(), time.Now()
	for attempt := 1; ; attempt++ {
		b, err := a.ask(ctx, bootstrap.Request{Attempt: attempt, Since: since})
		if err == nil {
			return b, nil
		}
		if err := cmp.Or(ctx.Err(), pause(ctx, pace.NextBackOff())); err != nil {
			return nil, fmt.Errorf("ask the source of the trust bundle: %w", err)
		}
	}
}

// newSourcePace returns the pauses between two requests to the source: up to 10 s at
// first and 2 minutes at last, with full jitter, because the whole fleet may be asking.
func newSourcePace() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval = 5 * time.Second
	b.RandomizationFactor = 1
	b.Multiplier = 1.5
	b.MaxInterval = time.Minute
	b.Reset()
	return b
}

// pause waits for d, or returns the error of ctx when that ends first.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
