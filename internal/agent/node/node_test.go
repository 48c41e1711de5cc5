package node_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/node"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

const nodeID = "spiffe://example.org/spire/agent/join_token/t"

var lastSerial atomic.Int64

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sn := lastSerial.Add(1)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(sn), Subject: pkix.Name{CommonName: fmt.Sprintf("authority %d", sn)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: []byte{byte(sn >> 8), byte(sn)},
	}
	a := &authority{key: key}
	a.cert = a.sign(t, tmpl, tmpl, key.Public())
	return a
}

func (a *authority) sign(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, a.key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (a *authority) bundle() *bundle.Bundle {
	b, err := bundle.New(td, bundle.Content{X509: []bundle.X509Authority{{Certificate: a.cert}}})
	if err != nil {
		panic(err)
	}
	return b
}

// server answers AttestAgent and RenewAgent over a connection without TLS:
// authenticating the server is the caller's part.
type server struct {
	agentv1.UnimplementedAgentServer
	t  testing.TB
	ca *authority

	challenges   int
	reattestable bool
	corrupt      func(*x509.Certificate)            // changes the SVID
	answer       func(chain [][]byte) [][]byte      // changes the chain
	result       func(*agentv1.AttestAgentResponse) // changes the answer
	fail         error

	payloads  []string
	responses []string
}

func (s *server) sign(csrDER []byte) [][]byte {
	csr, err := x509.ParseCertificateRequest(csrDER)
	if err != nil || csr.CheckSignature() != nil {
		s.t.Errorf("certificate request: %v", err)
		return nil
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(lastSerial.Add(1)), NotBefore: time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(time.Minute),
		KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{spiffeid.RequireFromString(nodeID).URL()}, BasicConstraintsValid: true,
	}
	if s.corrupt != nil {
		s.corrupt(tmpl)
	}
	chain := [][]byte{s.ca.sign(s.t, tmpl, s.ca.cert, csr.PublicKey).Raw}
	if s.answer != nil {
		chain = s.answer(chain)
	}
	return chain
}

func (s *server) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	if s.fail != nil {
		return s.fail
	}
	p := req.GetParams()
	s.payloads = append(s.payloads, p.GetData().GetType()+" "+string(p.GetData().GetPayload()))
	for i := range s.challenges {
		err := stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: fmt.Append(nil, i)}})
		if err != nil {
			return err
		}
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		s.responses = append(s.responses, string(req.GetChallengeResponse()))
	}
	out := &agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{Result: &agentv1.AttestAgentResponse_Result{
		Svid: &types.X509SVID{CertChain: s.sign(p.GetParams().GetCsr())}, Reattestable: s.reattestable,
	}}}
	if s.result != nil {
		s.result(out)
	}
	return stream.Send(out)
}

func (s *server) RenewAgent(_ context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	if s.fail != nil {
		return nil, s.fail
	}
	return &agentv1.RenewAgentResponse{Svid: &types.X509SVID{CertChain: s.sign(req.GetParams().GetCsr())}}, nil
}

func serve(t testing.TB, s *server) *grpc.ClientConn {
	t.Helper()
	s.t = t
	l, g := bufconn.Listen(1<<16), grpc.NewServer()
	agentv1.RegisterAgentServer(g, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.Serve(l)
	}()
	conn, err := grpc.NewClient("passthrough:///b", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		g.Stop()
		<-done
	})
	return conn
}

