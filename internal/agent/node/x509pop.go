package node

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/renewd/renewd/internal/config"
)

const (
	// X509PoPType is the name of the node attestor of X.509 certificates.
	X509PoPType = "x509pop"
	// maxCertificates is the size of a file with a key or certificates that is read, in
	// bytes. A certificate has 1 to 3 KiB.
	maxCertificates = 256 << 10
	// nonceSize is the length of both nonces of a challenge.
	nonceSize = 32
	// endpointTimeout is how long another agent's Workload API may take.
	endpointTimeout = 30 * time.Second
)

// X509PoPConfig says which certificate attests the node: either that of the files or
// the X.509-SVID of a Workload API.
type X509PoPConfig struct {
	// KeyPath and CertificatePath are PEM files: the private key, RSA or ECDSA, and the
	// certificate, which intermediates may follow.
	KeyPath, CertificatePath string
	// IntermediatesPath is a PEM file with more intermediates; optional.
	IntermediatesPath string
	// Endpoint is the address of the Workload API of another agent, such as
	// unix:///run/spire/agent.sock, for a server in mode spiffe.
	Endpoint string
}

type x509PoP struct{ cfg X509PoPConfig }

// X509PoP attests a node that has a certificate and its key, by answering a challenge with
// a signature. It is byte-compatible with SPIRE's plugin x509pop (SPIRE 1.16,
// pkg/common/plugin/x509pop): the payload is the chain, leaf first, and the signature is
// over the SHA-256 of the server's nonce and one of the agent.
func X509PoP(cfg X509PoPConfig) Attestor { return x509PoP{cfg} }

func (x509PoP) Type() string { return X509PoPType }

func (x x509PoP) Credential(ctx context.Context) (*Credential, error) {
	chain, key, err := x.load(ctx)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, fmt.Errorf("parse the node's certificate: %w", err)
	}
	// The server would refuse these without saying what to do.
	switch key.Public().(type) {
	case *rsa.PublicKey, *ecdsa.PublicKey:
	default:
		return nil, config.Permanent(fmt.Errorf("the node's certificate has a key of type %T: x509pop needs one with an RSA or ECDSA key", key.Public()))
	}
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return nil, config.Permanent(errors.New("the node's certificate is not for digital signatures: issue one with digitalSignature in its key usage"))
	}
	payload, err := json.Marshal(struct {
		Certificates [][]byte `json:"certificates"`
	}{chain})
	if err != nil {
		return nil, fmt.Errorf("encode the payload of x509pop: %w", err)
	}
	return &Credential{
		Payload: payload,
		Respond: func(challenge []byte) ([]byte, error) { return respondX509PoP(key, challenge) },
		About: fmt.Sprintf("the certificate of %q with serial number %x, issued by %q, good until %s",
			leaf.Subject, leaf.SerialNumber, leaf.Issuer, leaf.NotAfter.UTC().Format(time.RFC3339)),
		ExpiresAt: leaf.NotAfter,
	}, nil
}

// load returns the chain, leaf first, and the leaf's key.
func (x x509PoP) load(ctx context.Context) (chain [][]byte, key crypto.Signer, err error) {
	if x.cfg.Endpoint != "" {
		return fetchSVID(ctx, x.cfg.Endpoint)
	}
	certs, err := readFile("certificate_path", x.cfg.CertificatePath, maxCertificates)
	if err != nil {
		return nil, nil, err
	}
	keyPEM, err := readFile("private_key_path", x.cfg.KeyPath, maxCertificates)
	if err != nil {
		return nil, nil, err
	}
	pair, err := tls.X509KeyPair(certs, keyPEM)
	if err != nil {
		return nil, nil, config.Permanent(fmt.Errorf("load certificate_path %s with private_key_path %s: %w: give a PEM certificate and its RSA or ECDSA key without a passphrase", x.cfg.CertificatePath, x.cfg.KeyPath, err))
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, nil, fmt.Errorf("private_key_path %s: the key cannot sign", x.cfg.KeyPath)
	}
	chain = pair.Certificate
	if x.cfg.IntermediatesPath != "" {
		more, err := readFile("intermediates_path", x.cfg.IntermediatesPath, maxCertificates)
		if err != nil {
			return nil, nil, err
		}
		before := len(chain)
		for block, rest := pem.Decode(more); block != nil; block, rest = pem.Decode(rest) {
			if block.Type != "CERTIFICATE" {
				continue
			}
			if _, err := x509.ParseCertificate(block.Bytes); err != nil {
				return nil, nil, config.Permanent(fmt.Errorf("intermediates_path %s: %w: give a PEM file with intermediate certificates", x.cfg.IntermediatesPath, err))
			}
			chain = append(chain, block.Bytes)
		}
		if len(chain) == before {
			return nil, nil, config.Permanent(fmt.Errorf("intermediates_path %s holds no PEM certificate: remove the field, or give the right file", x.cfg.IntermediatesPath))
		}
	}
	return chain, key, nil
}

