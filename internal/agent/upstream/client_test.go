package upstream_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/internal/agent/upstream"
)

// agent is a client with its node, store and log.
type agent struct {
	*upstream.Client
	node  *node.Node
	store *node.Store
	trust atomic.Pointer[bundle.Bundle]
	logs  *bytes.Buffer
}

type options struct {
	dir       string
	token     string
	tokenFile string
	insecure  bool
	noTrust   bool
	otherwise func(verify func(*bundle.Bundle) error) bool
	verified  func()
	now       func() time.Time
	dial      func(context.Context, string) (net.Conn, error) // nil: to the server
}

func newAgent(t *testing.T, s *server, o options) *agent {
	t.Helper()
	if o.dir == "" {
		o.dir = t.TempDir()
	}
	a := &agent{logs: new(bytes.Buffer)}
	log := slog.New(slog.NewTextHandler(a.logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if !o.noTrust {
		a.trust.Store(s.trust())
	}
	if o.dial == nil {
		o.dial = s.dial
	}
	a.store = must(node.OpenStore(o.dir, nil))
	a.node = must(node.New(node.Config{TrustDomain: td, Attestor: node.JoinToken(o.token, o.tokenFile), Store: a.store, Bundle: a.trust.Load, Log: log, Now: o.now}))
	a.Client = must(upstream.New(upstream.Config{
		ServerAddress: "server:8081", TrustDomain: td, Node: a.node, Bundle: a.trust.Load, VerifyOtherwise: o.otherwise, Verified: o.verified, Insecure: o.insecure, Dial: o.dial, Process: "p1", Version: "1.0", Log: log, Now: o.now,
	}))
	return a
}

func (a *agent) close(t *testing.T) {
	t.Helper()
	if err := a.Close(); err != nil {
		t.Errorf("close the client: %v", err)
	}
	if err := a.store.Close(); err != nil {
		t.Errorf("close the store: %v", err)
	}
}

// bubble runs f in a synctest bubble with a server and an attested agent.
func bubble(t *testing.T, f func(t *testing.T, s *server, a *agent), opts ...grpc.ServerOption) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t, opts...)
		a := newAgent(t, s, options{token: "t"})
		defer a.close(t)
		if err := a.Attest(t.Context()); err != nil {
			t.Fatal(err)
		}
		f(t, s, a)
	})
}

func TestAttestAndRestartWithoutToken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, dir := newServer(t), t.TempDir()
		a := newAgent(t, s, options{dir: dir, token: "t"})
		if err := a.Attest(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := a.node.Identity().ID().String(); got != agentID {
			t.Errorf("identity is %s", got)
		}
		if !a.Attested().Equal(time.Now()) {
			t.Errorf("attested at %v", a.Attested())
		}
		if err := a.PostStatus(t.Context(), 1); err != nil {
			t.Error(err)
		}
		a.close(t)

		a = newAgent(t, s, options{dir: dir})
		defer a.close(t)
		if err := a.Attest(t.Context()); err != nil {
			t.Fatalf("restart: %v", err)
		}
		if err := a.PostStatus(t.Context(), 1); err != nil {
			t.Error(err)
		}
		if n := s.count("AttestAgent"); n != 1 {
			t.Errorf("attested %d times", n)
		}
		if !a.Attested().IsZero() {
			t.Error("an identity from the last run counts as a new attestation")
		}
	})
}

// The operator's file has the authority of the server's certificate, but the server
// already signs with the next one. The token must not be lost.
func TestAttestUnderAnAuthorityNewerThanTheBootstrap(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		a := newAgent(t, s, options{token: "t"})
		defer a.close(t)
		if _, err := a.FetchBundle(t.Context()); err != nil {
			t.Fatal(err)
		}
		next := newAuthority(t)
		s.locked(func() {
			s.ca = next
			s.roots = append(s.roots, &types.X509Certificate{Asn1: next.cert.Raw})
		})
		if err := a.Attest(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := a.PostStatus(t.Context(), 1); err != nil {
			t.Error(err)
		}
		if n := s.count("AttestAgent"); n != 1 {
			t.Errorf("attested %d times", n)
		}
	})
}

