package store

import (
	"context"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"

	"github.com/renewd/renewd/internal/server/federation"
)

// bucketFederation is created with the first bundle. It has one bucket.
var bucketFederation = []byte("federation")

const bundles = "bundles"

// federated is the value of federation/bundles.
type federated struct {
	Bundle    []byte
	FetchedAt time.Time
	File      string
}

func newFederation(tx *bbolt.Tx) (*bbolt.Bucket, error) {
	b, err := tx.CreateBucket(bucketFederation)
	if err != nil {
		return nil, err
	}
	_, err = b.CreateBucket([]byte(bundles))
	return b, err
}

// eachFederated calls fn with each record.
func eachFederated(b *bbolt.Bucket, fn func(federation.Record)) error {
	if err := checkKeys(b.Cursor(), []byte(bundles)); err != nil {
		return err
	}
	values := b.Bucket([]byte(bundles))
	if values == nil {
		return fmt.Errorf("%w: %q is not a bucket", ErrDamaged, bundles)
	}
	return values.ForEach(func(k, v []byte) error {
		f, err := decode[federated](k, v)
		if err != nil {
			return err
		}
		td, err := spiffeid.TrustDomainFromString(string(k))
		if err != nil {
			return fmt.Errorf("%w: %q is not a trust domain", ErrDamaged, k)
		}
		fn(federation.Record{TrustDomain: td, Bundle: f.Bundle, FetchedAt: f.FetchedAt, File: f.File})
		return nil
	})
}

func checkFederation(b *bbolt.Bucket) error { return eachFederated(b, func(federation.Record) {}) }

// Federated implements federation.Storage.
func (s *Store) Federated(ctx context.Context) ([]federation.Record, error) {
	var out []federation.Record
	err := s.view(ctx, func(tx *bbolt.Tx) error {
		if b := tx.Bucket(bucketFederation); b != nil {
			return eachFederated(b, func(r federation.Record) { out = append(out, r) })
		}
		return nil
	})
	return out, err
}

// SaveFederated implements federation.Storage.
func (s *Store) SaveFederated(ctx context.Context, r federation.Record) error {
	o, err := put(bundles, []byte(r.TrustDomain.Name()), federated{Bundle: r.Bundle, FetchedAt: r.FetchedAt, File: r.File})
	if err != nil {
		return err
	}
	return s.writeFederation(ctx, o)
}

// ForgetFederated implements federation.Storage.
func (s *Store) ForgetFederated(ctx context.Context, td spiffeid.TrustDomain) error {
	return s.writeFederation(ctx, op{bucket: bundles, key: []byte(td.Name())})
}

func (s *Store) writeFederation(ctx context.Context, o op) error {
	return s.write(ctx, &change{size: 1, done: make(chan struct{}), plan: func(state) ([]op, error) { return []op{o}, nil }})
}
