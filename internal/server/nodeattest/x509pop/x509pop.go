// Package x509pop verifies nodes by a certificate that they were given before and whose
// key they possess. It is the counterpart of the agents' attestor of that
// name, SPIRE's and our own, and gives the same IDs and selectors as the x509pop plugin of
// a SPIRE server (1.15).
//
// The agent sends its certificate and intermediates. If they chain to a trusted CA, the
// verifier sends a nonce, and the agent answers with a nonce of its own and a signature
// over both.
package x509pop

import (
	"cmp"
	"context"
	"crypto/fips140"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // names certificates, as SPIRE does; nothing is trusted for it
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"slices"
	"strings"
	"text/template"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/server/spireapi"
)

// Type is the type of attestation that agents name.
const Type = "x509pop"

// The modes of a [Config], named as in SPIRE.
const (
	// ModeExternalPKI trusts the CAs of files.
	ModeExternalPKI = "external_pki"
	// ModeSPIFFE trusts the CAs of the trust domain: an X.509-SVID below a path is
	// exchanged for an agent SVID.
	ModeSPIFFE = "spiffe"
)

// The defaults of a [Config], those of SPIRE.
const (
	DefaultSVIDPrefix       = "/spire-exchange"
	DefaultMaxIntermediates = 4
	DefaultMaxRSAKeySize    = 8192
)

// maxShown is the most bytes of the reason why a certificate is refused. It can have names
// of as many as fit into a request, which anybody can choose.
const maxShown = 500

// Config configures a [Verifier]. TrustDomain is required, and CABundleFiles or
// TrustBundle, depending on Mode.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Mode        string // ModeExternalPKI when empty
	// CABundleFiles are PEM files with the trusted CAs, reloaded when they change.
	// For ModeExternalPKI.
	CABundleFiles []string
	// TrustBundle returns the authorities of the trust domain. For ModeSPIFFE.
	TrustBundle func() []*x509.Certificate
	// SVIDPrefix is what the path of an exchanged X.509-SVID has to begin with, up to
	// a slash; "/" allows every path. DefaultSVIDPrefix when empty. For ModeSPIFFE.
	SVIDPrefix string
	// AgentPathTemplate makes the path of an agent's ID after /spire/agent; see
	// [ParseTemplate]. When empty it is /x509pop/ with the certificate's fingerprint,
	// or with the rest of the X.509-SVID's path in ModeSPIFFE.
	AgentPathTemplate string
	// MaxIntermediates is the most certificates beside the leaf, and MaxRSAKeySize
	// the most bits of an RSA key; the defaults when zero.
	MaxIntermediates, MaxRSAKeySize int
	// VerifyClientIP requires that the address of the connection is an IP SAN of the
	// certificate.
	VerifyClientIP bool
	Now            func() time.Time // time.Now when nil
	Log            *slog.Logger     // optional
}

// Verifier implements [spireapi.NodeVerifier].
type Verifier struct {
	config Config
	path   *template.Template
	roots  func() *x509.CertPool
}

