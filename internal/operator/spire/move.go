package spire

import (
	"context"
	"fmt"
	"slices"

	localv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"

	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/refusal"
)

// find returns the keyset for an ID of a keyset or of one of its authorities.
func (b *Backend) find(ctx context.Context, id string) (serverState, pair, error) {
	s, err := b.read(ctx)
	if err != nil {
		return s, pair{}, err
	}
	if i := slices.IndexFunc(s.pairs, func(p pair) bool { return p.matches(id) }); i >= 0 {
		return s, s.pairs[i], nil
	}
	for _, h := range s.others {
		if (pair{jwt: h}).matches(id) {
			return s, pair{}, refusef("%s is in the trust bundle, but not an authority of this SPIRE server: use another server of the cluster, or let it expire", id)
		}
	}
	return s, pair{}, refusal.ErrNotFound
}

func refusef(format string, args ...any) refusal.Error {
	return refusal.Error(fmt.Sprintf(format, args...))
}

// Prepare implements [runbook.Backend]: it prepares an X.509 authority, then a JWT
// authority. If only one is prepared, it prepares the other. It fails if SPIRE would
// forget an authority.
//
// Of two calls at the same time, on any client, SPIRE keeps the later authorities. The
// earlier caller gets [refusal.ErrBusy].
func (b *Backend) Prepare(ctx context.Context) (runbook.Keyset, error) {
	s, err := b.read(ctx)
	if err != nil {
		return runbook.Keyset{}, err
	}
	var p pair
	for _, other := range s.pairs {
		if other.any(inSlot(prepared)) {
			p = other
		}
	}
	if err := s.checkPrepare(p); err != nil {
		return runbook.Keyset{}, err
	}
	var done string
	if !p.x509.exists() {
		res, err := b.local.PrepareX509Authority(ctx, &localv1.PrepareX509AuthorityRequest{})
		if err != nil {
			return runbook.Keyset{}, callError("prepare", "", x509Kind, "", err)
		}
		p.x509.id = res.GetPreparedAuthority().GetAuthorityId()
		done = x509Kind
	}
	if !p.jwt.exists() && !s.noJWT {
		res, err := b.local.PrepareJWTAuthority(ctx, &localv1.PrepareJWTAuthorityRequest{})
		if err != nil {
			return runbook.Keyset{}, callError("prepare", "", jwtKind, done, err)
		}
		p.jwt.id = res.GetPreparedAuthority().GetAuthorityId()
	}
	after, err := b.read(ctx)
	if err != nil {
		return runbook.Keyset{}, fmt.Errorf("confirm that keyset %s is prepared: %w: %w", p.id(), runbook.ErrOutcomeUnknown, err)
	}
	for _, now := range after.pairs {
		if now.x509.id == p.x509.id && now.jwt.id == p.jwt.id && now.any(inSlot(prepared)) {
			return now.keyset(), nil
		}
	}
	return runbook.Keyset{}, refusal.ErrBusy
}

// checkPrepare returns an error if SPIRE would forget an authority. p is the prepared
// keyset, or the zero pair.
func (s serverState) checkPrepare(p pair) error {
	if p.any(inSlot(active)) {
		return refusef("cannot prepare: only one key of key set %s is activated; activate it again first", p.id())
	}
	if p.x509.exists() && (p.jwt.exists() || s.noJWT) {
		return refusef("cannot prepare: a SPIRE server has room for one prepared key set, which is %s; activate it, then taint and remove the old one", p.id())
	}
	for _, other := range s.pairs {
		// With an upstream authority no removal is possible anyway.
		if other.any(inSlot(old)) && s.upstream == "" {
			return refusef("cannot prepare: a SPIRE server has room for one key set beside the active one, and would forget %s; taint and remove it first", other.id())
		}
	}
	return nil
}

