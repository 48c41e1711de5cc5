package spireapi

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
)

// entrySet holds all entries at one moment. It is immutable.
type entrySet struct {
	sorted   []*StoredEntry // by ID
	byID     map[string]*StoredEntry
	byParent map[spiffeid.ID][]*StoredEntry // each ordered by ID; zero: every agent's
	// revision is the highest that is known. That of an entry which was deleted
	// before a restart is not known. So a new revision is never below the clock,
	// in nanoseconds since 1970: an ID that is reused gets one that no agent has.
	revision int64
}

func newEntrySet(entries map[string]*StoredEntry, revision int64) *entrySet {
	set := &entrySet{
		sorted: slices.SortedFunc(maps.Values(entries), compareID), byID: entries,
		byParent: make(map[spiffeid.ID][]*StoredEntry), revision: revision,
	}
	for _, e := range set.sorted {
		set.byParent[e.ParentID] = append(set.byParent[e.ParentID], e)
	}
	return set
}

func compareID(a, b *StoredEntry) int { return cmp.Compare(a.ID, b.ID) }

// authorized returns the entries that an agent serves, ordered by ID. The
// slice must not be modified.
func (set *entrySet) authorized(agent spiffeid.ID) []*StoredEntry {
	everyones, own := set.byParent[spiffeid.ID{}], set.byParent[agent]
	switch {
	case len(own) == 0:
		return everyones
	case len(everyones) == 0:
		return own
	}
	out := slices.Concat(everyones, own)
	slices.SortFunc(out, compareID)
	return out
}

// find returns an entry by ID; nil if the agent serves none with that ID.
func (set *entrySet) find(agent spiffeid.ID, id string) *StoredEntry {
	if e := set.byID[id]; e != nil && (e.ParentID.IsZero() || e.ParentID == agent) {
		return e
	}
	return nil
}

// proto returns the fields of an entry that a mask selects, all when it is nil. The
// parent of an entry for every agent is the agent that asks, because agents expect
// a parent.
func (e *StoredEntry) proto(agent spiffeid.ID, mask *types.EntryMask) *types.Entry {
	all := mask == nil
	out := &types.Entry{Id: e.ID}
	if all || mask.SpiffeId {
		out.SpiffeId = protoID(e.SPIFFEID)
	}
	if all || mask.ParentId {
		out.ParentId = protoID(agent)
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
