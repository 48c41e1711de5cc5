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

// system is a signing server on the loopback interface, an agent on a Unix socket in a
// temporary directory, and the workloads.
type system struct {
	server   *spireapi.Server // of the only deployment
	backend  runbook.Backend  // the server, as keysetctl uses it
	agent    *agent.Agent
	fleet    *fleet
	recorder renewalRecorder
	address  string // of the server
	socket   string // of the agent

	dir   string
	fail  context.CancelCauseFunc // ends the demo when a part of it ends
	stops []func() error          // in order of start
}

// newSystem starts the server. The caller must close the returned system, also after an
// error.
func newSystem(ctx context.Context, s settings, log *slog.Logger, fail context.CancelCauseFunc) (*system, error) {
	sys := &system{fail: fail, fleet: &fleet{fail: fail}}
	var err error
	if sys.dir, err = os.MkdirTemp("", "renewd-demo-"); err != nil {
		return sys, fmt.Errorf("make a temporary directory: %w", err)
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
		Log:           log.With("component", "server"),
		ServerOptions: []grpc.ServerOption{grpc.ChainUnaryInterceptor(sys.recorder.intercept)},
	})
	if err != nil {
		return sys, errors.Join(fmt.Errorf("make the server: %w", err), lis.Close())
	}
	sys.server = side.Server(server.DefaultDeployment)
	sys.background("server", side.Run)
	if _, err := sys.server.ApplyEntries(ctx, entries(s), false); err != nil {
		return sys, fmt.Errorf("apply the entries: %w", err)
	}
	operators, err := renewd.DialSocket(admin)
	if err != nil {
		return sys, err
	}
	sys.stops = append(sys.stops, operators.Close)
	sys.backend = operators.Backend("", "")
	return sys, nil
}

// entries returns the entries: the first for the workloads, the others idle.
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

// startAgent starts the agent with the server's address, a trust bundle and a join token.
func (sys *system) startAgent(ctx context.Context, s settings, log *slog.Logger) error {
	trust := filepath.Join(sys.dir, "bundle.pem")
	if err := os.WriteFile(trust, sys.server.BundlePEM(), 0o600); err != nil {
		return fmt.Errorf("write the trust bundle: %w", err)
	}
	token, err := sys.server.CreateJoinToken(ctx, 5*time.Minute, "")
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
		Log:             log.With("component", "agent"),
	})
	if err != nil {
		return fmt.Errorf("make the agent: %w", err)
	}
	sys.background("agent", sys.agent.Run)
	return nil
}

// background runs f until the system is closed. If f returns earlier, the demo fails.
func (sys *system) background(name string, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		err := f(ctx)
		if err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
		if ctx.Err() == nil {
			sys.fail(cmp.Or(err, fmt.Errorf("%s: ended unexpectedly", name)))
		}
		ended <- err
	}()
	sys.stops = append(sys.stops, func() error { cancel(); return <-ended })
}

// close stops all parts in reverse order of start, waits for them and removes all files.
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