func TestAttestWaitsForTheServerAndTheToken(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		file := filepath.Join(t.TempDir(), "token")
		a := newAgent(t, s, options{tokenFile: file})
		defer a.close(t)
		s.stop()
		done := make(chan error, 1)
		go func() { done <- a.Attest(t.Context()) }()
		time.Sleep(10 * time.Minute)
		if err := os.WriteFile(file, []byte("used\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		s.start()
		time.Sleep(time.Minute)
		// At most 5 s between tries and 2.5 s on average, once the pauses have grown.
		if n := s.count("AttestAgent"); n < 12 || n > 50 {
			t.Errorf("%d attempts in a minute", n)
		}
		if err := os.WriteFile(file, []byte("t\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		back := time.Now()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if took := time.Since(back); took > 6*time.Second {
			t.Errorf("took %v after the token was there", took)
		}
	})
}

// Failures that differ only in a time, a port or a count are logged as one, and again
// after ten minutes.
func TestEqualFailuresAreLoggedOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var tries atomic.Int64
		a := newAgent(t, newServer(t), options{token: "t", dial: func(context.Context, string) (net.Conn, error) {
			n := tries.Add(1)
			if n > 100 {
				return nil, errors.New("no route to host")
			}
			return nil, fmt.Errorf("read tcp 10.0.0.1:%d->10.0.0.2:8081 at %s after %v: connection reset by peer", 40000+n, time.Now().Format(time.RFC3339), time.Duration(n*n)*time.Millisecond)
		}})
		defer a.close(t)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
		defer cancel()
		if err := a.Attest(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		synctest.Wait()
		var counts []bool // by warning
		for line := range strings.Lines(a.logs.String()) {
			if strings.Contains(line, "level=WARN") {
				counts = append(counts, strings.Contains(line, "no route to host") && strings.Contains(line, " count="))
			}
		}
		if !slices.Equal(counts, []bool{false, false, true}) || tries.Load() < 110 {
			t.Errorf("two different failures, the second for 10 minutes: %d warnings, with counts %v, %d attempts", len(counts), counts, tries.Load())
		}
	})
}

func TestAttestFailsAtOnceWithoutCredential(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := newAgent(t, newServer(t), options{})
		defer a.close(t)
		err := a.Attest(t.Context())
		if !errors.Is(err, node.ErrNoCredential) || !strings.Contains(err.Error(), "join_token_file") {
			t.Errorf("got %v", err)
		}
	})
}

func TestServerIsVerified(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		corrupt func(*testing.T, *server, *agent)
		want    string
	}{
		"other ID": {func(_ *testing.T, s *server, _ *agent) { s.id = "spiffe://example.org/w" },
			`the peer is spiffe://example.org/w and not the server of trust domain example.org: correct server_address`},
		"other domain": {func(_ *testing.T, s *server, _ *agent) { s.id = "spiffe://other.org/spire/server" },
			`the peer is spiffe://other.org/spire/server, of trust domain other.org, and trust_domain is example.org: correct trust_domain or server_address`},
		"other authority": {func(t *testing.T, s *server, a *agent) {
			s.ca = newAuthority(t)
		}, "certificate signed by unknown authority"},
		"no trust": {func(_ *testing.T, _ *server, a *agent) { a.trust.Store(nil) }, "there is no trust bundle to verify the server with"},
		"no TLS": {func(_ *testing.T, s *server, _ *agent) { s.plain = true },
			"server_address must be the port of the server's API, usually 8081, and not one of metrics or plain HTTP"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := newServer(t)
				a := newAgent(t, s, options{token: "t"})
				defer a.close(t)
				s.stop()
				tt.corrupt(t, s, a)
				s.start()
				if _, err := a.FetchBundle(t.Context()); upstream.Code(err) != "Unavailable" || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v", err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				if err := a.Attest(ctx); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got %v", err)
				}
				if s.count("AttestAgent")+s.count("GetBundle") > 0 {
					t.Error("an unverified server received a call")
				}
			})
		})
	}
}

