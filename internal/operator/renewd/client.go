// Package renewd is the client of renewd's signing server for operators, and implements
// [runbook.Backend]. It connects to the admin socket, or over mTLS with an X.509-SVID.
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
	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
)

// Client is a connection to the Operator service. It does not retry calls that the server
// may have received.
type Client struct {
	api.OperatorClient
	conn   *grpc.ClientConn
	source io.Closer // nil at the admin socket
}

// DialOptions are the options of a Client's connection. They disable gRPC's retries,
// because a mutation may have happened. gRPC still repeats calls that were not sent, or
// that the server reports as not processed.
func DialOptions(creds credentials.TransportCredentials, more ...grpc.DialOption) []grpc.DialOption {
	return append(more,
		grpc.WithTransportCredentials(creds),
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
		grpc.WithChainUnaryInterceptor(sendTime),
		// A wait polls every few seconds, but gRPC's default backoff grows to two
		// minutes.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 20 * time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(false), grpc.MaxCallRecvMsgSize(api.MaxMessage), grpc.MaxCallSendMsgSize(api.MaxMessage)))
}

// NewClient returns a Client of a connection that was made with [DialOptions].
func NewClient(conn *grpc.ClientConn) *Client {
	return &Client{OperatorClient: api.NewOperatorClient(conn), conn: conn}
}

// DialSocket returns a Client of the admin socket at path. The first call connects.
func DialSocket(path string) (*Client, error) { return DialStarting(path, 0, nil) }

// DialStarting is [DialSocket] for a server that may be starting: while nothing listens at
// path, calls wait until the duration wait has passed since DialStarting. slow is called
// once if that takes longer than a second.
func DialStarting(path string, wait time.Duration, slow func()) (*Client, error) {
	begin := time.Now()
	notifySlow := sync.OnceFunc(func() { slow() })
	// gRPC would parse a path in the target as a URL.
	dialer := func(ctx context.Context, _ string) (net.Conn, error) {
		for {
			c, err := new(net.Dialer).DialContext(ctx, "unix", path)
			switch {
			case errors.Is(err, fs.ErrPermission):
				return nil, fmt.Errorf("%w: its mode admits root and the server's group: join that group, or set admin_socket_mode: 0666 so that only operators.managers and operators.readers decide", err)
			case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED):
				return c, err
			}
			waited := time.Since(begin)
			if waited >= wait {
				return nil, fmt.Errorf("%w: no server listens there; start it, or give its socket with --admin-socket", err)
			}
			if waited >= time.Second {
				notifySlow()
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

// startPoll is the time between two attempts to reach a starting server.
const startPoll = 50 * time.Millisecond

// serverPath is the path of the signing server's SPIFFE ID.
const serverPath = "/spire/server"

// CheckServer returns a usage error if the flag --server cannot be used: the address is not
// host:port, or there is no Workload API to get the operator's SVID from.
func CheckServer(address, workloadAPI string) error {
	return CheckRemote("--server", address, workloadAPI)
}

// CheckRemote is [CheckServer] for a flag of another name.
func CheckRemote(flag, address, workloadAPI string) error {
	if wrong := config.BadAddress(address, true); wrong != "" {
		// gRPC would accept other forms, and use 443 as the default port.
		return cli.Usagef("%s %s %s: give it with its port, such as server.example.org:8082", flag, address, wrong)
	}
	if workloadAPI == "" {
		return cli.Usagef("%s %s: SPIFFE_ENDPOINT_SOCKET is not set; set it to the Workload API socket that has the operator's SVID", flag, address)
	}
	return nil
}

// DialServer returns a Client of a server at host:port. It uses this process's SVID from
// the Workload API at socket, and waits for it until ctx is done. The server must be of
// the SVID's trust domain.
func DialServer(ctx context.Context, address, socket string) (*Client, error) {
	source, err := Identity(ctx, socket)
	if err != nil {
		return nil, err
	}
	svid, err := source.GetX509SVID()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("get an SVID from the Workload API at %s: %w", socket, err), source.Close())
	}
	id, err := spiffeid.FromPath(svid.ID.TrustDomain(), serverPath)
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

// Identity returns this process's SVID from the Workload API at socket. It waits for it
// until ctx is done. The caller closes the source.
func Identity(ctx context.Context, socket string) (*workloadapi.X509Source, error) {
	why := &attemptError{Logger: logger.Null}
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(socket), workloadapi.WithLogger(why)))
	if err != nil {
		if last := why.last.Load(); last != nil {
			err = fmt.Errorf("%s: %w", *last, err)
		}
		return nil, fmt.Errorf("get an SVID from the Workload API at %s: %w", socket, err)
	}
	return source, nil
}

// Reason returns the message of a call's error, without gRPC's prefixes for connection
// errors.
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

// attemptError keeps the last error of the Workload API. go-spiffe retries after every
// error and finally returns only that of the context.
type attemptError struct {
	logger.Logger
	last atomic.Pointer[string]
}

// Errorf receives the errors of go-spiffe's attempts.
func (e *attemptError) Errorf(_ string, args ...any) {
	for _, arg := range args {
		if err, ok := arg.(error); ok {
			text := Reason(err)
			e.last.Store(&text)
		}
	}
}

// Close closes the connection.
func (c *Client) Close() error {
	err := c.conn.Close()
	if c.source != nil {
		err = errors.Join(err, c.source.Close())
	}
	return err
}
