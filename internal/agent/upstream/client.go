package upstream

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/agent/node"
	"github.com/renewd/renewd/internal/loglimit"
)

const (
	// pollTimeout is the deadline of calls that fetch bundles or entries or report the
	// status.
	pollTimeout = 30 * time.Second
	// mintTimeout is that of calls that sign. It is longer, because a server queues the
	// calls above its rate limit and does not refuse them.
	mintTimeout = 60 * time.Second
	// maxVersion is the longest version that a SPIRE server accepts, in bytes.
	maxVersion = 255
)

// Config is what a [Client] needs. ServerAddress, TrustDomain, Node and Bundle
// are required.
type Config struct {
	ServerAddress string // host:port
	TrustDomain   spiffeid.TrustDomain
	Node          *node.Node
	// Bundle is the trust bundle in force, nil before there is one. It is read
	// at each handshake and must be safe for concurrent use.
	Bundle func() *bundle.Bundle
	// Trust returns what an error calls the bundle in force, and what to do when it lacks
	// the authority of the server's certificate; nil means general words.
	Trust func() (name, remedy string)
	// VerifyOtherwise, when set, is called when the bundle in force lacks the
	// authority of the server's certificate. It calls verify, which checks the
	// certificate, with what else the operator trusts, and reports whether that has
	// verified it.
	VerifyOtherwise func(verify func(*bundle.Bundle) error) bool
	// Verified, when set, is called when the bundle in force has verified the server.
	// Both are called at handshakes and must be safe for concurrent use.
	Verified func()
	// Insecure lets Bootstrap take the first bundle from an unverified server.
	// Every other call verifies the server.
	Insecure bool
	// Proxy, when set, is the HTTP proxy through which ServerAddress is reached:
	// http://HOST:PORT, with user and password if the proxy requires them.
	Proxy *url.URL
	// Dial connects to ServerAddress, or to the proxy; nil means TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Process is a random ID of this process. Reports carry it, so that the server can
	// tell two processes with one identity apart. It may be empty.
	Process string
	// Version is reported to the server, cut to 255 bytes.
	Version string
	Log     *slog.Logger
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
}

// Client talks to the server. Make it with [New] and end it with
// [Client.Close]. All methods may be called concurrently, except that
// SyncEntries is for one goroutine at a time.
type Client struct {
	cfg Config

	reports atomic.Uint64 // started so far

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	work   sync.WaitGroup // background attestation, connections being closed
	calls  sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	current   *link // for new calls; nil: the next call opens one
	links     map[*link]struct{}
	attesting *attestation // nil: no attestation is in progress

	banned  atomic.Bool
	refused atomic.Pointer[refusal]
	fetched atomic.Pointer[bundle.Bundle] // last bundle of the trust domain from a verified server
	judged  atomic.Pointer[verdict]
	// accepted is the last identity that the server signed or accepted. It is
	// usable although this node's clock shows a time outside its lifetime.
	accepted atomic.Pointer[node.Identity]
	attested atomic.Pointer[time.Time]
	// serverSeen is set when a server was verified on a connection that presents
	// the agent SVID, since the last fetch of the bundle. In TLS 1.3 the client
	// verifies the server before the server verifies the client.
	serverSeen atomic.Bool

	// identityTurn is a lock (a value in it holds it) for replacing the identity.
	// Unlike a mutex it can be given up when a context ends.
	identityTurn chan struct{}
	// Owned by keepAttesting.
	pace, evictionPace *backoff.ExponentialBackOff
	lines              *loglimit.Log

	skipped map[string]entryVersion // unusable entries, by ID; owned by SyncEntries
}

