package agent_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/federation"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/spireapi"
)

var partnerTD = spiffeid.RequireTrustDomainFromString("partner.example")

// settle is how long an operator waits between steps of a rotation: three times the hint
// of the bundle endpoint (SPIFFE Federation, section 4.1). By then the other server has
// fetched the bundle, and its agents have fetched it from that.
const settle = 3 * time.Minute

// side is a trust domain with a durable server, a bundle endpoint, and an agent
// with one workload.
type side struct {
	*world
	td      spiffeid.TrustDomain
	config  server.Config
	domain  *server.Domain
	network *network
	stop    func() // of the server
	streams *streams
}

// network has the bundle endpoints by address.
type network struct {
	mu    sync.Mutex
	hosts map[string]*bufconn.Listener
}

func (n *network) dial(ctx context.Context, _, address string) (net.Conn, error) {
	n.mu.Lock()
	lis := n.hosts[address]
	n.mu.Unlock()
	if lis == nil {
		return nil, errors.New("connection refused")
	}
	return lis.DialContext(ctx)
}

func newSide(t *testing.T, n *network, dir string, td, with spiffeid.TrustDomain) *side {
	s := &side{world: &world{t: t, logs: testLog(t)}, td: td, network: n}
	dir = filepath.Join(dir, td.Name())
	s.check(os.MkdirAll(dir, 0o700))
	s.check(seal.NewFile(filepath.Join(dir, "key")))
	s.config = server.Config{
		TrustDomain: td, DataDir: filepath.Join(dir, "data"), KeyFile: filepath.Join(dir, "key"),
		RefreshHint: time.Minute, Rotation: rotation.Policy{Mode: rotation.Off}, Log: s.logs, FederationDial: n.dial,
	}
	s.up()
	_, err := s.server.ApplyEntries(t.Context(), []spireapi.Entry{{
		ID: "web", SPIFFEID: spiffeid.RequireFromPath(td, "/web"), FederatesWith: []spiffeid.TrustDomain{with},
		Selectors: []spireapi.Selector{{Type: "test", Value: "web"}},
	}}, false)
	s.check(err)
	token, err := s.server.CreateJoinToken(t.Context(), time.Hour, "")
	s.check(err)
	s.cfg = agent.Config{
		TrustDomain: td, ServerAddress: "server:8081", TrustBundle: s.own(), JoinToken: token.Value, DataDir: filepath.Join(dir, "agent"),
		TaintDelay: 10 * time.Second, Log: s.logs, Dial: s.dial, Attestors: []attest.Attestor{s.world}, Peers: s.peer, Now: s.now,
	}
	return s
}

// own returns the bundle that the agent bootstraps with.
func (s *side) own() *bundle.Bundle {
	var c bundle.Content
	for _, cert := range s.domain.Published().Certificates() {
		c.X509 = append(c.X509, bundle.X509Authority{Certificate: cert})
	}
	b, err := bundle.New(s.td, c)
	s.check(err)
	return b
}

// up starts the server and its bundle endpoint.
func (s *side) up() {
	s.serverLis = bufconn.Listen(1 << 20)
	endpoint := bufconn.Listen(1 << 20)
	s.network.mu.Lock()
	s.network.hosts[s.td.Name()+":443"] = endpoint
	s.network.mu.Unlock()
	s.config.Deployments = []server.DeploymentConfig{{Name: "default", Listener: s.serverLis}}
	s.config.EndpointListener = endpoint
	var err error
	s.domain, err = server.Open(s.t.Context(), s.config)
	s.check(err)
	s.server = s.domain.Server("default")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func(d *server.Domain) { done <- d.Run(ctx) }(s.domain)
	s.stop = sync.OnceFunc(func() {
		cancel()
		s.check(<-done)
	})
}

