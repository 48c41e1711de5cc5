package server_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"net"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/renewd/renewd/internal/api"
)

// clockNode is an agent whose clock is right, and its workloads' SVIDs.
type clockNode struct {
	reports bool // false for a stock agent
	lies    bool // reports the time of the server's clock as its own
	own     *identity
	svids   map[string][]*identity // by entry
	jwts    []heldJWT
}

type heldJWT struct {
	key string
	exp time.Time
}

// authorityOf returns the ID of the authority that signed an SVID.
func authorityOf(ident *identity) string { return hex.EncodeToString(ident.chain[0].AuthorityKeyId) }

// lives reports whether an SVID is valid now or later.
func lives(ident *identity) bool { return time.Now().Before(ident.chain[0].NotAfter) }

// young reports whether an SVID need not be renewed by its age.
func young(ident *identity) bool {
	leaf := ident.chain[0]
	return time.Now().Before(leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2))
}

// reach connects with an identity. It does not verify the server's certificate, which may
// be invalid by the true time: agents accept it for its authority alone.
func (h *clockHistory) reach(ident *identity) *agent {
	c := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}
	if ident != nil {
		c.Certificates = []tls.Certificate{{Certificate: [][]byte{ident.chain[0].Raw}, PrivateKey: ident.key}}
	}
	lis := h.lis
	conn, err := grpc.NewClient("passthrough:///server", grpc.WithTransportCredentials(credentials.NewTLS(c)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	check(h.t, err)
	return &agent{
		identity: ident, ClientConn: conn, AgentClient: agentv1.NewAgentClient(conn), BundleClient: bundlev1.NewBundleClient(conn),
		SVIDClient: svidv1.NewSVIDClient(conn), FleetClient: api.NewFleetClient(conn), t: h.t,
	}
}

// attestNode attests a node with a new join token.
func (h *clockHistory) attestNode(ctx context.Context, n *clockNode) error {
	token, err := h.Server("default").CreateJoinToken(ctx, time.Hour, "")
	if err != nil {
		return err
	}
	return h.attestWith(ctx, n, token.Value)
}

func (h *clockHistory) attestWith(ctx context.Context, n *clockNode, token string) error {
	a := h.reach(nil)
	defer a.Close()
	key, csr := newKey(h.t)
	stream, err := a.AttestAgent(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(attestation(token, csr)); err != nil {
		return err
	}
	resp, err := stream.Recv()
	if err != nil {
		return err
	}
	n.own = parse(h.t, resp.GetResult().GetSvid(), key)
	return nil
}

// visit does what an agent does from time to time: it renews what is due, and reports.
func (h *clockHistory) visit(n *clockNode) error {
	ctx, cancel := context.WithTimeout(h.t.Context(), 10*time.Second)
	defer cancel()
	if n.own == nil {
		if err := h.attestNode(ctx, n); err != nil {
			return err
		}
	}
	a := h.reach(n.own)
	defer a.Close()
	b, err := a.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return err
	}
	tainted := map[string]bool{}
	for _, x := range b.GetX509Authorities() {
		cert, err := x509.ParseCertificate(x.GetAsn1())
		check(h.t, err)
		tainted[hex.EncodeToString(cert.SubjectKeyId)] = x.GetTainted()
	}
	due := func(ident *identity) bool { return tainted[authorityOf(ident)] || !young(ident) }
	if due(n.own) {
		key, csr := newKey(h.t)
		resp, err := a.RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
		if err != nil {
			return err
		}
		n.own = parse(h.t, resp.GetSvid(), key)
	}
	for _, entry := range []string{"web", "long"} {
		if have := n.svids[entry]; len(have) > 0 && !due(have[len(have)-1]) {
			continue
		}
		key, csr := newKey(h.t)
		resp, err := a.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: entry, Csr: csr}}})
		switch {
		case err != nil:
			return err
		case resp.GetResults()[0].GetStatus().GetCode() != 0:
			return errors.New(resp.GetResults()[0].GetStatus().GetMessage())
		}
		fresh := parse(h.t, resp.GetResults()[0].GetSvid(), key)
		if n.reports && !time.Now().Before(fresh.chain[0].NotBefore) {
			n.svids[entry] = nil // replaced
		}
		n.svids[entry] = append(n.svids[entry], fresh)
	}
	resp, err := a.NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: "web", Audience: []string{"a"}})
	if err != nil {
		return err
	}
	token, err := jwt.ParseSigned(resp.GetSvid().GetToken(), []jose.SignatureAlgorithm{jose.ES256})
	check(h.t, err)
	n.jwts = append(n.jwts, heldJWT{token.Headers[0].KeyID, time.Unix(resp.GetSvid().GetExpiresAt(), 0)})
	if !n.reports {
		return nil
	}
	report := &api.ReportRequest{BundleSequence: b.GetSequenceNumber()}
	for id, is := range tainted {
		if is {
			left := int64(0)
			for _, ident := range n.holds() {
				if authorityOf(ident) == id {
					left++
				}
			}
			report.Authorities = append(report.Authorities, &api.AuthorityReport{AuthorityId: id, Tainted: true, Pending: left, Settled: left == 0})
		}
	}
	sentAt := time.Now()
	if n.lies {
		sentAt = h.wall()
	}
	_, err = a.Report(api.WithSentAt(ctx, sentAt), report)
	if err == nil && n.lies {
		h.lied = true
	}
	return err
}

// holds returns all X.509-SVIDs of a node that are valid now or later.
func (n *clockNode) holds() []*identity {
	var all []*identity
	if n.own != nil {
		all = append(all, n.own)
	}
	for entry, have := range n.svids {
		n.svids[entry] = slices.DeleteFunc(have, func(ident *identity) bool { return !lives(ident) })
		all = append(all, n.svids[entry]...)
	}
	return slices.DeleteFunc(all, func(ident *identity) bool { return !lives(ident) })
}
