package spireapi

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Selector is a property of a workload.
type Selector struct{ Type, Value string }

// Entry gives the identity SPIFFEID to workloads that have all the Selectors.
type Entry struct {
	// ID is at most 255 bytes. An entry that is stored has one.
	ID       string
	SPIFFEID spiffeid.ID
	// ParentID says which agents serve the entry: the agent itself, the SPIFFE ID of an
	// alias, or that of another entry; every agent when zero. An alias is an entry whose
	// parent is the server, spiffe://<trust domain>/spire/server: an agent goes by its
	// SPIFFE ID if the agent's node has all its Selectors.
	ParentID spiffeid.ID
	// Operator allows an entry of an operator's SPIFFE ID that is not for one agent
	// only; see [Config.IsOperator].
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
	// ExpiresAt is when the entry is deleted, in full seconds; never when zero.
	ExpiresAt time.Time `json:",omitzero"`
}

// IsAlias reports whether an entry gives a SPIFFE ID to nodes, not to workloads.
func (e *Entry) IsAlias() bool { return e.ParentID.Path() == serverPath }

// Name returns what messages call an entry: its ID, or the SPIFFE ID if it has none yet.
func (e *Entry) Name() string { return cmp.Or(e.ID, e.SPIFFEID.String()) }

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

// EntrySet returns all entries as they are now.
func (s *Server) EntrySet() *EntrySet { return s.entries.Load() }

// EntriesOf returns the entries that an agent serves, ordered by ID. It returns ErrNotFound for
// an agent that is not attested.
func (s *Server) EntriesOf(ctx context.Context, id spiffeid.ID) ([]*StoredEntry, error) {
	agent, err := s.storage.Agent(ctx, id)
	switch {
	case err != nil:
		return nil, fmt.Errorf("entries of agent %s: %w", id, err)
	case agent == nil:
		return nil, fmt.Errorf("entries of agent %s: %w", id, ErrNotFound)
	}
	return s.EntrySet().Authorized(agent), nil
}

// Entries returns copies of all entries, ordered by ID. Their slices must not be
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
// An entry without an ID is the stored one that it is an edit of, whose ID it keeps, or a
// new one with an ID of [EntryID]. An unchanged entry keeps its revision, a changed one
// gets a new one. Nothing changes if dryRun is set, if some of the entries are invalid
// ([EntryErrors]) or, as a rule, if storage fails. If the outcome is unknown then,
// [Server.Entries] returns what storage has.
func (s *Server) ApplyEntries(ctx context.Context, entries []Entry, dryRun bool) (Diff, error) {
	return s.ApplyEntriesIf(ctx, entries, dryRun, acceptAny)
}

// ApplyEntriesIf is [Server.ApplyEntries] with a check of the difference. accept is
// called with what would change, even in a dry run or if that is nothing. If it
// returns an error, nothing changes and ApplyEntriesIf returns that error. No other
// change happens in between, so accept must not call the Server.
func (s *Server) ApplyEntriesIf(ctx context.Context, entries []Entry, dryRun bool, accept func(Diff) error) (Diff, error) {
	if err := s.checkList(entries); err != nil {
		return Diff{}, fmt.Errorf("apply entries: %w", err)
	}
	d, err := s.editEntries(ctx, func(edit *EntryEdit) error {
		list := make([]Entry, len(entries))
		for i, e := range entries {
			list[i] = canonical(e)
		}
		edit.before.identify(list)
		keep := make(map[string]bool, len(list))
		for _, e := range list {
			keep[e.ID] = true
			edit.putChecked(e)
		}
		for _, e := range edit.before.All() {
			if !keep[e.ID] {
				edit.Delete(e.ID)
			}
		}
		return nil
	}, dryRun, accept)
	if err != nil {
		return Diff{}, fmt.Errorf("apply entries: %w", err)
	}
	return d, nil
}

func acceptAny(Diff) error { return nil }

