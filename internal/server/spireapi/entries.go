package spireapi

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Selector is a property of a workload.
type Selector struct{ Type, Value string }

// Entry says that workloads with all the Selectors have the identity SPIFFEID.
type Entry struct {
	ID       string // at most 255 bytes
	SPIFFEID spiffeid.ID
	// ParentID is the agent that serves the entry; every agent when zero.
	ParentID spiffeid.ID
	// Operator says that every agent may serve the entry of an operator: without
	// it such an entry needs a ParentID; see [Config.IsOperator].
	Operator  bool `json:",omitempty"`
	Selectors []Selector
	// Hint tells a workload with several identities them apart.
	Hint          string
	FederatesWith []spiffeid.TrustDomain
	// DNSNames are in X.509-SVIDs beside the SPIFFE ID, in this order and in
	// lower case; see [keyset.CheckDNSNames]. The first is the common name.
	DNSNames []string
	// X509TTL is 1 to 168 hours, JWTTTL a second or more; the server's
	// defaults when zero.
	X509TTL, JWTTTL time.Duration
	// DisableX509SVIDPrefetch has agents mint an X.509-SVID only when a workload
	// asks for it.
	DisableX509SVIDPrefetch bool `json:",omitempty"`
	// JWTSVIDIncludeJTI puts a jti claim into JWT-SVIDs, and has agents hand each
	// of them out once.
	JWTSVIDIncludeJTI bool `json:",omitempty"`
}

// StoredEntry is an Entry as the server keeps it.
type StoredEntry struct {
	Entry
	// Revision differs from that of every earlier content under the same ID,
	// also when the ID was deleted in between.
	Revision  int64
	CreatedAt time.Time
}

// EntryChange is one entry that was added (Before is nil), removed (After is
// nil) or changed. What it points to must not be modified.
type EntryChange struct{ Before, After *Entry }

func (c EntryChange) id() string {
	if c.After != nil {
		return c.After.ID
	}
	return c.Before.ID
}

// Diff is what a list of entries changes, ordered by ID, and how many entries
// stay as they are.
type Diff struct {
	Changes   []EntryChange
	Unchanged int
}

// Removed is how many entries are removed, of how many there were before.
func (d Diff) Removed() (removed, before int) {
	before = d.Unchanged
	for _, c := range d.Changes {
		if c.Before != nil {
			before++
			if c.After == nil {
				removed++
			}
		}
	}
	return removed, before
}

// Entries returns all entries, ordered by ID. Their slices must not be
// modified.
func (s *Server) Entries() []StoredEntry {
	set := s.entries.Load()
	out := make([]StoredEntry, len(set.sorted))
	for i, e := range set.sorted {
		out[i] = *e
	}
	return out
}

// ApplyEntries makes entries all there are, in one atomic step, and returns
// what that changes. An entry that is the same as before keeps its revision,
// one that has changed gets a new one. Nothing changes when dryRun is set, when
// any of the entries is wrong (an [EntryError]) or, as a rule, when storage fails:
// where that leaves open what it has stored, [Server.Entries] says what it has.
func (s *Server) ApplyEntries(ctx context.Context, entries []Entry, dryRun bool) (Diff, error) {
	return s.ApplyEntriesIf(ctx, entries, dryRun, noObjection)
}

// ApplyEntriesIf is [Server.ApplyEntries] for a caller who decides by the change
// whether it is wanted. accept is called with what would be changed at that
// moment, also in a dry run and when that is nothing; no other change comes
// between. When it returns an error, nothing is changed and that error returned.
// It must not call the Server.
func (s *Server) ApplyEntriesIf(ctx context.Context, entries []Entry, dryRun bool, accept func(Diff) error) (Diff, error) {
	keep := make(map[string]bool, len(entries))
	for _, e := range entries {
		if keep[e.ID] {
			return Diff{}, fmt.Errorf("apply entries: %w", &EntryError{e.ID, "id", "appears twice"})
		}
		keep[e.ID] = true
	}
	d, err := s.changeEntries(ctx, entries, func(cur *entrySet) []string {
		var gone []string
		for _, e := range cur.sorted {
			if !keep[e.ID] {
				gone = append(gone, e.ID)
			}
		}
		return gone
	}, dryRun, accept)
	if err != nil {
		return Diff{}, fmt.Errorf("apply entries: %w", err)
	}
	return d, nil
}

