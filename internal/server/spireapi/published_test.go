package spireapi_test

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
	"github.com/renewd/renewd/test/memory"
)

// TestPublishedBundle serves one of two deployments of a trust domain.
func TestPublishedBundle(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		open := func() *keyset.Deployment {
			d, err := keyset.Open(t.Context(), keyset.Config{TrustDomain: td, Storage: new(memory.Keysets)})
			if err != nil {
				t.Fatal(err)
			}
			return d
		}
		own, other := open(), open()
		var published atomic.Pointer[keyset.Bundle]
		publish := func() {
			a, b := own.Bundle(), other.Bundle()
			published.Store(&keyset.Bundle{
				Sequence: a.Sequence + b.Sequence, X509: slices.Concat(a.X509, b.X509), JWT: slices.Concat(a.JWT, b.JWT),
			})
		}
		publish()
		s := start(t, spireapi.Config{Keysets: own, Published: published.Load})
		anyone := s.dial(t, nil)
		look := func(sequence uint64, n int) {
			t.Helper()
			// A mask of one caller does not change the answers to others.
			mask := &types.BundleMask{SequenceNumber: true}
			if _, err := anyone.GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: mask}); err != nil {
				t.Fatal(err)
			}
			b, err := anyone.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if b.GetSequenceNumber() != sequence || len(b.GetX509Authorities()) != n || len(b.GetJwtAuthorities()) != n {
				t.Errorf("bundle %d of %d and %d authorities, want %d of %d", b.GetSequenceNumber(),
					len(b.GetX509Authorities()), len(b.GetJwtAuthorities()), sequence, n)
			}
			for i, a := range published.Load().X509 {
				if !bytes.Equal(a.Certificate.Raw, b.GetX509Authorities()[i].GetAsn1()) {
					t.Errorf("authority %d is another", i)
				}
			}
			if got := bytes.Count(s.BundlePEM(), []byte("BEGIN CERTIFICATE")); got != n {
				t.Errorf("%d certificates in the bootstrap bundle, want %d", got, n)
			}
		}
		look(2, 2)
		next, err := other.Prepare(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		look(2, 2) // not published yet
		publish()
		look(3, 3)

		// An agent of the other deployment, also one with an SVID of a new authority,
		// completes the handshake. It is not an agent of this deployment.
		if err := other.Activate(t.Context(), next.ID); err != nil {
			t.Fatal(err)
		}
		key, _ := newKey(t)
		id := spiffeid.RequireFromPath(td, "/spire/agent/join_token/x")
		svid, err := other.SignX509(id, key.Public(), 0)
		if err != nil {
			t.Fatal(err)
		}
		caller := newIdentity(t, &types.X509SVID{CertChain: [][]byte{svid.DER}, Id: &types.SPIFFEID{Path: id.Path()}}, key)
		wantCode(t, s.dial(t, caller).ping(t.Context()), codes.PermissionDenied, notAttested)
	})
}

// TestRequestsAreBounded sends requests that are too large, anonymously.
func TestRequestsAreBounded(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		c := s.dial(t, nil)
		_, err := c.attest(t.Context(), "join_token", strings.Repeat("x", 1<<20), []byte("x"))
		wantCode(t, err, codes.ResourceExhausted)
		_, err = c.attest(t.Context(), "join_token", strings.Repeat("x", 1<<20-100), []byte("x"))
		wantCode(t, err, codes.InvalidArgument)
		long := metadata.AppendToOutgoingContext(t.Context(), "x", strings.Repeat("x", 20<<10))
		if _, err = c.GetBundle(long, &bundlev1.GetBundleRequest{}); err == nil {
			t.Error("20 KiB of metadata are accepted")
		}
	})
}

// TestStreamsAreBounded keeps as many streams open as one connection may have.
func TestStreamsAreBounded(t *testing.T) {
	t.Parallel()
	bubble(t, spireapi.Config{}, func(t *testing.T, s *running) {
		caller, c := s.join(t)
		s.apply(t, many(501))
		var streams []syncStream
		for range 128 {
			stream := openSync(t, c, &entryv1.SyncAuthorizedEntriesRequest{})
			receive(t, stream)
			streams = append(streams, stream)
		}
		brief, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := c.PostStatus(brief, &agentv1.PostStatusRequest{})
		wantCode(t, err, codes.DeadlineExceeded)
		if err := s.dial(t, caller).ping(t.Context()); err != nil {
			t.Errorf("another connection: %v", err)
		}
		if err := streams[0].CloseSend(); err != nil {
			t.Fatal(err)
		}
		if err := c.ping(t.Context()); err != nil {
			t.Errorf("after one stream ended: %v", err)
		}
	})
}
