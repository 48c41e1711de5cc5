package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/renewd/renewd/internal/keyset"
)

// Selector is a property of a workload.
type Selector struct{ Type, Value string }

// Entry says that workloads with all the Selectors have the identity SPIFFEID.
type Entry struct {
	ID       string
	SPIFFEID spiffeid.ID
	// ParentID is the agent that serves the entry; every agent when zero.
	ParentID  spiffeid.ID
	Selectors []Selector
	// Hint tells a workload with several identities them apart.
	Hint          string
	FederatesWith []spiffeid.TrustDomain
	// X509TTL is 1 to 168 hours, JWTTTL anything positive; the server's
	// defaults when zero.
	X509TTL, JWTTTL time.Duration
}

// StoredEntry is an Entry as the server keeps it.
type StoredEntry struct {
	Entry
	// Revision differs from that of every earlier content under the same ID.
	Revision  int64
	CreatedAt time.Time
}

// entrySet is all entries at one moment, ordered by ID. It is immutable.
type entrySet struct {
	sorted   []StoredEntry
	byID     map[string]StoredEntry
	revision int64 // the highest ever given
}

func newEntrySet(entries map[string]StoredEntry, revision int64) *entrySet {
	byID := func(a, b StoredEntry) int { return cmp.Compare(a.ID, b.ID) }
	return &entrySet{byID: entries, sorted: slices.SortedFunc(maps.Values(entries), byID), revision: revision}
}

// SetEntries makes entries all there are. An entry that is the same as before
// keeps its revision, one that has changed gets a new one. Nothing changes when
// any of them is wrong.
func (s *Server) SetEntries(ctx context.Context, entries []Entry) error {
	keep := make(map[string]bool, len(entries))
	for _, e := range entries {
		if keep[e.ID] {
			return fmt.Errorf("set entries: entry %q appears twice", e.ID)
		}
		keep[e.ID] = true
	}
	return s.changeEntries(ctx, "set entries", entries, func(id string) bool { return !keep[id] })
}

// UpsertEntry adds an entry or replaces the one that has its ID.
func (s *Server) UpsertEntry(ctx context.Context, e Entry) error {
	return s.changeEntries(ctx, "upsert entry", []Entry{e}, func(string) bool { return false })
}

// DeleteEntry deletes an entry. It returns ErrNotFound when there is none.
func (s *Server) DeleteEntry(ctx context.Context, id string) error {
	if _, ok := s.entries.Load().byID[id]; !ok {
		return fmt.Errorf("delete entry %q: %w", id, ErrNotFound)
	}
	return s.changeEntries(ctx, "delete entry", nil, func(other string) bool { return other == id })
}

// changeEntries stores entries and drops those that gone names. Writers wait
// for each other here, also while storage works; readers never wait.
func (s *Server) changeEntries(ctx context.Context, operation string, entries []Entry, gone func(id string) bool) error {
	for _, e := range entries {
		if err := s.checkEntry(e); err != nil {
			return fmt.Errorf("%s: entry %q: %w", operation, e.ID, err)
		}
	}
	s.entriesM.Lock()
	defer s.entriesM.Unlock()
	cur := s.entries.Load()
	next, revision := maps.Clone(cur.byID), cur.revision
	var put []StoredEntry
	var deleted []string
	for id := range cur.byID {
		if gone(id) {
			delete(next, id)
			deleted = append(deleted, id)
		}
	}
	for _, e := range entries {
		e = canonical(e)
		old, ok := cur.byID[e.ID]
		if ok && equalEntry(old.Entry, e) {
			continue
		}
		// One counter for all, so that an ID that was deleted and is used
		// again does not get a revision that an agent still holds.
		revision++
		stored := StoredEntry{Entry: e, Revision: revision, CreatedAt: old.CreatedAt}
		if !ok {
			stored.CreatedAt = s.now().UTC().Truncate(time.Second)
		}
		next[e.ID] = stored
		put = append(put, stored)
	}
	if len(put)+len(deleted) == 0 {
		return nil
	}
	if err := s.storage.PutEntries(ctx, put, deleted); err != nil {
		return fmt.Errorf("%s: %w", operation, err)
	}
	s.entries.Store(newEntrySet(next, revision))
	s.log.Info("entries changed", "stored", len(put), "deleted", len(deleted), "total", len(next))
	return nil
}

