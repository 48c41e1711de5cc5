package spire

import (
	"cmp"
	"slices"
	"time"

	"github.com/renewd/renewd/internal/operator/runbook"
)

// keyset consists of the keys of one generation, one key for each server in the order of
// the servers. A server whose key was revoked still has the IDs of it, another may lack
// the key.
type keyset []pair

// id returns the ID of the keyset: that of its first key that is in the trust bundle.
// Steps go through the servers in order, and a removal in reverse order, so that the ID
// is the same through all steps.
func (k keyset) id() string {
	for _, p := range k {
		if p.exists() {
			return p.id()
		}
	}
	return ""
}

// any reports whether an existing authority of a server fits.
func (k keyset) any(fits func(authority) bool) bool {
	return slices.ContainsFunc(k, func(p pair) bool { return p.any(fits) })
}

// matches reports whether id names the keyset, one of its keys or one of their
// authorities.
func (k keyset) matches(id string) bool {
	return slices.ContainsFunc(k, func(p pair) bool { return p.matches(id) })
}

// keysets groups the keys of all servers into keysets, in order of issue.
//
// A server has one or two keys. If it has two, the old or the active one is of the older
// keyset and the active or the prepared one of the newer. Each step of a rotation
// changes the keys of one keyset at each server, so that this holds while a step is half
// done, and also for servers that are several steps apart.
//
// A server with one key has not begun the rotation, has completed it, or was replaced:
// only time tells. Its key is of the newer keyset if it is closer in time to a newer key
// of another server than to an older one, as is one that was issued after them.
// If all servers have one key, these are one keyset.
//
// A server may have a third key, if another tool has left half of two rotations. Then the
// key in the middle is a keyset of its own, and steps are refused.
func keysets(servers []serverState) []keyset {
	older, middle, newer := make(keyset, len(servers)), make(keyset, len(servers)), make(keyset, len(servers))
	var olderIssued, newerIssued []time.Time
	for i, s := range servers {
		if len(s.keys) < 2 {
			continue
		}
		last := len(s.keys) - 1
		older[i], newer[i] = s.keys[0], s.keys[last]
		olderIssued, newerIssued = append(olderIssued, older[i].issued()), append(newerIssued, newer[i].issued())
		if last > 1 {
			middle[i] = s.keys[1]
		}
	}
	for i, s := range servers {
		if len(s.keys) != 1 {
			continue
		}
		if isNewer(s.keys[0].issued(), olderIssued, newerIssued) {
			older[i], newer[i] = s.revoked(), s.keys[0]
		} else {
			older[i] = s.keys[0]
		}
	}
	return slices.DeleteFunc([]keyset{older, middle, newer}, func(k keyset) bool { return k.id() == "" })
}

// isNewer reports whether a key that was issued then is of the newer keyset.
func isNewer(issued time.Time, older, newer []time.Time) bool {
	if len(newer) == 0 {
		return false // one keyset
	}
	distance := func(list []time.Time) time.Duration {
		var least time.Duration
		for i, t := range list {
			if d := issued.Sub(t).Abs(); i == 0 || d < least {
				least = d
			}
		}
		return least
	}
	return distance(newer) < distance(older)
}

// issued returns when the key was issued. Under an upstream authority that is not known,
// and its expiry serves for comparisons, as for a key without an X.509 authority.
func (p pair) issued() time.Time {
	for _, t := range []time.Time{p.x509.issued, p.x509.expires} {
		if !t.IsZero() {
			return t
		}
	}
	return p.jwt.expires
}

// lacking returns the servers that have no complete key of the keyset, although it is the
// newer one or the only one.
func (k keyset) lacking(servers []serverState) []int {
	var list []int
	for i, s := range servers {
		if !s.complete(k[i]) {
			list = append(list, i)
		}
	}
	return list
}

// progress orders the states of authorities by the steps of a rotation.
func (h authority) progress() int {
	if h.tainted {
		return int(old) + 1
	}
	return int(h.slot)
}

// state returns the state of the keyset's X.509 or JWT authorities: of those that a
// rotation has brought least far, because the next step is about them. It is empty if
// there are none.
func (k keyset) state(of func(pair) authority) runbook.State {
	least := authority{}
	for _, p := range k {
		if h := of(p); h.exists() && (!least.exists() || h.progress() < least.progress()) {
			least = h
		}
	}
	return least.state()
}

func (p pair) x509Authority() authority { return p.x509 }
func (p pair) jwtAuthority() authority  { return p.jwt }

// toRunbook returns what the servers know of a keyset, without figures and members.
func (s clusterState) toRunbook(k keyset) runbook.Keyset {
	out := k.toRunbook()
	if newer := s.newer(); newer != nil && newer.id() == out.ID {
		for _, i := range k.lacking(s.servers) {
			out.Lacking = append(out.Lacking, s.answered[i].name)
		}
	}
	return out
}

func (k keyset) toRunbook() runbook.Keyset {
	out := runbook.Keyset{
		ID: k.id(), X509SVIDs: -1, State: k.state(pair.x509Authority),
		SteppedDown: k.any(func(h authority) bool { return h.slot == old }),
	}
	jwt := k.state(pair.jwtAuthority)
	out.State = cmp.Or(out.State, jwt)
	if jwt != "" && jwt != out.State {
		out.JWTState = jwt
	}
	for _, p := range k {
		if !p.exists() {
			continue
		}
		// Relying parties of other trust domains may lack the newest key.
		if p.x509.issued.After(out.IssuedAt) {
			out.IssuedAt = p.x509.issued
		}
		out.ExpiresAt = earlier(out.ExpiresAt, p.expires())
		if p.x509.exists() {
			out.X509AuthorityID = cmp.Or(out.X509AuthorityID, p.x509.id)
			out.X509ExpiresAt = earlier(out.X509ExpiresAt, p.x509.expires)
		}
		if p.jwt.exists() {
			out.JWTKeyID = cmp.Or(out.JWTKeyID, p.jwt.id)
			out.JWTExpiresAt = earlier(out.JWTExpiresAt, p.jwt.expires)
		}
	}
	return out
}

// earlier returns the earlier time, or the only one that is not zero.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}

// unowned returns the authorities that are in the newest of the servers' bundles and in no
// slot of any of them, and that have not expired. Under an upstream authority the bundle
// has X.509 authorities of that one.
func unowned(servers []serverState, now time.Time) []runbook.Authority {
	newest := slices.MaxFunc(servers, func(a, b serverState) int { return cmp.Compare(a.sequence, b.sequence) })
	var out []runbook.Authority
	add := func(kind string, all []authority, slotsOf func(serverState) slots) {
		for _, h := range all {
			if !h.expires.After(now) || slices.ContainsFunc(servers, func(s serverState) bool { return slotsOf(s).has(h.id) }) {
				continue
			}
			out = append(out, runbook.Authority{Type: kind, ID: h.id, Tainted: h.tainted, ExpiresAt: h.expires})
		}
	}
	if newest.upstream == "" {
		add(x509Kind, newest.x509, func(s serverState) slots { return s.x509Slots })
	}
	add(jwtKind, newest.jwt, func(s serverState) slots { return s.jwtSlots })
	return out
}
