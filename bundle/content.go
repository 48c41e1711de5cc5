package bundle

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Content is the input of a [Bundle]. It may have duplicates and unusable authorities:
// [New] handles both.
type Content struct {
	// Sequence grows with every change of the bundle; zero means unknown.
	Sequence uint64
	// RefreshHint is the server's refresh hint; zero means none.
	RefreshHint time.Duration
	X509        []X509Authority
	JWT         []JWTAuthority
	// LeftOut are the elements that cannot be parsed as an authority.
	LeftOut []LeftOut
}

// LeftOut is an element of a trust bundle that cannot be used as an authority. The rest
// of the bundle is used.
type LeftOut struct {
	Type string // TypeX509, TypeJWT or TypeUnknown
	// ID is the authority ID or the key ID, empty if there is none.
	ID     string
	Reason string
	// Tainted means that it has the taint mark, which counts for all authorities
	// with the same ID.
	Tainted bool
}

// String returns type, ID and reason, cut to a bounded length.
func (l LeftOut) String() string {
	name := l.Type
	if l.ID != "" {
		name = fmt.Sprintf("%s:%.64s", l.Type, l.ID)
	}
	return strings.ToValidUTF8(fmt.Sprintf("%s: %.200s", name, l.Reason), "\uFFFD")
}

// maxListed is the maximum number of authorities in one log line.
const maxListed = 16

// LogLeftOut logs the authorities left out of a bundle if they have changed.
func LogLeftOut(log *slog.Logger, td spiffeid.TrustDomain, before, now []LeftOut) {
	if slices.Equal(before, now) {
		return
	}
	if len(now) == 0 {
		log.Info("no authority left out of the bundle", "trust_domain", td.Name())
		return
	}
	named := make([]string, min(len(now), maxListed))
	for i := range named {
		named[i] = now[i].String()
	}
	log.Warn("unusable authorities left out of the bundle", "trust_domain", td.Name(), "left_out", len(now), "authorities", named)
}

// AddX509 adds the X.509 authority with this certificate in DER, or leaves it out if it
// cannot be parsed.
func (c *Content) AddX509(der []byte, tainted bool) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		// There is no ID, and an index would change with the other elements.
		sum := sha256.Sum256(der)
		c.leaveOut(LeftOut{TypeX509, "", fmt.Sprintf("certificate with SHA-256 %x cannot be parsed: %v", sum[:8], err), tainted})
		return
	}
	c.X509 = append(c.X509, X509Authority{Certificate: cert, Tainted: tainted})
}

// AddJWT adds the JWT authority with this public key in PKIX form, or leaves it out if
// it cannot be parsed. A zero expiresAt means no expiry.
func (c *Content) AddJWT(keyID string, pkix []byte, expiresAt time.Time, tainted bool) {
	key, err := x509.ParsePKIXPublicKey(pkix)
	if err != nil {
		c.leaveOut(LeftOut{TypeJWT, keyID, fmt.Sprintf("its public key cannot be parsed: %v", err), tainted})
		return
	}
	c.JWT = append(c.JWT, JWTAuthority{KeyID: keyID, PublicKey: key, ExpiresAt: expiresAt, Tainted: tainted})
}

func (c *Content) leaveOut(l LeftOut) { c.LeftOut = append(c.LeftOut, l) }

