package store

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/ledger"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// What the bucket about has beside keyStore.
var (
	keyCopied    = []byte("copied_at") // of a copy that no server has used yet
	keyHeartbeat = []byte("heartbeat") // of the last commit
	keyRestored  = []byte("restored")  // of a store that was one
)

// restored is an element of the value of about/restored: what was signed between
// CopiedAt and At is not in the store.
type restored struct {
	At, CopiedAt time.Time
	Deployments  map[string]ledger.Restored
}

// Restored says what is not known of a deployment because the store was put back
// from a copy, once for each time, in order: of every keyset that was in it, what was
// signed between the copy and the first Open of it for writing. It does not change
// while the store is open. What has expired by the time of an Open is gone.
func (d *Deployment) Restored() []ledger.Restored {
	var all []ledger.Restored
	for _, r := range d.s.restored {
		if unknown, ok := r.Deployments[d.name]; ok {
			all = append(all, unknown)
		}
	}
	return all
}

// Lost are the times between a copy and its restore that an X.509-SVID could be of
// that was still valid when the store was opened, in order.
func (s *Store) Lost() []spireapi.Lost {
	var all []spireapi.Lost
	for _, r := range s.restored {
		if !s.over(r.x509End()) {
			all = append(all, spireapi.Lost{From: r.CopiedAt, To: r.At})
		}
	}
	return all
}

// RestoredAt is when this Open made a store of a copy, by a clock that may have been
// behind; zero when it did not. It does not change while the store is open.
func (s *Store) RestoredAt() time.Time {
	if !s.tookOver {
		return time.Time{}
	}
	return s.restored[len(s.restored)-1].At
}

// correct has the next process find when the restore of this one was, once the clock
// is believed to have been behind.
func (s *Store) correct(about *bbolt.Bucket, c *clock.Clock) error {
	if !s.tookOver {
		return nil
	}
	all := slices.Clone(s.restored)
	last := &all[len(all)-1]
	late := c.Heartbeat().Add(-c.Uptime()).Sub(last.At)
	if late <= clock.Skew {
		return nil
	}
	last.At = last.At.Add(late)
	last.Deployments = maps.Clone(last.Deployments)
	for name, unknown := range last.Deployments {
		unknown.X509 = maps.Clone(unknown.X509)
		for id, end := range unknown.X509 {
			unknown.X509[id] = end.Add(late)
		}
		last.Deployments[name] = unknown
	}
	return putRestored(about, all)
}

// x509End is when the last X.509-SVID expires that the store may not know of.
func (r *restored) x509End() time.Time { return r.At.Add(keyset.MaxX509TTL) }

// end is when nothing is valid any more that the store may not know of.
func (r *restored) end() time.Time {
	end := r.x509End()
	for _, unknown := range r.Deployments {
		for _, t := range unknown.JWT {
			end = later(end, t)
		}
	}
	return end
}

// overMargin is how long after the end what is not known is kept: clocks differ, and
// an hour costs nothing.
const overMargin = time.Hour

// over reports whether a time has passed for everybody, as far as is known when the
// store is opened. A clock that is ahead does not make it so: the heartbeat has to be
// past it, too.
func (s *Store) over(end time.Time) bool {
	sure := s.now()
	if !s.heartbeat.IsZero() && s.heartbeat.Before(sure) {
		sure = s.heartbeat
	}
	return sure.After(end.Add(overMargin))
}

// checkAbout looks at what the bucket has beside the format.
func (s *Store) checkAbout(b *bbolt.Bucket) error {
	return b.ForEach(func(k, v []byte) (err error) {
		switch string(k) {
		case string(keyStore):
		case string(keyCopied):
			s.copied, err = unpackTime(k, v)
		case string(keyRestored):
			s.restored, err = decodeRestored(s.format, k, v)
		case string(keyHeartbeat):
			s.heartbeat, err = unpackTime(k, v)
		default:
			err = fmt.Errorf("%w: %q does not belong there", ErrDamaged, k)
		}
		return err
	})
}

// decodeRestored reads the value of about/restored. Up to format 2 it is one element.
func decodeRestored(format int, k, v []byte) ([]restored, error) {
	if format > 2 {
		return decode[[]restored](k, v)
	}
	r, err := decode[restored](k, v)
	return []restored{r}, err
}

func putRestored(about *bbolt.Bucket, all []restored) error {
	if len(all) == 0 {
		return about.Delete(keyRestored)
	}
	value, err := packJSON(keyRestored, all)
	if err != nil {
		return err
	}
	return about.Put(keyRestored, value)
}

// jump is by how much a restore raises the sequence number of what is published:
// above all that was published after the copy, so that who holds that follows at
// once and does not take the restored bundle for that of a server that lags
// behind. No server publishes once a millisecond; that it grows with the time
// since the copy keeps a second restore of the same one above what came of the
// first. The constant is for clocks that are wrong.
func jump(since time.Duration) uint64 { return 1<<20 + uint64(max(0, since).Milliseconds()) }

