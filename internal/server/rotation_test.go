package server_test

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"math/rand/v2"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
)

const day = 24 * time.Hour

// TestYears runs automatic rotation of two deployments for many lifetimes of a keyset.
// Agents call every few hours and are sometimes away for a day. Their workloads verify
// each other at every moment, with the bundles and SVIDs that they have then.
func TestYears(t *testing.T) {
	t.Parallel()
	synctest.Test(t, years)
}

func years(t *testing.T) {
	const lifetime, length = 15 * day, 90 * day
	w := &yearsWorld{t: t, rand: rand.New(rand.NewPCG(1, 2)), seen: map[string]bool{}}
	c := server.Config{TrustDomain: td, KeysetLifetime: lifetime, X509TTL: 2 * day}
	names := []string{"east", "west"}
	for _, name := range names {
		lis := bufconn.Listen(1 << 16)
		w.nodes = append(w.nodes, &node{name: name, lis: lis})
		c.Deployments = append(c.Deployments, server.DeploymentConfig{Name: name, Listener: lis})
	}
	w.running = run(t, c)
	for _, n := range w.nodes {
		s := w.Server(n.name)
		_, err := s.ApplyEntries(t.Context(), []spireapi.Entry{{
			ID: "web", SPIFFEID: spiffeid.RequireFromPath(td, "/"+n.name), Selectors: []spireapi.Selector{{Type: "unix", Value: "uid:0"}},
		}}, false)
		check(t, err)
		token, err := s.CreateJoinToken(t.Context(), time.Hour, "")
		check(t, err)
		first := w.reach(n)
		n.own = first.attest(token.Value)
		check(t, first.Close())
		w.visit(n)
	}
	for begin := time.Now(); time.Since(begin) < length; {
		next := w.nodes[0]
		if w.nodes[1].nextVisit.Before(next.nextVisit) {
			next = w.nodes[1]
		}
		time.Sleep(time.Until(next.nextVisit))
		w.visit(next)
		w.trusted()
		for _, name := range names {
			w.checkKeysets(w.Server(name).Keysets())
		}
	}
	// As many rotations as in a year and a half of keysets of 90 days.
	if got, least := len(w.seen), 2*int(length/lifetime); got < least || w.away < 20 {
		t.Errorf("%d keysets, agents were away %d times: want at least %d and 20", got, w.away, least)
	}
	w.stop()
}

type yearsWorld struct {
	*running
	t     *testing.T
	rand  *rand.Rand
	nodes []*node
	seen  map[string]bool // keysets
	away  int
}

// node is an agent and its workload.
type node struct {
	name      string
	lis       *bufconn.Listener
	own, svid *identity
	trust     *spiffebundle.Bundle
	nextVisit time.Time
}

// reach connects to the node's deployment.
func (w *yearsWorld) reach(n *node) *agent {
	return w.connect(n.own, "server", grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return n.lis.DialContext(ctx) }))
}

// visit does what an agent does when it is due, and reports it.
func (w *yearsWorld) visit(n *node) {
	w.t.Helper()
	ctx := w.t.Context()
	a := w.reach(n)
	defer a.Close()
	b, trust := a.bundle()
	n.trust = trust
	report := &api.ReportRequest{BundleSequence: b.GetSequenceNumber()}
	tainted := map[string]bool{}
	for _, x := range b.GetX509Authorities() {
		cert, err := x509.ParseCertificate(x.GetAsn1())
		check(w.t, err)
		id := hex.EncodeToString(cert.SubjectKeyId)
		if tainted[id] = x.GetTainted(); x.GetTainted() {
			report.Authorities = append(report.Authorities, &api.AuthorityReport{AuthorityId: id, Tainted: true, Settled: true})
		}
	}
	if leaf := n.own.chain[0]; tainted[hex.EncodeToString(leaf.AuthorityKeyId)] || time.Now().After(leaf.NotBefore.Add(12*time.Hour)) {
		key, csr := newKey(w.t)
		resp, err := a.RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
		check(w.t, err)
		n.own = parse(w.t, resp.GetSvid(), key)
	}
	n.svid = a.workload("web")
	_, err := a.Report(ctx, report)
	check(w.t, err)
	stay := time.Duration(2+w.rand.IntN(6)) * time.Hour
	if w.rand.IntN(6) == 0 {
		stay = time.Duration(8+w.rand.IntN(16)) * time.Hour
		w.away++
	}
	n.nextVisit = time.Now().Add(stay)
}

// trusted checks that every workload verifies every other.
func (w *yearsWorld) trusted() {
	for _, n := range w.nodes {
		for _, other := range w.nodes {
			if err := verifies(other.svid, n.trust); err != nil {
				w.t.Fatalf("%v: %s does not trust %s: %v", time.Now(), n.name, other.name, err)
			}
		}
	}
}

// checkKeysets checks what must hold of keysets at every moment.
func (w *yearsWorld) checkKeysets(d *keyset.Deployment) {
	active := 0
	list := d.Status().Keysets
	for _, k := range list {
		w.seen[k.ID] = true
		if k.State == keyset.Active {
			active++
		}
		if time.Now().After(k.ExpiresAt.Add(25 * time.Hour)) {
			w.t.Fatalf("%v: expired and not removed: %v", time.Now(), k)
		}
	}
	if active != 1 || len(list) > 3 {
		w.t.Fatalf("%v: keysets of %s: %v", time.Now(), d.Name(), list)
	}
}
