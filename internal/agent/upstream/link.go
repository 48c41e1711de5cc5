package upstream

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/node"
)

const (
	// serverPath is the path of the server's own SPIFFE ID.
	serverPath = "/spire/server"
	// reconnectDelay is the longest pause between two attempts to connect, so
	// that the client reconnects soon after a server is back.
	reconnectDelay = 3 * time.Second
	// connectTimeout bounds one attempt, TLS included: the kernel of a frozen
	// machine accepts connections that nothing answers.
	connectTimeout = 5 * time.Second
	// userTimeout is how long sent bytes may stay unacknowledged before the
	// kernel gives the connection up (TCP_USER_TIMEOUT, RFC 5482).
	userTimeout = 20 * time.Second
	// window is the flow control window in bytes: an answer with 500 SVIDs.
	window = 1 << 20
)

// link is a connection that presents one identity or is anonymous. Client.mu
// guards calls and retired.
type link struct {
	conn     *grpc.ClientConn
	identity *node.Identity // nil: anonymous
	calls    int            // in flight
	retired  bool           // takes no new calls; closed after the last one

	// noSync is set when the server lacks SyncAuthorizedEntries. The next
	// connection may lead to another server.
	noSync atomic.Bool
}

// open returns a link. It does no I/O: gRPC connects at the first call.
func (c *Client) open(identity *node.Identity, config *tls.Config) (*link, error) {
	conn, err := grpc.NewClient(
		// passthrough: the dialer gets the address as it is and resolves it at
		// each attempt. gRPC's own resolver would cache the answer for longer and
		// would look for service configurations in DNS.
		"passthrough:///"+c.cfg.ServerAddress,
		grpc.WithContextDialer(c.cfg.Dial),
		grpc.WithNoProxy(), // Dial uses Config.Proxy
		grpc.WithDisableServiceConfig(),
		grpc.WithTransportCredentials(explained{credentials.NewTLS(config)}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: reconnectDelay},
			MinConnectTimeout: connectTimeout,
		}),
		grpc.WithUserAgent("renewd/"+c.cfg.Version),
		// A fixed window also turns off gRPC's bandwidth estimate, which sends a
		// ping after nearly every answer.
		grpc.WithStaticStreamWindowSize(window),
		grpc.WithStaticConnWindowSize(window),
	)
	if err != nil {
		return nil, fmt.Errorf("set up the connection to %s: %w", c.cfg.ServerAddress, err)
	}
	return &link{conn: conn, identity: identity}, nil
}

// explained adds the remedy to the error of a handshake with a peer that speaks no TLS.
type explained struct {
	credentials.TransportCredentials
}

func (e explained) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secure, info, err := e.TransportCredentials.ClientHandshake(ctx, authority, conn)
	if _, plain := errors.AsType[tls.RecordHeaderError](err); plain {
		err = fmt.Errorf("the peer speaks no TLS (%w): server_address must be the port of the server's API, usually 8081, and not one of metrics or plain HTTP", err)
	}
	return secure, info, err
}

// Clone implements [credentials.TransportCredentials].
func (e explained) Clone() credentials.TransportCredentials {
	return explained{e.TransportCredentials.Clone()}
}

// clientTLS presents the identity, if any, and requires the peer to be the server
// of the trust domain.
func (c *Client) clientTLS(identity *node.Identity) *tls.Config {
	config := &tls.Config{
		MinVersion: tls.VersionTLS13,
		// VerifyConnection verifies the peer by its SPIFFE ID instead of a host
		// name.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			// With the bundle of now: a link outlives rotations.
			err := c.verify(cs.PeerCertificates)
			if err == nil && identity != nil {
				c.serverSeen.Store(true)
			}
			return err
		},
	}
	if identity != nil {
		cert := identity.TLSCertificate()
		// Not Certificates: crypto/tls omits those when the server names other
		// authorities, and calls would be anonymous.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	}
	return config
}

// insecureTLS accepts any peer that claims to be the server of the trust domain.
func (c *Client) insecureTLS() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // only with Config.Insecure
		VerifyConnection: func(cs tls.ConnectionState) error {
			return isServer(cs.PeerCertificates, c.cfg.TrustDomain)
		},
	}
}

// verify checks a chain against the bundle in force or, when that lacks its
// authority, against what else the operator trusts.
func (c *Client) verify(chain []*x509.Certificate) error {
	verify := func(trust *bundle.Bundle) error {
		return verifyServer(chain, c.cfg.TrustDomain, trust, c.cfg.Now())
	}
	err := verify(c.cfg.Bundle())
	var unknown x509.UnknownAuthorityError
	switch {
	case err == nil && c.cfg.Verified != nil:
		c.cfg.Verified()
	case errors.As(err, &unknown) && c.cfg.VerifyOtherwise != nil && c.cfg.VerifyOtherwise(verify):
		return nil
	case errors.As(err, &unknown):
		return c.lacksAuthority(chain, unknown)
	}
	return err
}

// maxShown bounds how many authorities of a bundle an error lists.
const maxShown = 5

