package renewd_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/internal/operator/runbook"
)

// failing answers every call with an error.
type failing struct {
	api.UnimplementedOperatorServer
	err   error
	calls atomic.Int64
}

func (f *failing) fail() error { f.calls.Add(1); return f.err }

func (f *failing) ListKeysets(context.Context, *api.ListKeysetsRequest) (*api.ListKeysetsResponse, error) {
	return nil, f.fail()
}

func (f *failing) ListHolders(context.Context, *api.ListHoldersRequest) (*api.ListHoldersResponse, error) {
	return nil, f.fail()
}

func (f *failing) PrepareKeyset(context.Context, *api.PrepareKeysetRequest) (*api.PrepareKeysetResponse, error) {
	return nil, f.fail()
}

func (f *failing) ActivateKeyset(context.Context, *api.ActivateKeysetRequest) (*api.ActivateKeysetResponse, error) {
	return nil, f.fail()
}

func (f *failing) TaintKeyset(context.Context, *api.TaintKeysetRequest) (*api.TaintKeysetResponse, error) {
	return nil, f.fail()
}

func (f *failing) RemoveKeyset(context.Context, *api.RemoveKeysetRequest) (*api.RemoveKeysetResponse, error) {
	return nil, f.fail()
}

// dialFailing connects to a server that answers every call with an error. The service config
// asks the connection to retry.
func dialFailing(t *testing.T, f *failing) *renewd.Client {
	t.Helper()
	lis := bufconn.Listen(1 << 16)
	gs := grpc.NewServer()
	api.RegisterOperatorServer(gs, f)
	done := make(chan error, 1)
	go func() { done <- gs.Serve(lis) }()
	t.Cleanup(func() { gs.Stop(); check(t, <-done) })
	const retry = `{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 4, "initialBackoff": "0.001s",
		"maxBackoff": "0.001s", "backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE", "INTERNAL", "ABORTED"]}}]}`
	conn, err := grpc.NewClient("passthrough:///server", renewd.DialOptions(insecure.NewCredentials(), grpc.WithDefaultServiceConfig(retry),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))...)
	check(t, err)
	t.Cleanup(func() { conn.Close() })
	return renewd.NewClient(conn)
}

// TestErrors: the code decides whether an operator sees the server's message, because nothing
// was changed, or an unknown outcome. No call is made twice.
func TestErrors(t *testing.T) {
	t.Parallel()
	detailed := func(reason, domain string) error {
		st, err := status.New(codes.FailedPrecondition, "The text.").WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: domain})
		check(t, err)
		return st.Err()
	}
	plain := func(c codes.Code) error { return status.Error(c, "The text.") }
	for name, c := range map[string]struct {
		err              error
		unknown, notSafe bool
	}{
		"refused":           {err: plain(codes.FailedPrecondition)},
		"not found":         {err: plain(codes.NotFound)},
		"busy":              {err: plain(codes.Aborted)},
		"wrong request":     {err: plain(codes.InvalidArgument)},
		"may not":           {err: plain(codes.PermissionDenied)},
		"unauthenticated":   {err: plain(codes.Unauthenticated)},
		"older server":      {err: plain(codes.Unimplemented)},
		"not safe":          {err: detailed("NOT_SAFE", "renewd"), notSafe: true},
		"another detail":    {err: detailed("NOT_SAFE", "elsewhere")},
		"another reason":    {err: detailed("TOO_EARLY", "renewd")},
		"unavailable":       {err: plain(codes.Unavailable), unknown: true},
		"deadline":          {err: plain(codes.DeadlineExceeded), unknown: true},
		"canceled":          {err: plain(codes.Canceled), unknown: true},
		"internal":          {err: plain(codes.Internal), unknown: true},
		"unknown":           {err: plain(codes.Unknown), unknown: true},
		"exhausted":         {err: plain(codes.ResourceExhausted), unknown: true},
		"data loss":         {err: plain(codes.DataLoss), unknown: true},
		"not a status":      {err: errors.New("The text."), unknown: true},
		"a code of its own": {err: plain(codes.Code(99)), unknown: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := &failing{err: c.err}
			b := dialFailing(t, f).Backend("", "")
			_, prepare := b.Prepare(t.Context())
			for step, err := range map[string]error{
				"prepare": prepare, "activate": b.Activate(t.Context(), "ks_x"), "taint": b.Taint(t.Context(), "ks_x"), "remove": b.Remove(t.Context(), "ks_x", false),
			} {
				want := "The text."
				if c.unknown {
					want = "the outcome is not known: The text."
				}
				if err == nil || err.Error() != want || errors.Is(err, runbook.ErrOutcomeUnknown) != c.unknown {
					t.Errorf("%s: %v, want %s", step, err, want)
				}
				notSafe, ok := errors.AsType[*runbook.NotSafeError](err)
				if ok != c.notSafe || (ok && step == "remove" && notSafe.Keyset != "ks_x") {
					t.Errorf("%s: %#v", step, err)
				}
			}
			if n := f.calls.Load(); n != 4 {
				t.Errorf("4 steps made %d calls", n)
			}
			_, status := b.Status(t.Context())
			_, holders := b.Holders(t.Context(), "ks_x")
			for what, err := range map[string]error{"status": status, "holders": holders} {
				if err == nil || err.Error() != "The text." {
					t.Errorf("%s: %v", what, err)
				}
			}
		})
	}
}

// TestServerUnreachable: without a connection the error says that nothing was changed.
func TestServerUnreachable(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "none.sock")
	c, err := renewd.DialSocket(path)
	check(t, err)
	defer c.Close()
	b := c.Backend("", "")
	_, err = b.Prepare(t.Context())
	if err == nil || errors.Is(err, runbook.ErrOutcomeUnknown) || !strings.HasPrefix(err.Error(), "the server was not reached, nothing was changed: ") || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
	want := "dial unix " + path + ": connect: no such file or directory: no server listens there; start it, or give its socket with --admin-socket"
	if _, err := b.Status(t.Context()); err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Taint(canceled, "ks_x"); err == nil || errors.Is(err, runbook.ErrOutcomeUnknown) {
		t.Errorf("canceled before the call: %v", err)
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