// fetchSVID returns the X.509-SVID that another agent gives this process.
func fetchSVID(ctx context.Context, endpoint string) ([][]byte, crypto.Signer, error) {
	ctx, cancel := context.WithTimeout(ctx, endpointTimeout)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(endpoint))
	if err != nil {
		return nil, nil, fmt.Errorf("fetch the X.509-SVID from spiffe_endpoint_socket %s: %w", endpoint, err)
	}
	chain := make([][]byte, len(svid.Certificates))
	for i, c := range svid.Certificates {
		chain[i] = c.Raw
	}
	return chain, svid.PrivateKey, nil
}

// The challenge has one of the two members, by the type of the leaf's key, and the
// response has the same one.
type (
	x509PoPChallenge struct {
		RSA   *x509PoPNonce `json:"rsa_signature"`
		ECDSA *x509PoPNonce `json:"ecdsa_signature"`
	}
	x509PoPNonce struct {
		Nonce []byte `json:"nonce"`
	}
	x509PoPResponse struct {
		RSA   *rsaResponse   `json:"rsa_signature"`
		ECDSA *ecdsaResponse `json:"ecdsa_signature"`
	}
	rsaResponse struct {
		Nonce     []byte `json:"nonce"`
		Signature []byte `json:"signature"`
	}
	ecdsaResponse struct {
		Nonce []byte `json:"nonce"`
		R     []byte `json:"r"`
		S     []byte `json:"s"`
	}
)

// respondX509PoP signs a challenge. The agent's own nonce keeps the server from choosing
// what is signed.
func respondX509PoP(key crypto.Signer, challenge []byte) ([]byte, error) {
	var in x509PoPChallenge
	if json.Unmarshal(challenge, &in) != nil {
		return nil, errors.New("the server's challenge is not one of x509pop")
	}
	nonce := make([]byte, nonceSize)
	rand.Read(nonce) // never fails
	digest := func(c *x509PoPNonce) ([]byte, error) {
		switch {
		case c == nil:
			return nil, fmt.Errorf("the server's challenge is not for the type of the node's key, %T", key.Public())
		case len(c.Nonce) != nonceSize:
			return nil, fmt.Errorf("the nonce of the server's challenge has %d bytes instead of %d", len(c.Nonce), nonceSize)
		}
		sum := sha256.Sum256(append(append([]byte(nil), c.Nonce...), nonce...))
		return sum[:], nil
	}
	var out x509PoPResponse
	switch key := key.(type) {
	case *rsa.PrivateKey:
		sum, err := digest(in.RSA)
		if err != nil {
			return nil, err
		}
		signature, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, sum, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		if err != nil {
			return nil, fmt.Errorf("sign the server's challenge: %w", err)
		}
		out.RSA = &rsaResponse{nonce, signature}
	case *ecdsa.PrivateKey:
		sum, err := digest(in.ECDSA)
		if err != nil {
			return nil, err
		}
		r, s, err := ecdsa.Sign(rand.Reader, key, sum)
		if err != nil {
			return nil, fmt.Errorf("sign the server's challenge: %w", err)
		}
		out.ECDSA = &ecdsaResponse{nonce, r.Bytes(), s.Bytes()}
	default:
		return nil, fmt.Errorf("a key of type %T signs no challenge of x509pop", key)
	}
	return json.Marshal(out)
}
