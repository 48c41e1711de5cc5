package spire

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	localv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/operator/runbook"
)

// slot says where the server has an authority.
type slot int

const (
	noSlot   slot = iota // only in the bundle: forgotten, or of another server
	prepared             // in the second slot, has not signed
	active               // in the first slot
	old                  // in the second slot, has signed
)

// authority is the X.509 or the JWT authority of a keyset. The zero value means that
// there is none.
type authority struct {
	id        string
	slot      slot
	published bool // in the trust bundle; an old one stays in its slot when it is revoked
	tainted   bool
	issued    time.Time // zero: not known
	expires   time.Time // zero: not known
	upstream  string    // ID of the upstream authority that signed it; empty: none
}

// exists reports whether the authority is in the trust bundle, so that a step can change
// it.
func (h authority) exists() bool { return h.id != "" && h.published }

func (h authority) state() runbook.State {
	switch {
	case !h.exists():
		return ""
	case h.slot == active:
		return runbook.Active
	case h.tainted:
		return runbook.Tainted
	}
	return runbook.Prepared
}

// pair is a keyset.
type pair struct{ x509, jwt authority }

// id returns the keyset ID. It is derived from the X.509 authority even if that is
// revoked, so that it does not change during a removal.
func (p pair) id() string { return keysetID(cmp.Or(p.x509.id, p.jwt.id)) }

func keysetID(authorityID string) string { return "ks_" + authorityID[:min(10, len(authorityID))] }

func (p pair) authorities() []authority { return []authority{p.x509, p.jwt} }

// any reports whether an existing authority fits.
func (p pair) any(fits func(authority) bool) bool {
	return slices.ContainsFunc(p.authorities(), func(h authority) bool { return h.exists() && fits(h) })
}

// matches reports whether id is the ID of the keyset or of one of its authorities.
func (p pair) matches(id string) bool {
	return id == p.id() || slices.ContainsFunc(p.authorities(), func(h authority) bool {
		return h.id != "" && (id == h.id || id == keysetID(h.id))
	})
}

// expires returns when the first authority expires.
func (p pair) expires() time.Time {
	x, j := p.x509.expires, p.jwt.expires
	switch {
	case !p.x509.exists() || x.IsZero():
		return j
	case !p.jwt.exists() || j.IsZero() || x.Before(j):
		return x
	}
	return j
}

// serverState is the state of the server at one moment.
type serverState struct {
	trustDomain string
	sequence    uint64      // of the bundle
	pairs       []pair      // in order of issue
	others      []authority // in the bundle, not tainted, and in no slot
	upstream    string      // ID of the upstream authority; empty: none
	noJWT       bool        // JWT-SVIDs are disabled at the server
}

// slots holds the authorities of one kind in the server's slots.
type slots struct{ active, next authority }

// read reads the slots before the bundle: an authority that is prepared in between is
// then unknown, while the other order would make it look revoked.
func (b *Backend) read(ctx context.Context) (serverState, error) {
	s, err := b.readServer(ctx)
	if err != nil {
		if code := status.Code(err); code == codes.PermissionDenied || code == codes.Unimplemented {
			err = &runbook.PermanentError{Err: err}
		}
		return serverState{}, fmt.Errorf("SPIRE server at %s: %w", b.cfg.Socket, err)
	}
	return s, nil
}

func (b *Backend) readServer(ctx context.Context) (serverState, error) {
	var s serverState
	x, err := b.local.GetX509AuthorityState(ctx, &localv1.GetX509AuthorityStateRequest{})
	if err != nil {
		return s, fmt.Errorf("read X.509 authorities: %w", err)
	}
	j, err := b.local.GetJWTAuthorityState(ctx, &localv1.GetJWTAuthorityStateRequest{})
	if status.Code(err) == codes.Unimplemented {
		s.noJWT, err = true, nil
	}
	if err != nil {
		return s, fmt.Errorf("read JWT authorities: %w", err)
	}
	published, err := b.bundles.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return s, fmt.Errorf("read the trust bundle: %w", err)
	}
	td, err := spiffeid.TrustDomainFromString(published.TrustDomain)
	if err != nil {
		return s, fmt.Errorf("read the trust bundle: %w", err)
	}
	if b.cfg.TrustDomain != "" && td.Name() != spiffeid.RequireTrustDomainFromString(b.cfg.TrustDomain).Name() {
		return s, &runbook.PermanentError{Err: fmt.Errorf("it serves the trust domain %q, not %q: give its trust domain, or the socket of another server", td.Name(), b.cfg.TrustDomain)}
	}
	s.trustDomain, s.sequence = td.Name(), published.SequenceNumber
	s.upstream = x.GetActive().GetUpstreamAuthoritySubjectKeyId()

	x509InBundle, err := x509Authorities(published.X509Authorities)
	if err != nil {
		return s, err
	}
	x509Slots := newSlots(x.GetActive(), x.GetPrepared(), x.GetOld(), x509InBundle, s.upstream != "")
	jwtInBundle := jwtAuthorities(published.JwtAuthorities)
	jwtSlots := newSlots(j.GetActive(), j.GetPrepared(), j.GetOld(), jwtInBundle, false)
	s.pairs = pairSlots(x509Slots, jwtSlots)

	var taintedX509, taintedJWT []authority
	withoutSlot := func(all []authority, in slots) (tainted []authority) {
		for _, h := range all {
			if h.id == in.active.id || h.id == in.next.id {
				continue
			}
			if h.tainted {
				tainted = append(tainted, h)
			} else {
				s.others = append(s.others, h)
			}
		}
		return tainted
	}
	if s.upstream == "" { // else the bundle has upstream authorities instead
		taintedX509 = withoutSlot(x509InBundle, x509Slots)
	}
	taintedJWT = withoutSlot(jwtInBundle, jwtSlots)
	s.pairs = append(pairTainted(taintedX509, taintedJWT), s.pairs...)
	return s, nil
}