func TestBootstrap(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		a := newAgent(t, s, options{noTrust: true})
		defer a.close(t)
		if _, err := a.Bootstrap(t.Context()); err == nil || !strings.Contains(err.Error(), "insecure_bootstrap") {
			t.Errorf("got %v", err)
		}
		if s.conns > 0 {
			t.Error("connected without trust")
		}
		b := newAgent(t, s, options{noTrust: true, insecure: true, token: "t"})
		defer b.close(t)
		s.stop()
		time.AfterFunc(time.Minute, s.start)
		got, err := b.Bootstrap(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(got.X509()) != 1 || !got.X509()[0].Certificate.Equal(s.ca.cert) {
			t.Errorf("got %v", got.X509())
		}
		b.trust.Store(got)
		if err := b.Attest(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestInsecureBootstrapRefusesABundleThatDoesNotCoverTheServer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		s.roots = []*types.X509Certificate{{Asn1: newAuthority(t).cert.Raw}}
		a := newAgent(t, s, options{noTrust: true, insecure: true})
		defer a.close(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := a.Bootstrap(ctx); err == nil {
			t.Error("accepted")
		}
	})
}

func TestRenewalOpensAnotherConnection(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		if err := a.PostStatus(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		// A slow mint is in flight while the agent SVID is renewed.
		mints := make(chan struct{})
		var serials []string
		s.hook = func(ctx context.Context, method string) error {
			s.locked(func() { serials = append(serials, method+" "+clientCert(ctx).SerialNumber.String()) })
			if method == "NewJWTSVID" {
				<-mints
			}
			return nil
		}
		minted := make(chan error, 1)
		go func() {
			_, err := a.MintJWT(t.Context(), "e", []string{"a"})
			minted <- err
		}()
		synctest.Wait()
		old := a.node.Identity()
		if err := a.RenewNode(t.Context()); err != nil {
			t.Fatal(err)
		}
		fresh := a.node.Identity()
		if fresh == old {
			t.Fatal("not renewed")
		}
		for range 3 {
			if err := a.PostStatus(t.Context(), 1); err != nil {
				t.Fatal(err)
			}
		}
		close(mints)
		if err := <-minted; err != nil {
			t.Errorf("the call in flight failed: %v", err)
		}
		o, f := old.Chain[0].SerialNumber.String(), fresh.Chain[0].SerialNumber.String()
		want := []string{"NewJWTSVID " + o, "RenewAgent " + o, "PostStatus " + f, "PostStatus " + f, "PostStatus " + f}
		if got := strings.Join(serials, ", "); got != strings.Join(want, ", ") {
			t.Errorf("calls: %s", got)
		}
		if s.active != f {
			t.Error("the new SVID is not in force")
		}
		// The SVID is stored before its first use.
		if kept := must(a.store.LoadIdentity()); !kept.Chain[0].Equal(fresh.Chain[0]) {
			t.Error("the new SVID is not stored")
		}
	})
}

// A call with the old SVID may arrive after the first call with the new one. The
// server refuses it, and the node keeps its identity.
func TestCallRefusedForTheRetiredSVIDIsRepeated(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		gate := make(chan struct{})
		var held atomic.Bool
		s.hook = func(_ context.Context, method string) error {
			if method == "NewJWTSVID" && held.CompareAndSwap(false, true) {
				<-gate // as if the network had delayed the call
				return denied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
			}
			return nil
		}
		minted := make(chan error, 1)
		go func() {
			_, err := a.MintJWT(t.Context(), "e", nil)
			minted <- err
		}()
		synctest.Wait()
		if err := a.RenewNode(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := a.PostStatus(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		close(gate)
		if err := <-minted; err != nil {
			t.Errorf("got %v", err)
		}
		time.Sleep(time.Minute)
		if n := s.count("AttestAgent"); n != 1 {
			t.Errorf("attested %d times", n)
		}
	})
}

