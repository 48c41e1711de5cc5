package spire_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"math/big"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	localv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/operator/prom"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/operator/spire"
)

// fakeSPIRE follows the rules of SPIRE 1.15.3 and returns its errors.
type fakeSPIRE struct {
	localv1.UnimplementedLocalAuthorityServer
	bundlev1.UnimplementedBundleServer
	agentv1.UnimplementedAgentServer
	trustdomainv1.UnimplementedTrustDomainServer

	t        *testing.T
	stop     func()
	mu       *sync.Mutex // of the cluster
	now      time.Time
	sequence *uint64 // of the bundle, which the servers of a cluster share
	x, j     kind
	upstream string
	noJWT    bool
	agents   []*types.Agent
	// What is known of other trust domains.
	federated []*types.Bundle
	relations []*types.FederationRelationship
	// before and after are called around each mutation with its name, such as
	// TaintX509. Their error is the call's.
	before, after func(call string) error
	calls         []string                        // the mutations
	tick          func(call string) time.Duration // time since the mutation before
}

// kind is one kind of authority: its two slots and its part of the bundle.
type kind struct {
	active, next string
	nextOld      bool
	bundle       map[string]*authority
}

type authority struct {
	der     []byte
	expires time.Time
	tainted bool
	n       int // order of preparation
}

const caTTL = 72 * time.Hour

func newFake(t *testing.T) *fakeSPIRE {
	f := &fakeSPIRE{t: t, mu: new(sync.Mutex), sequence: new(uint64), now: time.Now().Truncate(time.Second), x: kind{bundle: map[string]*authority{}}, j: kind{bundle: map[string]*authority{}},
		tick: func(string) time.Duration { return time.Second }}
	f.x.active, f.j.active = f.create("X509"), f.create("JWT")
	return f
}

func (f *fakeSPIRE) kind(name string) *kind {
	if strings.HasSuffix(name, "JWT") {
		return &f.j
	}
	return &f.x
}

// create publishes a new authority.
func (f *fakeSPIRE) create(name string) string {
	k := f.kind(name)
	a := &authority{expires: f.now.Add(caTTL), n: len(f.x.bundle) + len(f.j.bundle)}
	id := fmt.Sprintf("Kid%029d", time.Now().UnixNano())
	if k == &f.x {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			f.t.Error(err)
		}
		ski := make([]byte, 20)
		rand.Read(ski)
		if a.der, err = x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, SubjectKeyId: ski, NotBefore: f.now, NotAfter: a.expires,
		}, &x509.Certificate{}, &key.PublicKey, key); err != nil {
			f.t.Error(err)
		}
		id = hex.EncodeToString(ski)
	}
	if f.upstream == "" || k == &f.j {
		k.bundle[id] = a
		*f.sequence++
	}
	return id
}

// mutate executes one mutating call by act.
func (f *fakeSPIRE) mutate(call string, act func(k *kind) error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, call)
	if f.noJWT && strings.HasSuffix(call, "JWT") {
		return status.Error(codes.Unimplemented, "JWT functionality is disabled")
	}
	if f.before != nil {
		if err := f.before(call); err != nil {
			return err
		}
	}
	if err := act(f.kind(call)); err != nil {
		return err
	}
	if f.after != nil {
		return f.after(call)
	}
	return nil
}

func invalid(text string) error  { return status.Error(codes.InvalidArgument, text) }
func internal(text string) error { return status.Error(codes.Internal, text) }

func (f *fakeSPIRE) prepare(call string) (*localv1.AuthorityState, error) {
	var id string
	err := f.mutate(call, func(k *kind) error {
		f.now = f.now.Add(f.tick(call))
		id = f.create(call)
		k.next, k.nextOld = id, false
		return nil
	})
	return &localv1.AuthorityState{AuthorityId: id}, err
}

func (f *fakeSPIRE) activate(call, id string) error {
	return f.mutate(call, func(k *kind) error {
		switch {
		case id != k.next:
			return invalid("unexpected authority ID")
		case k.nextOld:
			return internal("only Prepared authorities can be activated: unsupported local authority status: OLD")
		}
		k.active, k.next, k.nextOld = k.next, k.active, true
		return nil
	})
}

func (f *fakeSPIRE) taint(call, id string) error {
	return f.mutate(call, func(k *kind) error {
		switch {
		case f.upstream != "" && k == &f.x:
			return status.Error(codes.FailedPrecondition, "local authority can't be tainted if there is an upstream authority")
		case id == k.active:
			return invalid("unable to taint current local authority")
		case id != k.next:
			return invalid("unexpected authority ID")
		case !k.nextOld:
			return invalid("only Old local authorities can be tainted")
		case k.bundle[id] == nil:
			return internal("no ca found with provided subject key ID")
		case k.bundle[id].tainted:
			return internal("root CA is already tainted")
		}
		k.bundle[id].tainted = true
		*f.sequence++
		return nil
	})
}

