package store_test

import (
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.etcd.io/bbolt"

	"github.com/renewd/renewd/internal/server/federation"
	"github.com/renewd/renewd/internal/server/store"
)

func record(td, bundle string) federation.Record {
	return federation.Record{TrustDomain: spiffeid.RequireTrustDomainFromString(td), Bundle: []byte(bundle), FetchedAt: start, File: "f"}
}

// TestFederationStorage: records survive a restart. A store that never had one has no
// bucket for them, like a store of an earlier program.
func TestFederationStorage(t *testing.T) {
	t.Parallel()
	path, ctx := newPath(t), t.Context()
	s := open(t, path)
	expect := func(want ...federation.Record) {
		t.Helper()
		closed(t, s)
		s = open(t, path)
		got, err := s.Federated(ctx)
		slices.SortFunc(got, func(a, b federation.Record) int { return a.TrustDomain.Compare(b.TrustDomain) })
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	expect()
	closed(t, s)
	edit(t, path, func(tx *bbolt.Tx) error {
		if tx.Bucket([]byte("federation")) != nil {
			t.Error("the bucket exists before the first record")
		}
		return nil
	})
	s = open(t, path)
	a, b := record("a.example", "{a}"), record("b.example", "{b}")
	check(s.SaveFederated(ctx, b))
	check(s.SaveFederated(ctx, a))
	expect(a, b)
	a.Bundle = []byte("{a2}")
	check(s.SaveFederated(ctx, a))
	check(s.ForgetFederated(ctx, b.TrustDomain))
	expect(a)
	if names, err := s.Deployments(ctx); err != nil || len(names) != 0 {
		t.Errorf("deployments %q, %v", names, err)
	}
	check(s.ForgetFederated(ctx, a.TrustDomain))
	expect()
	closed(t, s)
	if err := s.SaveFederated(ctx, a); !errors.Is(err, store.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// TestFederationFormat: Open accepts valid records and rejects others.
func TestFederationFormat(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	closed(t, open(t, path))
	put := func(key, value string) {
		t.Helper()
		edit(t, path, func(tx *bbolt.Tx) error {
			f, err := tx.CreateBucketIfNotExists([]byte("federation"))
			if err != nil {
				return err
			}
			b, err := f.CreateBucketIfNotExists([]byte("bundles"))
			if err != nil {
				return err
			}
			return b.Put([]byte(key), []byte(value))
		})
	}
	packed := func(key, value string) string { return string(store.Pack([]byte(key), []byte(value))) }
	const value = `{"Bundle":"e2F9","FetchedAt":"2026-01-02T03:04:05.000000678Z","File":"f"}`
	put("a.example", packed("a.example", value))
	s := open(t, path)
	if got, err := s.Federated(t.Context()); err != nil || !reflect.DeepEqual(got, []federation.Record{record("a.example", "{a}")}) {
		t.Errorf("%+v, %v", got, err)
	}
	closed(t, s)
	for key, value := range map[string]string{
		"b.example":       packed("a.example", value), // checksum of another key
		"B":               packed("B", value),
		"c.example":       packed("c.example", "[]"),
		"c.another":       "",
		"d.example":       value,
		"d.example.extra": packed("d.example.extra", value)[1:],
	} {
		put(key, value)
		if s, err := store.Open(path, options()); !errors.Is(err, store.ErrDamaged) || !strings.Contains(err.Error(), "federation") {
			t.Errorf("%q: %v", key, err)
			if err == nil {
				closed(t, s)
			}
		}
		edit(t, path, func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte("federation")).Bucket([]byte("bundles")).Delete([]byte(key))
		})
	}
	edit(t, path, func(tx *bbolt.Tx) error { return tx.Bucket([]byte("federation")).DeleteBucket([]byte("bundles")) })
	if _, err := store.Open(path, options()); !errors.Is(err, store.ErrDamaged) {
		t.Errorf("without its bucket: %v", err)
	}
}