func TestReattestableNodeReattestsInsteadOfRenewing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		s.reattestable = true
		a := newAgent(t, s, options{token: "t"})
		defer a.close(t)
		if err := a.Attest(t.Context()); err != nil {
			t.Fatal(err)
		}
		old := a.node.Identity()
		if err := a.RenewNode(t.Context()); err != nil {
			t.Fatal(err)
		}
		if a.node.Identity() == old || s.count("AttestAgent") != 2 || s.count("RenewAgent") != 0 {
			t.Errorf("AttestAgent %d, RenewAgent %d", s.count("AttestAgent"), s.count("RenewAgent"))
		}
		if err := a.PostStatus(t.Context(), 1); err != nil {
			t.Error(err)
		}
	})
}

func TestRecycledConnections(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		s.entries = entries(3)
		end := time.Now().Add(30 * time.Minute)
		for time.Now().Before(end) {
			if _, err := a.FetchBundle(t.Context()); err != nil {
				t.Fatalf("bundle: %v", err)
			}
			if _, err := a.SyncEntries(t.Context(), nil); err != nil {
				t.Fatalf("entries: %v", err)
			}
			time.Sleep(997 * time.Millisecond)
		}
		if s.conns < 8 {
			t.Errorf("%d connections: they were not recycled", s.conns)
		}
	}, maxConnectionAge)
}

func TestReconnectSoonAfterAnOutage(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		s.stop()
		for range 60 {
			if _, err := a.FetchBundle(t.Context()); upstream.Code(err) != "Unavailable" {
				t.Fatalf("got %v", err)
			}
			time.Sleep(10 * time.Second)
		}
		s.start()
		time.Sleep(4 * time.Second)
		if _, err := a.FetchBundle(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestHungServer(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		hang := make(chan struct{})
		var hung atomic.Bool
		hung.Store(true)
		s.hook = func(ctx context.Context, _ string) error {
			if hung.Load() {
				<-hang
			}
			return nil
		}
		defer close(hang)
		conns := s.conns
		for _, c := range []struct {
			what string
			want time.Duration
			call func() error
		}{
			{"bundle", 30 * time.Second, func() error { _, err := a.FetchBundle(t.Context()); return err }},
			{"federated", 30 * time.Second, func() error { _, err := a.FetchFederatedBundle(t.Context(), td); return err }},
			{"entries", 30 * time.Second, func() error { _, err := a.SyncEntries(t.Context(), nil); return err }},
			{"status", 30 * time.Second, func() error { return a.PostStatus(t.Context(), 1) }},
			{"x509", time.Minute, func() error { _, err := a.MintX509(t.Context(), []upstream.CSR{{}}); return err }},
			{"jwt", time.Minute, func() error { _, err := a.MintJWT(t.Context(), "e", nil); return err }},
			{"renew", time.Minute, func() error { return a.RenewNode(t.Context()) }},
		} {
			began := time.Now()
			err := c.call()
			if took := time.Since(began); upstream.Code(err) != "DeadlineExceeded" || took != c.want {
				t.Errorf("%s: after %v: %v", c.what, took, err)
			}
		}
		if got := s.conns - conns; got < 7 {
			t.Errorf("%d connections for 7 calls that hung", got)
		}
		hung.Store(false)
		if err := a.PostStatus(t.Context(), 1); err != nil {
			t.Error(err)
		}
		// A caller's short deadline does not mean that the connection is broken.
		conns = s.conns
		hung.Store(true)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := a.PostStatus(ctx, 1); upstream.Code(err) != "DeadlineExceeded" {
			t.Errorf("got %v", err)
		}
		hung.Store(false)
		if err := a.PostStatus(t.Context(), 1); err != nil || s.conns != conns {
			t.Errorf("%d new connections, %v", s.conns-conns, err)
		}
	})
}

