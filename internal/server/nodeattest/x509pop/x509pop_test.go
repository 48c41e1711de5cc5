package x509pop_test

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/selector"
	"github.com/renewd/renewd/internal/server/nodeattest/x509pop"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// values returns the values of selectors, which all have the type, sorted and without
// duplicates.
func values(t *testing.T, all []spireapi.Selector) (out []string) {
	t.Helper()
	for _, s := range all {
		if s.Type != "x509pop" {
			t.Errorf("selector %v", s)
		}
		out = append(out, s.Value)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// TestAttest: RSA and ECDSA keys, below an intermediate and below the second of two roots.
func TestAttest(t *testing.T) {
	t.Parallel()
	root1, root2 := authority(t, nil, "root 1"), authority(t, nil, "root 2")
	intermediate := authority(t, root1, "intermediate")
	v := newVerifier(t, x509pop.Config{CABundleFiles: []string{writeCAs(t, "", root1), writeCAs(t, "", root2)}})
	for name, tt := range map[string]struct {
		parent *identity
		key    crypto.Signer
		chain  []*identity
		cas    []*identity
	}{
		"ECDSA below an intermediate": {intermediate, ecKey(t), []*identity{intermediate}, []*identity{intermediate, root1}},
		"RSA below a root":            {root2, rsaKey(), nil, []*identity{root2}},
	} {
		node := issue(t, tt.parent, tt.key, func(c *x509.Certificate) {
			c.URIs = []*url.URL{
				parseURI(t, "x509pop://example.org/site/berlin/1"), parseURI(t, "x509pop://example.org/rack/7"), parseURI(t, "x509pop://example.org/rack/8/"),
				parseURI(t, "x509pop://example.org/alone"), parseURI(t, "x509pop://other.example/site/x"), parseURI(t, "https://example.org/site/y"),
			}
		})
		got, err := attest(t, v, node, tt.chain, nil)
		check(t, err)
		if want := "spiffe://example.org/spire/agent/x509pop/" + fingerprint(node); got.ID.String() != want {
			t.Errorf("%s: ID %s, want %s", name, got.ID, want)
		}
		want := []string{"subject:cn:node1", "serialnumber:0abc", "san:site:berlin/1", "san:rack:8"}
		for _, ca := range tt.cas {
			want = append(want, "ca:fingerprint:"+fingerprint(ca))
		}
		slices.Sort(want)
		if got := values(t, got.Selectors); !slices.Equal(got, want) {
			t.Errorf("%s: selectors %q, want %q", name, got, want)
		}
		var given []string
		for _, s := range got.Selectors {
			given = append(given, s.Type+":"+s.Value)
		}
		check(t, selector.Compare("x509pop", given))
	}
}

// TestRefuses: with the codes of SPIRE's plugin.
func TestRefuses(t *testing.T) {
	t.Parallel()
	root, other := authority(t, nil, "root"), authority(t, nil, "other")
	v := newVerifier(t, x509pop.Config{CABundleFiles: []string{writeCAs(t, "", root)}, MaxIntermediates: 1, MaxRSAKeySize: 2047})
	node := issue(t, root, ecKey(t), nil)
	large := issue(t, root, rsaKey(), nil)
	for name, tt := range map[string]struct {
		node          *identity
		intermediates []*identity
		change        func(map[string]any)
		code          codes.Code
		says          string
	}{
		"other CA":           {node: issue(t, other, ecKey(t), nil), code: codes.PermissionDenied, says: "unknown authority"},
		"CA sent along":      {node: issue(t, other, ecKey(t), nil), intermediates: []*identity{other}, code: codes.PermissionDenied, says: "unknown authority"},
		"expired":            {node: issue(t, root, ecKey(t), func(c *x509.Certificate) { c.NotAfter = now.Add(-1) }), code: codes.PermissionDenied, says: "expired"},
		"many intermediates": {node: node, intermediates: []*identity{root, root}, code: codes.InvalidArgument, says: "too many intermediate"},
		"large RSA key":      {node: large, code: codes.InvalidArgument, says: "leaf certificate key size too large"},
		"large intermediate": {node: node, intermediates: []*identity{large}, code: codes.InvalidArgument, says: "intermediate certificate 0 key size"},
		"key usage":          {node: issue(t, root, ecKey(t), func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), code: codes.Internal, says: "not intended for digital signature"},
		"no key usage":       {node: issue(t, root, ecKey(t), func(c *x509.Certificate) { c.KeyUsage = 0 }), code: codes.Internal, says: "not intended for digital signature"},
		"Ed25519":            {node: issue(t, root, edKey(t), nil), code: codes.Internal, says: "unsupported public key type"},
		"key of another":     {node: &identity{node.cert, ecKey(t)}, code: codes.PermissionDenied, says: "ECDSA signature verify failed"},
		"short nonce":        {node: node, change: func(a map[string]any) { a["nonce"] = []byte("short") }, code: codes.PermissionDenied, says: "nonce has 5 bytes"},
		"signature of zeros": {node: node, change: func(a map[string]any) { a["r"], a["s"] = []byte{0}, []byte{0} }, code: codes.PermissionDenied, says: "verify failed"},
		"large signature":    {node: node, change: func(a map[string]any) { a["r"] = bytes.Repeat([]byte{255}, 1<<16) }, code: codes.PermissionDenied, says: "verify failed"},
		"not a number":       {node: node, change: func(a map[string]any) { a["r"] = 7 }, code: codes.InvalidArgument, says: "challenge response"},
	} {
		_, err := attest(t, v, tt.node, tt.intermediates, tt.change)
		if status.Code(err) != tt.code || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, want %v with %q", name, err, tt.code, tt.says)
		}
	}
	leaf, err := json.Marshal(map[string]any{"certificates": [][]byte{node.cert.Raw}})
	check(t, err)
	gone := errors.New("gone")
	for name, tt := range map[string]struct {
		payload, answer string
		code            codes.Code
	}{
		"no JSON":           {payload: "x", code: codes.InvalidArgument},
		"no certificates":   {payload: "{}", code: codes.InvalidArgument},
		"no certificate":    {payload: `{"certificates":["eA=="]}`, code: codes.InvalidArgument},
		"no answer":         {payload: string(leaf), answer: "{}", code: codes.PermissionDenied},
		"the other answer":  {payload: string(leaf), answer: `{"rsa_signature":{}}`, code: codes.PermissionDenied},
		"no JSON in answer": {payload: string(leaf), answer: "x", code: codes.InvalidArgument},
	} {
		_, err := v.Verify(t.Context(), []byte(tt.payload), func([]byte) ([]byte, error) { return []byte(tt.answer), nil })
		if status.Code(err) != tt.code {
			t.Errorf("%s: %v, want %v", name, err, tt.code)
		}
	}
	if _, err := v.Verify(t.Context(), leaf, func([]byte) ([]byte, error) { return nil, gone }); !errors.Is(err, gone) {
		t.Errorf("challenge failed: %v", err)
	}
}

// TestLongNames: names in an unknown node's certificates make no long errors.
func TestLongNames(t *testing.T) {
	t.Parallel()
	name := strings.Repeat("n", 500_000)
	issuer, sameName := authority(t, nil, name), authority(t, nil, name)
	v := newVerifier(t, x509pop.Config{CABundleFiles: []string{writeCAs(t, "", authority(t, nil, "root"))}})
	_, err := attest(t, v, issue(t, issuer, ecKey(t), nil), []*identity{sameName}, nil)
	if text := fmt.Sprint(err); status.Code(err) != codes.PermissionDenied || !strings.Contains(text, "unknown authority") || len(text) > 1000 {
		t.Errorf("%d bytes: %.1000s", len(text), text)
	}
}

// TestAnswersAreNotReusable: an answer to one challenge does not answer another.
func TestAnswersAreNotReusable(t *testing.T) {
	t.Parallel()
	root := authority(t, nil, "root")
	v := newVerifier(t, x509pop.Config{CABundleFiles: []string{writeCAs(t, "", root)}})
	for _, key := range []crypto.Signer{ecKey(t), rsaKey()} {
		node := issue(t, root, key, nil)
		payload, err := json.Marshal(map[string]any{"certificates": [][]byte{node.cert.Raw}})
		check(t, err)
		var recorded []byte
		_, err = v.Verify(t.Context(), payload, func(c []byte) ([]byte, error) {
			recorded = answer(t, key, c, nil)
			return recorded, nil
		})
		check(t, err)
		_, err = v.Verify(t.Context(), payload, func([]byte) ([]byte, error) { return recorded, nil })
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%T: a recorded answer: %v", key, err)
		}
	}
}