// New makes a Verifier. It fails if a CA file cannot be used.
func New(c Config) (*Verifier, error) {
	c.Mode = cmp.Or(c.Mode, ModeExternalPKI)
	c.MaxIntermediates = cmp.Or(c.MaxIntermediates, DefaultMaxIntermediates)
	c.MaxRSAKeySize = cmp.Or(c.MaxRSAKeySize, DefaultMaxRSAKeySize)
	c.Log = cmp.Or(c.Log, slog.New(slog.DiscardHandler))
	c.SVIDPrefix = cmp.Or(c.SVIDPrefix, DefaultSVIDPrefix)
	if !strings.HasSuffix(c.SVIDPrefix, "/") {
		c.SVIDPrefix += "/"
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	v := &Verifier{config: c}
	path := "/{{ .PluginName }}/{{ .Fingerprint }}"
	switch c.Mode {
	case ModeExternalPKI:
		roots, err := openFiles(c.CABundleFiles, c.Log)
		if err != nil {
			return nil, fmt.Errorf("x509pop: %w", err)
		}
		v.roots = roots
	case ModeSPIFFE:
		path = "/{{ .PluginName }}/{{ .SVIDPathTrimmed }}"
		v.roots = func() *x509.CertPool { return pool(c.TrustBundle()) }
	default:
		return nil, fmt.Errorf("x509pop: mode %q is neither %s nor %s", c.Mode, ModeExternalPKI, ModeSPIFFE)
	}
	var err error
	if v.path, err = ParseTemplate(cmp.Or(c.AgentPathTemplate, path)); err != nil {
		return nil, fmt.Errorf("x509pop: agent_path_template: %w", err)
	}
	return v, nil
}

// Type implements [spireapi.NodeVerifier].
func (v *Verifier) Type() string { return Type }

// payload is what an agent sends: DER certificates, its own first.
type payload struct {
	Certificates [][]byte `json:"certificates"`
}

// Verify implements [spireapi.NodeVerifier]. It refuses with the codes of SPIRE's plugin.
func (v *Verifier) Verify(ctx context.Context, data []byte, challenge func([]byte) ([]byte, error)) (spireapi.AttestedNode, error) {
	var none spireapi.AttestedNode
	leaf, intermediates, err := v.parse(data)
	if err != nil {
		return none, err
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: v.roots(), Intermediates: pool(intermediates), CurrentTime: v.config.Now(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return none, status.Errorf(codes.PermissionDenied, "certificate verification failed: %.*s", maxShown, err.Error())
	}
	if v.config.VerifyClientIP {
		if err := verifyClientIP(ctx, leaf); err != nil {
			return none, err
		}
	}
	if err := possession(leaf, challenge); err != nil {
		return none, err
	}
	var rest string
	if v.config.Mode == ModeSPIFFE {
		if rest, err = v.exchanged(leaf); err != nil {
			return none, err
		}
	}
	sans := uriSANs(leaf, v.config.TrustDomain)
	id, err := v.agentID(leaf, rest, sans)
	if err != nil {
		return none, status.Errorf(codes.Internal, "the certificate gives no agent ID: %v: check agent_path_template", err)
	}
	return spireapi.AttestedNode{ID: id, Selectors: selectors(leaf, chains, sans)}, nil
}

// parse reads the certificates, no more than there may be.
func (v *Verifier) parse(data []byte) (leaf *x509.Certificate, intermediates []*x509.Certificate, err error) {
	wrong := func(format string, args ...any) (*x509.Certificate, []*x509.Certificate, error) {
		return nil, nil, status.Errorf(codes.InvalidArgument, format, args...)
	}
	var p payload
	if err := json.Unmarshal(data, &p); err != nil {
		return wrong("payload is not JSON with certificates: %v", err)
	}
	switch n := len(p.Certificates); {
	case n == 0:
		return wrong("no certificate to attest")
	case n-1 > v.config.MaxIntermediates:
		return wrong("too many intermediate certificates: %d, more than %d", n-1, v.config.MaxIntermediates)
	}
	var all []*x509.Certificate
	for i, der := range p.Certificates {
		what := "leaf certificate"
		if i > 0 {
			what = fmt.Sprintf("intermediate certificate %d", i-1)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return wrong("unable to parse %s: %v", what, err)
		}
		if key, ok := cert.PublicKey.(*rsa.PublicKey); ok && key.N.BitLen() > v.config.MaxRSAKeySize {
			return wrong("%s key size too large: %d bits, more than %d", what, key.N.BitLen(), v.config.MaxRSAKeySize)
		}
		all = append(all, cert)
	}
	return all[0], all[1:], nil
}

func verifyClientIP(ctx context.Context, leaf *x509.Certificate) error {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return errors.New("verify_client_ip: the call has no peer")
	}
	host, _, err := net.SplitHostPort(p.Addr.String())
	ip := net.ParseIP(host)
	if err != nil || ip == nil {
		return fmt.Errorf("verify_client_ip: %q is not an IP address", p.Addr)
	}
	if !slices.ContainsFunc(leaf.IPAddresses, ip.Equal) {
		return status.Errorf(codes.PermissionDenied, "client IP %s does not match any certificate IP SAN", ip)
	}
	return nil
}

// exchanged returns the path of the X.509-SVID after the prefix.
func (v *Verifier) exchanged(leaf *x509.Certificate) (string, error) {
	for _, uri := range leaf.URIs {
		if uri.Scheme != "spiffe" {
			continue
		}
		// SPIRE does not look at the host. An upstream CA may sign other trust domains.
		if uri.Host != v.config.TrustDomain.Name() {
			return "", status.Errorf(codes.PermissionDenied, "X.509-SVID is not of trust domain %q", v.config.TrustDomain.Name())
		}
		rest, ok := strings.CutPrefix(uri.EscapedPath(), v.config.SVIDPrefix)
		if !ok {
			return "", status.Errorf(codes.PermissionDenied, "path of the X.509-SVID does not begin with %q", v.config.SVIDPrefix)
		}
		return rest, nil
	}
	return "", status.Error(codes.PermissionDenied, "certificate is not an X.509-SVID")
}

// uriSANs returns the values of the URI SANs x509pop://TRUSTDOMAIN/KEY/VALUE by key. Of
// two with the same key the last counts, as in SPIRE; one without a value is ignored.
func uriSANs(leaf *x509.Certificate, td spiffeid.TrustDomain) map[string]string {
	out := make(map[string]string)
	for _, uri := range leaf.URIs {
		if !strings.HasPrefix(uri.String(), "x509pop://"+td.Name()+"/") {
			continue
		}
		if key, value, ok := strings.Cut(strings.Trim(uri.Path, "/"), "/"); ok {
			out[key] = value
		}
	}
	return out
}

func (v *Verifier) agentID(leaf *x509.Certificate, rest string, sans map[string]string) (spiffeid.ID, error) {
	var path strings.Builder
	err := v.path.Execute(&path, templateData{
		Certificate: leaf, PluginName: Type, TrustDomain: v.config.TrustDomain.Name(),
		SerialNumberHex: serialNumber(leaf.SerialNumber), Fingerprint: fingerprint(leaf), SVIDPathTrimmed: rest, URISanSelectors: sans,
	})
	if err != nil {
		return spiffeid.ID{}, err
	}
	if err := spiffeid.ValidatePath(path.String()); err != nil {
		return spiffeid.ID{}, fmt.Errorf("path %q: %w", path.String(), err)
	}
	return spiffeid.FromPath(v.config.TrustDomain, "/spire/agent"+path.String())
}

// selectors returns what describes the node: its name and number, the CAs of all its
// chains, and its URI SANs.
func selectors(leaf *x509.Certificate, chains [][]*x509.Certificate, sans map[string]string) (out []spireapi.Selector) {
	add := func(value string) { out = append(out, spireapi.Selector{Type: Type, Value: value}) }
	if leaf.Subject.CommonName != "" {
		add("subject:cn:" + leaf.Subject.CommonName)
	}
	for _, chain := range chains {
		for _, ca := range chain[1:] {
			add("ca:fingerprint:" + fingerprint(ca))
		}
	}
	add("serialnumber:" + serialNumber(leaf.SerialNumber))
	for key, value := range sans {
		add("san:" + key + ":" + value)
	}
	return out
}

// fingerprint returns the SHA-1 of a certificate in hex. It only names the certificate, so
// it may be used where FIPS 140 is enforced.
func fingerprint(cert *x509.Certificate) string {
	var sum [sha1.Size]byte
	fips140.WithoutEnforcement(func() { sum = sha1.Sum(cert.Raw) }) //nolint:gosec // see the import
	return hex.EncodeToString(sum[:])
}

// serialNumber returns a serial number in hex, with an even number of digits.
func serialNumber(n *big.Int) string {
	digits := n.Text(16)
	if len(digits)%2 == 1 {
		digits = "0" + digits
	}
	return digits
}

func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, cert := range certs {
		p.AddCert(cert)
	}
	return p
}