func noObjection(Diff) error { return nil }

// UpsertEntry adds an entry or replaces the one that has its ID. It returns
// what was there before and what is now: equal when nothing has changed. A
// wrong entry is refused with an [EntryError].
func (s *Server) UpsertEntry(ctx context.Context, e Entry) (EntryChange, error) {
	d, err := s.changeEntries(ctx, []Entry{e}, func(*entrySet) []string { return nil }, false, noObjection)
	switch {
	case err != nil:
		return EntryChange{}, fmt.Errorf("upsert entry: %w", err)
	case len(d.Changes) == 0:
		e = canonical(e)
		return EntryChange{Before: &e, After: &e}, nil
	}
	return d.Changes[0], nil
}

// DeleteEntry deletes an entry. It returns ErrNotFound when there is none.
func (s *Server) DeleteEntry(ctx context.Context, id string) error {
	d, err := s.changeEntries(ctx, nil, func(cur *entrySet) []string {
		if cur.byID[id] == nil {
			return nil
		}
		return []string{id}
	}, false, noObjection)
	switch {
	case err != nil:
		return fmt.Errorf("delete entry %q: %w", id, err)
	case len(d.Changes) == 0:
		return fmt.Errorf("delete entry %q: %w", id, ErrNotFound)
	}
	return nil
}

// changeEntries stores entries and drops those that gone names of the current
// set, unless accept objects to what that changes. Writers wait for each other here, also while storage works; readers
// never wait.
func (s *Server) changeEntries(ctx context.Context, entries []Entry, gone func(cur *entrySet) []string, dryRun bool, accept func(Diff) error) (Diff, error) {
	for _, e := range entries {
		if err := s.checkEntry(e); err != nil {
			return Diff{}, err
		}
	}
	select {
	case s.entriesM <- struct{}{}:
		defer func() { <-s.entriesM }()
	case <-ctx.Done():
		return Diff{}, fmt.Errorf("wait for another change of entries: %w", ctx.Err())
	}
	cur := s.entries.Load()
	var d Diff
	var put []StoredEntry
	now := s.now().UTC()
	revision := max(cur.revision, now.UnixNano())
	for _, e := range entries {
		e = canonical(e)
		stored := StoredEntry{Entry: e, CreatedAt: now.Truncate(time.Second)}
		change := EntryChange{After: &e}
		if old := cur.byID[e.ID]; old != nil {
			if equalEntry(old.Entry, e) {
				d.Unchanged++
				continue
			}
			change.Before, stored.CreatedAt = &old.Entry, old.CreatedAt
		}
		revision++
		stored.Revision = revision
		put = append(put, stored)
		d.Changes = append(d.Changes, change)
	}
	drop := gone(cur)
	for _, id := range drop {
		d.Changes = append(d.Changes, EntryChange{Before: &cur.byID[id].Entry})
	}
	slices.SortFunc(d.Changes, func(a, b EntryChange) int { return cmp.Compare(a.id(), b.id()) })
	if err := accept(d); err != nil {
		return Diff{}, err
	}
	if dryRun || len(d.Changes) == 0 {
		return d, nil
	}
	if err := s.storage.PutEntries(ctx, put, drop); err != nil {
		// Stored or not, what is served and compared with is what storage has.
		if again := s.loadEntries(context.WithoutCancel(ctx)); again != nil {
			s.log.Error("entries could neither be stored nor read again", "error", again)
		}
		return Diff{}, err
	}
	next := maps.Clone(cur.byID)
	for _, id := range drop {
		delete(next, id)
	}
	for i := range put {
		next[put[i].ID] = &put[i]
	}
	s.entries.Store(newEntrySet(next, revision))
	s.log.Info("entries changed", "stored", len(put), "deleted", len(drop), "total", len(next))
	return d, nil
}

// loadEntries makes what storage has the entries that are served.
func (s *Server) loadEntries(ctx context.Context) error {
	stored, err := s.storage.Entries(ctx)
	if err != nil {
		return fmt.Errorf("load entries: %w", err)
	}
	entries := make(map[string]*StoredEntry, len(stored))
	var revision int64
	if cur := s.entries.Load(); cur != nil {
		revision = cur.revision
	}
	for i := range stored {
		entries[stored[i].ID] = &stored[i]
		revision = max(revision, stored[i].Revision)
	}
	s.entries.Store(newEntrySet(entries, revision))
	return nil
}
