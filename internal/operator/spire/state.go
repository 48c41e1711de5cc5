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

// place is where the server has an authority.
type place int

const (
	nowhere  place = iota // it is only in the bundle: nobody's, or another server's
	prepared              // in the second slot, has not signed
	active                // in the first slot
	old                   // in the second slot, has signed
)

// half is one authority: the X.509 or the JWT half of a keyset. The zero half
// is one that is not there.
type half struct {
	id        string
	place     place
	published bool // in the trust bundle; an old one stays in its slot when it is revoked
	tainted   bool
	issued    time.Time // zero: not known
	expires   time.Time // zero: not known
	upstream  string    // ID of the upstream authority that signed it; empty: none
}

// here tells whether there is something left of the half to be moved.
func (h half) here() bool { return h.id != "" && h.published }

func (h half) state() runbook.State {
	switch {
	case !h.here():
		return ""
	case h.place == active:
		return runbook.Active
	case h.tainted:
		return runbook.Tainted
	}
	return runbook.Prepared
}

// pair is a keyset.
type pair struct{ x509, jwt half }

// id is derived from the X.509 authority, also when that is revoked already, so
// that it does not change during a removal.
func (p pair) id() string { return keysetID(cmp.Or(p.x509.id, p.jwt.id)) }

func keysetID(authorityID string) string { return "ks_" + authorityID[:min(10, len(authorityID))] }

func (p pair) halves() []half { return []half{p.x509, p.jwt} }

// any tells whether a half that is there fits.
func (p pair) any(fits func(half) bool) bool {
	return slices.ContainsFunc(p.halves(), func(h half) bool { return h.here() && fits(h) })
}

// named tells whether the operator's ID means this keyset.
func (p pair) named(id string) bool {
	return id == p.id() || slices.ContainsFunc(p.halves(), func(h half) bool {
		return h.id != "" && (id == h.id || id == keysetID(h.id))
	})
}

// expires is when the first of the two halves does.
func (p pair) expires() time.Time {
	x, j := p.x509.expires, p.jwt.expires
	switch {
	case !p.x509.here() || x.IsZero():
		return j
	case !p.jwt.here() || j.IsZero() || x.Before(j):
		return x
	}
	return j
}

// server is the state of the server at one moment.
type server struct {
	trustDomain string
	sequence    uint64 // of the bundle
	pairs       []pair // in order of issue
	others      []half // in the bundle, not tainted, and in no slot
	upstream    string // ID of the upstream authority; empty: none
	noJWT       bool   // JWT-SVIDs are disabled at the server
}

// slots are the authorities of one kind that the server has.
type slots struct{ active, next half }

// read reads the slots first: what is prepared meanwhile is then a stranger in
// the bundle and not a keyset that seems revoked.
func (b *Backend) read(ctx context.Context) (server, error) {
	s, err := b.readServer(ctx)
	if err != nil {
		return server{}, fmt.Errorf("SPIRE server at %s: %w", b.cfg.Socket, err)
	}
	return s, nil
}

func (b *Backend) readServer(ctx context.Context) (server, error) {
	var s server
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
		return s, fmt.Errorf("it serves the trust domain %q, not %q: give that one, or the socket of another server", td.Name(), b.cfg.TrustDomain)
	}
	s.trustDomain, s.sequence = td.Name(), published.SequenceNumber
	s.upstream = x.GetActive().GetUpstreamAuthoritySubjectKeyId()

	x509InBundle, err := x509Authorities(published.X509Authorities)
	if err != nil {
		return s, err
	}
	x509Slots := fill(x.GetActive(), x.GetPrepared(), x.GetOld(), x509InBundle, s.upstream != "")
	jwtInBundle := jwtAuthorities(published.JwtAuthorities)
	jwtSlots := fill(j.GetActive(), j.GetPrepared(), j.GetOld(), jwtInBundle, false)
	s.pairs = match(x509Slots, jwtSlots)

	var lostX509, lostJWT []half
	lost := func(all []half, in slots) (tainted []half) {
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
	if s.upstream == "" { // else these are not the server's kind of authority
		lostX509 = lost(x509InBundle, x509Slots)
	}
	lostJWT = lost(jwtInBundle, jwtSlots)
	s.pairs = append(matchLost(lostX509, lostJWT), s.pairs...)
	return s, nil
}

