package agent_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	agentpb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlepb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entrypb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localpb "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent"
	"github.com/renewd/renewd/metrics"
)

// spire is a real SPIRE server, run from SPIRE_BIN_DIR.
type spire struct {
	t       *testing.T
	bin     string
	address string
	conn    *grpc.ClientConn
}

func spireBin(t *testing.T) string {
	t.Helper()
	bin := os.Getenv("SPIRE_BIN_DIR")
	if bin == "" {
		t.Skip("set SPIRE_BIN_DIR to a folder with spire-server and spire-agent to run this test under a real SPIRE server")
	}
	return bin
}

func startSPIRE(t *testing.T) *spire {
	t.Helper()
	s := &spire{t: t, bin: spireBin(t)}
	// Unix socket paths are limited to 107 bytes, which t.TempDir may exceed.
	dir, err := os.MkdirTemp("", "spire")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	port, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.address = port.Addr().String()
	port.Close()
	_, number, _ := net.SplitHostPort(s.address)
	config := fmt.Sprintf(`
server {
  bind_address = "127.0.0.1"
  bind_port = %q
  trust_domain = "example.org"
  data_dir = %q
  socket_path = %q
  log_level = "WARN"
  ca_ttl = "72h"
  default_x509_svid_ttl = "24h"
  default_jwt_svid_ttl = "24h"
}
plugins {
  DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = %q } }
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "memory" { plugin_data {} }
}
`, number, dir, dir+"/api.sock", dir+"/db.sqlite3")
	if err := os.WriteFile(dir+"/server.conf", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(dir + "/server.log")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(s.bin, "spire-server"), "run", "-config", dir+"/server.conf")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			out, _ := os.ReadFile(dir + "/server.log")
			t.Logf("spire-server:\n%s", out)
		}
	})
	if s.conn, err = grpc.NewClient("unix://"+dir+"/api.sock", grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := bundlepb.NewBundleClient(s.conn).GetBundle(ctx, &bundlepb.GetBundleRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatalf("spire-server does not answer: %v", err)
	}
	return s
}

