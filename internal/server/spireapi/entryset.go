package spireapi

import (
	"cmp"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// EntrySet has all entries at one moment. It is immutable, and so are the entries and the
// lists that it returns. A change copies the list of all entries and what it touches in the
// indexes, nothing else.
type EntrySet struct {
	sorted     []*StoredEntry // by ID
	byParent   *index
	bySPIFFEID *index
	// aliases has each alias once, by the first of its selectors.
	aliases map[Selector][]*StoredEntry
	// revision is the highest that is known. That of an entry which was deleted
	// before a restart is not known. So a new revision is never below the clock,
	// in nanoseconds since 1970: an ID that is reused gets one that no agent has.
	revision int64
}

func newEntrySet(entries []*StoredEntry, revision int64) *EntrySet {
	edits := make([]edit, len(entries))
	for i, e := range entries {
		edits[i] = edit{e.ID, e}
	}
	empty := &EntrySet{byParent: new(index), bySPIFFEID: new(index)}
	return empty.with(edits, revision)
}

// with returns the set after edits, which have each ID once.
func (set *EntrySet) with(edits []edit, revision int64) *EntrySet {
	edits = slices.Clone(edits)
	slices.SortFunc(edits, func(a, b edit) int { return cmp.Compare(a.id, b.id) })
	next := &EntrySet{
		sorted:     splice(set.sorted, edits),
		byParent:   set.byParent.with(edits, set, func(e *StoredEntry) spiffeid.ID { return e.ParentID }),
		bySPIFFEID: set.bySPIFFEID.with(edits, set, func(e *StoredEntry) spiffeid.ID { return e.SPIFFEID }),
		aliases:    set.aliases,
		revision:   revision,
	}
	for _, e := range edits {
		if old := set.Entry(e.id); old != nil && old.IsAlias() || e.entry != nil && e.entry.IsAlias() {
			next.indexAliases()
			break
		}
	}
	return next
}

func (set *EntrySet) indexAliases() {
	set.aliases = make(map[Selector][]*StoredEntry)
	for _, p := range set.byParent {
		for parent, list := range p {
			if parent.Path() != serverPath {
				continue
			}
			for _, e := range list {
				if len(e.Selectors) > 0 {
					set.aliases[e.Selectors[0]] = append(set.aliases[e.Selectors[0]], e)
				}
			}
		}
	}
}

// Entry returns an entry by ID, nil if there is none.
func (set *EntrySet) Entry(id string) *StoredEntry {
	if at, found := search(set.sorted, id); found {
		return set.sorted[at]
	}
	return nil
}

// All returns all entries, ordered by ID.
func (set *EntrySet) All() []*StoredEntry { return set.sorted }

// OfParent returns the entries with a ParentID, which may be zero, ordered by ID.
func (set *EntrySet) OfParent(parent spiffeid.ID) []*StoredEntry { return set.byParent.get(parent) }

// OfSPIFFEID returns the entries with a SPIFFE ID, ordered by ID.
func (set *EntrySet) OfSPIFFEID(id spiffeid.ID) []*StoredEntry { return set.bySPIFFEID.get(id) }

// Authorized returns the entries that an agent serves, ordered by ID: as from a SPIRE server
// (1.13.3, package entrycache), those whose parent is the agent, or the SPIFFE ID of an alias
// all of whose selectors the agent has, or the SPIFFE ID of another entry that it serves; and
// those without a parent. It looks at these entries only.
func (set *EntrySet) Authorized(a *Agent) []*StoredEntry {
	parents := []spiffeid.ID{{}, a.ID}
	for _, sel := range a.Selectors {
		for _, alias := range set.aliases[sel] {
			if alias.matches(a) {
				parents = append(parents, alias.SPIFFEID)
			}
		}
	}
	var longest, others []*StoredEntry
	seen := make(map[spiffeid.ID]bool)
	for len(parents) > 0 {
		parent := parents[len(parents)-1]
		parents = parents[:len(parents)-1]
		list := set.byParent.get(parent)
		if len(list) == 0 || seen[parent] {
			continue
		}
		seen[parent] = true
		for _, e := range list {
			if len(set.byParent.get(e.SPIFFEID)) > 0 {
				parents = append(parents, e.SPIFFEID)
			}
		}
		if len(list) > len(longest) {
			list, longest = longest, list
		}
		others = append(others, list...)
	}
	if len(others) == 0 {
		return longest
	}
	edits := make([]edit, len(others))
	for i, e := range others {
		edits[i] = edit{e.ID, e}
	}
	slices.SortFunc(edits, func(a, b edit) int { return cmp.Compare(a.id, b.id) })
	return splice(longest, edits)
}

// find returns an entry by ID; nil if the agent serves none with that ID. It goes from
// the entry upwards, so it costs the same however many entries the agent serves.
func (set *EntrySet) find(a *Agent, id string) *StoredEntry {
	entry := set.Entry(id)
	if entry == nil || entry.IsAlias() {
		return nil
	}
	seen := make(map[spiffeid.ID]bool)
	for parents := []spiffeid.ID{entry.ParentID}; len(parents) > 0; {
		parent := parents[len(parents)-1]
		parents = parents[:len(parents)-1]
		if parent.IsZero() || parent == a.ID {
			return entry
		}
		if seen[parent] {
			continue
		}
		seen[parent] = true
		for _, above := range set.bySPIFFEID.get(parent) {
			switch {
			case !above.IsAlias():
				parents = append(parents, above.ParentID)
			case above.matches(a):
				return entry
			}
		}
	}
	return nil
}

// matches reports whether an agent has all selectors of an alias.
func (e *StoredEntry) matches(a *Agent) bool {
	for _, sel := range e.Selectors {
		if !slices.Contains(a.Selectors, sel) {
			return false
		}
	}
	return len(e.Selectors) > 0
}

// Proto returns the fields of an entry that a mask selects, all when it is nil. everyone is
// the parent of an entry without one, because SPIRE's clients expect a parent.
func (e *StoredEntry) Proto(everyone spiffeid.ID, mask *types.EntryMask) *types.Entry {
	all := mask == nil
	out := &types.Entry{Id: e.ID}
	if all || mask.SpiffeId {
		out.SpiffeId = protoID(e.SPIFFEID)
	}
	if all || mask.ParentId {
		out.ParentId = protoID(cmp.Or(e.ParentID, everyone))
	}
	if all || mask.Selectors {
		out.Selectors = make([]*types.Selector, len(e.Selectors))
		for i, sel := range e.Selectors {
			out.Selectors[i] = &types.Selector{Type: sel.Type, Value: sel.Value}
		}
	}
	if all || mask.FederatesWith {
		for _, td := range e.FederatesWith {
			out.FederatesWith = append(out.FederatesWith, td.Name())
		}
	}
	if all || mask.DnsNames {
		out.DnsNames = e.DNSNames
	}
	if all || mask.X509SvidTtl {
		out.X509SvidTtl = int32(e.X509TTL / time.Second)
	}
	if all || mask.JwtSvidTtl {
		out.JwtSvidTtl = int32(min(e.JWTTTL/time.Second, 1<<31-1))
	}
	if all || mask.Hint {
		out.Hint = e.Hint
	}
	if (all || mask.ExpiresAt) && !e.ExpiresAt.IsZero() {
		out.ExpiresAt = e.ExpiresAt.Unix()
	}
	// As from a SPIRE server, the message is absent when no attribute is set.
	if (all || mask.AdditionalAttributes) && (e.DisableX509SVIDPrefetch || e.JWTSVIDIncludeJTI) {
		out.AdditionalAttributes = &types.Entry_AdditionalAttributes{
			DisableX509SvidPrefetch: e.DisableX509SVIDPrefetch, JwtSvidIncludeJti: e.JWTSVIDIncludeJTI,
		}
	}
	if all || mask.RevisionNumber {
		out.RevisionNumber = e.Revision
	}
	if all || mask.CreatedAt {
		out.CreatedAt = e.CreatedAt.Unix()
	}
	return out
}
