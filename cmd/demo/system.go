package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/renewd/renewd/internal/agent"
	"github.com/renewd/renewd/internal/agent/attest"
	"github.com/renewd/renewd/internal/operator/renewd"
	"github.com/renewd/renewd/internal/operator/runbook"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/internal/server/spireapi"
)

var trustDomain = spiffeid.RequireTrustDomainFromString("example.org")

// system is everything that runs: a signing server on the loopback interface,
// an agent on a Unix socket in a temporary folder, and the workloads.
type system struct {
	server  *spireapi.Server // of the only deployment
	backend runbook.Backend  // the server, as keysetctl has it
	agent   *agent.Agent
	fleet   *fleet
	pace    pace
	address string // of the server
	socket  string // of the agent

	dir   string
	fail  context.CancelCauseFunc // ends the demo when a part of it ends
	stops []func() error          // of what runs, in order of start
}

// newSystem makes the system and starts the server. What it returns has to be
// closed, also with an error.
func newSystem(ctx context.Context, s settings, log *slog.Logger, fail context.CancelCauseFunc) (*system, error) {
	sys := &system{fail: fail, fleet: &fleet{fail: fail}}
	var err error
	if sys.dir, err = os.MkdirTemp("", "renewd-demo-"); err != nil {
		return sys, fmt.Errorf("make a temporary folder: %w", err)
	}
	sys.socket = filepath.Join(sys.dir, "agent.sock")
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return sys, fmt.Errorf("open the server's port: %w", err)
	}
	sys.address = lis.Addr().String()
	admin := filepath.Join(sys.dir, "admin.sock")
	side, err := server.Open(ctx, server.Config{
		TrustDomain:   trustDomain,
		Deployments:   []server.DeploymentConfig{{Name: server.DefaultDeployment, Listener: lis}},
		AdminSocket:   admin,
		Rotation:      rotation.Policy{Mode: rotation.Off},
		Log:           log.With("part", "server"),
		ServerOptions: []grpc.ServerOption{grpc.ChainUnaryInterceptor(sys.pace.intercept)},
	})
	if err != nil {
		return sys, errors.Join(fmt.Errorf("make the server: %w", err), lis.Close())
	}
	sys.server = side.Server(server.DefaultDeployment)
	sys.background("server", side.Run)
	if _, err := sys.server.ApplyEntries(ctx, entries(s), false); err != nil {
		return sys, fmt.Errorf("enter the identities: %w", err)
	}
	operators, err := renewd.DialSocket(admin)
	if err != nil {
		return sys, err
	}
	sys.stops = append(sys.stops, operators.Close)
	sys.backend = operators.Backend("", "")
	return sys, nil
}

// entries are the identities: the first are the workloads', and no process
// asks for the rest.
func entries(s settings) []spireapi.Entry {
	out := make([]spireapi.Entry, s.svids)
	for i := range out {
		path, selector := "/idle/"+strconv.Itoa(i+1), "idle"
		if i < s.workloads {
			path, selector = "/workload/"+strconv.Itoa(i+1), workloadSelector(i+1)
		}
		out[i] = spireapi.Entry{
			ID:        fmt.Sprintf("entry-%05d", i+1),
			SPIFFEID:  spiffeid.RequireFromPath(trustDomain, path),
			Selectors: []spireapi.Selector{{Type: selectorType, Value: selector}},
		}
	}
	return out
}

// startAgent starts the agent with what an operator would give it: where the
// server is, whom to trust there, and a token for its first call.
func (sys *system) startAgent(ctx context.Context, s settings, log *slog.Logger) error {
	trust := filepath.Join(sys.dir, "bundle.pem")
	if err := os.WriteFile(trust, sys.server.BundlePEM(), 0o600); err != nil {
		return fmt.Errorf("write the trust bundle: %w", err)
	}
	token, err := sys.server.CreateJoinToken(ctx, 5*time.Minute)
	if err != nil {
		return fmt.Errorf("make a join token: %w", err)
	}
	sys.agent, err = agent.New(agent.Config{
		TrustDomain:     trustDomain,
		ServerAddress:   sys.address,
		TrustBundleFile: trust,
		JoinToken:       token.Value,
		DataDir:         filepath.Join(sys.dir, "data"),
		SocketPath:      sys.socket,
		SocketMode:      0o600,
		Attestors:       []attest.Attestor{sys.fleet},
		TaintDelay:      s.maxDelay,
		TaintRate:       s.rate,
		RefreshInterval: s.refresh,
		CacheSize:       s.svids,
		Log:             log.With("part", "agent"),
	})
	if err != nil {
		return fmt.Errorf("make the agent: %w", err)
	}
	sys.background("agent", sys.agent.Run)
	return nil
}

// background runs f until the system is closed. An end before that is the end
// of the demo.
func (sys *system) background(what string, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		err := f(ctx)
		if err != nil {
			err = fmt.Errorf("%s: %w", what, err)
		}
		if ctx.Err() == nil {
			sys.fail(cmp.Or(err, fmt.Errorf("%s: ended by itself", what)))
		}
		ended <- err
	}()
	sys.stops = append(sys.stops, func() error { cancel(); return <-ended })
}

// close stops everything, the last started first, waits for it and removes
// what was written.
func (sys *system) close() error {
	sys.fleet.close()
	var errs []error
	for _, stop := range slices.Backward(sys.stops) {
		errs = append(errs, stop())
	}
	if sys.dir != "" {
		errs = append(errs, os.RemoveAll(sys.dir))
	}
	return errors.Join(errs...)
}