func newNode(t testing.TB, s *node.Store, a node.Attestor, ca *authority, edit func(*node.Config)) *node.Node {
	t.Helper()
	cfg := node.Config{TrustDomain: td, Attestor: a, Store: s, Bundle: ca.bundle}
	if edit != nil {
		edit(&cfg)
	}
	n, err := node.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestJoinToken(t *testing.T) {
	t.Parallel()
	file := func(content string) string {
		path := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, c := range map[string]struct {
		value, file, want, err string
	}{
		"value":             {value: " abc\n", want: "abc"},
		"file":              {file: file("\n abc \r\n"), want: "abc"},
		"value before file": {value: "abc", file: file("def"), want: "abc"},
		"nothing":           {err: "set join_token or join_token_file"},
		"blank":             {value: " ", err: "set join_token or join_token_file"},
		"no file":           {file: filepath.Join(t.TempDir(), "none"), err: "join_token_file"},
		"empty file":        {file: file(" \n"), err: "is empty: put a token into it"},
		"two words":         {file: file("a b"), err: "more than one word"},
		"two in the value":  {value: "a b", err: "join_token is not one word"},
		"no token of SPIRE": {value: "Token: ", err: "join_token is not one word"},
		// What "spire-server token generate" prints, without and with -spiffeID.
		"of SPIRE":           {file: file("Token: 0b7a-1\nWarning: Missing SPIFFE ID.\n"), want: "0b7a-1"},
		"of SPIRE, with ID":  {file: file("Token: 0b7a-1\n"), want: "0b7a-1"},
		"of SPIRE, value":    {value: "Token: 0b7a-1", want: "0b7a-1"},
		"of SPIRE, CRLF":     {file: file("Token: 0b7a-1\r\nWarning: Missing SPIFFE ID.\r\n"), want: "0b7a-1"},
		"of SPIRE, no token": {file: file("Token: \nWarning: Missing SPIFFE ID.\n"), err: "is empty: put a token into it"},
		"two of SPIRE":       {file: file("Token: 0b7a-1\nToken: 0b7a-2\n"), err: "more than one word"},
		"a warning alone":    {file: file("Warning: Missing SPIFFE ID.\n"), err: "more than one word"},
		"large file":         {file: file(strings.Repeat("x", 5000)), err: "larger than"},
	} {
		var got []byte
		credential, err := node.JoinToken(c.value, c.file).Credential(t.Context())
		if err == nil {
			got = credential.Payload
		}
		if string(got) != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
		if errors.Is(err, node.ErrNoCredential) != (name == "nothing" || name == "blank") {
			t.Errorf("%s: ErrNoCredential: %v", name, err)
		}
	}
	if node.JoinToken("a", "").Type() != "join_token" {
		t.Error("type")
	}
	if credential, err := node.JoinToken("a", "").Credential(t.Context()); err != nil || credential.Respond != nil {
		t.Errorf("a challenge would be answered: %v", err)
	}
}

// challenger is an attestor that answers challenges.
type challenger struct{}

func (challenger) Type() string { return "challenger" }
func (challenger) Credential(context.Context) (*node.Credential, error) {
	return &node.Credential{Payload: []byte("payload"), Respond: func(challenge []byte) ([]byte, error) {
		return append([]byte("answer to "), challenge...), nil
	}}, nil
}

func TestAttestAnswersChallenges(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	s := &server{ca: ca, challenges: 2, reattestable: true}
	n := newNode(t, openStore(t, t.TempDir()), challenger{}, ca, nil)
	conn := serve(t, s)
	if err := n.Attest(t.Context(), conn, ca.bundle()); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(s.payloads) != "[challenger payload]" || fmt.Sprint(s.responses) != "[answer to 0 answer to 1]" {
		t.Errorf("got %q, %q", s.payloads, s.responses)
	}
	if id := n.Identity(); !id.Reattestable || id.ID().String() != nodeID {
		t.Errorf("got %v", id)
	}
	s.challenges = 1000
	if err := n.Attest(t.Context(), conn, ca.bundle()); err == nil || !strings.Contains(err.Error(), "challenges") {
		t.Errorf("got %v", err)
	}
}

func TestInvalidAnswersAreRejected(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t), newAuthority(t)
	uri := func(id string) func(*server) {
		return func(s *server) {
			s.corrupt = func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: id}} }
		}
	}
	for name, corrupt := range map[string]func(*server){
		"no certificate":   func(s *server) { s.answer = func([][]byte) [][]byte { return nil } },
		"bad DER":          func(s *server) { s.answer = func([][]byte) [][]byte { return [][]byte{[]byte("x")} } },
		"bad intermediate": func(s *server) { s.answer = func(c [][]byte) [][]byte { return append(c, nil) } },
		"long chain":       func(s *server) { s.answer = func(c [][]byte) [][]byte { return append(c, make([][]byte, 10)...) } },
		"large":            func(s *server) { s.answer = func(c [][]byte) [][]byte { return append(c, make([]byte, 65<<10)) } },
		"other key": func(s *server) {
			key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			s.answer = func(c [][]byte) [][]byte {
				cert, _ := x509.ParseCertificate(c[0])
				return [][]byte{ca.sign(t, cert, ca.cert, key.Public()).Raw}
			}
		},
		"other authority": func(s *server) { s.ca = other },
		"workload":        uri("/w"),
		"server":          uri("/spire/server"),
		"no ID":           func(s *server) { s.corrupt = func(c *x509.Certificate) { c.URIs = nil } },
		"two IDs":         func(s *server) { s.corrupt = func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) } },
		"other domain":    func(s *server) { s.corrupt = func(c *x509.Certificate) { c.URIs[0].Host = "other.org" } },
		"authority":       func(s *server) { s.corrupt = func(c *x509.Certificate) { c.IsCA = true } },
		"expired":         func(s *server) { s.corrupt = func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) } },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := &server{ca: ca}
			corrupt(s)
			store := openStore(t, t.TempDir())
			n := newNode(t, store, node.JoinToken("t", ""), ca, nil)
			conn := serve(t, s)
			if err := n.Attest(t.Context(), conn, ca.bundle()); err == nil || n.Identity() != nil {
				t.Errorf("attest: accepted, %v", err)
			}
			if id, err := store.LoadIdentity(); id != nil || err != nil {
				t.Errorf("attest: kept %v, %v", id, err)
			}
			*s = server{t: t, ca: ca}
			if err := n.Attest(t.Context(), conn, ca.bundle()); err != nil {
				t.Fatal(err)
			}
			held := n.Identity()
			corrupt(s)
			if err := n.Renew(t.Context(), conn); err == nil || n.Identity() != held {
				t.Errorf("renew: accepted, %v", err)
			}
			if kept, err := store.LoadIdentity(); err != nil || !kept.Chain[0].Equal(held.Chain[0]) {
				t.Errorf("renew: kept %v, %v", kept, err)
			}
		})
	}
}

