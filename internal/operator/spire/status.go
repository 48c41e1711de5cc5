package spire

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/renewd/renewd/internal/operator/prom"
	"github.com/renewd/renewd/internal/operator/runbook"
)

// Why figures are not to be had.
const (
	noFigures       = "SPIRE does not know what agents hold: give --prometheus"
	upstreamFigures = "an upstream authority signs the X.509 authorities, and agents count by that one"
)

// automatic is what SPIRE's own rotation does; it cannot be asked when.
const automatic = "SPIRE prepares the next keyset by itself when half of the active one's life has passed, in the place of one that has stepped down, and activates it near the end"

// Status returns the keysets of the server, in order of issue. Of a keyset with
// one half the other's ID is empty. With no figures, or when they cannot be
// had, each keyset says why.
func (b *Backend) Status(ctx context.Context) (runbook.Status, error) {
	s, err := b.read(ctx)
	if err != nil {
		return runbook.Status{}, err
	}
	agents, err := b.expected(ctx)
	if err != nil {
		return runbook.Status{}, err
	}
	out := runbook.Status{
		TrustDomain: s.trustDomain, Deployment: b.cfg.Deployment, Sequence: s.sequence,
		Agents: len(agents), AgentsBehind: -1, Automatic: automatic,
	}
	for _, p := range s.pairs {
		k := p.keyset()
		f, err := b.figures(ctx, s, p, agents)
		if err != nil {
			k.Unknown = err.Error()
		} else {
			out.Agents, out.AgentsBehind = f.Expected, f.Behind(s.sequence)
			judge(&k, p, s, f)
		}
		out.Keysets = append(out.Keysets, k)
	}
	return out, nil
}

// keyset is what the server knows of the pair; the figures are not known.
func (p pair) keyset() runbook.Keyset {
	k := runbook.Keyset{
		ID: p.id(), State: p.x509.state(), IssuedAt: p.x509.issued, ExpiresAt: p.expires(), X509SVIDs: -1,
		SteppedDown: p.any(func(h half) bool { return h.place == old }),
	}
	if p.x509.here() {
		k.X509AuthorityID = p.x509.id
	}
	if p.jwt.here() {
		k.JWTKeyID = p.jwt.id
		k.State = cmp.Or(k.State, p.jwt.state())
		if p.jwt.state() != k.State {
			k.JWTState = p.jwt.state()
		}
	}
	return k
}

// judge adds the figures. Nothing can be lost with a half that is gone.
func judge(k *runbook.Keyset, p pair, s server, f prom.Figures) {
	k.JWTExpiry = f.JWTExpiry
	k.JWTSafe = !p.jwt.here() || (p.jwt.tainted && f.JWTSafe)
	if s.upstream != "" {
		k.Unknown = upstreamFigures
		return
	}
	k.X509SVIDs = f.X509SVIDs
	k.X509Safe = !p.x509.here() || (p.x509.tainted && f.X509Safe)
}

// figures asks for a keyset's figures, if there is anybody to ask.
func (b *Backend) figures(ctx context.Context, s server, p pair, agents []string) (prom.Figures, error) {
	if b.cfg.Figures == nil {
		return prom.Figures{}, errors.New(noFigures)
	}
	var x509ID, jwtID string
	if p.x509.here() && s.upstream == "" {
		x509ID = p.x509.id
	}
	if p.jwt.here() {
		jwtID = p.jwt.id
	}
	return b.cfg.Figures.Figures(ctx, x509ID, jwtID, agents)
}

// Holders returns the agents that could still hold X.509-SVIDs of the keyset:
// for one that is active those that do, with the reason signing.
func (b *Backend) Holders(ctx context.Context, id string) ([]runbook.Holder, error) {
	s, p, err := b.find(ctx, id)
	if err != nil {
		return nil, err
	}
	if s.upstream != "" {
		return nil, errors.New(upstreamFigures)
	}
	if !p.x509.here() {
		return nil, nil
	}
	agents, err := b.expected(ctx)
	if err != nil {
		return nil, err
	}
	f, err := b.figures(ctx, s, p, agents)
	if err != nil {
		return nil, err
	}
	if p.x509.place != active {
		return f.Holders, nil
	}
	var signing []runbook.Holder
	for _, h := range f.Holders {
		if h.SVIDs > 0 {
			h.Reason = "signing"
			signing = append(signing, h)
		}
	}
	return signing, nil
}

// safe is nil when nothing hangs on the keyset's X.509 authority. JWT-SVIDs end
// by themselves; that some are valid does not make a removal unsafe.
func (b *Backend) safe(ctx context.Context, s server, p pair) error {
	if !p.x509.here() {
		return nil
	}
	agents, err := b.expected(ctx)
	if err != nil {
		return err
	}
	f, err := b.figures(ctx, s, p, agents)
	if err != nil {
		return &runbook.NotSafeError{Keyset: p.id(), Message: err.Error()}
	}
	if f.X509Safe {
		return nil
	}
	return &runbook.NotSafeError{Keyset: p.id(), Message: fmt.Sprintf(
		"%d of %d agents could still hold X.509-SVIDs of %s", f.Holding, f.Expected, p.id())}
}