// federate makes the server fetch bundles from another's endpoint, beginning with a
// bundle in a file.
func (s *side) federate(with *side, dir string) {
	file := filepath.Join(dir, with.td.Name()+".pem")
	if _, err := os.Stat(file); err != nil {
		s.check(os.WriteFile(file, with.domain.Published().PEM(), 0o600))
	}
	s.config.Federation = []federation.Endpoint{{
		TrustDomain: with.td, URL: "https://" + with.td.Name() + "/bundle", Profile: federation.ProfileSPIFFE,
		ID: spiffeid.RequireFromPath(with.td, "/spire/server"), BundleFile: file,
	}}
	s.stop()
	s.up()
}

// start starts the agent and opens its workload's streams.
func (s *side) start() {
	s.startAgent()
	s.streams = s.openStreams()
}

// streams are the streams of a workload that verifies others.
type streams struct {
	close func()

	mu       sync.Mutex
	messages int
	x509     *workloadpb.X509SVIDResponse
	bundles  *workloadpb.X509BundlesResponse
	jwt      *workloadpb.JWTBundlesResponse
}

func (s *side) openStreams() *streams {
	conn := s.connectAs("web")
	client := workloadpb.NewSpiffeWorkloadAPIClient(conn)
	ctx, cancel := context.WithCancel(workloadContext(context.Background()))
	out := &streams{}
	var work sync.WaitGroup
	work.Go(func() { receive(out, s.first(client.FetchX509SVID(ctx, &workloadpb.X509SVIDRequest{})), &out.x509) })
	work.Go(func() {
		stream, err := client.FetchX509Bundles(ctx, &workloadpb.X509BundlesRequest{})
		s.check(err)
		receive(out, stream.Recv, &out.bundles)
	})
	work.Go(func() {
		stream, err := client.FetchJWTBundles(ctx, &workloadpb.JWTBundlesRequest{})
		s.check(err)
		receive(out, stream.Recv, &out.jwt)
	})
	out.close = sync.OnceFunc(func() {
		cancel()
		work.Wait()
		conn.Close()
	})
	return out
}

// count returns the number of messages.
func (s *streams) count() int {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.messages
}

// first returns a receive function that also checks the SVIDs.
func (s *side) first(stream workloadpb.SpiffeWorkloadAPI_FetchX509SVIDClient, err error) func() (*workloadpb.X509SVIDResponse, error) {
	s.check(err)
	return func() (*workloadpb.X509SVIDResponse, error) {
		resp, err := stream.Recv()
		if err == nil {
			s.read(resp)
		}
		return resp, err
	}
}

// receive stores the last message of a stream.
func receive[M any](s *streams, recv func() (M, error), last *M) {
	for {
		m, err := recv()
		if err != nil {
			return
		}
		s.mu.Lock()
		*last = m
		s.messages++
		s.mu.Unlock()
	}
}

// foreign returns the bundle of another trust domain that the workload received last, nil
// when there is none. Its X.509 authorities must be the same with the SVIDs and in the
// stream of bundles.
func (s *side) foreign(td spiffeid.TrustDomain) *spiffebundle.Bundle {
	s.t.Helper()
	synctest.Wait()
	s.streams.mu.Lock()
	defer s.streams.mu.Unlock()
	if s.streams.x509 == nil || s.streams.bundles == nil || s.streams.jwt == nil {
		s.t.Fatal("a stream has no answer")
	}
	der := s.streams.x509.FederatedBundles[td.IDString()]
	if other := s.streams.bundles.Bundles[td.IDString()]; string(der) != string(other) {
		s.t.Errorf("%d bytes with the SVID, %d in the stream of bundles", len(der), len(other))
	}
	jwks := s.streams.jwt.Bundles[td.IDString()]
	if der == nil || jwks == nil {
		if der != nil || jwks != nil {
			s.t.Errorf("%d bytes of X.509, %d of JWT", len(der), len(jwks))
		}
		return nil
	}
	certs, err := x509.ParseCertificates(der)
	s.check(err)
	keys, err := jwtbundle.Parse(td, jwks)
	s.check(err)
	b := spiffebundle.FromX509Authorities(td, certs)
	b.SetJWTAuthorities(keys.JWTAuthorities())
	return b
}