// lacksAuthority returns an error that compares the authorities of the bundle in force with
// the one that signed a chain: after a rotation a bundle of earlier is as valid as before and
// verifies nothing.
func (c *Client) lacksAuthority(chain []*x509.Certificate, err error) error {
	name, remedy := c.cfg.Trust()
	var has []string
	all := c.cfg.Bundle().X509()
	for i, a := range all {
		if i == maxShown {
			has = append(has, fmt.Sprintf("and %d more", len(all)-maxShown))
			break
		}
		has = append(has, fmt.Sprintf("%s until %s", a.ID, a.Certificate.NotAfter.UTC().Format(time.RFC3339)))
	}
	signer := chain[len(chain)-1].AuthorityKeyId // as the peer says, so of any length
	signer = signer[:min(len(signer), sha256.Size)]
	return fmt.Errorf("verify the server: authority %x, which signed the server's certificate, is not in %s; it has %s: %w: %s", signer, name, strings.Join(has, ", "), err, remedy)
}

// verifyServer checks that a chain is the server's and ends in an authority of
// trust (SPIFFE X.509-SVID, section 5). A certificate that is not valid yet is
// accepted: a trusted authority has signed it already, so this node's clock is
// behind. Refusing it would cut the node off whenever the server renews its
// certificate.
func verifyServer(chain []*x509.Certificate, td spiffeid.TrustDomain, trust *bundle.Bundle, now time.Time) error {
	if trust == nil {
		return errors.New("there is no trust bundle to verify the server with")
	}
	roots := make([]*x509.Certificate, 0, len(trust.X509()))
	for _, a := range trust.X509() {
		roots = append(roots, a.Certificate)
	}
	if err := isServer(chain, td); err != nil { // its text says more than that of a failed verification
		return err
	}
	if now.Before(chain[0].NotBefore) {
		now = chain[0].NotBefore
	}
	_, _, err := x509svid.Verify(chain, x509bundle.FromX509Authorities(td, roots), x509svid.WithTime(now))
	if err != nil {
		return fmt.Errorf("verify the server: %w", withoutCurrentTime(err))
	}
	return nil
}

// withoutCurrentTime returns err or, for an expired certificate, an error that
// names the remedy. Its text lacks the current time, so that it is logged once.
func withoutCurrentTime(err error) error {
	var invalid x509.CertificateInvalidError
	if !errors.As(err, &invalid) || invalid.Reason != x509.Expired {
		return err
	}
	return fmt.Errorf("the certificate expired at %s by this node's clock: set the clock if it is ahead, or renew the server's certificate",
		invalid.Cert.NotAfter.UTC().Format(time.RFC3339))
}

// isServer returns an error unless a chain claims to be that of the trust domain's server.
func isServer(chain []*x509.Certificate, td spiffeid.TrustDomain) error {
	if len(chain) == 0 {
		return errors.New("the server presents no certificate")
	}
	id, err := x509svid.IDFromCert(chain[0]) // which has no character that gRPC's error would escape
	switch {
	case err != nil:
		return fmt.Errorf("the peer is no SPIRE server: %w: correct server_address", err)
	case !id.MemberOf(td):
		return fmt.Errorf("the peer is %s, of trust domain %s, and trust_domain is %s: correct trust_domain or server_address", id, id.TrustDomain().Name(), td.Name())
	case id.Path() != serverPath:
		return fmt.Errorf("the peer is %s and not the server of trust domain %s: correct server_address", id, td.Name())
	}
	return nil
}

// dialTCP connects over TCP. The kernel ends the connection when the peer no
// longer acknowledges what is sent.
func dialTCP(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var set error
		err := raw.Control(func(fd uintptr) {
			set = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
		})
		return errors.Join(err, set)
	}}
	return d.DialContext(ctx, "tcp", address)
}

// acquire returns the link for a call with this identity; nil means an anonymous
// call. End the call with release.
func (c *Client) acquire(identity *node.Identity) (*link, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errClosed
	}
	if c.current == nil || c.current.identity != identity {
		l, err := c.open(identity, c.clientTLS(identity))
		if err != nil {
			return nil, err
		}
		c.retireLocked(c.current)
		c.current = l
		c.links[l] = struct{}{}
	}
	c.current.calls++
	c.calls.Add(1)
	return c.current, nil
}

// release ends a call on the link.
func (c *Client) release(l *link) {
	defer c.calls.Done()
	c.mu.Lock()
	defer c.mu.Unlock()
	l.calls--
	c.closeIdleLocked(l)
}

// replace makes the next call open another connection.
func (c *Client) replace(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current == l {
		c.current = nil
	}
	c.retireLocked(l)
}

func (c *Client) retireLocked(l *link) {
	if l != nil {
		l.retired = true
		c.closeIdleLocked(l)
	}
}

// closeIdleLocked closes a retired link after its last call. It does so in the
// background, because closing takes seconds when the peer hangs.
func (c *Client) closeIdleLocked(l *link) {
	if _, open := c.links[l]; open && l.retired && l.calls == 0 {
		delete(c.links, l)
		c.work.Go(func() { l.conn.Close() })
	}
}
