package bundle

// Kind is how an authority changed between two bundles.
type Kind string

// The kinds of change.
const (
	KindAdded     Kind = "added"
	KindTainted   Kind = "tainted"
	KindUntainted Kind = "untainted"
	KindRemoved   Kind = "removed"
)

// The types of authority. A [Change] has one of the first two.
const (
	TypeX509    = "x509"
	TypeJWT     = "jwt"
	TypeUnknown = "unknown" // of a [LeftOut] that is neither
)

// Change is the change of one authority between two bundles of one trust domain.
type Change struct {
	Kind Kind
	Type string // TypeX509 or TypeJWT
	ID   string // authority ID or JWT key ID
}

// Diff lists the changes from one bundle to the next, in the order of the next one's
// authorities and then of the removed ones. An authority that is tainted when it is
// added has both changes. A nil bundle has no authorities.
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

// marks lists one mark for each authority ID. All certificates of an ID have the same; see
// [Content.usable].
func marks(b *Bundle, typ string) []mark {
	if b == nil {
		return nil
	}
	var out []mark
	add := func(id string, tainted bool) {
		if _, had := find(out, id); !had {
			out = append(out, mark{id, tainted})
		}
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