func TestRenewedSVIDOfAnotherNode(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	s := &server{ca: ca}
	n := newNode(t, openStore(t, t.TempDir()), node.JoinToken("t", ""), ca, nil)
	conn := serve(t, s)
	if err := n.Renew(t.Context(), conn); err == nil {
		t.Error("renewed without an identity")
	}
	if err := n.Attest(t.Context(), conn, ca.bundle()); err != nil {
		t.Fatal(err)
	}
	s.corrupt = func(c *x509.Certificate) { c.URIs[0].Path = "/spire/agent/join_token/u" }
	if err := n.Renew(t.Context(), conn); err == nil || !strings.Contains(err.Error(), "the node is") {
		t.Errorf("got %v", err)
	}
}

func TestAttestAnswersWithoutResult(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	for name, corrupt := range map[string]func(*server){
		"no step":   func(s *server) { s.result = func(r *agentv1.AttestAgentResponse) { r.Step = nil } },
		"no SVID":   func(s *server) { s.result = func(r *agentv1.AttestAgentResponse) { r.GetResult().Svid = nil } },
		"challenge": func(s *server) { s.challenges = 1 },
		"refused":   func(s *server) { s.fail = status.Error(codes.InvalidArgument, "join token does not exist") },
	} {
		s := &server{ca: ca}
		corrupt(s)
		n := newNode(t, openStore(t, t.TempDir()), node.JoinToken("t", ""), ca, nil)
		err := n.Attest(t.Context(), serve(t, s), ca.bundle())
		if err == nil || n.Identity() != nil {
			t.Errorf("%s: got %v", name, err)
		}
		if name == "refused" && (status.Code(err) != codes.InvalidArgument ||
			!strings.HasPrefix(err.Error(), "with join_token: rpc error") || !strings.HasSuffix(err.Error(), `give this node a new one, of "spire-server token generate"`)) {
			t.Errorf("the code or the remedy is lost: %v", err)
		}
	}
}