// trust returns the server's bundle, as an operator configures it.
func (s *spire) trust() *bundle.Bundle {
	s.t.Helper()
	b, err := bundlepb.NewBundleClient(s.conn).GetBundle(s.t.Context(), &bundlepb.GetBundleRequest{})
	if err != nil {
		s.t.Fatal(err)
	}
	var c bundle.Content
	for _, x := range b.X509Authorities {
		cert, err := x509.ParseCertificate(x.Asn1)
		if err != nil {
			s.t.Fatal(err)
		}
		c.X509 = append(c.X509, bundle.X509Authority{Certificate: cert})
	}
	out, err := bundle.New(spiffeid.RequireTrustDomainFromString("example.org"), c)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

// populate creates a join token and n entries for its agent. The first two are for
// processes of this user.
func (s *spire) populate(n int) (token string) {
	s.t.Helper()
	jt, err := agentpb.NewAgentClient(s.conn).CreateJoinToken(s.t.Context(), &agentpb.CreateJoinTokenRequest{Ttl: 600})
	if err != nil {
		s.t.Fatal(err)
	}
	parent := &types.SPIFFEID{TrustDomain: "example.org", Path: "/spire/agent/join_token/" + jt.Value}
	for from := 0; from < n; from += 50 {
		req := &entrypb.BatchCreateEntryRequest{}
		for i := from; i < min(from+50, n); i++ {
			uid := os.Getuid()
			if i >= 2 {
				uid = 1_000_000 + i
			}
			req.Entries = append(req.Entries, &types.Entry{
				Id:        fmt.Sprintf("entry-%05d", i),
				ParentId:  parent,
				SpiffeId:  &types.SPIFFEID{TrustDomain: "example.org", Path: fmt.Sprintf("/workload/%d", i)},
				Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", uid)}},
			})
		}
		res, err := entrypb.NewEntryClient(s.conn).BatchCreateEntry(s.t.Context(), req)
		if err != nil {
			s.t.Fatal(err)
		}
		for _, r := range res.Results {
			if r.Status.Code != 0 {
				s.t.Fatalf("create entry: %s", r.Status.Message)
			}
		}
	}
	return jt.Value
}

// rotate prepares and activates new authorities and taints the old ones; it
// returns the IDs of the old ones.
func (s *spire) rotate() (x509ID, jwtID string) {
	s.t.Helper()
	ctx := s.t.Context()
	c := localpb.NewLocalAuthorityClient(s.conn)
	check := func(err error) {
		s.t.Helper()
		if err != nil {
			s.t.Fatal(err)
		}
	}
	x, err := c.PrepareX509Authority(ctx, &localpb.PrepareX509AuthorityRequest{})
	check(err)
	j, err := c.PrepareJWTAuthority(ctx, &localpb.PrepareJWTAuthorityRequest{})
	check(err)
	xs, err := c.GetX509AuthorityState(ctx, &localpb.GetX509AuthorityStateRequest{})
	check(err)
	js, err := c.GetJWTAuthorityState(ctx, &localpb.GetJWTAuthorityStateRequest{})
	check(err)
	_, err = c.ActivateX509Authority(ctx, &localpb.ActivateX509AuthorityRequest{AuthorityId: x.PreparedAuthority.AuthorityId})
	check(err)
	_, err = c.ActivateJWTAuthority(ctx, &localpb.ActivateJWTAuthorityRequest{AuthorityId: j.PreparedAuthority.AuthorityId})
	check(err)
	_, err = c.TaintX509Authority(ctx, &localpb.TaintX509AuthorityRequest{AuthorityId: xs.Active.AuthorityId})
	check(err)
	_, err = c.TaintJWTAuthority(ctx, &localpb.TaintJWTAuthorityRequest{AuthorityId: js.Active.AuthorityId})
	check(err)
	return xs.Active.AuthorityId, js.Active.AuthorityId
}

func (s *spire) revoke(x509ID, jwtID string) {
	s.t.Helper()
	c := localpb.NewLocalAuthorityClient(s.conn)
	if _, err := c.RevokeX509Authority(s.t.Context(), &localpb.RevokeX509AuthorityRequest{AuthorityId: x509ID}); err != nil {
		s.t.Fatal(err)
	}
	if _, err := c.RevokeJWTAuthority(s.t.Context(), &localpb.RevokeJWTAuthorityRequest{AuthorityId: jwtID}); err != nil {
		s.t.Fatal(err)
	}
}

// traffic makes mTLS connections continuously with the stock client's source.
type traffic struct {
	handshakes, failures atomic.Int64
	firstFailure         atomic.Pointer[error]
}

func (tr *traffic) run(ctx context.Context, source *workloadapi.X509Source, wg *sync.WaitGroup) error {
	lis, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeMemberOf(td)))
	if err != nil {
		return err
	}
	wg.Go(func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn) // the client sees and counts what fails
			})
		}
	})
	wg.Go(func() {
		defer lis.Close()
		dialer := tls.Dialer{Config: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeMemberOf(td))}
		for ctx.Err() == nil {
			if err := ping(ctx, &dialer, lis.Addr().String()); err != nil && ctx.Err() == nil {
				tr.failures.Add(1)
				tr.firstFailure.CompareAndSwap(nil, &err)
			}
			tr.handshakes.Add(1)
		}
	})
	return nil
}

func ping(ctx context.Context, d *tls.Dialer, address string) error {
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("x")); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 1))
	return err
}

// waitFor polls until ok, or fails the test after limit of real time.
func waitFor(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, limit)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func authorityOf(s metrics.State, typ, id string) (metrics.Authority, bool) {
	for _, a := range s.Authorities {
		if a.Type == typ && a.ID == id {
			return a, true
		}
	}
	return metrics.Authority{}, false
}