func TestDenialReasonsThatRequireReattestation(t *testing.T) {
	t.Parallel()
	for _, reason := range []types.PermissionDeniedDetails_Reason{
		types.PermissionDeniedDetails_AGENT_EXPIRED, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE,
		types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, types.PermissionDeniedDetails_AGENT_MUST_REATTEST,
	} {
		t.Run(reason.String(), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, s *server, a *agent) {
				var refuse atomic.Bool
				refuse.Store(true)
				s.hook = func(_ context.Context, method string) error {
					if method != "AttestAgent" && method != "GetBundle" && refuse.Load() {
						return denied(reason)
					}
					return nil
				}
				time.Sleep(time.Hour / 2)
				_, err := a.SyncEntries(t.Context(), nil)
				if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), reason.String()) {
					t.Errorf("got %v", err)
				}
				// The token is used up, so the node cannot attest. The client makes no
				// mint calls, but fetches the bundle.
				before := s.count("NewJWTSVID")
				for range 100 {
					if _, err := a.MintJWT(t.Context(), "e", nil); upstream.Code(err) != "Unauthenticated" || !strings.Contains(err.Error(), reason.String()) {
						t.Fatalf("got %v", err)
					}
				}
				if s.count("NewJWTSVID") != before {
					t.Error("a refused identity was used to mint")
				}
				if _, err := a.FetchBundle(t.Context()); err != nil {
					t.Error(err)
				}
				tried := s.count("AttestAgent")
				time.Sleep(time.Minute)
				if n := s.count("AttestAgent") - tried; n < 12 || n > 60 {
					t.Errorf("%d attempts in a minute", n)
				}
				s.locked(func() { s.tokens["t"] = true })
				refuse.Store(false)
				time.Sleep(6 * time.Second)
				if _, err := a.MintJWT(t.Context(), "e", nil); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// The server wants a re-attestation only when it is asked for a renewal. The identity held
// stays in use whatever becomes of it.
func TestRenewalThatTheServerRefusesIsAReattestation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		file := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(file, []byte("t"), 0o600); err != nil {
			t.Fatal(err)
		}
		a := newAgent(t, s, options{tokenFile: file})
		defer a.close(t)
		if err := a.Attest(t.Context()); err != nil {
			t.Fatal(err)
		}
		held := a.node.Identity()
		if held.Reattestable {
			t.Fatal("the server has said that the node can be attested again")
		}
		s.locked(func() { s.reattestable = true })
		stays := func(why string) {
			t.Helper()
			if err := a.RenewNode(t.Context()); err == nil {
				t.Errorf("%s: renewed", why)
			}
			if err := a.Identified(); err != nil || a.node.Identity() != held {
				t.Errorf("%s: the identity held is lost: %v", why, err)
			}
			if _, err := a.MintJWT(t.Context(), "e", nil); err != nil {
				t.Errorf("%s: %v", why, err)
			}
		}
		stays("used token")
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		stays("no token")
		s.stop()
		if err := a.RenewNode(t.Context()); err == nil || a.node.Identity() != held {
			t.Errorf("server down: %v", err)
		}
		s.start()
		time.Sleep(5 * time.Second)
		stays("no token, server back")
		if err := os.WriteFile(file, []byte("t"), 0o600); err != nil {
			t.Fatal(err)
		}
		s.locked(func() { s.tokens["t"] = true })
		for range 2 {
			before := s.count("RenewAgent")
			if err := a.RenewNode(t.Context()); err != nil {
				t.Fatal(err)
			}
			if id := a.node.Identity(); id == held || !id.Reattestable {
				t.Error("not attested again")
			}
			if err := a.PostStatus(t.Context(), 1); err != nil {
				t.Error(err)
			}
			if held.Reattestable && s.count("RenewAgent") != before {
				t.Error("the server is asked for a renewal again")
			}
			held = a.node.Identity()
		}
	})
}

