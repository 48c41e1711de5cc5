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
	// maxListBytes is the largest message accepted: a list of about 200,000
	// entries.
	maxListBytes = 64 << 20
	// maxEntries is the most entries that one sync may return.
	maxEntries = 1 << 20
	// maxAsk is the most entries requested at once: SPIRE's page size.
	maxAsk = 500
)

// entryVersion identifies one state of an entry. It includes the creation time,
// because an entry that is deleted and created again with the same ID starts with
// the same revision number.
type entryVersion struct{ revision, created int64 }

// EntryChanges is the difference between one answer and the entries held.
type EntryChanges struct {
	// Upsert holds the entries that are new, or have another revision or creation
	// time, also an earlier one.
	Upsert []*cache.Entry
	// Missing holds the IDs of held entries that the answer does not name.
	Missing []string
	// Withdrawn holds the held entries that are no longer for workloads. Only ID,
	// Revision and CreatedAt are set, to those of the answer.
	Withdrawn []*cache.Entry
}

// SyncEntries asks which entries the node is authorized for. have is what the
// caller holds, by ID; SyncEntries only reads it. It skips entries that are not for
// workloads, and invalid ones, with one log line for each version of those. A held
// entry whose new version is invalid is neither missing nor changed.
//
// An invalid answer is an error, and nothing of it is used. The whole sync has
// pollTimeout.
func (c *Client) SyncEntries(ctx context.Context, have map[string]*cache.Entry) (EntryChanges, error) {
	var s *entrySync
	err := c.call(ctx, "sync entries", pollTimeout, needProbe, func(ctx context.Context, l *link) error {
		if !l.noSync.Load() {
			s = c.newSync(have)
			err := s.stream(ctx, l)
			if status.Code(err) != codes.Unimplemented {
				return err
			}
			l.noSync.Store(true)
			c.cfg.Log.Info("SyncAuthorizedEntries not supported by the server, fetching the full list each time")
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

// entrySync is one sync in progress.
type entrySync struct {
	client *Client
	have   map[string]*cache.Entry
	before map[string]entryVersion // skipped by the sync before

	skipped map[string]entryVersion
	seen    map[string]struct{} // IDs that the server has named
	changes EntryChanges
}

func (c *Client) newSync(have map[string]*cache.Entry) *entrySync {
	return &entrySync{
		client:  c,
		have:    have,
		before:  c.skipped,
		skipped: make(map[string]entryVersion),
		seen:    make(map[string]struct{}, len(have)),
	}
}

// list fetches the whole list in one answer.
func (s *entrySync) list(ctx context.Context, l *link) error {
	answer, err := entryv1.NewEntryClient(l.conn).GetAuthorizedEntries(ctx,
		&entryv1.GetAuthorizedEntriesRequest{OutputMask: entryMask}, grpc.MaxCallRecvMsgSize(maxListBytes))
	if err != nil {
		return err
	}
	return s.all(answer.GetEntries())
}

// stream makes one SyncAuthorizedEntries call. A server with few entries sends all
// of them. One with many sends pages of IDs and revisions, and then the entries
// that the client requests.
func (s *entrySync) stream(ctx context.Context, l *link) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := entryv1.NewEntryClient(l.conn).SyncAuthorizedEntries(ctx, grpc.MaxCallRecvMsgSize(maxListBytes))
	if err != nil {
		return err
	}
	// Send fails with io.EOF when the server has ended the stream; Recv returns
	// the reason.
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
	slices.Sort(ask) // saves the server sorting them
	for ids := range slices.Chunk(ask, min(size, maxAsk)) {
		_ = stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids})
		if err := s.answers(stream, ids); err != nil {
			return err
		}
	}
	// Everything was received. The stream is closed so that the server does not
	// count it as canceled; an error no longer matters.
	if stream.CloseSend() == nil {
		_, _ = stream.Recv()
	}
	return nil
}

type pageStream interface {
	Recv() (*entryv1.SyncAuthorizedEntriesResponse, error)
}

// pages receives the full list, which may come in several messages.
func (s *entrySync) pages(stream pageStream, page *entryv1.SyncAuthorizedEntriesResponse) error {
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

// all processes a full list.
func (s *entrySync) all(entries []*types.Entry) error {
	for _, e := range entries {
		at := entryVersion{e.GetRevisionNumber(), e.GetCreatedAt()}
		if s.markNamed(e.GetId(), at) && (s.wanted(e.GetId(), at) || s.federationChanged(e)) {
			s.take(e)
		}
	}
	return nil
}

// federationChanged reports whether a held entry federates with other trust domains
// now. SPIRE can change that without a new revision: when a bundle is deleted with
// mode dissociate. With a server that sends pages of revisions it goes unnoticed.
func (s *entrySync) federationChanged(in *types.Entry) bool {
	held := s.have[in.GetId()]
	if held == nil {
		return false
	}
	now, err := federatesWith(held.SPIFFEID.TrustDomain(), in)
	return err == nil && !slices.Equal(held.FederatesWith, now)
}

// revisions receives the pages of IDs and returns those to request, and the size of
// the server's pages.
func (s *entrySync) revisions(stream pageStream, page *entryv1.SyncAuthorizedEntriesResponse) (ask []string, size int, err error) {
	size = len(page.GetEntryRevisions())
	for n := 0; ; {
		for _, r := range page.GetEntryRevisions() {
			at := entryVersion{r.GetRevisionNumber(), r.GetCreatedAt()}
			if s.markNamed(r.GetId(), at) && s.wanted(r.GetId(), at) {
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

// answers receives the requested entries, each exactly once.
func (s *entrySync) answers(stream pageStream, ids []string) error {
	pending := make(map[string]struct{}, len(ids))
	for _, id := range ids {
		pending[id] = struct{}{}
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
			if _, asked := pending[e.GetId()]; !asked {
				return malformed("entry %q was not asked for, or comes twice", e.GetId())
			}
			delete(pending, e.GetId())
			s.take(e)
		}
		if page.GetMore() {
			continue
		}
		if len(pending) > 0 {
			return malformed("%d of %d entries asked for are missing", len(pending), len(ids))
		}
		return nil
	}
}

// markNamed records that the server named an entry. It returns false, and skips the
// entry, when its ID or revision is invalid.
func (s *entrySync) markNamed(id string, at entryVersion) bool {
	if _, twice := s.seen[id]; id == "" || twice || at.revision < 0 {
		why := "it has no ID"
		switch {
		case twice:
			// Skipped under another name: the first entry is usable.
			id, why = "second "+id, "another entry has the same ID"
		case id != "":
			why = "its revision is negative"
			s.seen[id] = struct{}{} // it is not missing
		}
		s.skip(id, at, why)
		return false
	}
	s.seen[id] = struct{}{}
	return true
}

// wanted reports whether the content of an entry is needed: neither this version
// is held nor was it skipped before.
func (s *entrySync) wanted(id string, at entryVersion) bool {
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
func (s *entrySync) take(in *types.Entry) {
	at := entryVersion{in.GetRevisionNumber(), in.GetCreatedAt()}
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

// skip skips an entry and logs that once for each of its versions.
func (s *entrySync) skip(id string, at entryVersion, why string) {
	was, known := s.before[id]
	s.skipped[id] = at
	if !known || was != at {
		s.client.cfg.Log.Warn("entry skipped", "entry_id", id, "revision", at.revision, "reason", why)
	}
}

func (s *entrySync) result() EntryChanges {
	for id := range s.have {
		if _, seen := s.seen[id]; !seen {
			s.changes.Missing = append(s.changes.Missing, id)
		}
	}
	slices.Sort(s.changes.Missing)
	return s.changes
}
