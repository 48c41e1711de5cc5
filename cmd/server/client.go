package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/cli"
)

// maxAnswer bounds an answer of the server, in bytes: 100,000 entries take
// about 30 MB.
const maxAnswer = 256 << 20

// client is how the operator's commands reach the running server.
type client struct {
	cli.Env
	socket, trustDomain, deployment, output string
	timeout                                 time.Duration
}

// newClient adds the flags of clientUsage to fset.
func newClient(fset *flag.FlagSet, e cli.Env) *client {
	c := &client{Env: e}
	fset.StringVar(&c.socket, "admin-socket", cmp.Or(e.Getenv("RENEWD_ADMIN_SOCKET"), e.Getenv("RENEWD_SERVER_ADMIN_SOCKET"), defaultSocket), "")
	fset.StringVar(&c.trustDomain, "trust-domain", e.Getenv("TRUST_DOMAIN"), "")
	fset.StringVar(&c.deployment, "deployment-name", e.Getenv("DEPLOYMENT_NAME"), "")
	fset.DurationVar(&c.timeout, "timeout", time.Minute, "")
	fset.StringVar(&c.output, "o", "text", "")
	return c
}

func (c *client) scope() *api.Scope {
	return &api.Scope{TrustDomain: c.trustDomain, Deployment: c.deployment}
}

func (c *client) json() bool { return c.output == "json" }

// do connects and calls f. What went wrong is named after the operation.
func (c *client) do(ctx context.Context, operation string, f func(context.Context, api.OperatorClient) error) error {
	if err := cli.CheckOutput(operation, c.output); err != nil {
		return err
	}
	socket, err := filepath.Abs(c.socket)
	if err != nil {
		return fmt.Errorf("%s: %w", operation, err)
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer), grpc.MaxCallSendMsgSize(maxAnswer)))
	if err != nil {
		return fmt.Errorf("%s: admin socket %s: %w", operation, socket, err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	err = f(ctx, api.NewOperatorClient(conn))
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", operation, c.explain(err))
}

// explain says in people's words what a status of the server means.
func (c *client) explain(err error) error {
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	switch st.Code() {
	case codes.Unavailable:
		if _, statErr := os.Stat(c.socket); statErr != nil {
			return fmt.Errorf("no server: %w; start it, or give its socket with -admin-socket", statErr)
		}
		return fmt.Errorf("no answer on admin socket %s: %s", c.socket, st.Message())
	case codes.PermissionDenied:
		return fmt.Errorf("refused: %s; operators.managers and operators.readers in the server's configuration say who may", st.Message())
	case codes.DeadlineExceeded:
		return fmt.Errorf("no answer within %v; what was asked for may have happened", c.timeout)
	}
	return errors.New(st.Message())
}

// moment is a time of the server's; nil when it is not known.
func moment(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	at := t.AsTime()
	return &at
}

// when prints a moment for a table.
func when(t *time.Time, now time.Time) string {
	if t == nil {
		return "-"
	}
	return cli.When(*t, now)
}

// text prints what came from the server for a table.
func text(s string) string {
	if s == "" {
		return "-"
	}
	return cli.Printable(s)
}