// Two machines with one node identity revoke each other's agent SVID with every
// attestation: a line in each log says so, and the attestations become rare.
func TestAttestationsOfASharedIdentityArePaced(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		s.reattestable = true
		a, b := newAgent(t, s, options{token: "t"}), newAgent(t, s, options{token: "t"})
		defer a.close(t)
		defer b.close(t)
		for _, agent := range []*agent{a, b} {
			if err := agent.Attest(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if n := attestations(t, s, 10*time.Minute, a, b); n > 20 {
			t.Errorf("%d attestations in 10 minutes", n)
		}
		if n := attestations(t, s, time.Hour, a, b); n < 6 || n > 40 {
			t.Errorf("%d attestations in the hour after that", n)
		}
		const line = "level=WARN msg=\"agent SVID revoked by another attestation of the same node identity: give each agent a credential of its own\" spiffe_id=" + agentID
		for _, agent := range []*agent{a, b} {
			if n := strings.Count(agent.logs.String(), line); n < 2 || n > 8 {
				t.Errorf("%d warnings", n)
			}
		}
		// The other machine is gone.
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		attested := func() bool { _, err := a.SyncEntries(t.Context(), nil); return err == nil }
		for end := time.Now().Add(8 * time.Minute); !attested() && time.Now().Before(end); time.Sleep(5 * time.Second) {
		}
		if n := attestations(t, s, time.Hour, a); n > 1 {
			t.Errorf("%d attestations of the only agent in an hour", n)
		}
		// A later eviction is not held against it.
		s.locked(func() { s.active = "" })
		_ = a.PostStatus(t.Context(), 1)
		time.Sleep(5 * time.Second)
		if err := a.PostStatus(t.Context(), 1); err != nil {
			t.Error(err)
		}
		if !strings.Contains(a.logs.String(), "node identity used by this agent alone") {
			t.Error("the end is not logged")
		}
	})
}

// attestations lets the agents poll for a while and returns how often they have attested.
func attestations(t *testing.T, s *server, d time.Duration, agents ...*agent) int {
	before := s.count("AttestAgent")
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(5 * time.Second) {
		for _, a := range agents {
			_, _ = a.SyncEntries(t.Context(), nil) // refused while another one is active
		}
	}
	return s.count("AttestAgent") - before
}

func TestServerThatAcceptsARefusedIdentityAgain(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		active := s.active
		s.locked(func() { s.active = "" })
		if err := a.PostStatus(t.Context(), 1); err == nil {
			t.Fatal("not refused")
		}
		s.locked(func() { s.active = active })
		if _, err := a.SyncEntries(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if err := a.PostStatus(t.Context(), 1); err != nil {
			t.Error(err)
		}
		time.Sleep(10 * time.Second)
		n := s.count("AttestAgent")
		time.Sleep(time.Hour / 2)
		if s.count("AttestAgent") != n {
			t.Error("still attesting a node that is accepted")
		}
	})
}

func TestBanned(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		s.locked(func() { s.banned = true })
		_, err := a.SyncEntries(t.Context(), nil)
		if !errors.Is(err, upstream.ErrBanned) || upstream.Code(err) != "PermissionDenied" {
			t.Errorf("got %v", err)
		}
		if a.node.Identity() != nil || must(a.store.LoadIdentity()) != nil {
			t.Error("the identity was not wiped")
		}
		calls := len(s.calls)
		_, bundleErr := a.FetchBundle(t.Context())
		_, mintErr := a.MintX509(t.Context(), []upstream.CSR{{}})
		for _, err := range []error{bundleErr, mintErr, a.RenewNode(t.Context()), a.Attest(t.Context()), a.PostStatus(t.Context(), 1)} {
			if !errors.Is(err, upstream.ErrBanned) {
				t.Errorf("got %v", err)
			}
		}
		time.Sleep(time.Hour)
		if len(s.calls) != calls || s.count("AttestAgent") != 1 {
			t.Error("a banned node still makes calls")
		}
	})
}

