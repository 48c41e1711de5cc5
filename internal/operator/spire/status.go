package spire

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/renewd/renewd/internal/operator/prom"
	"github.com/renewd/renewd/internal/operator/runbook"
)

// The reasons for unknown figures.
const (
	noFigures       = "SPIRE does not know what agents hold: give --prometheus"
	upstreamFigures = "an upstream authority signs the X.509 authorities, and agents report figures for that one"
)

// automatic describes SPIRE's rotation, whose next time the API does not say.
const automatic = "SPIRE prepares the next keyset after half of the active one's life, replaces the old keyset by it, and activates it near the end"

// evict is the command that makes the server forget an agent; see [runbook.Status].
const evict = "spire-server agent evict -spiffeID ID"

// Status implements [runbook.Backend]. If an authority of a keyset does not exist, its
// ID is empty. If the figures are not known, each keyset says why.
func (b *Backend) Status(ctx context.Context) (runbook.Status, error) {
	s, err := b.read(ctx)
	if err != nil {
		return runbook.Status{}, err
	}
	agents, err := b.expectedAgents(ctx)
	if err != nil {
		return runbook.Status{}, err
	}
	out := runbook.Status{
		TrustDomain: s.trustDomain, Deployment: b.cfg.Deployment, Sequence: s.sequence,
		Agents: len(agents), AgentsBehind: -1, Automatic: automatic,
		Evict: evict, EvictGone: evict,
	}
	for _, p := range s.pairs {
		k := p.keyset()
		f, err := b.figures(ctx, s, p, agents)
		if err != nil {
			k.Unknown, k.Unknowable = err.Error(), b.cfg.Figures == nil
		} else {
			out.Agents, out.AgentsBehind = f.Expected, f.Behind(s.sequence)
			addFigures(&k, p, s, f)
		}
		out.Keysets = append(out.Keysets, k)
	}
	return out, nil
}

// keyset returns what the server knows of the pair, without figures.
func (p pair) keyset() runbook.Keyset {
	k := runbook.Keyset{
		ID: p.id(), State: p.x509.state(), IssuedAt: p.x509.issued, ExpiresAt: p.expires(), X509SVIDs: -1,
		SteppedDown: p.any(func(h authority) bool { return h.slot == old }),
	}
	if p.x509.exists() {
		k.X509AuthorityID = p.x509.id
	}
	if p.jwt.exists() {
		k.JWTKeyID = p.jwt.id
		k.State = cmp.Or(k.State, p.jwt.state())
		if p.jwt.state() != k.State {
			k.JWTState = p.jwt.state()
		}
	}
	return k
}

// addFigures adds the figures to k. An authority that does not exist is safe.
func addFigures(k *runbook.Keyset, p pair, s serverState, f prom.Figures) {
	k.JWTExpiry = f.JWTExpiry
	k.JWTSafe = !p.jwt.exists() || (p.jwt.tainted && f.JWTSafe)
	if s.upstream != "" {
		k.Unknown, k.Unknowable = upstreamFigures, true
		return
	}
	k.X509SVIDs = f.X509SVIDs
	k.X509Safe = !p.x509.exists() || (p.x509.tainted && f.X509Safe)
}

func (b *Backend) figures(ctx context.Context, s serverState, p pair, agents []string) (prom.Figures, error) {
	if b.cfg.Figures == nil {
		return prom.Figures{}, errors.New(noFigures)
	}
	var x509ID, jwtID string
	if p.x509.exists() && s.upstream == "" {
		x509ID = p.x509.id
	}
	if p.jwt.exists() {
		jwtID = p.jwt.id
	}
	return b.cfg.Figures.Figures(ctx, x509ID, jwtID, agents)
}

// Holders implements [runbook.Backend]. The holders of an active keyset have the reason
// signing.
func (b *Backend) Holders(ctx context.Context, id string) ([]runbook.Holder, error) {
	s, p, err := b.find(ctx, id)
	if err != nil {
		return nil, err
	}
	if s.upstream != "" {
		return nil, errors.New(upstreamFigures)
	}
	if !p.x509.exists() {
		return nil, nil
	}
	agents, err := b.expectedAgents(ctx)
	if err != nil {
		return nil, err
	}
	f, err := b.figures(ctx, s, p, agents)
	if err != nil {
		return nil, err
	}
	if p.x509.slot != active {
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

// checkSafe returns an error unless no SVID depends on the keyset's X.509 authority.
// JWT-SVIDs do not matter to it.
func (b *Backend) checkSafe(ctx context.Context, s serverState, p pair) error {
	if !p.x509.exists() {
		return nil
	}
	agents, err := b.expectedAgents(ctx)
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
		"%d of %d agents may still hold X.509-SVIDs of %s", f.Holding, f.Expected, p.id())}
}
