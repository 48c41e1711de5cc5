package spire

import (
	"cmp"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	localv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/renewd/renewd/internal/operator/runbook"
)

// slot says where the server has an authority.
type slot int

const (
	noSlot   slot = iota // only in the bundle
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

// pair is the key of a keyset at one server: its X.509 and its JWT authority. The zero
// value means that the server has none.
type pair struct{ x509, jwt authority }

// id returns an ID of the keyset. It is derived from the X.509 authority even if that is
// revoked, so that it does not change during a removal.
func (p pair) id() string { return keysetID(cmp.Or(p.x509.id, p.jwt.id)) }

// exists reports whether an authority of the pair is in the trust bundle.
func (p pair) exists() bool { return p.x509.exists() || p.jwt.exists() }

func keysetID(authorityID string) string { return "ks_" + authorityID[:min(10, len(authorityID))] }

func (p pair) authorities() []authority { return []authority{p.x509, p.jwt} }

// any reports whether an existing authority fits.
func (p pair) any(fits func(authority) bool) bool {
	return slices.ContainsFunc(p.authorities(), func(h authority) bool { return h.exists() && fits(h) })
}

// matches reports whether id names the pair or one of its authorities.
func (p pair) matches(id string) bool {
	return slices.ContainsFunc(p.authorities(), func(h authority) bool {
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

func inSlot(at slot) func(authority) bool { return func(h authority) bool { return h.slot == at } }

func untainted(h authority) bool { return !h.tainted }

// serverState is the state of a server at one moment.
type serverState struct {
	trustDomain         string
	sequence            uint64      // of the bundle
	x509, jwt           []authority // in the bundle
	x509Slots, jwtSlots slots
	keys                []pair // of the slots, in order of issue, without revoked ones
	upstream            string // ID of the upstream authority; empty: none
	noJWT               bool   // JWT-SVIDs are disabled at the server
}

// slots holds the authorities of one kind in the server's slots.
type slots struct{ active, next authority }

// has reports whether the slots hold the authority.
func (s slots) has(id string) bool { return s.active.id == id || s.next.id == id }

// revoked returns what has been revoked and is still in the slots.
func (s serverState) revoked() pair {
	var p pair
	if s.x509Slots.next.slot == old && !s.x509Slots.next.published {
		p.x509 = s.x509Slots.next
	}
	if s.jwtSlots.next.slot == old && !s.jwtSlots.next.published {
		p.jwt = s.jwtSlots.next
	}
	return p
}

// complete reports whether the server has no key to add to the pair.
func (s serverState) complete(p pair) bool { return p.x509.exists() && (p.jwt.exists() || s.noJWT) }

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

// pairSlots pairs the slots of both kinds of a server, in order of issue: old, active,
// prepared. There are two pairs at most, except where another tool has left an old
// authority of one kind beside a prepared one of the other.
//
// Usually active belongs to active and next to next. If one kind has a prepared
// authority and the other an old one, there are two explanations: only one key of a
// keyset was activated, or only one was prepared. Keys that were prepared together
// expire together, which decides between them.
func pairSlots(x, j slots) []pair {
	same := x.next.slot == j.next.slot
	var pairs []pair
	add := func(p pair) {
		if p.exists() {
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