func TestExpiredSVIDIsReplacedByReattestation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		file := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(file, []byte("t"), 0o600); err != nil {
			t.Fatal(err)
		}
		a := newAgent(t, s, options{tokenFile: file})
		defer a.close(t)
		if err := a.Attest(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := a.PostStatus(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		s.hook = func(ctx context.Context, method string) error {
			if cert := clientCert(ctx); cert != nil && time.Now().After(cert.NotAfter) {
				t.Errorf("%s came with an expired SVID", method)
			}
			return nil
		}
		time.Sleep(2 * time.Hour)
		if err := a.PostStatus(t.Context(), 1); upstream.Code(err) != "Unauthenticated" || !strings.Contains(err.Error(), "expired") {
			t.Errorf("got %v", err)
		}
		if _, err := a.FetchBundle(t.Context()); err != nil {
			t.Errorf("bundle: %v", err)
		}
		time.Sleep(time.Minute)
		s.locked(func() { s.tokens["second"] = true })
		if err := os.WriteFile(file, []byte("second"), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(6 * time.Second)
		if err := a.PostStatus(t.Context(), 1); err != nil {
			t.Error(err)
		}
	})
}

// The authority of the agent SVID was removed before the renewal of the SVID.
func TestSVIDWithoutAuthorityIsReplacedByReattestation(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		next := newAuthority(t)
		s.locked(func() {
			s.ca, s.tokens["t"] = next, true
			s.roots = []*types.X509Certificate{{Asn1: next.cert.Raw}}
		})
		s.stop()
		s.start()
		a.trust.Store(s.trust())
		a.trust.Store(must(a.FetchBundle(t.Context())))
		if err := a.PostStatus(t.Context(), 1); upstream.Code(err) != "Unauthenticated" || !strings.Contains(err.Error(), "authority") {
			t.Errorf("got %v", err)
		}
		time.Sleep(10 * time.Second)
		if err := a.PostStatus(t.Context(), 1); err != nil {
			t.Error(err)
		}
	})
}

func TestUnusableAgentSVIDAnswers(t *testing.T) {
	t.Parallel()
	for name, corrupt := range map[string]func(*x509.Certificate){
		"expired": func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) },
		"not an agent": func(c *x509.Certificate) {
			c.URIs[0] = spiffeid.RequireFromString("spiffe://example.org/w").URL()
		},
		"other agent": func(c *x509.Certificate) {
			c.URIs[0] = spiffeid.RequireFromString("spiffe://example.org/spire/agent/join_token/u").URL()
		},
		"other domain": func(c *x509.Certificate) {
			c.URIs[0] = spiffeid.RequireFromString("spiffe://other.org/spire/agent/join_token/t").URL()
		},
		"authority": func(c *x509.Certificate) { c.IsCA = true },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bubble(t, func(t *testing.T, s *server, a *agent) {
				held := a.node.Identity()
				s.locked(func() { s.corruptSVID = corrupt })
				if err := a.RenewNode(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot be used") {
					t.Errorf("got %v", err)
				}
				if a.node.Identity() != held || !must(a.store.LoadIdentity()).Chain[0].Equal(held.Chain[0]) {
					t.Error("the identity changed")
				}
				s.locked(func() { s.corruptSVID = nil })
				if err := a.RenewNode(t.Context()); err != nil {
					t.Errorf("afterwards: %v", err)
				}
			})
		})
	}
}