// fill makes the slots of one kind from what the service and the bundle say.
// Under an upstream authority the X.509 authorities are not in the bundle
// themselves.
func fill(a, p, o *localv1.AuthorityState, inBundle []half, upstream bool) slots {
	take := func(s *localv1.AuthorityState, at place) half {
		if s.GetAuthorityId() == "" {
			return half{}
		}
		h := half{id: s.AuthorityId}
		if i := slices.IndexFunc(inBundle, func(h half) bool { return h.id == s.AuthorityId }); i >= 0 {
			h = inBundle[i]
		}
		h.place, h.upstream = at, s.UpstreamAuthoritySubjectKeyId
		h.published = h.published || upstream || at == active
		if h.expires.IsZero() {
			h.expires = unix(s.ExpiresAt)
		}
		return h
	}
	next := take(p, prepared)
	if next.id == "" {
		next = take(o, old)
	}
	return slots{take(a, active), next}
}

// rounding is by how much the ends of two authorities that were prepared
// together can differ more, because they are whole seconds.
const rounding = 2 * time.Second

// match pairs the slots of both kinds into keysets, in order of issue: what is
// old was issued before the active one, what is prepared after it.
//
// Usually active belongs to active and next to next. When one kind has a
// prepared authority and the other an old one, a keyset may have been activated
// by half. Keys that were prepared together expire together, so that is how it
// is told from a keyset that was prepared by half.
func match(x, j slots) []pair {
	same := x.next.place == j.next.place
	var pairs []pair
	add := func(p pair) {
		if p.x509.here() || p.jwt.here() {
			pairs = append(pairs, p)
		}
	}
	crossed := !same && x.next.here() && j.next.here() &&
		apart(x.active, j.next)+apart(j.active, x.next) <= apart(x.active, j.active)+rounding
	switch {
	case crossed && x.next.place == old:
		add(pair{x.next, j.active})
		add(pair{x.active, j.next})
	case crossed:
		add(pair{x.active, j.next})
		add(pair{x.next, j.active})
	default:
		// Halves in unlike places are keysets of their own.
		for _, at := range []place{old, active, prepared} {
			var p pair
			switch {
			case at == active:
				p = pair{x.active, j.active}
			case same && x.next.place == at:
				p = pair{x.next, j.next}
			case x.next.place == at:
				p.x509 = x.next
			case j.next.place == at:
				p.jwt = j.next
			}
			add(p)
		}
	}
	return pairs
}

// matchLost pairs what is tainted and in no slot any more.
func matchLost(x509, jwt []half) []pair {
	var pairs []pair
	for _, x := range x509 {
		p := pair{x509: x}
		i := slices.IndexFunc(jwt, func(j half) bool { return apart(x, j) <= time.Minute })
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

// apart is the time between the ends of two authorities.
func apart(a, b half) time.Duration { return a.expires.Sub(b.expires).Abs() }

func x509Authorities(list []*types.X509Certificate) ([]half, error) {
	all := make([]half, 0, len(list))
	for _, a := range list {
		cert, err := x509.ParseCertificate(a.Asn1)
		if err != nil {
			return nil, fmt.Errorf("read the trust bundle: parse certificate: %w", err)
		}
		all = append(all, half{
			id: hex.EncodeToString(cert.SubjectKeyId), published: true, tainted: a.Tainted,
			issued: cert.NotBefore.UTC(), expires: cert.NotAfter.UTC(),
		})
	}
	return all, nil
}

func jwtAuthorities(list []*types.JWTKey) []half {
	all := make([]half, 0, len(list))
	for _, a := range list {
		all = append(all, half{id: a.KeyId, published: true, tainted: a.Tainted, expires: unix(a.ExpiresAt)})
	}
	return all
}

func unix(seconds int64) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0).UTC()
}
