package spire

import (
	"context"
	"fmt"
	"slices"

	localv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"

	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/refusal"
)

// find returns the keyset that an operator's ID means: the keyset's own, or the
// full ID of one of its authorities.
func (b *Backend) find(ctx context.Context, id string) (server, pair, error) {
	s, err := b.read(ctx)
	if err != nil {
		return s, pair{}, err
	}
	if i := slices.IndexFunc(s.pairs, func(p pair) bool { return p.named(id) }); i >= 0 {
		return s, s.pairs[i], nil
	}
	for _, h := range s.others {
		if (pair{jwt: h}).named(id) {
			return s, pair{}, refused("%s is in the trust bundle, but this SPIRE server does not have it: another server of the cluster has, or nobody", id)
		}
	}
	return s, pair{}, refusal.ErrNotFound
}

func refused(format string, args ...any) refusal.Error {
	return refusal.Error(fmt.Sprintf(format, args...))
}

// Prepare makes a new keyset: first its X.509, then its JWT authority. One that
// was prepared by half gets the other half. It refuses where SPIRE would lose
// hold of an authority that is not removed yet.
//
// SPIRE takes the word of two who prepare at the same moment, and keeps what
// came last; the one whose keyset is not there any more gets refusal.ErrBusy.
func (b *Backend) Prepare(ctx context.Context) (runbook.Keyset, error) {
	s, err := b.read(ctx)
	if err != nil {
		return runbook.Keyset{}, err
	}
	var p pair
	for _, other := range s.pairs {
		if other.any(in(prepared)) {
			p = other
		}
	}
	if err := s.mayPrepare(p); err != nil {
		return runbook.Keyset{}, err
	}
	var done string
	if !p.x509.here() {
		res, err := b.local.PrepareX509Authority(ctx, &localv1.PrepareX509AuthorityRequest{})
		if err != nil {
			return runbook.Keyset{}, failed("prepare", "", x509Kind, "", err)
		}
		p.x509.id = res.GetPreparedAuthority().GetAuthorityId()
		done = x509Kind
	}
	if !p.jwt.here() && !s.noJWT {
		res, err := b.local.PrepareJWTAuthority(ctx, &localv1.PrepareJWTAuthorityRequest{})
		if err != nil {
			return runbook.Keyset{}, failed("prepare", "", jwtKind, done, err)
		}
		p.jwt.id = res.GetPreparedAuthority().GetAuthorityId()
	}
	after, err := b.read(ctx)
	if err != nil {
		return runbook.Keyset{}, fmt.Errorf("keyset %s is prepared, but reading it back failed: %w: %w", p.id(), runbook.ErrOutcomeUnknown, err)
	}
	for _, now := range after.pairs {
		if now.x509.id == p.x509.id && now.jwt.id == p.jwt.id && now.any(in(prepared)) {
			return now.keyset(), nil
		}
	}
	return runbook.Keyset{}, refusal.ErrBusy
}

// mayPrepare refuses what would make SPIRE lose hold of an authority; p is what
// is prepared already.
func (s server) mayPrepare(p pair) error {
	if p.any(in(active)) {
		return refused("cannot prepare: key set %s is activated by half, activate it again first", p.id())
	}
	if p.x509.here() && (p.jwt.here() || s.noJWT) {
		return refused("cannot prepare: key set %s is prepared already, and a SPIRE server has room for one; activate it, then taint and remove the other", p.id())
	}
	for _, other := range s.pairs {
		// Under an upstream authority nothing can be removed, so nothing is lost.
		if other.any(in(old)) && s.upstream == "" {
			return refused("cannot prepare: a SPIRE server has room for one key set beside the active one, and would lose hold of %s; taint and remove that first", other.id())
		}
	}
	return nil
}

