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

// The optional keys of the bucket about.
var (
	keyCopied    = []byte("copied_at") // in a copy that no server has used yet
	keyHeartbeat = []byte("heartbeat") // of the last commit
	keyRestored  = []byte("restored")  // in a store that was a copy
)

// restored is an element of the value of about/restored: the store does not have what was
// signed between CopiedAt and At.
type restored struct {
	At, CopiedAt time.Time
	Deployments  map[string]ledger.Restored
}

// Restored returns, for each restore of the store from a copy, in order, what is not
// known of a deployment: the expiry of what every keyset of the copy may have signed
// between the copy and its first [Open] for writing. The result does not change while the
// store is open. A restore of which everything had expired at the Open is left out.
func (d *Deployment) Restored() []ledger.Restored {
	var all []ledger.Restored
	for _, r := range d.s.restored {
		if unknown, ok := r.Deployments[d.name]; ok {
			all = append(all, unknown)
		}
	}
	return all
}

// Lost returns the periods between a copy and its restore, in order. It leaves out those
// whose X.509-SVIDs had all expired when the store was opened.
func (s *Store) Lost() []spireapi.Lost {
	var all []spireapi.Lost
	for _, r := range s.restored {
		if !s.hasPassed(r.x509End()) {
			all = append(all, spireapi.Lost{From: r.CopiedAt, To: r.At})
		}
	}
	return all
}

// RestoredAt returns when this [Open] turned a copy into a store, by a clock that may have
// been behind; zero if it did not. It does not change while the store is open.
func (s *Store) RestoredAt() time.Time {
	if !s.adopted {
		return time.Time{}
	}
	return s.restored[len(s.restored)-1].At
}

// correctRestore stores the corrected time of this process's restore for the next
// process, once the clock shows that it was behind at the restore.
func (s *Store) correctRestore(about *bbolt.Bucket, c *clock.Clock) error {
	if !s.adopted {
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

// x509End returns the latest expiry of X.509-SVIDs that the store may not know.
func (r *restored) x509End() time.Time { return r.At.Add(keyset.MaxX509TTL) }

// end returns the latest expiry of SVIDs that the store may not know.
func (r *restored) end() time.Time {
	end := r.x509End()
	for _, unknown := range r.Deployments {
		for _, t := range unknown.JWT {
			if t.After(end) {
				end = t
			}
		}
	}
	return end
}

// hasPassed reports whether something with the given expiry has expired by every machine's
// clock ([clock.Over]), as far as is known when the store is opened. The heartbeat must be
// past it, too, because the clock may be ahead.
func (s *Store) hasPassed(t time.Time) bool {
	now := s.now()
	if !s.heartbeat.IsZero() && s.heartbeat.Before(now) {
		now = s.heartbeat
	}
	return !now.Before(clock.Over(t))
}

// checkAbout reads and checks the optional values of the bucket.
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

// decodeRestored decodes the value of about/restored. Up to format 2 it is one element.
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

// sequenceStep returns by how much a restore raises the sequence number of the published
// bundle: above everything published since the copy. A consumer with a later bundle then
// accepts the restored one at once and does not take it for that of a lagging server. No
// server publishes once a millisecond. The step grows with the time since the copy, so
// that a second restore of the same copy is above what was published after the first. The
// constant is for clocks that are wrong.
func sequenceStep(since time.Duration) uint64 { return 1<<20 + uint64(max(0, since).Milliseconds()) }

// adoptCopy turns a copy into a store, in one commit: it replaces the mark of the copy
// with an element of about/restored. If it fails, the next [Open] does it. It also deletes
// elements of which everything has expired.
func (s *Store) adoptCopy() error {
	ended := func(r restored) bool { return s.hasPassed(r.end()) }
	if s.copied.IsZero() && !slices.ContainsFunc(s.restored, ended) {
		return nil
	}
	kept := slices.DeleteFunc(slices.Clone(s.restored), ended)
	r := restored{At: s.now().UTC(), CopiedAt: s.copied, Deployments: make(map[string]ledger.Restored)}
	if r.At.Before(r.CopiedAt) {
		// The expiry of what is not known would be too early.
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
		return fmt.Errorf("delete an expired restore: %w", err)
	case err != nil:
		return fmt.Errorf("restore it from a copy: %w", err)
	}
	if !s.copied.IsZero() {
		s.log.Warn("store restored from a copy: SVIDs signed since the copy are not known, its keysets are not safe to remove before those have expired, and its join tokens are deleted",
			"path", s.path, "copied_at", r.CopiedAt, "x509_unknown_until", r.x509End(), "join_tokens_dropped", dropped)
	}
	s.copied, s.restored, s.adopted = time.Time{}, kept, !s.copied.IsZero()
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

// apply changes a deployment for the restore and records what is not known of it.
func (r *restored) apply(b *bbolt.Bucket, name string) (tokensDropped int, err error) {
	// A token that was spent after the copy could be used a second time.
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
		// A keyset of any state may have signed since the copy began. Nothing that it
		// signed expires later than the keyset; JWT-SVIDs have no other limit.
		unknown.X509[id], unknown.JWT[k.JWTKeyID] = r.x509End(), k.ExpiresAt
		if k.ExpiresAt.Before(r.x509End()) {
			unknown.X509[id] = k.ExpiresAt
		}
	}
	r.Deployments[name] = unknown
	doc.Version++
	doc.Sequence += sequenceStep(r.At.Sub(r.CopiedAt))
	document, err := put(keysets, keyDocument, doc) // its keys stay sealed
	if err != nil {
		return 0, err
	}
	note, err := put(audit, auditKey(doc.Version), AuditRecord{Number: doc.Version, Change: keyset.Change{
		At: r.At, Actor: keyset.Server, Operation: "restore", Before: states, After: states,
		Note: fmt.Sprintf("from a copy of %s; what was signed since is not known; join tokens dropped: %d", clock.Text(r.CopiedAt), tokensDropped),
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