// Digest returns a hash of the authorities, independent of their order. Taint marks and
// sequence number are not part of it.
func (c *Content) Digest() string {
	var all []string
	for _, a := range c.X509 {
		all = append(all, "x509\x00"+string(a.Certificate.Raw))
	}
	for _, k := range c.JWT {
		der, _ := x509.MarshalPKIXPublicKey(k.PublicKey) // cannot fail: see unusableKey
		all = append(all, "jwt\x00"+k.KeyID+"\x00"+string(der))
	}
	slices.Sort(all)
	sum := sha256.New()
	for _, a := range all {
		fmt.Fprintf(sum, "%d\x00%s", len(a), a)
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// usable returns the usable authorities, each once, in the order of their first
// occurrence, and lists the others as left out.
//
//   - The same certificate, or the same key with the same key ID, is one authority.
//     After a taint by the root of the nesting, a nested SPIRE server publishes a JWT
//     key twice, with and without the mark.
//   - Different certificates of one authority ID, such as those of a reissued or
//     cross-signed root, are all trusted: each verifies chains that the others may not.
//   - Of different JWT keys with one key ID the first is used. Servers append, so it is
//     the one that signed the tokens in use, and a key that is added later can neither
//     take over a key ID in use nor withdraw trust in it.
//   - A taint mark counts for the ID, because an SVID is known by the ID of its
//     authority, which does not tell which of two certificates or keys signed it. The
//     mark of an unusable authority counts, too.
func (c *Content) usable() Content {
	u := sorter{
		out:   Content{Sequence: c.Sequence, RefreshHint: c.RefreshHint},
		certs: make(map[cert]bool, len(c.X509)), keys: make(map[string]int, len(c.JWT)),
		marks: make(map[name]time.Time), left: make(map[LeftOut]bool),
	}
	for _, l := range c.LeftOut {
		u.leaveOut(l)
	}
	for _, a := range c.X509 {
		u.addX509(a)
	}
	for _, k := range c.JWT {
		u.addJWT(k)
	}
	for i := range u.out.X509 {
		a := &u.out.X509[i]
		a.TaintedSince, a.Tainted = u.marks[name{TypeX509, a.ID}], u.marked(TypeX509, a.ID)
	}
	for i := range u.out.JWT {
		k := &u.out.JWT[i]
		k.Tainted = u.marked(TypeJWT, k.KeyID)
	}
	return u.out
}

type (
	name struct{ typ, id string }
	cert struct{ id, der string }
)

// sorter is the state of [Content.usable].
type sorter struct {
	out   Content
	certs map[cert]bool
	keys  map[string]int     // index in out.JWT by key ID
	marks map[name]time.Time // since when each ID is tainted, zero if unknown
	left  map[LeftOut]bool
}

func (u *sorter) leaveOut(l LeftOut) {
	u.mark(l.Type, l.ID, l.Tainted, time.Time{})
	if !u.left[l] {
		u.left[l] = true
		u.out.leaveOut(l)
	}
}

func (u *sorter) mark(typ, id string, tainted bool, since time.Time) {
	if !tainted || id == "" {
		return
	}
	n := name{typ, id}
	if known := u.marks[n]; since.IsZero() || (!known.IsZero() && known.Before(since)) {
		since = known
	}
	u.marks[n] = since
}

func (u *sorter) marked(typ, id string) bool {
	_, ok := u.marks[name{typ, id}]
	return ok
}

func (u *sorter) addX509(a X509Authority) {
	if a.Certificate == nil {
		u.leaveOut(LeftOut{TypeX509, a.ID, "it has no certificate", a.Tainted})
		return
	}
	if a.ID == "" {
		a.ID = AuthorityID(a.Certificate)
	}
	if !canSign(a.Certificate) {
		u.leaveOut(LeftOut{TypeX509, a.ID, "its certificate is not that of a CA", a.Tainted})
		return
	}
	u.mark(TypeX509, a.ID, a.Tainted, a.TaintedSince)
	if c := (cert{a.ID, string(a.Certificate.Raw)}); !u.certs[c] {
		u.certs[c] = true
		u.out.X509 = append(u.out.X509, a)
	}
}

func (u *sorter) addJWT(k JWTAuthority) {
	if reason := unusableKey(k); reason != "" {
		u.leaveOut(LeftOut{TypeJWT, k.KeyID, reason, k.Tainted})
		return
	}
	i, had := u.keys[k.KeyID]
	switch {
	case !had:
		u.keys[k.KeyID] = len(u.out.JWT)
		u.out.JWT = append(u.out.JWT, k)
	case !SameKey(u.out.JWT[i].PublicKey, k.PublicKey):
		u.leaveOut(LeftOut{TypeJWT, k.KeyID, "another key has the same key ID and comes first", k.Tainted})
		return
	default:
		first := &u.out.JWT[i]
		if first.ExpiresAt.IsZero() || k.ExpiresAt.IsZero() {
			first.ExpiresAt = time.Time{}
		} else if k.ExpiresAt.After(first.ExpiresAt) {
			first.ExpiresAt = k.ExpiresAt
		}
	}
	u.mark(TypeJWT, k.KeyID, k.Tainted, time.Time{})
}

// canSign reports whether the certificate can be a CA by the rule of crypto/x509, which
// accepts version 1. As a root, any other certificate would verify itself: a workload's
// SVID would be its own authority.
func canSign(cert *x509.Certificate) bool {
	if cert.Version >= 3 && !cert.BasicConstraintsValid || cert.BasicConstraintsValid && !cert.IsCA {
		return false
	}
	return cert.KeyUsage == 0 || cert.KeyUsage&x509.KeyUsageCertSign != 0
}

// unusableKey returns why a JWT authority cannot be used, empty if it can. Workloads get
// the keys as a JWK set, so a key without that form is unusable.
func unusableKey(k JWTAuthority) string {
	if k.KeyID == "" {
		return "it has no key ID"
	}
	if k.PublicKey == nil {
		return "it has no public key"
	}
	jwk := jose.JSONWebKey{Key: k.PublicKey, KeyID: k.KeyID}
	if !jwk.IsPublic() || !jwk.Valid() {
		return "it is not a public key of a supported type"
	}
	if _, err := jwk.MarshalJSON(); err != nil {
		return fmt.Sprintf("its key has no JWK form: %v", err)
	}
	if _, err := x509.MarshalPKIXPublicKey(k.PublicKey); err != nil {
		return fmt.Sprintf("its key has no PKIX form: %v", err)
	}
	return ""
}

// SameKey reports whether two public keys are equal.
func SameKey(a, b crypto.PublicKey) bool {
	key, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && key.Equal(b)
}
