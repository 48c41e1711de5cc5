// Package renewd is the operator's side of our own signing server: the client of
// its operators' API, and with it a [runbook.Backend]. A server is reached at its
// admin socket, or over mTLS with an X.509-SVID.
package renewd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/logger"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/internal/api"
)

// Client is a connection to the operators' API. Nothing is ever sent again that
// the server may have acted on.
type Client struct {
	api.OperatorClient
	conn   *grpc.ClientConn
	source io.Closer // nil at the admin socket
}

// DialOptions are what a client's connection is made with. A mutation that may
// have happened is the operator's to judge: what gRPC still repeats by itself is a
// call that has not left this process, or of which the server says that it has not
// looked at it.
func DialOptions(creds credentials.TransportCredentials, more ...grpc.DialOption) []grpc.DialOption {
	return append(more,
		grpc.WithTransportCredentials(creds),
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
		grpc.WithChainUnaryInterceptor(sayTime),
		// A long wait looks every few seconds; gRPC's own pause after a server
		// that was away grows to two minutes.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 20 * time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(false), grpc.MaxCallRecvMsgSize(api.MaxMessage), grpc.MaxCallSendMsgSize(api.MaxMessage)))
}

// NewClient makes a Client of a connection that was made with [DialOptions].
func NewClient(conn *grpc.ClientConn) *Client {
	return &Client{OperatorClient: api.NewOperatorClient(conn), conn: conn}
}

// DialSocket connects to the admin socket at path, with the first call.
func DialSocket(path string) (*Client, error) { return DialStarting(path, 0, nil) }

// DialStarting is [DialSocket] for a server that may still be starting: a call
// waits while nobody listens at path, until wait has passed since DialStarting.
// slow is called once when that takes longer than a second.
func DialStarting(path string, wait time.Duration, slow func()) (*Client, error) {
	begin := time.Now()
	told := sync.OnceFunc(func() { slow() })
	// A dialer of our own, since a path in a gRPC target is parsed as a URL.
	dialer := func(ctx context.Context, _ string) (net.Conn, error) {
		for {
			c, err := new(net.Dialer).DialContext(ctx, "unix", path)
			switch {
			case errors.Is(err, fs.ErrPermission):
				return nil, fmt.Errorf("%w: its mode lets in root and the server's group; join that, or set admin_socket_mode: 0666 and let operators.managers and operators.readers decide alone", err)
			case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED):
				return c, err
			}
			waited := time.Since(begin)
			if waited >= wait {
				return nil, fmt.Errorf("%w: no server listens there; start it, or give its socket with --admin-socket", err)
			}
			if waited >= time.Second {
				told()
			}
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-time.After(startPoll):
			}
		}
	}
	conn, err := grpc.NewClient("passthrough:///admin-socket", DialOptions(insecure.NewCredentials(), grpc.WithContextDialer(dialer))...)
	if err != nil {
		return nil, fmt.Errorf("admin socket %s: %w", path, err)
	}
	return NewClient(conn), nil
}

// startPoll is how often it is tried whether a server that is starting listens.
const startPoll = 50 * time.Millisecond

// serverPath is the path of the signing server's SPIFFE ID.
const serverPath = "/spire/server"

// DialServer connects to a server at host:port with the SVID that the Workload
// API at socket gives this process. The server must be that of the SVID's trust
// domain. It waits for the SVID until ctx is done.
func DialServer(ctx context.Context, address, socket string) (*Client, error) {
	why := &reason{Logger: logger.Null}
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(socket), workloadapi.WithLogger(why)))
	if err != nil {
		if last := why.last.Load(); last != nil {
			err = fmt.Errorf("%s: %w", *last, err)
		}
		return nil, fmt.Errorf("get an SVID from the Workload API at %s: %w", socket, err)
	}
	own, err := source.GetX509SVID()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("get an SVID from the Workload API at %s: %w", socket, err), source.Close())
	}
	id, err := spiffeid.FromPath(own.ID.TrustDomain(), serverPath)
	if err != nil {
		return nil, errors.Join(err, source.Close())
	}
	creds := credentials.NewTLS(tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(id)))
	conn, err := grpc.NewClient(address, DialOptions(creds)...)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("server %s: %w", address, err), source.Close())
	}
	return &Client{OperatorClient: api.NewOperatorClient(conn), conn: conn, source: source}, nil
}

// Reason is the message of a call's error, without what gRPC puts around an
// error of the connection.
func Reason(err error) string {
	message := status.Convert(err).Message()
	quoted, ok := strings.CutPrefix(message, "connection error: desc = ")
	if !ok {
		return message
	}
	text, err := strconv.Unquote(quoted)
	if err != nil {
		return message
	}
	text = strings.TrimPrefix(text, "transport: ")
	return strings.TrimPrefix(text, "Error while dialing: ")
}

// reason remembers why the Workload API gave no SVID. Whatever that is, go-spiffe
// tries again, and in the end says only that the time was over.
type reason struct {
	logger.Logger
	last atomic.Pointer[string]
}

// Errorf is told of every attempt that failed.
func (r *reason) Errorf(_ string, args ...any) {
	for _, arg := range args {
		if err, ok := arg.(error); ok {
			text := Reason(err)
			r.last.Store(&text)
		}
	}
}

// Close ends the connection.
func (c *Client) Close() error {
	err := c.conn.Close()
	if c.source != nil {
		err = errors.Join(err, c.source.Close())
	}
	return err
}