func (s *Server) loadEntries(ctx context.Context) error {
	stored, err := s.storage.Entries(ctx)
	if err != nil {
		return fmt.Errorf("load entries: %w", err)
	}
	entries := make(map[string]StoredEntry, len(stored))
	var revision int64
	for _, e := range stored {
		entries[e.ID] = e
		revision = max(revision, e.Revision)
	}
	s.entries.Store(newEntrySet(entries, revision))
	return nil
}

func (s *Server) checkEntry(e Entry) error {
	switch {
	case e.ID == "":
		return errors.New("no ID")
	case !e.SPIFFEID.MemberOf(s.td):
		return fmt.Errorf("SPIFFE ID %q is not of trust domain %q", e.SPIFFEID, s.td.Name())
	case e.SPIFFEID.Path() == "":
		return errors.New("SPIFFE ID has no path")
	case e.SPIFFEID.Path() == "/spire" || strings.HasPrefix(e.SPIFFEID.Path(), "/spire/"):
		return fmt.Errorf("SPIFFE ID %q is reserved for servers and agents", e.SPIFFEID)
	case !e.ParentID.IsZero() && !e.ParentID.MemberOf(s.td):
		return fmt.Errorf("parent ID %q is not of trust domain %q", e.ParentID, s.td.Name())
	case len(e.Selectors) == 0:
		return errors.New("no selectors: it would match every workload")
	case e.JWTTTL < 0:
		return fmt.Errorf("JWT lifetime %v is negative", e.JWTTTL)
	}
	for _, sel := range e.Selectors {
		if sel.Type == "" || sel.Value == "" || strings.Contains(sel.Type, ":") {
			return fmt.Errorf("selector %q:%q is malformed", sel.Type, sel.Value)
		}
	}
	if slices.Contains(e.FederatesWith, s.td) {
		return errors.New("federates with its own trust domain")
	}
	return checkX509TTL(e.X509TTL)
}

func checkX509TTL(ttl time.Duration) error {
	if ttl != 0 && (ttl < keyset.MinX509TTL || ttl > keyset.MaxX509TTL) {
		return fmt.Errorf("X.509 lifetime %v is not within %v to %v", ttl, keyset.MinX509TTL, keyset.MaxX509TTL)
	}
	return nil
}

// canonical copies an entry and orders what has no order, so that equal
// entries compare equal.
func canonical(e Entry) Entry {
	e.Selectors = slices.Clone(e.Selectors)
	slices.SortFunc(e.Selectors, func(a, b Selector) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Value, b.Value))
	})
	e.Selectors = slices.Compact(e.Selectors)
	e.FederatesWith = slices.Clone(e.FederatesWith)
	slices.SortFunc(e.FederatesWith, spiffeid.TrustDomain.Compare)
	e.FederatesWith = slices.Compact(e.FederatesWith)
	return e
}

func equalEntry(a, b Entry) bool {
	return a.ID == b.ID && a.SPIFFEID == b.SPIFFEID && a.ParentID == b.ParentID && a.Hint == b.Hint &&
		a.X509TTL == b.X509TTL && a.JWTTTL == b.JWTTTL &&
		slices.Equal(a.Selectors, b.Selectors) && slices.Equal(a.FederatesWith, b.FederatesWith)
}

func (e *StoredEntry) servedBy(agent spiffeid.ID) bool {
	return e.ParentID.IsZero() || e.ParentID == agent
}

// authorized returns the entries that an agent serves, ordered by ID.
func (s *Server) authorized(agent spiffeid.ID) []StoredEntry {
	all := s.entries.Load().sorted
	out := make([]StoredEntry, 0, len(all))
	for _, e := range all {
		if e.servedBy(agent) {
			out = append(out, e)
		}
	}
	return out
}

// entryFor finds an entry that an agent serves.
func (s *Server) entryFor(agent spiffeid.ID, id string) (StoredEntry, bool) {
	e, ok := s.entries.Load().byID[id]
	return e, ok && e.servedBy(agent)
}

// proto renders an entry for an agent. An entry of every agent names the one
// that asks as its parent, because agents expect one. A nil mask wants all.
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
	if all || mask.X509SvidTtl {
		out.X509SvidTtl = int32(e.X509TTL / time.Second)
	}
	if all || mask.JwtSvidTtl {
		out.JwtSvidTtl = int32(min(e.JWTTTL/time.Second, 1<<31-1))
	}
	if all || mask.Hint {
		out.Hint = e.Hint
	}
	if all || mask.RevisionNumber {
		out.RevisionNumber = e.Revision
	}
	if all || mask.CreatedAt {
		out.CreatedAt = e.CreatedAt.Unix()
	}
	return out
}
