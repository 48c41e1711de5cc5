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

// minter makes the server's client what renewal asks of one.
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

// own makes the node's identity what renewal asks of one.
type own struct {
	node   *node.Node
	store  *node.Store
	client *upstream.Client
	trust  func() *bundle.Bundle
	now    func() time.Time

	mu   sync.Mutex
	of   *node.Identity // that at is for
	at   time.Duration  // age at which it is renewed
	seen map[*node.Identity]signed
}

// signed is which authority signed an agent SVID.
type signed struct {
	authority string
	verified  bool
	by        *bundle.Bundle // that it was looked for in
}

// Held describes the node's own SVID.
//
// When it is to be renewed is told from its age, not from its times: those are
// of the server's clock, and this node's may be an hour away from it, so that an
// SVID would be renewed all the time or too late.
func (o *own) Held() *cache.SVID {
	id := o.node.Identity()
	o.mu.Lock()
	defer o.mu.Unlock()
	if id == nil {
		return nil
	}
	if id != o.of {
		o.of = id
		var made time.Time
		o.at = renew.RenewAt(made, made.Add(id.Life()), rand.Float64()).Sub(made)
	}
	now := o.now()
	age := id.Age(now)
	if age < -clockSkew {
		age = o.at // the clock is behind, by how much is found out with the next one
	}
	leaf := id.Chain[0]
	return &cache.SVID{ID: id.ID(), Authority: o.authority(id), NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, RenewAt: now.Add(o.at - age)}
}

// stored reports whether a restart may find a valid agent SVID on disk that the
// authority signed.
func (o *own) stored(authority string) bool {
	ids, now := o.store.Stored(), o.now()
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.ContainsFunc(ids, func(id *node.Identity) bool { return id.Chain[0].NotAfter.After(now) && o.authority(id) == authority })
}

// authority finds the authority of an agent SVID as that of any other is found: its
// chain ends in it. Where it ends in none of the bundle, because the authority was
// removed, and the SVID must be renewed all the more, the authority key identifier of
// the topmost certificate has to do. mu is held.
func (o *own) authority(id *node.Identity) string {
	trust := o.trust()
	known, ok := o.seen[id]
	if ok && (known.verified || known.by == trust) {
		return known.authority
	}
	leaf, top := id.Chain[0], id.Chain[len(id.Chain)-1]
	if !ok {
		known.authority = hex.EncodeToString(top.AuthorityKeyId)
	}
	known.by = trust
	if trust != nil {
		at := o.now()
		if at.Before(leaf.NotBefore) || at.After(leaf.NotAfter) {
			at = leaf.NotBefore
		}
		if authority, err := trust.Verify(leaf, id.Chain[1:], at); err == nil {
			known.authority, known.verified = authority, true
		}
	}
	if o.seen == nil || len(o.seen) > maxSeen {
		o.seen = make(map[*node.Identity]signed)
	}
	o.seen[id] = known
	return known.authority
}

// maxSeen is how many agent SVIDs are remembered. There are two at a time, one of
// which is about to replace the other.
const maxSeen = 4

// clockSkew is what clocks of machines that are well kept may differ by.
const clockSkew = time.Minute

func (o *own) Renew(ctx context.Context) error { return o.client.RenewNode(ctx) }

// observer turns what happens into metrics.
type observer struct{ metrics *metrics.Metrics }

func (o observer) Minted(err error, took time.Duration) {
	o.metrics.Minted(metrics.TypeX509, upstream.Code(err), took)
}

func (o observer) Renewed(reason renew.Reason, outcome renew.Outcome) {
	o.metrics.Renewed(string(reason), string(outcome))
}

// streams is told what happens on the Workload API, counts the open streams
// and turns the rest into metrics.
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

func (s *streams) JWTMinted(took time.Duration, err error) {
	s.metrics.Minted(metrics.TypeJWT, upstream.Code(err), took)
}

// initWorkloadMetrics has the series of every RPC of the Workload API exist
// before the first call.
func initWorkloadMetrics(m *metrics.Metrics) {
	s := grpc.NewServer()
	workloadpb.RegisterSpiffeWorkloadAPIServer(s, workloadpb.UnimplementedSpiffeWorkloadAPIServer{})
	m.InitServer(s)
}
