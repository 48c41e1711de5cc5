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
		ClientAuth:       tls.RequestClientCert, // verifyClient verifies it as an X.509-SVID
		VerifyConnection: s.verifyClient,
		// A resumed session would not be verified against the present bundle.
		SessionTicketsDisabled: true,
	}
}

// Certificate returns the server's TLS certificate. It issues a new one if another
// keyset has become active, half of the present one's lifetime is over, or the
// present one is not yet valid by the present clock. It is not in the ledger: only
// the server holds it, and agents are never served one of an inactive keyset.
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
		s.log.Error("server certificate not issued", "error", err)
		return nil, fmt.Errorf("server certificate: %w", err)
	}
	s.log.Info("server certificate issued", "authority_id", svid.Authority, "expires_at", svid.NotAfter)
	return &tls.Certificate{Certificate: [][]byte{svid.DER}, PrivateKey: key}, nil
}

// verifyClient accepts a connection without client certificate, and one whose
// certificate is an X.509-SVID of the trust domain. Whether the client is an agent
// of this server is checked by authorize: the published bundle may be of several
// deployments.
//
// A certificate that begins in the future was issued while this clock was ahead. It is
// verified as of its beginning: if it were refused, an agent that renewed at that time
// would be shut out until then. While the clock itself is behind it is refused, because
// this server would replace it by one that has expired when the clock is right again.
func (s *Server) verifyClient(state tls.ConnectionState) error {
	if len(state.PeerCertificates) == 0 {
		return nil
	}
	at := s.now()
	if begin := state.PeerCertificates[0].NotBefore; at.Before(begin) && !s.config.SetBack() {
		at = begin
	}
	if _, _, err := x509svid.Verify(state.PeerCertificates, s.published().authorities, x509svid.WithTime(at)); err != nil {
		return fmt.Errorf("client certificate: %w", err)
	}
	return nil
}
