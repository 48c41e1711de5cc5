package agent

import (
	"context"
	"encoding/hex"
	"maps"
	"math/rand/v2"
	"sync"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"

	"github.com/renewd/renewd/cache"
	"github.com/renewd/renewd/internal/node"
	"github.com/renewd/renewd/internal/upstream"
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
	client *upstream.Client
	now    func() time.Time

	mu   sync.Mutex
	of   *node.Identity // what svid describes
	svid *cache.SVID
	at   time.Duration // age at which it is renewed
}

// Held describes the node's own SVID. Its authority is read from the
// authority key identifier of the topmost certificate, because the chain of an
// authority that was removed no longer verifies and must be renewed all the
// more.
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
		leaf := id.Chain[0]
		o.of = id
		o.svid = &cache.SVID{
			ID:        id.ID(),
			Authority: hex.EncodeToString(id.Chain[len(id.Chain)-1].AuthorityKeyId),
			NotBefore: leaf.NotBefore,
			NotAfter:  leaf.NotAfter,
		}
		var made time.Time
		o.at = renew.RenewAt(made, made.Add(id.Life()), rand.Float64()).Sub(made)
	}
	now := o.now()
	age := id.Age(now)
	if age < -clockSkew {
		age = o.at // the clock is behind, by how much is found out with the next one
	}
	s := *o.svid
	s.RenewAt = now.Add(o.at - age)
	return &s
}

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