// takeOver turns the mark of a copy into what the store knows of itself from then
// on, in one commit. Before it the mark is there and the next Open does it; after it
// there is none. It also drops what was not known and has ended.
func (s *Store) takeOver() error {
	ended := func(r restored) bool { return s.over(r.end()) }
	if s.copied.IsZero() && !slices.ContainsFunc(s.restored, ended) {
		return nil
	}
	kept := slices.DeleteFunc(slices.Clone(s.restored), ended)
	r := restored{At: s.now().UTC(), CopiedAt: s.copied, Deployments: make(map[string]ledger.Restored)}
	if r.At.Before(r.CopiedAt) {
		// What is not known would end too soon.
		return fmt.Errorf("it is a copy of %s, and the clock shows %s: set the clock of the machine", r.CopiedAt.Format(time.RFC3339), r.At.Format(time.RFC3339))
	}
	dropped := 0
	err := guard(func() error {
		return s.db.Update(func(tx *bbolt.Tx) (err error) {
			about := tx.Bucket(bucketAbout)
			if !s.copied.IsZero() {
				if dropped, err = r.applyAll(tx.Bucket(bucketDeployments)); err != nil {
					return err
				}
				kept = append(kept, r)
				if err := about.Delete(keyCopied); err != nil {
					return err
				}
			}
			return putRestored(about, kept)
		})
	})
	switch {
	case err != nil && s.copied.IsZero():
		return fmt.Errorf("drop what was not known of a restore and has ended: %w", err)
	case err != nil:
		return fmt.Errorf("take it over as a copy that was put back: %w", err)
	}
	if !s.copied.IsZero() {
		s.log.Warn("this store is a copy that was put back: what was signed since it was taken is not known, and no keyset of it is safe to remove before that has expired; join tokens were dropped",
			"file", s.path, "copied_at", r.CopiedAt, "x509_unknown_until", r.x509End(), "join_tokens_dropped", dropped)
	}
	s.copied, s.restored, s.tookOver = time.Time{}, kept, !s.copied.IsZero()
	return nil
}

// applyAll is apply for all deployments.
func (r *restored) applyAll(deployments *bbolt.Bucket) (tokensDropped int, err error) {
	var names []string
	err = deployments.ForEachBucket(func(name []byte) error {
		names = append(names, string(name))
		return nil
	})
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		n, err := r.apply(deployments.Bucket([]byte(name)), name)
		if err != nil {
			return 0, fmt.Errorf("deployment %q: %w", name, err)
		}
		tokensDropped += n
	}
	return tokensDropped, nil
}

// apply changes a deployment and notes what is not known of it.
func (r *restored) apply(b *bbolt.Bucket, name string) (tokensDropped int, err error) {
	// Those that were spent after the copy would let somebody in once more.
	tokensDropped = b.Bucket([]byte(tokens)).Stats().KeyN
	if err := b.DeleteBucket([]byte(tokens)); err != nil {
		return 0, err
	}
	if _, err := b.CreateBucket([]byte(tokens)); err != nil {
		return 0, err
	}
	doc, err := decodeDocument(b)
	if err != nil || doc.Version == 0 {
		return tokensDropped, err
	}
	unknown := ledger.Restored{CopiedAt: r.CopiedAt, X509: make(map[string]time.Time), JWT: make(map[string]time.Time)}
	states := make(map[string]keyset.State)
	for _, k := range doc.Records {
		states[k.ID] = k.State
		ca, err := x509.ParseCertificate(k.CA)
		if err != nil {
			return 0, fmt.Errorf("%w: keyset %s has no CA certificate", ErrDamaged, k.ID)
		}
		id := hex.EncodeToString(ca.SubjectKeyId)
		// A keyset of whatever state may have signed after the copy, or while it
		// was taken. Nothing that it signs outlives it; nothing else limits the
		// life of JWT-SVIDs.
		unknown.X509[id], unknown.JWT[k.JWTKeyID] = r.x509End(), k.ExpiresAt
		if k.ExpiresAt.Before(r.x509End()) {
			unknown.X509[id] = k.ExpiresAt
		}
	}
	r.Deployments[name] = unknown
	doc.Version++
	doc.Sequence += jump(r.At.Sub(r.CopiedAt))
	document, err := put(keysets, keyDocument, doc) // its keys are sealed as they were
	if err != nil {
		return 0, err
	}
	note, err := put(audit, auditKey(doc.Version), AuditRecord{Number: doc.Version, Change: keyset.Change{
		At: r.At, Actor: keyset.Server, Operation: "restore", Before: states, After: states,
		Note: fmt.Sprintf("from a copy of %s UTC; what was signed since is not known; join tokens dropped: %d", r.CopiedAt.Format(time.DateTime), tokensDropped),
	}})
	if err != nil {
		return 0, err
	}
	for _, o := range []op{document, note} {
		if err := b.Bucket([]byte(o.bucket)).Put(o.key, o.value); err != nil {
			return 0, err
		}
	}
	return tokensDropped, nil
}

func later(x, y time.Time) time.Time {
	if x.After(y) {
		return x
	}
	return y
}
