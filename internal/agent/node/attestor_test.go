package node_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"

	"github.com/renewd/renewd/internal/agent/node"
)

// serviceAccountToken returns a token with these claims, and a signature that nobody checks.
func serviceAccountToken(claims string) string {
	part := base64.RawURLEncoding.EncodeToString
	return part([]byte(`{"alg":"RS256"}`)) + "." + part([]byte(claims)) + "." + part([]byte("signature"))
}

func writeFile(t testing.TB, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestK8sPSAT(t *testing.T) {
	t.Parallel()
	// The claims as the API server of Kubernetes 1.32 and later writes them.
	token := serviceAccountToken(`{"aud":["other","spire-server"],"exp":1796000000,"iss":"https://kubernetes.default.svc","kubernetes.io":{
		"namespace":"renewd","node":{"name":"node-1","uid":"u1"},"pod":{"name":"renewd-agent-x","uid":"u2"},"serviceaccount":{"name":"renewd-agent","uid":"u3"}},"sub":"system:serviceaccount:renewd:renewd-agent"}`)
	path := writeFile(t, "token", []byte(token+"\n"))
	a := node.K8sPSAT(node.K8sPSATConfig{Cluster: "prod", TokenPath: path, Audience: "spire-server"})
	if a.Type() != "k8s_psat" {
		t.Errorf("type %q", a.Type())
	}
	c, err := a.Credential(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"cluster":"prod","token":"` + token + `"}`; string(c.Payload) != want {
		t.Errorf("payload %s, want %s", c.Payload, want)
	}
	if c.Respond != nil {
		t.Error("a challenge would be answered")
	}
	for _, part := range []string{`"prod"`, `["other" "spire-server"]`, `"renewd-agent-x" in namespace "renewd"`, "2026-11-30T"} {
		if !strings.Contains(c.About, part) {
			t.Errorf("%s lacks %s", c.About, part)
		}
	}
	if strings.Contains(c.About, token) {
		t.Error("the token is in its description")
	}

	// The kubelet has replaced the token.
	other := serviceAccountToken(`{"aud":"spire-server"}`)
	if err := os.WriteFile(path, []byte(other), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err = a.Credential(t.Context()); err != nil || !strings.Contains(string(c.Payload), other) {
		t.Errorf("after the replacement: %v", err)
	}

	for name, tt := range map[string]struct{ content, want string }{
		"empty":          {" \n", "is empty"},
		"not a token":    {"secret", "holds no JWT"},
		"not base64":     {"a.secret!.c", "holds no JWT"},
		"not JSON":       {"a." + base64.RawURLEncoding.EncodeToString([]byte("secret")) + ".c", "holds no JWT"},
		"other audience": {serviceAccountToken(`{"aud":["https://kubernetes.default.svc"]}`), `for the audience ["https://kubernetes.default.svc"] instead of "spire-server": set the audience`},
		"no audience":    {serviceAccountToken(`{"iss":"secret"}`), `for the audience [] instead`},
		"odd audience":   {serviceAccountToken(`{"aud":{"secret":1}}`), `holds no JWT`},
		"large":          {strings.Repeat("secret", 20000), "is larger than"},
	} {
		_, err := node.K8sPSAT(node.K8sPSATConfig{Cluster: "prod", TokenPath: writeFile(t, "token", []byte(tt.content)), Audience: "spire-server"}).Credential(t.Context())
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "token_path") {
			t.Errorf("%s: %v, want %s", name, err, tt.want)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v has the file's content", name, err)
		}
	}
	if _, err := node.K8sPSAT(node.K8sPSATConfig{TokenPath: filepath.Join(t.TempDir(), "none")}).Credential(t.Context()); err == nil || !strings.Contains(err.Error(), "read token_path") {
		t.Errorf("missing file: %v", err)
	}
	any := node.K8sPSAT(node.K8sPSATConfig{Cluster: "prod", TokenPath: writeFile(t, "token", []byte(serviceAccountToken(`{}`)))})
	if _, err := any.Credential(t.Context()); err != nil {
		t.Errorf("any audience: %v", err)
	}
}

// popFiles are a certificate of a key and an intermediate, as files.
type popFiles struct{ key, cert, intermediate string }

func newPoPFiles(t testing.TB, key crypto.Signer, edit func(*x509.Certificate)) popFiles {
	t.Helper()
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := func(name string) *x509.Certificate {
		return &x509.Certificate{SerialNumber: big.NewInt(0xabcd), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	}
	ca := template("intermediate")
	ca.IsCA, ca.BasicConstraintsValid, ca.KeyUsage = true, true, x509.KeyUsageCertSign
	leaf := template("node-1")
	leaf.KeyUsage = x509.KeyUsageDigitalSignature
	if edit != nil {
		edit(leaf)
	}
	encode := func(kind string, der []byte, err error) []byte {
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	f := popFiles{key: writeFile(t, "key.pem", encode("PRIVATE KEY", der, err))}
	der, err = x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	f.cert = writeFile(t, "cert.pem", encode("CERTIFICATE", der, err))
	der, err = x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	f.intermediate = writeFile(t, "intermediate.pem", encode("CERTIFICATE", der, err))
	return f
}

func (f popFiles) config() node.X509PoPConfig {
	return node.X509PoPConfig{KeyPath: f.key, CertificatePath: f.cert, IntermediatesPath: f.intermediate}
}

// response is the answer to a challenge as SPIRE's server decodes it.
type response struct {
	RSA *struct {
		Nonce     []byte `json:"nonce"`
		Signature []byte `json:"signature"`
	} `json:"rsa_signature"`
	ECDSA *struct {
		Nonce []byte `json:"nonce"`
		R     []byte `json:"r"`
		S     []byte `json:"s"`
	} `json:"ecdsa_signature"`
}

// The answers are verified as SPIRE's server does it (SPIRE 1.16, pkg/common/plugin/x509pop).
func TestX509PoP(t *testing.T) {
	t.Parallel()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p256, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	nonce := bytes.Repeat([]byte{7}, 32)
	for name, key := range map[string]crypto.Signer{"rsa_signature": rsaKey, "ecdsa_signature": p256, "ecdsa_signature ": p384} {
		f := newPoPFiles(t, key, nil)
		a := node.X509PoP(f.config())
		if a.Type() != "x509pop" {
			t.Errorf("type %q", a.Type())
		}
		c, err := a.Credential(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var payload map[string][][]byte
		if err := json.Unmarshal(c.Payload, &payload); err != nil || len(payload) != 1 || len(payload["certificates"]) != 2 {
			t.Fatalf("payload %s, %v", c.Payload, err)
		}
		leaf, err := x509.ParseCertificate(payload["certificates"][0])
		if err != nil || leaf.Subject.CommonName != "node-1" {
			t.Errorf("the first certificate is %v, %v", leaf, err)
		}
		for _, part := range []string{`"CN=node-1"`, "abcd", `"CN=intermediate"`} {
			if !strings.Contains(c.About, part) {
				t.Errorf("%s lacks %s", c.About, part)
			}
		}
		challenge, _ := json.Marshal(map[string]any{strings.TrimSpace(name): map[string][]byte{"nonce": nonce}})
		answer, err := c.Respond(challenge)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var r response
		if err := json.Unmarshal(answer, &r); err != nil || (r.RSA == nil) == (r.ECDSA == nil) {
			t.Fatalf("%s: %s, %v", name, answer, err)
		}
		digest := func(own []byte) []byte {
			if len(own) != 32 {
				t.Errorf("%s: nonce of %d bytes", name, len(own))
			}
			sum := sha256.Sum256(append(bytes.Clone(nonce), own...))
			return sum[:]
		}
		if r.RSA != nil {
			if err := rsa.VerifyPSS(leaf.PublicKey.(*rsa.PublicKey), crypto.SHA256, digest(r.RSA.Nonce), r.RSA.Signature, nil); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		} else if !ecdsa.Verify(leaf.PublicKey.(*ecdsa.PublicKey), digest(r.ECDSA.Nonce), new(big.Int).SetBytes(r.ECDSA.R), new(big.Int).SetBytes(r.ECDSA.S)) {
			t.Errorf("%s: the signature does not verify", name)
		}
		again, err := c.Respond(challenge)
		if err != nil || bytes.Equal(again, answer) {
			t.Errorf("%s: two answers are equal, %v", name, err)
		}
		for _, bad := range []string{``, `x`, `{}`, `{"rsa_signature":{},"ecdsa_signature":{}}`, `{"rsa_signature":{"nonce":"AAA="},"ecdsa_signature":{"nonce":"AAA="}}`} {
			if out, err := c.Respond([]byte(bad)); err == nil {
				t.Errorf("%s: challenge %q answered with %s", name, bad, out)
			}
		}
	}
}

// Each attempt reads the files, and what cannot work says why.
func TestX509PoPFiles(t *testing.T) {
	t.Parallel()
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	other, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	good, renewed := newPoPFiles(t, key, nil), newPoPFiles(t, other, nil)
	junk, large := writeFile(t, "junk", []byte("secret")), writeFile(t, "large", make([]byte, 300<<10))

	a := node.X509PoP(node.X509PoPConfig{KeyPath: good.key, CertificatePath: good.cert})
	first, err := a.Credential(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{renewed.key: good.key, renewed.cert: good.cert} {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	second, err := a.Credential(t.Context())
	if err != nil || bytes.Equal(first.Payload, second.Payload) {
		t.Errorf("the replaced certificate is not read: %v", err)
	}

	with := func(f popFiles, edit func(*node.X509PoPConfig)) node.X509PoPConfig {
		c := f.config()
		if edit != nil {
			edit(&c)
		}
		return c
	}
	f := newPoPFiles(t, key, nil)
	for name, tt := range map[string]struct {
		cfg  node.X509PoPConfig
		want string
	}{
		"no certificate":     {with(f, func(c *node.X509PoPConfig) { c.CertificatePath = "/none" }), "read certificate_path: open /none"},
		"no key":             {with(f, func(c *node.X509PoPConfig) { c.KeyPath = "/none" }), "read private_key_path: open /none"},
		"no intermediates":   {with(f, func(c *node.X509PoPConfig) { c.IntermediatesPath = "/none" }), "read intermediates_path: open /none"},
		"junk certificate":   {with(f, func(c *node.X509PoPConfig) { c.CertificatePath = junk }), "without a passphrase"},
		"junk key":           {with(f, func(c *node.X509PoPConfig) { c.KeyPath = junk }), "without a passphrase"},
		"junk intermediates": {with(f, func(c *node.X509PoPConfig) { c.IntermediatesPath = junk }), "holds no PEM certificate"},
		"large key":          {with(f, func(c *node.X509PoPConfig) { c.KeyPath = large }), "is larger than"},
		"other key":          {with(f, func(c *node.X509PoPConfig) { c.KeyPath = newPoPFiles(t, other, nil).key }), "private key does not match"},
		"Ed25519":            {with(newPoPFiles(t, ed, nil), nil), "needs one with an RSA or ECDSA key"},
		"key usage":          {with(newPoPFiles(t, key, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), nil), "issue one with digitalSignature"},
		"no endpoint":        {node.X509PoPConfig{Endpoint: "http://x"}, "spiffe_endpoint_socket http://x"},
	} {
		_, err := node.X509PoP(tt.cfg).Credential(t.Context())
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %s", name, err, tt.want)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v has the file's content", name, err)
		}
	}
}

type upstreamAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	svid *workload.X509SVID
}

func (u *upstreamAPI) FetchX509SVID(_ *workload.X509SVIDRequest, s grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return s.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{u.svid}})
}

// With a Workload API the payload is the SVID that it gives this process.
func TestX509PoPFromAWorkloadAPI(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	leaf := ca.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(5), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{td.ID().URL().JoinPath("node-1")},
	}, ca.cert, key.Public())
	dir, err := os.MkdirTemp("", "renewd") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	lis, err := net.Listen("unix", filepath.Join(dir, "api.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(srv, &upstreamAPI{svid: &workload.X509SVID{
		SpiffeId: "spiffe://example.org/node-1", X509Svid: leaf.Raw, X509SvidKey: der, Bundle: ca.cert.Raw,
	}})
	done := make(chan error, 1)
	go func() { done <- srv.Serve(lis) }()
	defer func() {
		srv.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	c, err := node.X509PoP(node.X509PoPConfig{Endpoint: "unix://" + lis.Addr().String()}).Credential(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf(`{"certificates":[%q]}`, base64.StdEncoding.EncodeToString(leaf.Raw)); string(c.Payload) != want {
		t.Errorf("payload %s, want %s", c.Payload, want)
	}
	if _, err := c.Respond([]byte(`{"ecdsa_signature":{"nonce":"` + base64.StdEncoding.EncodeToString(make([]byte, 32)) + `"}}`)); err != nil {
		t.Error(err)
	}
}

// A refusal names the credential; what the server said is last.
func TestARefusedCredentialIsNamed(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s := &server{ca: ca, challenges: 1} // whose challenge is none of x509pop
	n := newNode(t, openStore(t, t.TempDir()), node.X509PoP(newPoPFiles(t, key, nil).config()), ca, nil)
	err := n.Attest(t.Context(), serve(t, s), ca.bundle())
	if err == nil || !strings.Contains(err.Error(), `with the certificate of "CN=node-1"`) || !strings.Contains(err.Error(), "not one of x509pop") {
		t.Errorf("got %v", err)
	}
}

// No content of a token file makes the agent panic, send something else than the file's
// token, or repeat the token in an error.
func FuzzServiceAccountToken(f *testing.F) {
	f.Add(serviceAccountToken(`{"aud":"spire-server","exp":1e300}`))
	f.Add(serviceAccountToken(`{"aud":["spire-server"],"exp":-1}`))
	f.Add("a.b.c")
	f.Add("\x87" + serviceAccountToken(`{"aud":["spire-server"]}`))
	path := writeFile(f, "token", nil)
	f.Fuzz(func(t *testing.T, content string) {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := node.K8sPSAT(node.K8sPSATConfig{Cluster: "c", TokenPath: path, Audience: "spire-server"}).Credential(t.Context())
		if err != nil {
			return
		}
		var payload struct{ Cluster, Token string }
		if err := json.Unmarshal(c.Payload, &payload); err != nil || payload.Cluster != "c" || payload.Token != strings.TrimSpace(content) {
			t.Errorf("payload %q of %q: %v", c.Payload, content, err)
		}
	})
}

// No challenge makes the agent panic or sign anything but a digest of two nonces.
func FuzzX509PoPChallenge(f *testing.F) {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	c, err := node.X509PoP(newPoPFiles(f, key, nil).config()).Credential(f.Context())
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"ecdsa_signature":{"nonce":"` + base64.StdEncoding.EncodeToString(make([]byte, 32)) + `"}}`))
	f.Add([]byte(`{"rsa_signature":{"nonce":""},"ecdsa_signature":null}`))
	f.Fuzz(func(t *testing.T, challenge []byte) {
		answer, err := c.Respond(challenge)
		if err != nil {
			return
		}
		var r response
		if err := json.Unmarshal(answer, &r); err != nil || r.ECDSA == nil || len(r.ECDSA.Nonce) != 32 {
			t.Errorf("answer %s: %v", answer, err)
		}
	})
}