// UpsertEntry puts an entry; see [EntryEdit.Put]. In the result, Before and After are
// equal if nothing has changed.
func (s *Server) UpsertEntry(ctx context.Context, e Entry) (EntryChange, error) {
	var stored *StoredEntry
	d, err := s.EditEntries(ctx, func(edit *EntryEdit) (err error) {
		stored, err = edit.Put(e)
		return err
	})
	switch {
	case err != nil:
		return EntryChange{}, fmt.Errorf("upsert entry: %w", err)
	case len(d.Changes) == 0:
		return EntryChange{Before: &stored.Entry, After: &stored.Entry}, nil
	}
	return d.Changes[0], nil
}

// DeleteEntry deletes an entry. It returns ErrNotFound when there is none.
func (s *Server) DeleteEntry(ctx context.Context, id string) error {
	_, err := s.EditEntries(ctx, func(edit *EntryEdit) error {
		if !edit.Delete(id) {
			return ErrNotFound
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("delete entry %q: %w", id, err)
	}
	return nil
}

// PruneEntries deletes the entries whose ExpiresAt has passed.
func (s *Server) PruneEntries(ctx context.Context) error {
	now := s.config.AtLeast()
	expired := func(e *StoredEntry) bool { return !e.ExpiresAt.IsZero() && e.ExpiresAt.Before(now) }
	if !slices.ContainsFunc(s.EntrySet().All(), expired) {
		return nil
	}
	d, err := s.EditEntries(ctx, func(edit *EntryEdit) error {
		for _, e := range edit.before.All() {
			if expired(e) {
				edit.Delete(e.ID)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("delete expired entries: %w", err)
	}
	for _, c := range d.Changes {
		s.log.Info("expired entry deleted", "entry_id", c.Before.ID, "spiffe_id", c.Before.SPIFFEID.String())
	}
	return nil
}

// EntryEdit is a change of several entries that is being prepared; see
// [Server.EditEntries]. It is not safe for concurrent use. What it returns must not be
// modified.
type EntryEdit struct {
	s         *Server
	before    *EntrySet
	edits     map[string]*StoredEntry  // by ID; nil: to be removed
	put       map[spiffeid.ID][]string // the IDs of those with a SPIFFE ID that are to be stored
	now       time.Time
	revision  int64
	unchanged int
}

// Entry returns an entry by ID as it will be; nil if there will be none.
func (c *EntryEdit) Entry(id string) *StoredEntry {
	if e, edited := c.edits[id]; edited {
		return e
	}
	return c.before.Entry(id)
}

// Similar returns an entry as it will be that has the same SPIFFE ID, parent and
// selectors, by which a SPIRE server tells duplicates; nil if there is none.
func (c *EntryEdit) Similar(e Entry) *StoredEntry {
	e = canonical(e)
	similar := func(other *StoredEntry) bool {
		return other != nil && other.SPIFFEID == e.SPIFFEID && other.ParentID == e.ParentID && slices.Equal(other.Selectors, e.Selectors)
	}
	for _, other := range c.before.OfSPIFFEID(e.SPIFFEID) {
		if other = c.Entry(other.ID); similar(other) {
			return other
		}
	}
	for _, id := range c.put[e.SPIFFEID] {
		if other := c.Entry(id); similar(other) {
			return other
		}
	}
	return nil
}

// Put adds an entry, or replaces the one with the same ID, and returns it as it will be
// stored. Without an ID it replaces the one that is similar, or is added with a new ID
// ([EntryID]). It refuses an invalid entry with an [EntryError]. Without a difference the
// entry stays as it is.
func (c *EntryEdit) Put(e Entry) (*StoredEntry, error) {
	if err := c.s.checkEntry(e); err != nil {
		return nil, err
	}
	if e = canonical(e); e.ID == "" {
		if similar := c.Similar(e); similar != nil {
			e.ID = similar.ID
		} else {
			e.ID = newID(e, func(id string) bool { return c.Entry(id) != nil || c.before.Entry(id) != nil })
		}
	}
	return c.putChecked(e), nil
}

// putChecked puts a valid entry with an ID, which is canonical.
func (c *EntryEdit) putChecked(e Entry) *StoredEntry {
	stored := &StoredEntry{Entry: e, CreatedAt: c.now.Truncate(time.Second)}
	if old := c.Entry(e.ID); old != nil {
		if equalEntry(old.Entry, stored.Entry) {
			c.unchanged++
			return old
		}
		stored.CreatedAt = old.CreatedAt
	}
	c.revision++
	stored.Revision = c.revision
	c.edits[e.ID] = stored
	c.put[e.SPIFFEID] = append(c.put[e.SPIFFEID], e.ID)
	return stored
}

// Delete removes an entry. It reports whether there was one.
func (c *EntryEdit) Delete(id string) bool {
	if c.Entry(id) == nil {
		return false
	}
	if c.before.Entry(id) == nil {
		delete(c.edits, id) // added by this edit
	} else {
		c.edits[id] = nil
	}
	return true
}

func (c *EntryEdit) diff() Diff {
	d := Diff{Unchanged: c.unchanged}
	for id, after := range c.edits {
		var change EntryChange
		if before := c.before.Entry(id); before != nil {
			change.Before = &before.Entry
		}
		if after != nil {
			change.After = &after.Entry
		}
		d.Changes = append(d.Changes, change)
	}
	slices.SortFunc(d.Changes, func(a, b EntryChange) int { return cmp.Compare(a.id(), b.id()) })
	return d
}

// EditEntries stores what edit does to the entries, in one atomic step, and returns the
// difference. No other change happens in between, so edit must not call the Server. If it
// returns an error, nothing changes and EditEntries returns that error. For errors of
// storage see [Server.ApplyEntries].
func (s *Server) EditEntries(ctx context.Context, edit func(*EntryEdit) error) (Diff, error) {
	return s.editEntries(ctx, edit, false, acceptAny)
}

// editEntries stores what edit does, unless accept returns an error. One writer at a time
// runs here, the call of storage included; readers never wait.
func (s *Server) editEntries(ctx context.Context, prepare func(*EntryEdit) error, dryRun bool, accept func(Diff) error) (Diff, error) {
	select {
	case s.entriesSem <- struct{}{}:
		defer func() { <-s.entriesSem }()
	case <-ctx.Done():
		return Diff{}, fmt.Errorf("wait for another change of entries: %w", ctx.Err())
	}
	c := &EntryEdit{s: s, before: s.entries.Load(), edits: make(map[string]*StoredEntry), put: make(map[spiffeid.ID][]string), now: s.now().UTC()}
	c.revision = max(c.before.revision, c.now.UnixNano())
	if err := prepare(c); err != nil {
		return Diff{}, err
	}
	d := c.diff()
	if err := accept(d); err != nil {
		return Diff{}, err
	}
	if dryRun || len(d.Changes) == 0 {
		return d, nil
	}
	var put []StoredEntry
	var remove []string
	edits := make([]edit, 0, len(c.edits))
	for id, e := range c.edits {
		edits = append(edits, edit{id, e})
		if e == nil {
			remove = append(remove, id)
		} else {
			put = append(put, *e)
		}
	}
	if err := s.storage.PutEntries(ctx, put, remove); err != nil {
		// The change may have been stored: serve what storage has.
		if loadErr := s.loadEntries(context.WithoutCancel(ctx)); loadErr != nil {
			s.log.Error("entries neither stored nor reloaded", "error", loadErr)
		}
		return Diff{}, err
	}
	next := c.before.with(edits, c.revision)
	s.entries.Store(next)
	s.log.Info("entries changed", "stored", len(put), "deleted", len(remove), "total", len(next.sorted))
	return d, nil
}

// loadEntries replaces the served entries with those in storage.
func (s *Server) loadEntries(ctx context.Context) error {
	stored, err := s.storage.Entries(ctx)
	if err != nil {
		return fmt.Errorf("load entries: %w", err)
	}
	entries := make([]*StoredEntry, len(stored))
	var revision int64
	if cur := s.entries.Load(); cur != nil {
		revision = cur.revision
	}
	for i := range stored {
		entries[i] = &stored[i]
		revision = max(revision, stored[i].Revision)
	}
	s.entries.Store(newEntrySet(entries, revision))
	return nil
}