// identity has newly signed SVIDs of a workload.
type identity struct {
	svid  *x509.Certificate
	token string
}

func (s *side) identity() identity {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s.check(err)
	keys := s.server.Keysets()
	svid, err := keys.SignX509(spiffeid.RequireFromPath(s.td, "/db"), key.Public(), 24*time.Hour)
	s.check(err)
	cert, err := x509.ParseCertificate(svid.DER)
	s.check(err)
	token, err := keys.SignJWT(spiffeid.RequireFromPath(s.td, "/db"), []string{"web"}, 24*time.Hour)
	s.check(err)
	return identity{cert, token.Token}
}

// trusts fails the test if the workload does not trust an identity of another side, or
// does so although it should not.
func (s *side) trusts(of *side, who identity, want bool) {
	s.t.Helper()
	b := s.foreign(of.td)
	if b == nil {
		s.t.Fatalf("%s: no bundle of %s", s.td.Name(), of.td.Name())
	}
	if _, _, err := x509svid.Verify([]*x509.Certificate{who.svid}, b); (err == nil) != want {
		s.t.Errorf("X.509-SVID of %s at %s: %v", of.td.Name(), s.td.Name(), err)
	}
	if _, err := jwtsvid.ParseAndValidate(who.token, b, []string{"web"}); (err == nil) != want {
		s.t.Errorf("JWT-SVID of %s at %s: %v", of.td.Name(), s.td.Name(), err)
	}
}

// Two trust domains federate. One rotates its signing keys twice, step by step. The
// workloads of the other verify, at each moment, SVIDs of all keys that are not removed. A
// restart of the server and its agent while the other side is down changes nothing. When
// the two no longer federate, the workloads lose the bundle.
func TestDrillFederation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir, n := t.TempDir(), &network{hosts: map[string]*bufconn.Listener{}}
		ours, theirs := newSide(t, n, dir, td, partnerTD), newSide(t, n, dir, partnerTD, td)
		ours.federate(theirs, dir)
		theirs.federate(ours, dir)
		for _, s := range []*side{ours, theirs} {
			s.start()
			defer func() {
				s.streams.close()
				s.stopAgent()
				s.stop()
			}()
		}
		time.Sleep(settle)
		theirs.trusts(ours, ours.identity(), true)
		ours.trusts(theirs, theirs.identity(), true)

		for range 2 {
			keys := theirs.server.Keysets()
			old, before := keys.Active(), theirs.identity()
			next, err := keys.Prepare(t.Context())
			ours.check(err)
			time.Sleep(settle)
			for _, step := range []func() error{
				func() error { return keys.Activate(t.Context(), next.ID) },
				func() error { return keys.Taint(t.Context(), old.ID) },
			} {
				ours.check(step())
				for range 10 {
					ours.trusts(theirs, before, true)
					ours.trusts(theirs, theirs.identity(), true)
					time.Sleep(settle / 10)
				}
			}
			ours.check(keys.Remove(t.Context(), old.ID))
			ours.trusts(theirs, theirs.identity(), true)
			time.Sleep(settle)
			ours.trusts(theirs, before, false)
			ours.trusts(theirs, theirs.identity(), true)
			if n := len(ours.foreign(partnerTD).X509Authorities()); n != 1 {
				t.Errorf("%d authorities are left", n)
			}
		}
		messages := ours.streams.count()
		time.Sleep(time.Hour)
		if again := ours.streams.count(); again != messages {
			t.Errorf("%d messages in an hour without changes", again-messages)
		}
		theirs.trusts(ours, ours.identity(), true)

		who := theirs.identity()
		theirs.stop()
		ours.streams.close()
		ours.stopAgent()
		ours.stop()
		ours.up()
		ours.start()
		time.Sleep(settle)
		ours.trusts(theirs, who, true)

		ours.config.Federation = nil
		ours.stop()
		ours.up()
		time.Sleep(settle)
		if b := ours.foreign(partnerTD); b != nil {
			t.Errorf("%d authorities of a trust domain that is no longer federated", len(b.X509Authorities()))
		}
	})
}