func TestRotationUnderSPIRE(t *testing.T) {
	const entries = 500
	server := startSPIRE(t)
	token := server.populate(entries)
	dir, err := os.MkdirTemp("", "renewd")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	cfg := agent.Config{
		TrustDomain: td, ServerAddress: server.address, TrustBundle: server.trust(), JoinToken: token,
		DataDir: dir + "/data", SocketPath: dir + "/agent.sock", TaintDelay: 5 * time.Second, Log: testLog(t),
	}
	start := func() (*agent.Agent, func()) {
		t.Helper()
		a, err := agent.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx) }()
		return a, func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("agent: %v", err)
			}
		}
	}
	a, stop := start()
	stopOnce := sync.OnceFunc(stop)
	defer stopOnce()

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	socket := workloadapi.WithAddr("unix://" + cfg.SocketPath)
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(socket))
	if err != nil {
		t.Fatalf("stock client: %v", err)
	}
	defer source.Close()
	waitFor(t, "all SVIDs held", time.Minute, func() bool {
		n := 0
		for _, x := range a.State().Authorities {
			if x.Type == metrics.TypeX509 {
				n += x.Held
			}
		}
		return n == entries
	})
	jwtBefore, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "api"}, socket)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(ctx, filepath.Join(server.bin, "spire-agent"), "api", "fetch", "x509", "-socketPath", cfg.SocketPath, "-output", "json").CombinedOutput()
	var fetched struct {
		SVIDs []struct {
			SpiffeID string `json:"spiffe_id"`
		} `json:"svids"`
	}
	if err != nil || json.Unmarshal(out, &fetched) != nil || len(fetched.SVIDs) != 2 {
		t.Errorf("spire-agent api fetch: %v, %d SVIDs of 2\n%s", err, len(fetched.SVIDs), out)
	}

	var tr traffic
	var wg sync.WaitGroup
	trafficCtx, stopTraffic := context.WithCancel(ctx)
	defer func() { stopTraffic(); wg.Wait() }()
	if err := tr.run(trafficCtx, source, &wg); err != nil {
		t.Fatal(err)
	}
	oldX509, oldJWT := server.rotate()
	tainted := time.Now()
	waitFor(t, "settled", 90*time.Second, func() bool {
		x, ok := authorityOf(a.State(), metrics.TypeX509, oldX509)
		return ok && x.State == metrics.StateSettled
	})
	settled := time.Since(tainted)
	jwtAfter, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "api"}, socket)
	if err != nil || jwtAfter.Marshal() != jwtBefore.Marshal() {
		t.Errorf("the JWT-SVID changed with the taint (%v)", err)
	}
	server.revoke(oldX509, oldJWT)
	waitFor(t, "revocation seen", 30*time.Second, func() bool {
		_, x := authorityOf(a.State(), metrics.TypeX509, oldX509)
		_, j := authorityOf(a.State(), metrics.TypeJWT, oldJWT)
		return !x && !j
	})
	jwtNew, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "api"}, socket)
	if err != nil || jwtNew.Marshal() == jwtBefore.Marshal() {
		t.Errorf("the JWT-SVID of a revoked key is still served (%v)", err)
	}

	// A restart needs no new token.
	stopOnce()
	restarted := time.Now()
	_, stop = start()
	defer stop()
	// A new client for each attempt, because one that found no socket pauses for
	// seconds before it retries.
	waitFor(t, "SVIDs after a restart without a token", 30*time.Second, func() bool {
		_, err := workloadapi.FetchX509SVID(ctx, socket)
		return err == nil
	})
	first := time.Since(restarted)
	stopTraffic()
	wg.Wait()
	if n := tr.failures.Load(); n != 0 {
		t.Errorf("%d of %d handshakes failed, the first with: %v", n, tr.handshakes.Load(), *tr.firstFailure.Load())
	}
	t.Logf("%d entries: taint to settled %v; %d handshakes, %d failures; restart to first SVID %v",
		entries, settled.Round(time.Millisecond), tr.handshakes.Load(), tr.failures.Load(), first.Round(time.Millisecond))
}