// Activate makes a prepared keyset the one that signs: first its X.509, then
// its JWT authority. One that was activated by half gets its other half moved.
func (b *Backend) Activate(ctx context.Context, id string) error {
	s, p, err := b.find(ctx, id)
	if err != nil {
		return err
	}
	switch {
	case p.any(func(h half) bool { return h.tainted }):
		return refusal.ErrActivateTainted
	case p.any(in(old)):
		return refused("cannot activate key set %s: a SPIRE server does not take back one that has stepped down; prepare a new one", p.id())
	case !p.any(in(prepared)):
		return refusal.ErrActivateActive
	case !p.x509.here() || (!p.jwt.here() && !s.noJWT):
		return refused("cannot activate key set %s: it is prepared by half, prepare again first", p.id())
	}
	return carryOut("activate", id, in(prepared), call{x509Kind, p.x509, func(id string) error {
		_, err := b.local.ActivateX509Authority(ctx, &localv1.ActivateX509AuthorityRequest{AuthorityId: id})
		return err
	}}, call{jwtKind, p.jwt, func(id string) error {
		_, err := b.local.ActivateJWTAuthority(ctx, &localv1.ActivateJWTAuthorityRequest{AuthorityId: id})
		return err
	}})
}

// Taint marks a keyset that has stepped down: first its X.509, then its JWT
// authority. One that was tainted by half gets its other half marked.
func (b *Backend) Taint(ctx context.Context, id string) error {
	s, p, err := b.find(ctx, id)
	if err != nil {
		return err
	}
	switch {
	case p.any(in(active)):
		return refusal.ErrTaintActive
	case s.upstream != "":
		return s.underUpstream("tainted", "taint")
	case p.any(in(prepared)):
		return refused("cannot taint key set %s: a SPIRE server taints only one that has been active; activate it, then a successor", p.id())
	case !p.any(func(h half) bool { return !h.tainted }):
		return refusal.ErrTaintTainted
	}
	return carryOut("taint", id, func(h half) bool { return !h.tainted }, call{x509Kind, p.x509, func(id string) error {
		_, err := b.local.TaintX509Authority(ctx, &localv1.TaintX509AuthorityRequest{AuthorityId: id})
		return err
	}}, call{jwtKind, p.jwt, func(id string) error {
		_, err := b.local.TaintJWTAuthority(ctx, &localv1.TaintJWTAuthorityRequest{AuthorityId: id})
		return err
	}})
}

// Remove revokes a tainted keyset: first its JWT, then its X.509 authority, so
// that the keyset keeps its ID until the end. Unless force is set, it refuses
// with a *runbook.NotSafeError what the figures do not say is safe for X.509.
func (b *Backend) Remove(ctx context.Context, id string, force bool) error {
	s, p, err := b.find(ctx, id)
	if err != nil {
		return err
	}
	switch {
	case p.any(in(active)):
		return refusal.ErrRemoveActive
	case s.upstream != "":
		return s.underUpstream("revoked", "revoke")
	case p.any(func(h half) bool { return !h.tainted }):
		return refusal.ErrRemovePrepared
	case p.x509.here() && p.x509.place == nowhere:
		return refused("cannot remove key set %s: this SPIRE server does not have its X.509 authority any more, because another was prepared in its place, or never had; it stays in the trust bundle until it expires (%s)",
			p.id(), p.x509.expires)
	}
	if !force {
		if err := b.safe(ctx, s, p); err != nil {
			return err
		}
	}
	return carryOut("remove", id, half.here, call{jwtKind, p.jwt, func(id string) error {
		_, err := b.local.RevokeJWTAuthority(ctx, &localv1.RevokeJWTAuthorityRequest{AuthorityId: id})
		return err
	}}, call{x509Kind, p.x509, func(id string) error {
		_, err := b.local.RevokeX509Authority(ctx, &localv1.RevokeX509AuthorityRequest{AuthorityId: id})
		return err
	}})
}

func (s server) underUpstream(done, verb string) error {
	return refused("the X.509 authorities of this SPIRE server are signed by the upstream authority %s and cannot be %s; rotate that one, and use spire-server upstreamauthority %s",
		s.upstream, done, verb)
}

func in(at place) func(half) bool { return func(h half) bool { return h.place == at } }
