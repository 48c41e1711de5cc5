package upstream

import (
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
)

// The deadlines of calls when [Config] sets none.
const (
	DefaultPollTimeout = 30 * time.Second
	// DefaultMintTimeout is longer, because a server that limits such calls
	// does not refuse them but lets them wait for their turn.
	DefaultMintTimeout = 60 * time.Second
)

// maxVersion is what a SPIRE server takes of a version.
const maxVersion = 255

// Config is what a [Client] needs. ServerAddress, TrustDomain, Node and Bundle
// are required.
type Config struct {
	ServerAddress string // host:port
	TrustDomain   spiffeid.TrustDomain
	Node          *node.Node
	// Bundle is the trust bundle in force, nil before there is one. It is read
	// at each handshake and must be safe for concurrent use.
	Bundle func() *bundle.Bundle
	// Operator, when set, is asked when the server cannot be verified with the
	// bundle in force, because another authority signed for it. It returns what
	// the operator says now to trust the server by, nil when that is nothing new,
	// and what to call when the server was verified with it. It is called at
	// handshakes and must be safe for concurrent use.
	Operator func() (trust *bundle.Bundle, verified func())
	// Insecure lets Bootstrap take the bundle from whoever answers when there
	// is none yet. Nothing else is ever done without verifying the server.
	Insecure bool
	// Proxy, when set, is the HTTP proxy through which ServerAddress is reached:
	// http://HOST:PORT, with user and password if it wants them.
	Proxy *url.URL
	// Dial connects to ServerAddress, or to the proxy; nil means TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Process is a random ID of this process, which reports carry: it tells the process
	// from another one of the same identity. Reports carry none when it is empty.
	Process string
	// Version is reported to the server, cut to 255 bytes.
	Version string
	// PollTimeout is the deadline of calls that ask for bundles or entries or
	// report the status, MintTimeout that of calls that have something signed.
	// Zero means the default.
	PollTimeout, MintTimeout time.Duration
	Log                      *slog.Logger
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
}

// Client talks to the server. Make it with [New] and end it with
// [Client.Close]. All methods may be called concurrently, except that
// SyncEntries is for one goroutine at a time.
type Client struct {
	cfg Config

	reports atomic.Uint64 // that were begun

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	work   sync.WaitGroup // the background proof, connections being closed
	calls  sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	current *link // for new calls; nil: the next call opens one
	links   map[*link]struct{}
	proof   *proof // under way; nil when none

	banned  atomic.Bool
	refused atomic.Pointer[refusal]
	fetched atomic.Pointer[bundle.Bundle] // the last own bundle that a verified server answered
	judged  atomic.Pointer[verdict]
	// vouched is the identity that the server has made or accepted last, which
	// says more about its time than this node's clock.
	vouched  atomic.Pointer[node.Identity]
	attested atomic.Pointer[time.Time]
	// met: since the bundle was fetched last the server has proved itself on a
	// connection that presents the own SVID. In TLS 1.3 that is before it has
	// judged the SVID.
	met atomic.Bool

	// proving is held (by a value in it) by whoever replaces the identity.
	proving chan struct{}
	pace    *backoff.ExponentialBackOff // belongs to the holder of proof

	skipped map[string]stamp // entries known to be of no use; belongs to SyncEntries
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
		cfg.Dial = throughProxy(cfg.Proxy, cfg.Dial)
	}
	if cfg.PollTimeout <= 0 {
		cfg.PollTimeout = DefaultPollTimeout
	}
	if cfg.MintTimeout <= 0 {
		cfg.MintTimeout = DefaultMintTimeout
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	cfg.Version = strings.ToValidUTF8(cfg.Version[:min(len(cfg.Version), maxVersion)], "")
	c := &Client{
		cfg:     cfg,
		links:   make(map[*link]struct{}),
		proving: make(chan struct{}, 1),
		pace:    newPace(),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c, nil
}

// Close ends calls under way and everything in the background, and returns
// when all of it has ended.
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

// need is what a call needs of the node's identity.
type need int

const (
	needNothing  need = iota // whoever asks is answered
	needIdentity             // a proved node
	// needAnswer is needIdentity, and the call is made even though the server
	// has refused the identity before. One such call is enough to notice that
	// the server has changed its mind; it is made at the pace of a poll.
	needAnswer
)

// call makes one call: it picks the connection, sets the deadline and draws the
// conclusions from the outcome. what names the operation in errors.
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
			c.prove()
			return &unproved{err}
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
		case wantsProof(err) && again && identity != c.cfg.Node.Identity():
			// The identity was replaced while this call was on its way. The
			// server refused it before it did anything, so making it again
			// does nothing twice.
			continue
		case wantsProof(err):
			c.refused.Store(&refusal{identity, err})
			c.prove()
		case timedOut(err, ctx, caller):
			c.discard(l)
		case status.Code(err) == codes.Unavailable && identity != nil && identity.ValidAt(c.cfg.Now()) != nil:
			// No answer, or a handshake that the server has ended: perhaps the
			// clock is right after all.
			c.vouched.CompareAndSwap(identity, nil)
		}
		return err
	}
}

// ban wipes the identity and makes every later call fail.
func (c *Client) ban(cause error) error {
	if c.banned.CompareAndSwap(false, true) {
		c.cfg.Log.Error("the server has banned this node", "error", cause)
		if err := c.cfg.Node.Wipe(); err != nil {
			c.cfg.Log.Error("the own SVID of the banned node is still on disk", "error", err)
		}
	}
	return fmt.Errorf("%w (%w)", ErrBanned, cause)
}

// PostStatus reports this agent's version, and the sequence number of the
// bundle in force, to the server. It fails with [ErrNoReports] at a server that
// takes no statuses: the policy of SPIRE before 1.14.3 lets no agent post one.
func (c *Client) PostStatus(ctx context.Context, sequence uint64) error {
	err := c.call(ctx, "post status", c.cfg.PollTimeout, needIdentity, func(ctx context.Context, l *link) error {
		_, err := agentv1.NewAgentClient(l.conn).PostStatus(ctx, &agentv1.PostStatusRequest{AgentVersion: c.cfg.Version, CurrentBundleSerial: sequence})
		return err
	})
	if unwelcome(err) {
		return ErrNoReports
	}
	return err
}