// TestReload: a changed file is used at the next attestation, a bad one is logged once.
func TestReload(t *testing.T) {
	t.Parallel()
	first, second := authority(t, nil, "first"), authority(t, nil, "second")
	path := writeCAs(t, "", first)
	var log bytes.Buffer
	v := newVerifier(t, x509pop.Config{CABundleFiles: []string{path}, Log: slog.New(slog.NewTextHandler(&log, nil))})
	old, next := issue(t, first, ecKey(t), nil), issue(t, second, ecKey(t), nil)
	accepts := func(node *identity, want bool) {
		t.Helper()
		if _, err := attest(t, v, node, nil, nil); (err == nil) != want {
			t.Errorf("accepted: %v, want %v", err, want)
		}
	}
	replace := func(write func(path string)) {
		temporary := filepath.Join(t.TempDir(), "new")
		write(temporary)
		check(t, os.Rename(temporary, path))
	}
	accepts(old, true)
	accepts(next, false)
	for _, bad := range []string{"", "no certificate", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"} {
		replace(func(name string) { check(t, os.WriteFile(name, []byte(bad), 0o600)) })
		accepts(old, true)
		accepts(old, true)
	}
	check(t, os.Remove(path))
	accepts(old, true)
	if n := strings.Count(log.String(), "not reloaded"); n != 5 {
		t.Errorf("%d bad files are logged, want 5:\n%s", n, &log)
	}
	replace(func(name string) { writeCAs(t, name, second) })
	accepts(next, true)
	accepts(old, false)
	if !strings.Contains(log.String(), `msg="CA bundle of x509pop reloaded" certificates=1`) {
		t.Errorf("the log has %s", &log)
	}
}

