package upstream

import (
	"context"
	"slices"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/cache"
)

const (
	// maxListBytes bounds a full list in one message: about 200,000 entries.
	maxListBytes = 64 << 20
	// maxEntries bounds what all pages of one sync may add up to.
	maxEntries = 1 << 20
	// maxAsk is the most entries asked for at once; SPIRE's own page size.
	maxAsk = 500
)

// stamp tells apart the states of an entry. The creation time is part of it:
// an entry that is deleted and made again under the same ID starts with the
// same revision number.
type stamp struct{ revision, created int64 }

// EntryChanges is how one answer about entries differs from what is held.
type EntryChanges struct {
	// Upsert holds the entries that are new, or there with another revision or
	// another time of creation, be it a lower one.
	Upsert []*cache.Entry
	// Missing holds the IDs of held entries that the answer does not name.
	Missing []string
	// Withdrawn holds held entries that it names as not for workloads, in the
	// state that it names: ID, Revision and CreatedAt.
	Withdrawn []*cache.Entry
}

// SyncEntries asks which entries the node is authorized for. have is what the
// caller holds, by ID; it is only read. Entries that cannot be used (broken, or
// not meant for workloads) are left out, the broken ones with one log line for
// each of their states; one that is held already is then neither missing nor
// changed.
//
// An answer that cannot be right as a whole is an error, and nothing of it
// counts. The deadline is one PollTimeout for the whole sync.
func (c *Client) SyncEntries(ctx context.Context, have map[string]*cache.Entry) (EntryChanges, error) {
	var s *syncing
	err := c.call(ctx, "sync entries", c.cfg.PollTimeout, needAnswer, func(ctx context.Context, l *link) error {
		if !l.noSync.Load() {
			s = c.newSync(have)
			err := s.stream(ctx, l)
			if status.Code(err) != codes.Unimplemented {
				return err
			}
			l.noSync.Store(true)
			c.cfg.Log.Info("the server lacks SyncAuthorizedEntries, asking for the full list each time")
		}
		s = c.newSync(have)
		return s.list(ctx, l)
	})
	if err != nil {
		return EntryChanges{}, err
	}
	c.skipped = s.skipped
	return s.result(), nil
}

// syncing is one sync under way.
type syncing struct {
	client *Client
	have   map[string]*cache.Entry
	before map[string]stamp // known to be of no use as they are

	skipped map[string]stamp    // before, for the next sync
	seen    map[string]struct{} // IDs that the server named
	changes EntryChanges
}

func (c *Client) newSync(have map[string]*cache.Entry) *syncing {
	return &syncing{
		client:  c,
		have:    have,
		before:  c.skipped,
		skipped: make(map[string]stamp),
		seen:    make(map[string]struct{}, len(have)),
	}
}

// list takes the whole list in one answer.
func (s *syncing) list(ctx context.Context, l *link) error {
	answer, err := entryv1.NewEntryClient(l.conn).GetAuthorizedEntries(ctx,
		&entryv1.GetAuthorizedEntriesRequest{OutputMask: entryMask}, grpc.MaxCallRecvMsgSize(maxListBytes))
	if err != nil {
		return err
	}
	return s.all(answer.GetEntries())
}

// stream does one SyncAuthorizedEntries. A server with few entries sends all of
// them; one with many sends IDs with revisions in pages, and then what it is
// asked for.
func (s *syncing) stream(ctx context.Context, l *link) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := entryv1.NewEntryClient(l.conn).SyncAuthorizedEntries(ctx, grpc.MaxCallRecvMsgSize(maxListBytes))
	if err != nil {
		return err
	}
	// Send fails with io.EOF when the server has ended the stream; Recv then
	// knows why.
	_ = stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: entryMask})
	page, err := stream.Recv()
	if err != nil {
		return ended(err)
	}
	if len(page.GetEntryRevisions()) == 0 {
		return s.pages(stream, page)
	}
	ask, size, err := s.revisions(stream, page)
	if err != nil {
		return err
	}
	slices.Sort(ask) // the server does it otherwise
	for ids := range slices.Chunk(ask, min(size, maxAsk)) {
		_ = stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids})
		if err := s.answers(stream, ids); err != nil {
			return err
		}
	}
	// What was asked for is here. The stream is ended in good order, so that
	// the server does not count it as canceled; how that goes does not matter.
	if stream.CloseSend() == nil {
		_, _ = stream.Recv()
	}
	return nil
}

type pageStream interface {
	Recv() (*entryv1.SyncAuthorizedEntriesResponse, error)
}

// pages takes the full list, which may come in several messages.
func (s *syncing) pages(stream pageStream, page *entryv1.SyncAuthorizedEntriesResponse) error {
	entries := page.GetEntries()
	for page.GetMore() {
		var err error
		if page, err = stream.Recv(); err != nil {
			return ended(err)
		}
		switch {
		case len(page.GetEntryRevisions()) > 0:
			return malformed("it mixes entries and revisions")
		case len(page.GetEntries()) == 0 && page.GetMore():
			return malformed("a page of it is empty")
		}
		entries = append(entries, page.GetEntries()...)
		if len(entries) > maxEntries {
			return malformed("it has more than %d entries", maxEntries)
		}
	}
	return s.all(entries)
}