// New returns a Client. It makes no connection and starts nothing.
func New(cfg Config) (*Client, error) {
	if cfg.TrustDomain.IsZero() || cfg.Node == nil || cfg.Bundle == nil {
		return nil, errors.New("upstream: Config needs TrustDomain, Node and Bundle")
	}
	if cfg.Dial == nil {
		if _, _, err := net.SplitHostPort(cfg.ServerAddress); err != nil {
			return nil, fmt.Errorf("server_address %q is not host:port: %w", cfg.ServerAddress, err)
		}
		cfg.Dial = dialTCP
	}
	if cfg.Proxy != nil {
		cfg.Dial = dialerThrough(cfg.Proxy, cfg.Dial)
	}
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Trust == nil {
		cfg.Trust = func() (name, remedy string) { return "the trust bundle", "give the server's bundle" }
	}
	cfg.Version = strings.ToValidUTF8(cfg.Version[:min(len(cfg.Version), maxVersion)], "")
	c := &Client{
		cfg:          cfg,
		links:        make(map[*link]struct{}),
		identityTurn: make(chan struct{}, 1),
		pace:         newPace(),
		evictionPace: newEvictionPace(),
		lines:        loglimit.New(cfg.Log, loglimit.Interval, 1),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c, nil
}

// Close cancels the calls and background work in progress, and returns when
// they have ended.
func (c *Client) Close() error {
	c.cancel()
	c.mu.Lock()
	c.closed = true
	links := c.links
	c.links, c.current = nil, nil
	c.mu.Unlock()
	var errs []error
	for l := range links {
		errs = append(errs, l.conn.Close())
	}
	c.work.Wait()
	c.calls.Wait()
	return errors.Join(errs...)
}

// need says which identity a call needs.
type need int

const (
	needNothing  need = iota // the server answers anonymous callers, too
	needIdentity             // an attested node
	// needProbe is needIdentity, but the call is made although the server has
	// refused the identity before. So one poll notices when the server accepts
	// the identity again.
	needProbe
)

// call makes one call: it picks the connection, sets the deadline and updates the
// state of the identity and the connection from the outcome. what names the
// operation in errors.
func (c *Client) call(ctx context.Context, what string, timeout time.Duration, n need, do func(context.Context, *link) error) error {
	err := c.try(ctx, timeout, n, do)
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

func (c *Client) try(caller context.Context, timeout time.Duration, n need, do func(context.Context, *link) error) error {
	ctx, cancel := context.WithTimeout(caller, timeout)
	defer cancel()
	for again := true; ; again = false {
		if c.banned.Load() {
			return ErrBanned
		}
		identity, err := c.usable()
		if err == nil && n == needIdentity {
			if r := c.refused.Load(); r != nil && r.identity == identity {
				err = r.err
			}
		}
		if err != nil && n != needNothing {
			c.startAttesting()
			return &notAttestedError{err}
		}
		l, err := c.acquire(identity)
		if err != nil {
			return err
		}
		err = do(ctx, l)
		c.release(l)
		switch {
		case err == nil:
			if r := c.refused.Load(); r != nil && r.identity == identity && n != needNothing {
				c.refused.CompareAndSwap(r, nil)
			}
			return nil
		case banned(err):
			return c.ban(err)
		case wantsAttestation(err) && again && identity != c.cfg.Node.Identity():
			// The identity was replaced during this call. The server refused
			// the call before it executed anything, so repeating it is safe.
			continue
		case wantsAttestation(err):
			c.refused.Store(&refusal{identity, err})
			c.startAttesting()
		case timedOut(err, ctx, caller):
			c.replace(l)
		case status.Code(err) == codes.Unavailable && identity != nil && identity.ValidAt(c.cfg.Now()) != nil:
			// No answer, or the server ended the handshake: the SVID may have
			// expired by the server's clock, too.
			c.accepted.CompareAndSwap(identity, nil)
		}
		return err
	}
}

// ban wipes the identity and makes every later call fail.
func (c *Client) ban(cause error) error {
	if c.banned.CompareAndSwap(false, true) {
		c.cfg.Log.Error("node banned by the server", "error", cause)
		if err := c.cfg.Node.Wipe(); err != nil {
			c.cfg.Log.Error("agent SVID of the banned node not deleted from disk", "error", err)
		}
	}
	return fmt.Errorf("%w (%w)", ErrBanned, cause)
}

// PostStatus reports this agent's version and the sequence number of the bundle
// in force to the server. It fails with [ErrNoReports] when the server accepts no
// statuses: SPIRE before 1.14.3 denies the call to all agents.
func (c *Client) PostStatus(ctx context.Context, sequence uint64) error {
	err := c.call(ctx, "post status", pollTimeout, needIdentity, func(ctx context.Context, l *link) error {
		_, err := agentv1.NewAgentClient(l.conn).PostStatus(ctx, &agentv1.PostStatusRequest{AgentVersion: c.cfg.Version, CurrentBundleSerial: sequence})
		return err
	})
	if notOffered(err) {
		return ErrNoReports
	}
	return err
}