// TestNewRefuses: what a Verifier cannot work with.
func TestNewRefuses(t *testing.T) {
	t.Parallel()
	good := writeCAs(t, "", authority(t, nil, "root"))
	empty := filepath.Join(t.TempDir(), "empty")
	check(t, os.WriteFile(empty, nil, 0o600))
	for says, c := range map[string]x509pop.Config{
		"none is given":                                {},
		"no such file":                                 {CABundleFiles: []string{good, "/missing"}},
		"has no certificate: give a file":              {CABundleFiles: []string{good, empty}},
		`mode "x" is neither`:                          {Mode: "x"},
		"agent_path_template: template":                {CABundleFiles: []string{good}, AgentPathTemplate: "{{"},
		`agent_path_template: template: agent path:1:`: {CABundleFiles: []string{good}, AgentPathTemplate: `{{ env "HOME" }}`},
	} {
		if _, err := x509pop.New(c); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%+v: %v, want %q", c, err, says)
		}
	}
}

// TestAgentPathTemplate: what templates of SPIRE's documentation give, and what they
// cannot give is refused.
func TestAgentPathTemplate(t *testing.T) {
	t.Parallel()
	root := authority(t, nil, "root")
	bundle := writeCAs(t, "", root)
	node := issue(t, root, ecKey(t), func(c *x509.Certificate) {
		c.Subject.CommonName, c.Subject.OrganizationalUnit = "Node One", []string{"ou"}
		c.URIs = []*url.URL{parseURI(t, "x509pop://example.org/datacenter/fra1")}
	})
	for template, want := range map[string]string{
		"/{{ .PluginName }}/{{ .SerialNumberHex }}":                                      "/x509pop/0abc",
		"/cn/{{ .Subject.CommonName | lower | replace \" \" \"-\" }}":                    "/cn/node-one",
		"/{{ .TrustDomain }}/{{ .URISanSelectors.datacenter }}/{{ .Fingerprint }}":       "/example.org/fra1/" + fingerprint(node),
		"/{{ index .Subject.OrganizationalUnit 0 }}/{{ .Subject.CommonName | trunc 4 }}": "/ou/Node",
		"/{{ .URISanSelectors.missing }}":                                                "",
		"/cn/{{ .Subject.CommonName }}":                                                  "", // a space
		"no/slash":                                                                       "",
		"/a/../b":                                                                        "",
		`/{{ fail "never" }}`:                                                            "",
	} {
		v := newVerifier(t, x509pop.Config{CABundleFiles: []string{bundle}, AgentPathTemplate: template})
		got, err := attest(t, v, node, nil, nil)
		switch {
		case want == "" && (status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "check agent_path_template")):
			t.Errorf("%s: %v, %v", template, got.ID, err)
		case want != "" && (err != nil || got.ID.Path() != "/spire/agent"+want):
			t.Errorf("%s: %v, %v, want %s", template, got.ID, err, want)
		}
	}
}

