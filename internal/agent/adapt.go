package agent

import (
	"context"
	"encoding/hex"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/internal/agent/upstream"
	"github.com/renewd/renewd/metrics"
	"github.com/renewd/renewd/renew"
)

// minter is the [renew.Minter] of the upstream client.
type minter struct{ client *upstream.Client }

func (m minter) Mint(ctx context.Context, requests []renew.Request) ([]renew.Result, error) {
	csrs := make([]upstream.CSR, len(requests))
	for i, r := range requests {
		csrs[i] = upstream.CSR{EntryID: r.EntryID, DER: r.CSR}
	}
	signed, err := m.client.MintX509(ctx, csrs)
	if err != nil {
		return nil, err
	}
	out := make([]renew.Result, len(signed))
	for i, s := range signed {
		out[i] = renew.Result{Chain: s.Chain, Err: s.Err}
	}
	return out, nil
}

// agentSVID is the [renew.AgentSVID] of the node's identity.
type agentSVID struct {
	node   *node.Node
	store  *node.Store
	client *upstream.Client
	trust  func() *bundle.Bundle
	now    func() time.Time

	mu       sync.Mutex
	current  *node.Identity // that renewAge is for
	renewAge time.Duration  // age at which it is renewed
	signers  map[*node.Identity]signer
}

// signer is the authority that signed an agent SVID.
type signer struct {
	authority string
	verified  bool
	bundle    *bundle.Bundle // in which the authority was looked up
}

// Held returns the agent SVID, nil when there is none.
//
// RenewAt follows from the SVID's age, not from its times: those are by the server's
// clock. If this node's clock is an hour off, the SVID would be renewed all the time
// or too late.
func (o *agentSVID) Held() *cache.SVID {
	id := o.node.Identity()
	o.mu.Lock()
	defer o.mu.Unlock()
	if id == nil {
		return nil
	}
	if id != o.current {
		o.current = id
		var made time.Time
		o.renewAge = renew.RenewAt(made, made.Add(id.Lifetime()), rand.Float64()).Sub(made)
	}
	now := o.now()
	age := id.Age(now)
	if age < -clockSkew {
		age = o.renewAge // the clock is behind: renew now, the new SVID has a known age
	}
	leaf := id.Chain[0]
	return &cache.SVID{ID: id.ID(), Authority: o.authorityLocked(id), NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, RenewAt: now.Add(o.renewAge - age)}
}

// onDisk reports whether a restart may find a valid agent SVID on disk that the
// authority signed.
func (o *agentSVID) onDisk(authority string) bool {
	ids, now := o.store.Stored(), o.now()
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.ContainsFunc(ids, func(id *node.Identity) bool {
		return id.Chain[0].NotAfter.After(now) && o.authorityLocked(id) == authority
	})
}

// authorityLocked returns the ID of the authority that an agent SVID's chain ends in.
// If the bundle does not have it, because it was removed, it returns the authority key
// identifier of the topmost certificate, so that the SVID is still renewed.
func (o *agentSVID) authorityLocked(id *node.Identity) string {
	trust := o.trust()
	known, ok := o.signers[id]
	if ok && (known.verified || known.bundle == trust) {
		return known.authority
	}
	leaf, top := id.Chain[0], id.Chain[len(id.Chain)-1]
	if !ok {
		known.authority = hex.EncodeToString(top.AuthorityKeyId)
	}
	known.bundle = trust
	if trust != nil {
		at := o.now()
		if at.Before(leaf.NotBefore) || at.After(leaf.NotAfter) {
			at = leaf.NotBefore
		}
		if authority, err := trust.Verify(leaf, id.Chain[1:], at); err == nil {
			known.authority, known.verified = authority, true
		}
	}
	if o.signers == nil || len(o.signers) > maxSigners {
		o.signers = make(map[*node.Identity]signer)
	}
	o.signers[id] = known
	return known.authority
}

// maxSigners is the size of the cache of signers. There are two agent SVIDs at most: the
// one held and its replacement.
const maxSigners = 4

// clockSkew is the tolerated difference between clocks.
const clockSkew = time.Minute

func (o *agentSVID) Renew(ctx context.Context) error { return o.client.RenewNode(ctx) }

// observer counts renewals in the metrics.
type observer struct{ metrics *metrics.Metrics }

func (o observer) Minted(err error, took time.Duration) {
	o.metrics.Minted(metrics.TypeX509, upstream.Code(err), took)
}

func (o observer) Renewed(reason renew.Reason, outcome renew.Outcome) {
	o.metrics.Renewed(string(reason), string(outcome))
}

// streams is the [workload.Observer]: it counts the open streams, and the rest in the
// metrics.
type streams struct {
	metrics *metrics.Metrics

	mu   sync.Mutex
	open map[string]int // by RPC
}

func (s *streams) StreamOpened(method string) { s.count(method, 1) }
func (s *streams) StreamClosed(method string) { s.count(method, -1) }

func (s *streams) count(method string, by int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		s.open = make(map[string]int)
	}
	s.open[method] += by
}

func (s *streams) counts() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.open)
}

func (s *streams) OversizeAnswer(string) { s.metrics.Oversized() }

func (s *streams) Attested(attestor string, took time.Duration, err error) {
	s.metrics.Attested(attestor, took, err)
}

func (s *streams) JWTMinted(took time.Duration, err error) {
	s.metrics.Minted(metrics.TypeJWT, upstream.Code(err), took)
}

// initWorkloadMetrics creates the series of every RPC of the Workload API before the
// first call.
func initWorkloadMetrics(m *metrics.Metrics) {
	s := grpc.NewServer()
	workloadpb.RegisterSpiffeWorkloadAPIServer(s, workloadpb.UnimplementedSpiffeWorkloadAPIServer{})
	m.InitServer(s)
}