// Activate implements [runbook.Backend]: it activates the X.509 authority, then the JWT
// authority.
func (b *Backend) Activate(ctx context.Context, id string) error {
	s, p, err := b.find(ctx, id)
	if err != nil {
		return err
	}
	switch {
	case p.any(func(h authority) bool { return h.tainted }):
		return refusal.ErrActivateTainted
	case p.any(inSlot(old)):
		return refusef("cannot activate key set %s: a SPIRE server activates no old one; prepare a new one", p.id())
	case !p.any(inSlot(prepared)):
		return refusal.ErrActivateActive
	case !p.x509.exists() || (!p.jwt.exists() && !s.noJWT):
		return refusef("cannot activate key set %s: only one of its keys is prepared; prepare again first", p.id())
	}
	return apply("activate", id, inSlot(prepared), mutation{x509Kind, p.x509, func(id string) error {
		_, err := b.local.ActivateX509Authority(ctx, &localv1.ActivateX509AuthorityRequest{AuthorityId: id})
		return err
	}}, mutation{jwtKind, p.jwt, func(id string) error {
		_, err := b.local.ActivateJWTAuthority(ctx, &localv1.ActivateJWTAuthorityRequest{AuthorityId: id})
		return err
	}})
}

// Taint implements [runbook.Backend]: it taints the X.509 authority, then the JWT
// authority.
func (b *Backend) Taint(ctx context.Context, id string) error {
	s, p, err := b.find(ctx, id)
	if err != nil {
		return err
	}
	switch {
	case p.any(inSlot(active)):
		return refusal.ErrTaintActive
	case s.upstream != "":
		return s.upstreamRefusal("tainted", "taint")
	case p.any(inSlot(prepared)):
		return refusef("cannot taint key set %s: a SPIRE server taints only one that was active before; activate it, then another one", p.id())
	case !p.any(func(h authority) bool { return !h.tainted }):
		return refusal.ErrTaintTainted
	}
	return apply("taint", id, func(h authority) bool { return !h.tainted }, mutation{x509Kind, p.x509, func(id string) error {
		_, err := b.local.TaintX509Authority(ctx, &localv1.TaintX509AuthorityRequest{AuthorityId: id})
		return err
	}}, mutation{jwtKind, p.jwt, func(id string) error {
		_, err := b.local.TaintJWTAuthority(ctx, &localv1.TaintJWTAuthorityRequest{AuthorityId: id})
		return err
	}})
}

// Remove implements [runbook.Backend]: it revokes the JWT authority, then the X.509
// authority, so that the keyset keeps its ID until the end.
func (b *Backend) Remove(ctx context.Context, id string, force bool) error {
	s, p, err := b.find(ctx, id)
	if err != nil {
		return err
	}
	switch {
	case p.any(inSlot(active)):
		return refusal.ErrRemoveActive
	case s.upstream != "":
		return s.upstreamRefusal("revoked", "revoke")
	case p.any(func(h authority) bool { return !h.tainted }):
		return refusal.ErrRemovePrepared
	case p.x509.exists() && p.x509.slot == noSlot:
		return refusef("cannot remove key set %s: its X.509 authority is not one of this SPIRE server, which may have prepared another instead; it stays in the trust bundle until it expires (%s)",
			p.id(), p.x509.expires)
	}
	if !force {
		if err := b.checkSafe(ctx, s, p); err != nil {
			return err
		}
	}
	return apply("remove", id, authority.exists, mutation{jwtKind, p.jwt, func(id string) error {
		_, err := b.local.RevokeJWTAuthority(ctx, &localv1.RevokeJWTAuthorityRequest{AuthorityId: id})
		return err
	}}, mutation{x509Kind, p.x509, func(id string) error {
		_, err := b.local.RevokeX509Authority(ctx, &localv1.RevokeX509AuthorityRequest{AuthorityId: id})
		return err
	}})
}

func (s serverState) upstreamRefusal(done, verb string) error {
	return refusef("the upstream authority %s signs the X.509 authorities of this SPIRE server, so they cannot be %s; rotate the upstream authority and run spire-server upstreamauthority %s",
		s.upstream, done, verb)
}

func inSlot(at slot) func(authority) bool { return func(h authority) bool { return h.slot == at } }
