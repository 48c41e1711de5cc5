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

// Entry gives the identity SPIFFEID to workloads that have all the Selectors.
type Entry struct {
	ID       string // at most 255 bytes
	SPIFFEID spiffeid.ID
	// ParentID is the agent that serves the entry; every agent when zero.
	ParentID spiffeid.ID
	// Operator allows an entry of an operator's SPIFFE ID without ParentID; see
	// [Config.IsOperator].
	Operator  bool `json:",omitempty"`
	Selectors []Selector
	// Hint lets a workload tell its identities apart.
	Hint          string
	FederatesWith []spiffeid.TrustDomain
	// DNSNames are in X.509-SVIDs in addition to the SPIFFE ID, in this order and
	// in lower case; see [keyset.CheckDNSNames]. The first is the common name.
	DNSNames []string
	// X509TTL is 1 to 168 hours, JWTTTL a second or more; the server's
	// defaults when zero.
	X509TTL, JWTTTL time.Duration
	// DisableX509SVIDPrefetch makes agents mint an X.509-SVID only when a workload
	// asks for it.
	DisableX509SVIDPrefetch bool `json:",omitempty"`
	// JWTSVIDIncludeJTI adds a jti claim to JWT-SVIDs, and makes agents use each of
	// them for one answer only.
	JWTSVIDIncludeJTI bool `json:",omitempty"`
}

// StoredEntry is an Entry as the server stores it.
type StoredEntry struct {
	Entry
	// Revision differs from that of every earlier entry with the same ID, even if
	// the ID was deleted in between.
	Revision  int64
	CreatedAt time.Time
}

// EntryChange is one entry that was added (Before is nil), removed (After is
// nil) or changed. The entries must not be modified.
type EntryChange struct{ Before, After *Entry }

func (c EntryChange) id() string {
	if c.After != nil {
		return c.After.ID
	}
	return c.Before.ID
}

// Diff is the difference between two sets of entries: the changes, ordered by ID,
// and how many entries are the same.
type Diff struct {
	Changes   []EntryChange
	Unchanged int
}

// Removed returns how many entries are removed, and how many there were before.
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

// ApplyEntries replaces all entries in one atomic step and returns the difference.
// An unchanged entry keeps its revision, a changed one gets a new one. Nothing
// changes if dryRun is set, if one of the entries is invalid (an [EntryError]) or,
// as a rule, if storage fails. If the outcome is unknown then, [Server.Entries]
// returns what storage has.
func (s *Server) ApplyEntries(ctx context.Context, entries []Entry, dryRun bool) (Diff, error) {
	return s.ApplyEntriesIf(ctx, entries, dryRun, acceptAny)
}

// ApplyEntriesIf is [Server.ApplyEntries] with a check of the difference. accept is
// called with what would change, even in a dry run or if that is nothing. If it
// returns an error, nothing changes and ApplyEntriesIf returns that error. No other
// change happens in between, so accept must not call the Server.
func (s *Server) ApplyEntriesIf(ctx context.Context, entries []Entry, dryRun bool, accept func(Diff) error) (Diff, error) {
	keep := make(map[string]bool, len(entries))
	for _, e := range entries {
		if keep[e.ID] {
			return Diff{}, fmt.Errorf("apply entries: %w", &EntryError{e.ID, "id", "appears twice"})
		}
		keep[e.ID] = true
	}
	d, err := s.changeEntries(ctx, entries, func(cur *entrySet) []string {
		var remove []string
		for _, e := range cur.sorted {
			if !keep[e.ID] {
				remove = append(remove, e.ID)
			}
		}
		return remove
	}, dryRun, accept)
	if err != nil {
		return Diff{}, fmt.Errorf("apply entries: %w", err)
	}
	return d, nil
}

func acceptAny(Diff) error { return nil }

// UpsertEntry adds an entry or replaces the one with the same ID. In the result,
// Before and After are equal if nothing has changed. An invalid entry is refused
// with an [EntryError].
func (s *Server) UpsertEntry(ctx context.Context, e Entry) (EntryChange, error) {
	d, err := s.changeEntries(ctx, []Entry{e}, func(*entrySet) []string { return nil }, false, acceptAny)
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
	}, false, acceptAny)
	switch {
	case err != nil:
		return fmt.Errorf("delete entry %q: %w", id, err)
	case len(d.Changes) == 0:
		return fmt.Errorf("delete entry %q: %w", id, ErrNotFound)
	}
	return nil
}

// changeEntries stores entries and deletes those whose IDs remove returns, unless
// accept returns an error. One writer at a time runs here, the call of storage
// included; readers never wait.
func (s *Server) changeEntries(ctx context.Context, entries []Entry, remove func(cur *entrySet) []string, dryRun bool, accept func(Diff) error) (Diff, error) {
	for _, e := range entries {
		if err := s.checkEntry(e); err != nil {
			return Diff{}, err
		}
	}
	select {
	case s.entriesSem <- struct{}{}:
		defer func() { <-s.entriesSem }()
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
	drop := remove(cur)
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
		// The change may have been stored: serve what storage has.
		if loadErr := s.loadEntries(context.WithoutCancel(ctx)); loadErr != nil {
			s.log.Error("entries neither stored nor reloaded", "error", loadErr)
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

// loadEntries replaces the served entries with those in storage.
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