// all takes a full list.
func (s *syncing) all(entries []*types.Entry) error {
	for _, e := range entries {
		at := stamp{e.GetRevisionNumber(), e.GetCreatedAt()}
		if s.announce(e.GetId(), at) && (s.wanted(e.GetId(), at) || s.refederated(e)) {
			s.take(e)
		}
	}
	return nil
}

// refederated reports whether an entry that is held federates with others now. That
// can be without another revision: SPIRE takes a trust domain out of the entries
// when its bundle is deleted with mode dissociate, and counts that as no change of
// them. A server with many entries shows it in no revision that it lists, either.
func (s *syncing) refederated(in *types.Entry) bool {
	held := s.have[in.GetId()]
	if held == nil {
		return false
	}
	now, err := federatesWith(held.SPIFFEID.TrustDomain(), in)
	return err == nil && !slices.Equal(held.FederatesWith, now)
}

// revisions takes the pages of IDs and returns those to ask for, and the size
// of the server's pages.
func (s *syncing) revisions(stream pageStream, page *entryv1.SyncAuthorizedEntriesResponse) (ask []string, size int, err error) {
	size = len(page.GetEntryRevisions())
	for n := 0; ; {
		for _, r := range page.GetEntryRevisions() {
			at := stamp{r.GetRevisionNumber(), r.GetCreatedAt()}
			if s.announce(r.GetId(), at) && s.wanted(r.GetId(), at) {
				ask = append(ask, r.GetId())
			}
		}
		if n += len(page.GetEntryRevisions()); n > maxEntries {
			return nil, 0, malformed("it has more than %d entries", maxEntries)
		}
		if !page.GetMore() {
			return ask, size, nil
		}
		if page, err = stream.Recv(); err != nil {
			return nil, 0, ended(err)
		}
		switch {
		case len(page.GetEntries()) > 0:
			return nil, 0, malformed("it mixes revisions and entries")
		case len(page.GetEntryRevisions()) == 0:
			return nil, 0, malformed("a page of it is empty")
		}
	}
}

// answers takes the entries that were asked for: each of them once.
func (s *syncing) answers(stream pageStream, ids []string) error {
	open := make(map[string]struct{}, len(ids))
	for _, id := range ids {
		open[id] = struct{}{}
	}
	for {
		page, err := stream.Recv()
		if err != nil {
			return ended(err)
		}
		switch {
		case len(page.GetEntryRevisions()) > 0:
			return malformed("it mixes entries and revisions")
		case len(page.GetEntries()) == 0 && page.GetMore():
			return malformed("a page of it is empty")
		}
		for _, e := range page.GetEntries() {
			if _, asked := open[e.GetId()]; !asked {
				return malformed("entry %q was not asked for, or comes twice", e.GetId())
			}
			delete(open, e.GetId())
			s.take(e)
		}
		if page.GetMore() {
			continue
		}
		if len(open) > 0 {
			return malformed("%d of %d entries asked for are missing", len(open), len(ids))
		}
		return nil
	}
}

// announce notes that the server named an entry, and reports whether it can be
// told apart from the others.
func (s *syncing) announce(id string, at stamp) bool {
	if _, twice := s.seen[id]; id == "" || twice || at.revision < 0 {
		why := "it has no ID"
		switch {
		case twice:
			// Remembered under another name: the first entry is of use.
			id, why = "second "+id, "another entry has the same ID"
		case id != "":
			why = "its revision is negative"
			s.seen[id] = struct{}{} // named, thus not missing
		}
		s.skip(id, at, why)
		return false
	}
	s.seen[id] = struct{}{}
	return true
}

// wanted reports whether the content of an entry is needed: not when it is held
// as it is, nor when it is known to be of no use.
func (s *syncing) wanted(id string, at stamp) bool {
	held := s.have[id]
	if held != nil && held.Revision == at.revision &&
		(at.created == 0 || held.CreatedAt.IsZero() || held.CreatedAt.Equal(unixTime(at.created))) {
		return false
	}
	if was, skipped := s.before[id]; skipped && was == at {
		s.skipped[id] = at
		return held != nil
	}
	return true
}

// take adds an entry to the result, or skips it.
func (s *syncing) take(in *types.Entry) {
	at := stamp{in.GetRevisionNumber(), in.GetCreatedAt()}
	if in.GetStoreSvid() {
		s.skipped[in.GetId()] = at
		if _, held := s.have[in.GetId()]; held {
			s.changes.Withdrawn = append(s.changes.Withdrawn,
				&cache.Entry{ID: in.GetId(), Revision: at.revision, CreatedAt: unixTime(at.created)})
		}
		return
	}
	e, err := parseEntry(s.client.cfg.TrustDomain, in)
	if err != nil {
		s.skip(in.GetId(), at, err.Error())
		return
	}
	s.changes.Upsert = append(s.changes.Upsert, e)
}

// skip leaves an entry out and says so, once for each of its states.
func (s *syncing) skip(id string, at stamp, why string) {
	was, known := s.before[id]
	s.skipped[id] = at
	if !known || was != at {
		s.client.cfg.Log.Warn("entry skipped", "entry", id, "revision", at.revision, "reason", why)
	}
}

func (s *syncing) result() EntryChanges {
	for id := range s.have {
		if _, seen := s.seen[id]; !seen {
			s.changes.Missing = append(s.changes.Missing, id)
		}
	}
	slices.Sort(s.changes.Missing)
	return s.changes
}