func (f *fakeSPIRE) revoke(call, id string) error {
	return f.mutate(call, func(k *kind) error {
		switch {
		case id == k.active:
			return invalid("invalid authority ID: unable to use current authority")
		case k == &f.x && (id != k.next || !k.nextOld):
			return invalid("invalid authority ID: only Old local authority can be revoked")
		case k.bundle[id] == nil:
			return internal("no root CA found with provided subject key ID")
		case !k.bundle[id].tainted:
			return internal("it is not possible to revoke an untainted root CA")
		}
		delete(k.bundle, id)
		*f.sequence++
		return nil
	})
}

func (f *fakeSPIRE) slots(k *kind) (a, p, o *localv1.AuthorityState) {
	of := func(id string) *localv1.AuthorityState {
		if id == "" {
			return nil
		}
		s := &localv1.AuthorityState{AuthorityId: id, ExpiresAt: f.now.Add(caTTL).Unix()}
		if k == &f.x {
			s.UpstreamAuthoritySubjectKeyId = f.upstream
		}
		if a := k.bundle[id]; a != nil {
			s.ExpiresAt = a.expires.Unix()
		}
		return s
	}
	if k.nextOld {
		return of(k.active), nil, of(k.next)
	}
	return of(k.active), of(k.next), nil
}

func (f *fakeSPIRE) GetX509AuthorityState(context.Context, *localv1.GetX509AuthorityStateRequest) (*localv1.GetX509AuthorityStateResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a, p, o := f.slots(&f.x)
	return &localv1.GetX509AuthorityStateResponse{Active: a, Prepared: p, Old: o}, nil
}

func (f *fakeSPIRE) GetJWTAuthorityState(context.Context, *localv1.GetJWTAuthorityStateRequest) (*localv1.GetJWTAuthorityStateResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.noJWT {
		return nil, status.Error(codes.Unimplemented, "JWT functionality is disabled")
	}
	a, p, o := f.slots(&f.j)
	return &localv1.GetJWTAuthorityStateResponse{Active: a, Prepared: p, Old: o}, nil
}

func (f *fakeSPIRE) PrepareX509Authority(context.Context, *localv1.PrepareX509AuthorityRequest) (*localv1.PrepareX509AuthorityResponse, error) {
	s, err := f.prepare("PrepareX509")
	return &localv1.PrepareX509AuthorityResponse{PreparedAuthority: s}, err
}

func (f *fakeSPIRE) PrepareJWTAuthority(context.Context, *localv1.PrepareJWTAuthorityRequest) (*localv1.PrepareJWTAuthorityResponse, error) {
	s, err := f.prepare("PrepareJWT")
	return &localv1.PrepareJWTAuthorityResponse{PreparedAuthority: s}, err
}

func (f *fakeSPIRE) ActivateX509Authority(_ context.Context, r *localv1.ActivateX509AuthorityRequest) (*localv1.ActivateX509AuthorityResponse, error) {
	return &localv1.ActivateX509AuthorityResponse{}, f.activate("ActivateX509", r.AuthorityId)
}

func (f *fakeSPIRE) ActivateJWTAuthority(_ context.Context, r *localv1.ActivateJWTAuthorityRequest) (*localv1.ActivateJWTAuthorityResponse, error) {
	return &localv1.ActivateJWTAuthorityResponse{}, f.activate("ActivateJWT", r.AuthorityId)
}

func (f *fakeSPIRE) TaintX509Authority(_ context.Context, r *localv1.TaintX509AuthorityRequest) (*localv1.TaintX509AuthorityResponse, error) {
	return &localv1.TaintX509AuthorityResponse{}, f.taint("TaintX509", r.AuthorityId)
}

func (f *fakeSPIRE) TaintJWTAuthority(_ context.Context, r *localv1.TaintJWTAuthorityRequest) (*localv1.TaintJWTAuthorityResponse, error) {
	return &localv1.TaintJWTAuthorityResponse{}, f.taint("TaintJWT", r.AuthorityId)
}

func (f *fakeSPIRE) RevokeX509Authority(_ context.Context, r *localv1.RevokeX509AuthorityRequest) (*localv1.RevokeX509AuthorityResponse, error) {
	return &localv1.RevokeX509AuthorityResponse{}, f.revoke("RevokeX509", r.AuthorityId)
}