func TestMint(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		csr := must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key))
		got, err := a.MintX509(t.Context(), []upstream.CSR{{"a", csr}, {"b", []byte("x")}, {"c", csr}})
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 3 || got[0].Err != nil || upstream.Code(got[1].Err) != "InvalidArgument" || got[2].Err != nil {
			t.Fatalf("got %v", got)
		}
		if id := must(x509.ParseCertificate(got[2].Chain[0])).URIs[0].String(); id != "spiffe://example.org/c" {
			t.Errorf("third is %s", id)
		}
		if token := must(a.MintJWT(t.Context(), "e", []string{"x"})); token != "token for e" {
			t.Errorf("got %q", token)
		}
		ok := func() *svidv1.BatchNewX509SVIDResponse_Result {
			return &svidv1.BatchNewX509SVIDResponse_Result{Status: &types.Status{}, Svid: &types.X509SVID{CertChain: [][]byte{{1}}}}
		}
		for name, results := range map[string][]*svidv1.BatchNewX509SVIDResponse_Result{
			"none": nil, "too few": {ok()}, "too many": {ok(), ok(), ok()},
		} {
			s.mint = func(*svidv1.BatchNewX509SVIDRequest) *svidv1.BatchNewX509SVIDResponse {
				return &svidv1.BatchNewX509SVIDResponse{Results: results}
			}
			if _, err := a.MintX509(t.Context(), []upstream.CSR{{}, {}}); upstream.Code(err) != "Internal" {
				t.Errorf("%s: got %v", name, err)
			}
		}
		for name, corrupt := range map[string]func(*svidv1.BatchNewX509SVIDResponse_Result){
			"no status":     func(r *svidv1.BatchNewX509SVIDResponse_Result) { r.Status = nil },
			"no SVID":       func(r *svidv1.BatchNewX509SVIDResponse_Result) { r.Svid = nil },
			"empty DER":     func(r *svidv1.BatchNewX509SVIDResponse_Result) { r.Svid.CertChain[0] = nil },
			"large DER":     func(r *svidv1.BatchNewX509SVIDResponse_Result) { r.Svid.CertChain[0] = make([]byte, 65<<10) },
			"long chain":    func(r *svidv1.BatchNewX509SVIDResponse_Result) { r.Svid.CertChain = make([][]byte, 11) },
			"status not OK": func(r *svidv1.BatchNewX509SVIDResponse_Result) { r.Status.Code = 5 },
		} {
			s.mint = func(*svidv1.BatchNewX509SVIDRequest) *svidv1.BatchNewX509SVIDResponse {
				bad := ok()
				corrupt(bad)
				return &svidv1.BatchNewX509SVIDResponse{Results: []*svidv1.BatchNewX509SVIDResponse_Result{bad, ok()}}
			}
			got, err := a.MintX509(t.Context(), []upstream.CSR{{}, {}})
			if err != nil || got[0].Err == nil || got[0].Chain != nil || got[1].Err != nil {
				t.Errorf("%s: got %v, %v", name, got, err)
			}
		}
	})
}

func TestFederatedBundle(t *testing.T) {
	t.Parallel()
	bubble(t, func(t *testing.T, s *server, a *agent) {
		other := spiffeid.RequireTrustDomainFromString("other.org")
		if b := must(a.FetchFederatedBundle(t.Context(), other)); b.TrustDomain() != other {
			t.Errorf("got the bundle of %v", b.TrustDomain())
		}
		if _, err := a.FetchFederatedBundle(t.Context(), spiffeid.RequireTrustDomainFromString("third.org")); !errors.Is(err, bundle.ErrNotFound) {
			t.Errorf("got %v", err)
		}
	})
}

func TestClosedClient(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		a := newAgent(t, s, options{token: "wrong"})
		done := make(chan error, 1)
		go func() { done <- a.Attest(t.Context()) }()
		time.Sleep(time.Minute)
		a.close(t)
		if err := <-done; err == nil {
			t.Error("attested")
		}
		if _, err := a.FetchBundle(t.Context()); err == nil {
			t.Error("a closed client works")
		}
	})
}