// makeUnwritable makes every write of a file in dir fail, also for root. repair undoes
// that.
func makeUnwritable(t testing.TB, dir string) (repair func()) {
	t.Helper()
	block := []string{filepath.Join(dir, "identity.json.probe")}
	for _, name := range node.Files {
		block = append(block, filepath.Join(dir, name+".tmp"))
	}
	for _, temp := range block {
		if err := os.MkdirAll(filepath.Join(temp, "x"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		for _, temp := range block {
			if err := os.RemoveAll(temp); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// A join token is not used up when the identity could not be saved.
func TestTokenIsNotSentIfDataDirIsUnwritable(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca := newAuthority(t)
	s := &server{ca: ca}
	n := newNode(t, openStore(t, dir), node.JoinToken("t", ""), ca, nil)
	makeUnwritable(t, dir)
	if err := n.Attest(t.Context(), serve(t, s), ca.bundle()); err == nil || len(s.payloads) > 0 {
		t.Errorf("got %v, sent %q", err, s.payloads)
	}
}

func TestAttestedIdentityIsUsedUnsaved(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca := newAuthority(t)
	s := &server{ca: ca}
	var logs bytes.Buffer
	n := newNode(t, openStore(t, dir), node.JoinToken("t", ""), ca, func(c *node.Config) { c.Log = slog.New(slog.NewTextHandler(&logs, nil)) })
	conn := serve(t, s)
	s.result = func(*agentv1.AttestAgentResponse) { makeUnwritable(t, dir) } // between the check and the answer
	if err := n.Attest(t.Context(), conn, ca.bundle()); err != nil || n.Identity() == nil {
		t.Errorf("the token is used up and the identity lost: %v", err)
	}
	if !strings.Contains(logs.String(), "agent SVID not written") {
		t.Errorf("log: %s", &logs)
	}
	held := n.Identity()
	if err := n.Renew(t.Context(), conn); err == nil || n.Identity() != held {
		t.Errorf("an unsaved renewed identity is used: %v", err)
	}
}

// Near its expiry the agent SVID is replaced although the new one cannot be saved: a
// full disk must not cost the node its identity.
func TestRenewedIdentityIsUsedUnsavedOnlyNearExpiry(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca := newAuthority(t)
	var now atomic.Int64
	var logs bytes.Buffer
	n := newNode(t, openStore(t, dir), node.JoinToken("t", ""), ca, func(c *node.Config) {
		c.Now = func() time.Time { return time.Now().Add(time.Duration(now.Load())) }
		c.Log = slog.New(slog.NewTextHandler(&logs, nil))
	})
	conn := serve(t, &server{ca: ca})
	if err := n.Attest(t.Context(), conn, ca.bundle()); err != nil {
		t.Fatal(err)
	}
	makeUnwritable(t, dir)
	held := n.Identity()
	now.Store(int64(40 * time.Second)) // of 70 s, of which 10 s had passed at the start
	if err := n.Renew(t.Context(), conn); err == nil || n.Identity() != held {
		t.Errorf("an unsaved renewed identity is used long before the expiry: %v", err)
	}
	now.Store(int64(50 * time.Second))
	if err := n.Renew(t.Context(), conn); err != nil || n.Identity() == held {
		t.Errorf("the identity is not replaced before it expires: %v", err)
	}
	if !strings.Contains(logs.String(), "agent SVID not written") {
		t.Errorf("log: %s", &logs)
	}
}

func TestStoredIdentities(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	other := spiffeid.RequireTrustDomainFromString("other.org")
	for name, c := range map[string]struct {
		edit func(*node.Config)
		log  string
	}{
		"valid":        {},
		"expired":      {func(c *node.Config) { c.Now = func() time.Time { return time.Now().Add(time.Hour) } }, "not valid by this node's clock"},
		"other domain": {func(c *node.Config) { c.TrustDomain = other }, "another trust domain"},
	} {
		dir := t.TempDir()
		s := openStore(t, dir)
		n := newNode(t, s, node.JoinToken("t", ""), ca, nil)
		if err := n.Attest(t.Context(), serve(t, &server{ca: ca}), ca.bundle()); err != nil {
			t.Fatal(err)
		}
		var logs bytes.Buffer
		n = newNode(t, s, node.JoinToken("", ""), ca, func(cfg *node.Config) {
			cfg.Log = slog.New(slog.NewTextHandler(&logs, nil))
			if c.edit != nil {
				c.edit(cfg)
			}
		})
		if (n.Identity() == nil) != (name == "other domain") || !strings.Contains(logs.String(), c.log) {
			t.Errorf("%s: got %v, log %s", name, n.Identity(), &logs)
		}
		if id, err := s.LoadIdentity(); id == nil || err != nil {
			t.Errorf("%s: the file is gone: %v", name, err)
		}
	}
}

func TestCorruptIdentity(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	dir := t.TempDir()
	s := openStore(t, dir)
	n := newNode(t, s, node.JoinToken("t", ""), ca, nil)
	if err := n.Attest(t.Context(), serve(t, &server{ca: ca}), ca.bundle()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "identity.json")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{
		"empty": nil, "cut": whole[:len(whole)/2], "no key": []byte(`{"version":1,"key":"aGVsbG8="}`),
		"no version": bytes.Replace(whole, []byte(`"version":1`), []byte(`"version":0`), 1),
	} {
		overwrite(t, dir, "identity.json", content)
		cfg := node.Config{TrustDomain: td, Attestor: node.JoinToken("", ""), Store: s, Bundle: ca.bundle}
		_, err := node.New(cfg)
		var corrupt *node.CorruptError
		if !errors.As(err, &corrupt) || corrupt.Path != path || !strings.Contains(err.Error(), "move it away") {
			t.Errorf("%s: got %v", name, err)
		}
		if got, _ := os.ReadFile(path); !bytes.Equal(got, content) {
			t.Errorf("%s: the file was changed", name)
		}
		// With a token the agent starts, and the file is moved aside.
		cfg.Attestor = node.JoinToken("t", "")
		n, err := node.New(cfg)
		if err != nil || n.Identity() != nil {
			t.Errorf("%s: with a token: %v", name, err)
		}
		aside, _ := filepath.Glob(path + ".corrupt-*")
		if len(aside) != 1 {
			t.Fatalf("%s: moved aside: %v", name, aside)
		}
		if got, _ := os.ReadFile(aside[0]); !bytes.Equal(got, content) {
			t.Errorf("%s: the file moved aside was changed", name)
		}
		os.Remove(aside[0])
	}
}

func TestWipe(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	s := openStore(t, t.TempDir())
	n := newNode(t, s, node.JoinToken("t", ""), ca, nil)
	if err := n.Attest(t.Context(), serve(t, &server{ca: ca}), ca.bundle()); err != nil {
		t.Fatal(err)
	}
	if err := n.Wipe(); err != nil {
		t.Fatal(err)
	}
	if id, err := s.LoadIdentity(); id != nil || err != nil || n.Identity() != nil {
		t.Errorf("not wiped: %v, %v", id, err)
	}
}

// FuzzAgentSVIDAnswer answers with arbitrary chains. An accepted one can be presented,
// saved and loaded.
func FuzzAgentSVIDAnswer(f *testing.F) {
	ca := newAuthority(f)
	f.Add([]byte{}, []byte{}, true)
	f.Add([]byte("x"), ca.cert.Raw, true)
	f.Add([]byte{}, ca.cert.Raw, false)
	s := &server{ca: ca}
	conn := serve(f, s)
	f.Fuzz(func(t *testing.T, one, two []byte, replace bool) {
		s.answer = func(chain [][]byte) [][]byte {
			if replace {
				chain = [][]byte{one}
			}
			if len(two) > 0 {
				chain = append(chain, two)
			}
			return chain
		}
		store := openStore(t, t.TempDir())
		n := newNode(t, store, node.JoinToken("t", ""), ca, nil)
		err := n.Attest(t.Context(), conn, ca.bundle())
		if (err == nil) != (n.Identity() != nil) {
			t.Fatalf("got %v, %v", n.Identity(), err)
		}
		if kept, loadErr := store.LoadIdentity(); loadErr != nil || (kept != nil) != (err == nil) {
			t.Fatalf("kept %v, %v", kept, loadErr)
		}
	})
}