func (f *fakeSPIRE) RevokeJWTAuthority(_ context.Context, r *localv1.RevokeJWTAuthorityRequest) (*localv1.RevokeJWTAuthorityResponse, error) {
	return &localv1.RevokeJWTAuthorityResponse{}, f.revoke("RevokeJWT", r.AuthorityId)
}

func (f *fakeSPIRE) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b := &types.Bundle{TrustDomain: "example.org", SequenceNumber: *f.sequence}
	for _, id := range byAge(f.x.bundle) {
		a := f.x.bundle[id]
		b.X509Authorities = append(b.X509Authorities, &types.X509Certificate{Asn1: a.der, Tainted: a.tainted})
	}
	for _, id := range byAge(f.j.bundle) {
		a := f.j.bundle[id]
		b.JwtAuthorities = append(b.JwtAuthorities, &types.JWTKey{KeyId: id, ExpiresAt: a.expires.Unix(), Tainted: a.tainted})
	}
	return b, nil
}

func (f *fakeSPIRE) ListFederatedBundles(context.Context, *bundlev1.ListFederatedBundlesRequest) (*bundlev1.ListFederatedBundlesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &bundlev1.ListFederatedBundlesResponse{Bundles: f.federated}, nil
}

func (f *fakeSPIRE) ListFederationRelationships(context.Context, *trustdomainv1.ListFederationRelationshipsRequest) (*trustdomainv1.ListFederationRelationshipsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &trustdomainv1.ListFederationRelationshipsResponse{FederationRelationships: f.relations}, nil
}

func byAge(m map[string]*authority) []string {
	return slices.SortedFunc(maps.Keys(m), func(a, b string) int { return m[a].n - m[b].n })
}

// ListAgents answers in pages of at most two agents.
func (f *fakeSPIRE) ListAgents(_ context.Context, r *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	from, _ := strconv.Atoi(r.PageToken)
	to := min(from+2, len(f.agents))
	res := &agentv1.ListAgentsResponse{Agents: f.agents[from:to]}
	if to < len(f.agents) {
		res.NextPageToken = strconv.Itoa(to)
	}
	return res, nil
}

// made returns the mutations since the last call, and whether they succeeded.
func (f *fakeSPIRE) takeCalls() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := strings.Join(f.calls, " ")
	f.calls = nil
	return out
}

func (f *fakeSPIRE) hook(before, after func(call string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before, f.after = before, after
}

// serve starts the fake on a socket and returns a backend for it.
func (f *fakeSPIRE) serve(c spire.Config) *spire.Backend {
	f.t.Helper()
	c.Sockets = []string{f.listen()}
	return open(f.t, c)
}

// listen starts the fake and returns the path of its socket.
func (f *fakeSPIRE) listen() string {
	f.t.Helper()
	// Unix socket paths are limited to 107 bytes, which t.TempDir may exceed.
	dir, err := os.MkdirTemp("", "spire")
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { os.RemoveAll(dir) })
	path := dir + "/a %41?b#c:1.sock" // must not be parsed as a URL
	lis, err := net.Listen("unix", path)
	if err != nil {
		f.t.Fatal(err)
	}
	s := grpc.NewServer()
	localv1.RegisterLocalAuthorityServer(s, f)
	bundlev1.RegisterBundleServer(s, f)
	agentv1.RegisterAgentServer(s, f)
	trustdomainv1.RegisterTrustDomainServer(s, f)
	done := make(chan error)
	go func() { done <- s.Serve(lis) }()
	f.t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			f.t.Error(err)
		}
	})
	f.stop = s.Stop
	return path
}

func open(t *testing.T, c spire.Config) *spire.Backend {
	t.Helper()
	b, err := spire.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

// rows returns "State/JWTState" for each keyset of the status, with a dash for a missing
// key.
func rows(t *testing.T, b *spire.Backend) (string, runbook.Status) {
	t.Helper()
	s, err := b.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, k := range s.Keysets {
		x, j := string(k.State), string(k.State)
		if k.JWTState != "" {
			j = string(k.JWTState)
		}
		if k.X509AuthorityID == "" {
			x = "-"
		}
		if k.JWTKeyID == "" {
			j = "-"
		}
		out = append(out, x+"/"+j)
	}
	return strings.Join(out, " "), s
}

func wantRows(t *testing.T, b *spire.Backend, want string) runbook.Status {
	t.Helper()
	got, s := rows(t, b)
	if got != want {
		t.Fatalf("keysets are %q, want %q", got, want)
	}
	return s
}

// figuresFunc implements [spire.Figures].
type figuresFunc func(x509ID, jwtID string, expected []string) (prom.Figures, error)

func (f figuresFunc) Figures(_ context.Context, x509ID, jwtID string, expected []string) (prom.Figures, error) {
	return f(x509ID, jwtID, expected)
}
