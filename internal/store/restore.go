package store

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"time"

	"go.etcd.io/bbolt"

	"github.com/renewd/renewd/internal/keyset"
	"github.com/renewd/renewd/internal/ledger"
)

// What the bucket about has beside keyStore.
var (
	keyCopied    = []byte("copied_at") // of a copy that no server has used yet
	keyHeartbeat = []byte("heartbeat") // of the last commit
	keyRestored  = []byte("restored")  // of a store that was one
)

// restored is the value of about/restored: what was signed between CopiedAt and At
// is not in the store.
type restored struct {
	At, CopiedAt time.Time
	Deployments  map[string]ledger.Restored
}

// Restored says what is not known of a deployment because the store was put back
// from a copy: of every keyset that was in it, what was signed between the copy
// and the first Open of it for writing. It does not change while the store is
// open; the zero value when there is nothing of that kind.
func (d *Deployment) Restored() ledger.Restored { return d.s.restored.Deployments[d.name] }

// Lost returns between when the store was copied and put back; zero times when it
// was not.
func (s *Store) Lost() (from, to time.Time) { return s.restored.CopiedAt, s.restored.At }

// checkAbout looks at what the bucket has beside the format.
func (s *Store) checkAbout(b *bbolt.Bucket) error {
	return b.ForEach(func(k, v []byte) (err error) {
		switch string(k) {
		case string(keyStore):
		case string(keyCopied):
			s.copied, err = unpackTime(k, v)
		case string(keyRestored):
			s.restored, err = decode[restored](k, v)
		case string(keyHeartbeat):
			s.heartbeat, err = unpackTime(k, v)
		default:
			err = fmt.Errorf("%w: %q does not belong there", ErrDamaged, k)
		}
		return err
	})
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
// there is none.
func (s *Store) takeOver() error {
	if s.copied.IsZero() {
		return nil
	}
	r := restored{At: s.now().UTC(), CopiedAt: s.copied, Deployments: make(map[string]ledger.Restored)}
	if r.At.Before(r.CopiedAt) {
		// What is not known would end too soon.
		return fmt.Errorf("it is a copy of %s, and the clock shows %s: set the clock of the machine", r.CopiedAt.Format(time.RFC3339), r.At.Format(time.RFC3339))
	}
	dropped := 0
	err := guard(func() error {
		return s.db.Update(func(tx *bbolt.Tx) error {
			deployments, names := tx.Bucket(bucketDeployments), []string(nil)
			err := deployments.ForEachBucket(func(name []byte) error {
				names = append(names, string(name))
				return nil
			})
			if err != nil {
				return err
			}
			for _, name := range names {
				n, err := r.apply(deployments.Bucket([]byte(name)), name, s.restored.Deployments[name])
				if err != nil {
					return fmt.Errorf("deployment %q: %w", name, err)
				}
				dropped += n
			}
			value, err := packJSON(keyRestored, r)
			if err != nil {
				return err
			}
			about := tx.Bucket(bucketAbout)
			if err := about.Put(keyRestored, value); err != nil {
				return err
			}
			return about.Delete(keyCopied)
		})
	})
	if err != nil {
		return fmt.Errorf("take it over as a copy that was put back: %w", err)
	}
	s.copied, s.restored = time.Time{}, r
	s.log.Warn("this store is a copy that was put back: what was signed since it was taken is not known, and no keyset of it is safe to remove before that has expired; join tokens were dropped",
		"file", s.path, "copied_at", r.CopiedAt, "x509_unknown_until", r.At.Add(keyset.MaxX509TTL), "join_tokens_dropped", dropped)
	return nil
}

// apply changes a deployment and notes what is not known of it, before being what
// was not known already.
func (r *restored) apply(b *bbolt.Bucket, name string, before ledger.Restored) (tokensDropped int, err error) {
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
		end := r.At.Add(keyset.MaxX509TTL)
		if k.ExpiresAt.Before(end) {
			end = k.ExpiresAt
		}
		unknown.X509[id] = later(end, before.X509[id])
		unknown.JWT[k.JWTKeyID] = later(k.ExpiresAt, before.JWT[k.JWTKeyID])
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
