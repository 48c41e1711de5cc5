package bundle

// Kind is what became of an authority between two bundles.
type Kind string

// The kinds of change an authority can go through.
const (
	KindAdded     Kind = "added"
	KindTainted   Kind = "tainted"
	KindUntainted Kind = "untainted"
	KindRemoved   Kind = "removed"
)

// The types of authority. A [Change] is about one of the first two.
const (
	TypeX509    = "x509"
	TypeJWT     = "jwt"
	TypeUnknown = "unknown" // of a [LeftOut] that is of neither
)

// Change is one authority's step between two bundles of one trust domain.
type Change struct {
	Kind Kind
	Type string // TypeX509 or TypeJWT
	ID   string // authority ID or JWT key ID
}

// Diff lists what changed from one bundle to the next, in the order of the next one's authorities
// and then of those removed. An authority that arrives tainted is both added
// and tainted. A nil bundle has no authorities.
func Diff(from, to *Bundle) []Change {
	var out []Change
	for _, typ := range []string{TypeX509, TypeJWT} {
		before, after := marks(from, typ), marks(to, typ)
		for _, m := range after {
			was, had := find(before, m.id)
			if !had {
				out = append(out, Change{KindAdded, typ, m.id})
			}
			switch {
			case m.tainted && !was:
				out = append(out, Change{KindTainted, typ, m.id})
			case !m.tainted && was:
				out = append(out, Change{KindUntainted, typ, m.id})
			}
		}
		for _, m := range before {
			if _, has := find(after, m.id); !has {
				out = append(out, Change{KindRemoved, typ, m.id})
			}
		}
	}
	return out
}

type mark struct {
	id      string
	tainted bool
}

// marks lists one mark for each authority ID, tainted when any of its
// certificates is.
func marks(b *Bundle, typ string) []mark {
	if b == nil {
		return nil
	}
	var out []mark
	add := func(id string, tainted bool) {
		for i := range out {
			if out[i].id == id {
				out[i].tainted = out[i].tainted || tainted
				return
			}
		}
		out = append(out, mark{id, tainted})
	}
	if typ == TypeX509 {
		for _, a := range b.content.X509 {
			add(a.ID, a.Tainted)
		}
	} else {
		for _, k := range b.content.JWT {
			add(k.KeyID, k.Tainted)
		}
	}
	return out
}

func find(in []mark, id string) (tainted, ok bool) {
	for _, m := range in {
		if m.id == id {
			return m.tainted, true
		}
	}
	return false, false
}
