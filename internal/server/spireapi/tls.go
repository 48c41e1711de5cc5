package spireapi

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// serverPath is the path of the server's own SPIFFE ID, which agents expect.
const serverPath = "/spire/server"

func (s *Server) newTLSConfig() *tls.Config {
	return &tls.Config{
		MinVersion:       tls.VersionTLS12,
		Time:             s.now,
		GetCertificate:   func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.Certificate() },
		ClientAuth:       tls.RequestClientCert, // verified below, as a SPIFFE ID
		VerifyConnection: s.verifyClient,
		// Every connection is verified against the bundle of its own time.
		SessionTicketsDisabled: true,
	}
}

// Certificate returns what the server proves itself with: a new one when another keyset
// has become active, half the life of the old one is over, or it has not begun by
// the present clock. It is not in the ledger: nobody else holds it, and no handshake
// of an agent uses that of a keyset which is not the active one.
func (s *Server) Certificate() (*tls.Certificate, error) { return s.serving.Get() }

// issue signs a certificate for the server itself.
func (s *Server) issue() (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate server key: %w", err)
	}
	id, err := spiffeid.FromPath(s.td, serverPath)
	if err != nil {
		return nil, fmt.Errorf("server ID: %w", err)
	}
	svid, err := s.keysets.SignX509(id, key.Public(), s.config.X509TTL)
	if err != nil {
		s.log.Error("no server certificate", "error", err)
		return nil, fmt.Errorf("server certificate: %w", err)
	}
	s.log.Info("server certificate issued", "authority", svid.Authority, "expires_at", svid.NotAfter)
	return &tls.Certificate{Certificate: [][]byte{svid.DER}, PrivateKey: key}, nil
}

// verifyClient accepts a connection without client certificate, and one whose
// certificate is an X.509-SVID of the trust domain. Whether its holder is an
// agent of this server is for authorize to say: the published bundle may be of
// several deployments.
func (s *Server) verifyClient(state tls.ConnectionState) error {
	if len(state.PeerCertificates) == 0 {
		return nil
	}
	if _, _, err := x509svid.Verify(state.PeerCertificates, s.published().authorities, x509svid.WithTime(s.now())); err != nil {
		return fmt.Errorf("client certificate: %w", err)
	}
	return nil
}
