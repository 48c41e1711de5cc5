package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
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
	// reconnectDelay is the longest pause between two tries to connect, so
	// that a server which comes back is found quickly.
	reconnectDelay = 3 * time.Second
	// connectTimeout bounds one try, TLS included. A frozen machine accepts
	// connections in its kernel and never answers.
	connectTimeout = 5 * time.Second
	// userTimeout is how long sent bytes may stay unacknowledged before the
	// kernel gives the connection up (TCP_USER_TIMEOUT, RFC 5482).
	userTimeout = 20 * time.Second
	// window is how many bytes of an answer may be under way: an answer with
	// 500 SVIDs.
	window = 1 << 20
)

// link is a connection that presents one identity, or none. What is not
// atomic is guarded by Client.mu.
type link struct {
	conn     *grpc.ClientConn
	identity *node.Identity // nil: anonymous
	calls    int            // under way
	retired  bool           // no new calls; closed after the last

	// noSync says that the server lacks SyncAuthorizedEntries. It is a
	// property of the connection: the next may lead to another server.
	noSync atomic.Bool
}

// open makes a link. It does no I/O yet.
func (c *Client) open(identity *node.Identity, config *tls.Config) (*link, error) {
	conn, err := grpc.NewClient(
		// passthrough: the address goes to the dialer as it is, and is resolved
		// at each try. gRPC's own resolver would keep an old answer for longer
		// and would ask for service configurations in DNS.
		"passthrough:///"+c.cfg.ServerAddress,
		grpc.WithContextDialer(c.cfg.Dial),
		grpc.WithNoProxy(), // Config.Proxy alone counts, in Dial
		grpc.WithDisableServiceConfig(),
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: reconnectDelay},
			MinConnectTimeout: connectTimeout,
		}),
		grpc.WithUserAgent("renewd/"+c.cfg.Version),
		// A fixed window also turns off gRPC's estimate of the bandwidth, which
		// sends a ping after nearly every answer.
		grpc.WithStaticStreamWindowSize(window),
		grpc.WithStaticConnWindowSize(window),
	)
	if err != nil {
		return nil, fmt.Errorf("set up the connection to %s: %w", c.cfg.ServerAddress, err)
	}
	return &link{conn: conn, identity: identity}, nil
}

// clientTLS presents the identity, if any, and demands the server of the trust
// domain at the other end.
func (c *Client) clientTLS(identity *node.Identity) *tls.Config {
	config := &tls.Config{
		MinVersion: tls.VersionTLS13,
		// The peer is verified by its SPIFFE ID, not by a host name, in
		// VerifyConnection.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			// Read now, not when the link was made: a link outlives rotations.
			err := c.verify(cs.PeerCertificates)
			if err == nil && identity != nil {
				c.met.Store(true)
			}
			return err
		},
	}
	if identity != nil {
		cert := identity.TLSCertificate()
		// Not Certificates: those are left out when the server names
		// authorities that do not fit, and a call would arrive anonymously.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	}
	return config
}

// insecureTLS accepts whoever claims to be the server of the trust domain.
func (c *Client) insecureTLS() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // asked for by name: Config.Insecure
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return errors.New("the server presents no certificate")
			}
			id, err := x509svid.IDFromCert(cs.PeerCertificates[0])
			if err != nil {
				return err
			}
			return isServer(id, c.cfg.TrustDomain)
		},
	}
}

// verify checks a chain against the bundle in force or, when that is of other
// authorities, against what the operator says now.
func (c *Client) verify(chain []*x509.Certificate) error {
	err := verifyServer(chain, c.cfg.TrustDomain, c.cfg.Bundle(), c.cfg.Now())
	var unknown x509.UnknownAuthorityError
	if !errors.As(err, &unknown) || c.cfg.Operator == nil {
		return err
	}
	trust, verified := c.cfg.Operator()
	if trust == nil || verifyServer(chain, c.cfg.TrustDomain, trust, c.cfg.Now()) != nil {
		return err
	}
	verified()
	return nil
}

// verifyServer checks that a chain is the server's and ends in an authority of
// trust (SPIFFE X.509-SVID, section 5). A certificate of the future is one of
// now: an authority that is trusted has signed it already, so it is this node's
// clock that lags. To refuse it would part the node from its server at each new
// certificate, until the agent SVID has expired.
func verifyServer(chain []*x509.Certificate, td spiffeid.TrustDomain, trust *bundle.Bundle, now time.Time) error {
	if trust == nil {
		return errors.New("there is no trust bundle to verify the server with")
	}
	roots := make([]*x509.Certificate, 0, len(trust.X509()))
	for _, a := range trust.X509() {
		roots = append(roots, a.Certificate)
	}
	if len(chain) > 0 && now.Before(chain[0].NotBefore) {
		now = chain[0].NotBefore
	}
	id, _, err := x509svid.Verify(chain, x509bundle.FromX509Authorities(td, roots), x509svid.WithTime(now))
	if err != nil {
		return fmt.Errorf("verify the server with trust bundle %d: %w", trust.Sequence(), timeless(err))
	}
	return isServer(id, td)
}

// timeless gives an error about an expired certificate a text that names the
// remedy and does not hold the current time, which would make each one a new one.
func timeless(err error) error {
	var invalid x509.CertificateInvalidError
	if !errors.As(err, &invalid) || invalid.Reason != x509.Expired {
		return err
	}
	return fmt.Errorf("the certificate expired at %s by this node's clock: set the clock if it is ahead, else have the server renew its certificate",
		invalid.Cert.NotAfter.UTC().Format(time.RFC3339))
}

func isServer(id spiffeid.ID, td spiffeid.TrustDomain) error {
	if !id.MemberOf(td) || id.Path() != serverPath {
		return fmt.Errorf("the peer is %q and not the server of trust domain %q", id, td.Name())
	}
	return nil
}

// dialTCP connects over TCP and has the kernel notice a peer that vanished.
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

// acquire returns the link for a call that begins now, bound to the identity
// that is usable now; nil stands for an anonymous call.
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
		c.retire(c.current)
		c.current = l
		c.links[l] = struct{}{}
	}
	c.current.calls++
	c.calls.Add(1)
	return c.current, nil
}

// release ends a call.
func (c *Client) release(l *link) {
	defer c.calls.Done()
	c.mu.Lock()
	defer c.mu.Unlock()
	l.calls--
	c.closeIdle(l)
}

// discard has the next call open another connection.
func (c *Client) discard(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current == l {
		c.current = nil
	}
	c.retire(l)
}

func (c *Client) retire(l *link) {
	if l != nil {
		l.retired = true
		c.closeIdle(l)
	}
}

// closeIdle closes a retired link after its last call. That says goodbye to
// the peer, which takes seconds when it hangs, so nobody waits for it but
// Close.
func (c *Client) closeIdle(l *link) {
	if _, open := c.links[l]; open && l.retired && l.calls == 0 {
		delete(c.links, l)
		c.work.Go(func() { l.conn.Close() })
	}
}
