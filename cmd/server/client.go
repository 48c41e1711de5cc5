package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/operator/renewd"
)

// maxAnswer bounds an answer of the server, in bytes: 100,000 entries take
// about 30 MB.
const maxAnswer = 256 << 20

// client connects an operator's command to the running server.
type client struct {
	*cli.Call
	socket, server, trustDomain, deployment string
	timeout                                 time.Duration
}

// newClient adds the flags of clientUsage to a call. -o takes more formats than text and json
// if they are given.
func newClient(call *cli.Call, formats ...string) *client {
	c := &client{Call: call}
	c.Flags.StringVar(&c.socket, "admin-socket", cmp.Or(c.Getenv("RENEWD_ADMIN_SOCKET"), c.Getenv("RENEWD_SERVER_ADMIN_SOCKET"), defaultSocket), "")
	c.Flags.StringVar(&c.server, "server", "", "")
	c.Flags.StringVar(&c.trustDomain, "trust-domain", c.Getenv("TRUST_DOMAIN"), "")
	c.Flags.StringVar(&c.deployment, "deployment-name", c.Getenv("DEPLOYMENT_NAME"), "")
	c.Flags.DurationVar(&c.timeout, "timeout", time.Minute, "")
	c.Output(formats...)
	return c
}

func (c *client) scope() *api.Scope {
	return &api.Scope{TrustDomain: c.trustDomain, Deployment: c.deployment}
}

// startWait is how long a command waits for a server that is starting, so that it can
// follow the start of the server at once. It is at most half of --timeout, so that the
// cause is printed.
const startWait = 5 * time.Second

// do connects and calls f. Its error begins with the name of the command. It waits for a server that
// is starting.
func (c *client) do(ctx context.Context, f func(context.Context, api.OperatorClient) error) error {
	return c.doWithin(ctx, min(startWait, c.timeout/2), f)
}

// doWithin is do with another time to wait for a server that is starting.
func (c *client) doWithin(ctx context.Context, wait time.Duration, f func(context.Context, api.OperatorClient) error) error {
	if err := checkTrustDomainFlag(c.Call, c.trustDomain); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	conn, err := c.dial(ctx, wait)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if err := f(ctx, conn.OperatorClient); err != nil {
		return fmt.Errorf("%s: %w", c.Name(), c.explain(err))
	}
	return nil
}

// checkTrustDomainFlag checks the value of --trust-domain, which may be empty.
func checkTrustDomainFlag(call *cli.Call, name string) error {
	if name == "" {
		return nil
	}
	if err := config.CheckTrustDomain(name); err != nil {
		return cli.Usagef("%s: --trust-domain %q %v", call.Name(), name, err)
	}
	return nil
}

func (c *client) dial(ctx context.Context, wait time.Duration) (*renewd.Client, error) {
	if c.server == "" {
		return renewd.DialStarting(c.socket, wait, func() {
			if cli.IsTerminal(c.Stderr) {
				_, _ = fmt.Fprintf(c.Stderr, "server: waiting for a server at %s\n", c.socket)
			}
		})
	}
	workloadAPI := c.Getenv("SPIFFE_ENDPOINT_SOCKET")
	if err := renewd.CheckServer(c.server, workloadAPI); err != nil {
		return nil, cli.Usagef("%s: %v", c.Name(), err)
	}
	return renewd.DialServer(ctx, c.server, workloadAPI)
}

// explain converts a gRPC status to an error for operators.
func (c *client) explain(err error) error {
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	switch st.Code() {
	case codes.Unavailable:
		if c.server != "" {
			return fmt.Errorf("no answer from %s: %s", c.server, renewd.Reason(err))
		}
		return fmt.Errorf("no answer: %s", renewd.Reason(err))
	case codes.DeadlineExceeded:
		return fmt.Errorf("no answer within %v; the server may have carried out the request", c.timeout)
	}
	return errors.New(st.Message())
}

// large raises gRPC's limit of 4 MB for an answer.
var large = grpc.MaxCallRecvMsgSize(maxAnswer)

// moment converts a timestamp; nil if it is not set.
func moment(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	at := t.AsTime()
	return &at
}

// when formats a time for a table.
func when(t *time.Time, now time.Time) string {
	if t == nil {
		return "-"
	}
	return cli.When(*t, now)
}

// text formats a string of the server for a table.
func text(s string) string {
	if s == "" {
		return "-"
	}
	return cli.Printable(s)
}