// newSlots returns the slots of one kind from the answers of the LocalAuthority service
// and the bundle. The bundle lacks X.509 authorities that have an upstream authority.
func newSlots(a, p, o *localv1.AuthorityState, inBundle []authority, upstream bool) slots {
	take := func(s *localv1.AuthorityState, at slot) authority {
		if s.GetAuthorityId() == "" {
			return authority{}
		}
		h := authority{id: s.AuthorityId}
		if i := slices.IndexFunc(inBundle, func(h authority) bool { return h.id == s.AuthorityId }); i >= 0 {
			h = inBundle[i]
		}
		h.slot, h.upstream = at, s.UpstreamAuthoritySubjectKeyId
		h.published = h.published || upstream || at == active
		if h.expires.IsZero() {
			h.expires = unixTime(s.ExpiresAt)
		}
		return h
	}
	next := take(p, prepared)
	if next.id == "" {
		next = take(o, old)
	}
	return slots{take(a, active), next}
}

// rounding allows for expiry times in whole seconds.
const rounding = 2 * time.Second

// pairSlots pairs the slots of both kinds into keysets, in order of issue: old, active,
// prepared.
//
// Usually active belongs to active and next to next. If one kind has a prepared
// authority and the other an old one, there are two explanations: only one key of a
// keyset was activated, or only one was prepared. Keys that were prepared together
// expire together, which decides between them.
func pairSlots(x, j slots) []pair {
	same := x.next.slot == j.next.slot
	var pairs []pair
	add := func(p pair) {
		if p.x509.exists() || p.jwt.exists() {
			pairs = append(pairs, p)
		}
	}
	crossed := !same && x.next.exists() && j.next.exists() &&
		expiryDistance(x.active, j.next)+expiryDistance(j.active, x.next) <= expiryDistance(x.active, j.active)+rounding
	switch {
	case crossed && x.next.slot == old:
		add(pair{x.next, j.active})
		add(pair{x.active, j.next})
	case crossed:
		add(pair{x.active, j.next})
		add(pair{x.next, j.active})
	default:
		// Authorities in different slots belong to different keysets.
		for _, at := range []slot{old, active, prepared} {
			var p pair
			switch {
			case at == active:
				p = pair{x.active, j.active}
			case same && x.next.slot == at:
				p = pair{x.next, j.next}
			case x.next.slot == at:
				p.x509 = x.next
			case j.next.slot == at:
				p.jwt = j.next
			}
			add(p)
		}
	}
	return pairs
}

// pairTainted pairs the tainted authorities that have no slot.
func pairTainted(x509, jwt []authority) []pair {
	var pairs []pair
	for _, x := range x509 {
		p := pair{x509: x}
		i := slices.IndexFunc(jwt, func(j authority) bool { return expiryDistance(x, j) <= time.Minute })
		if i >= 0 {
			p.jwt = jwt[i]
			jwt = slices.Delete(slices.Clone(jwt), i, i+1)
		}
		pairs = append(pairs, p)
	}
	for _, j := range jwt {
		pairs = append(pairs, pair{jwt: j})
	}
	slices.SortStableFunc(pairs, func(a, b pair) int { return a.expires().Compare(b.expires()) })
	return pairs
}

func expiryDistance(a, b authority) time.Duration { return a.expires.Sub(b.expires).Abs() }

func x509Authorities(list []*types.X509Certificate) ([]authority, error) {
	all := make([]authority, 0, len(list))
	for _, a := range list {
		cert, err := x509.ParseCertificate(a.Asn1)
		if err != nil {
			return nil, fmt.Errorf("read the trust bundle: parse certificate: %w", err)
		}
		all = append(all, authority{
			id: hex.EncodeToString(cert.SubjectKeyId), published: true, tainted: a.Tainted,
			issued: cert.NotBefore.UTC(), expires: cert.NotAfter.UTC(),
		})
	}
	return all, nil
}

func jwtAuthorities(list []*types.JWTKey) []authority {
	all := make([]authority, 0, len(list))
	for _, a := range list {
		all = append(all, authority{id: a.KeyId, published: true, tainted: a.Tainted, expires: unixTime(a.ExpiresAt)})
	}
	return all
}

func unixTime(seconds int64) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0).UTC()
}