// TestModeSPIFFE: an X.509-SVID below the prefix is exchanged for an agent SVID.
func TestModeSPIFFE(t *testing.T) {
	t.Parallel()
	root := authority(t, nil, "root")
	var trusted []*x509.Certificate
	c := x509pop.Config{Mode: x509pop.ModeSPIFFE, TrustBundle: func() []*x509.Certificate { return trusted }}
	svid := func(ids ...string) *identity {
		return issue(t, root, ecKey(t), func(c *x509.Certificate) {
			for _, id := range ids {
				c.URIs = append(c.URIs, parseURI(t, id))
			}
		})
	}
	v := newVerifier(t, c)
	good := svid("spiffe://example.org/spire-exchange/host/1")
	if _, err := attest(t, v, good, nil, nil); status.Code(err) != codes.PermissionDenied {
		t.Errorf("without authorities: %v", err)
	}
	trusted = []*x509.Certificate{root.cert}
	for want, node := range map[string]*identity{
		"/spire/agent/x509pop/host/1": good,
		"":                            svid("https://example.org/x", "x509pop://example.org/a/b"),
		"no prefix":                   svid("spiffe://example.org/other/host"),
		"in the name":                 svid("spiffe://example.org/spire-exchanged/host"),
		"foreign":                     svid("spiffe://other.example/spire-exchange/host"),
	} {
		got, err := attest(t, v, node, nil, nil)
		if strings.HasPrefix(want, "/") {
			if err != nil || got.ID.Path() != want {
				t.Errorf("%v, %v, want %s", got.ID, err, want)
			}
		} else if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v, %v", want, got.ID, err)
		}
	}
	c.SVIDPrefix = "/"
	got, err := attest(t, newVerifier(t, c), svid("spiffe://example.org/other/host"), nil, nil)
	if err != nil || got.ID.Path() != "/spire/agent/x509pop/other/host" {
		t.Errorf("any path: %v, %v", got.ID, err)
	}
}

// TestVerifyClientIP: the connection comes from an IP SAN of the certificate.
func TestVerifyClientIP(t *testing.T) {
	t.Parallel()
	root := authority(t, nil, "root")
	v := newVerifier(t, x509pop.Config{CABundleFiles: []string{writeCAs(t, "", root)}, VerifyClientIP: true})
	node := issue(t, root, ecKey(t), func(c *x509.Certificate) {
		c.IPAddresses = []net.IP{net.ParseIP("192.0.2.1"), net.ParseIP("2001:db8::1")}
	})
	payload, err := json.Marshal(map[string]any{"certificates": [][]byte{node.cert.Raw}})
	check(t, err)
	for from, want := range map[net.Addr]codes.Code{
		&net.TCPAddr{IP: net.ParseIP("192.0.2.1"), Port: 1}:        codes.OK,
		&net.TCPAddr{IP: net.ParseIP("::ffff:192.0.2.1"), Port: 1}: codes.OK,
		&net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 1}:      codes.OK,
		&net.TCPAddr{IP: net.ParseIP("192.0.2.2"), Port: 1}:        codes.PermissionDenied,
		&net.UnixAddr{Name: "/run/socket"}:                         codes.Unknown, // not a refusal
	} {
		ctx := peer.NewContext(t.Context(), &peer.Peer{Addr: from})
		_, err := v.Verify(ctx, payload, func(c []byte) ([]byte, error) { return answer(t, node.key, c, nil), nil })
		if status.Code(err) != want {
			t.Errorf("from %v: %v, want %v", from, err, want)
		}
	}
}

// FuzzVerify: no payload and no answer is accepted, or causes a panic, unless the agent has
// the key.
func FuzzVerify(f *testing.F) {
	root := authority(f, nil, "root")
	v := newVerifier(f, x509pop.Config{CABundleFiles: []string{writeCAs(f, "", root)}})
	payload, err := json.Marshal(map[string]any{"certificates": [][]byte{issue(f, root, ecKey(f), nil).cert.Raw}})
	check(f, err)
	f.Add(payload, []byte(`{"ecdsa_signature":{"nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","r":"AQ==","s":"AQ=="}}`))
	f.Add([]byte(`{"certificates":["AA=="]}`), []byte(`{"rsa_signature":{"signature":"AQ=="}}`))
	f.Fuzz(func(t *testing.T, payload, answer []byte) {
		node, err := v.Verify(t.Context(), payload, func([]byte) ([]byte, error) { return answer, nil })
		if err == nil {
			t.Errorf("accepted %v", node)
		}
		if status.Code(err) == codes.Unknown {
			t.Errorf("not a status: %v", err)
		}
	})
}
