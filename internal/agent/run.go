package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/renewd/renewd/internal/agent/admin"
	"github.com/renewd/renewd/internal/agent/upstream"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/socket"
	"github.com/renewd/renewd/metrics"
)

// Run serves until ctx is done and then returns nil. It returns an error before that
// when a listener cannot be opened, when the node has no credential to attest with, when
// the server has banned it, or when [RebootstrapAlways] is not possible. All its goroutines have ended when it returns.
func (a *Agent) Run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, a.close()) }()
	listener := a.cfg.Listener
	if listener == nil {
		lis, err := socket.Listen(a.cfg.SocketPath, a.cfg.SocketMode)
		if err != nil {
			return fmt.Errorf("socket_path: %w", err)
		}
		a.socket.Store(lis)
		listener = lis
	}
	serveAdmin, err := a.listenAdmin()
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	serveMetrics, err := a.listenMetrics()
	if err != nil {
		stopped, cancel := context.WithCancel(ctx)
		cancel()
		return errors.Join(err, listener.Close(), serveAdmin(stopped))
	}
	a.entrySyncs.record(nil)
	a.bundleRefreshes.record(nil)
	a.log.Info("agent started", "trust_domain", a.cfg.TrustDomain.Name(), "address", a.cfg.ServerAddress,
		"path", listener.Addr().String(), "version", a.cfg.Version)
	a.cfg.Started()
	stopped := ctx
	group, ctx := errgroup.WithContext(ctx)
	serving := ctx
	if a.svidStore != nil {
		// The cache may evict SVIDs above its limit when their streams end. So the
		// streams end only after all SVIDs were stored.
		var endServing context.CancelFunc
		serving, endServing = context.WithCancel(context.WithoutCancel(ctx))
		defer endServing()
		group.Go(func() error {
			defer endServing()
			return a.svidStore.Follow(ctx, a.cache)
		})
	}
	group.Go(func() error {
		a.releaseReturning(ctx)
		return nil
	})
	group.Go(func() error {
		a.sweep(ctx)
		return nil
	})
	group.Go(func() error { return a.store.Run(ctx) })
	group.Go(func() error {
		a.compareTrust(ctx)
		return nil
	})
	group.Go(func() error { return a.runRebootstrap(ctx) })
	group.Go(func() error { return wrap("Workload API", a.workload.Serve(serving, listener)) })
	if lis := a.socket.Load(); lis != nil {
		group.Go(func() error { lis.Watch(ctx, a.log); return nil })
	}
	group.Go(func() error { return serveAdmin(ctx) })
	group.Go(func() error { return serveMetrics(ctx) })
	group.Go(func() error {
		if err := a.connect(ctx); err != nil {
			return err
		}
		group.Go(func() error { return a.refresher.Run(ctx) })
		group.Go(func() error { return a.renewer.Run(ctx) })
		group.Go(func() error { return a.runReports(ctx) })
		return a.syncEntries(ctx)
	})
	err = group.Wait()
	if stopped.Err() != nil && !errors.Is(err, upstream.ErrBanned) {
		err = nil // the errors are of work that was canceled
	}
	a.log.Info("agent stopped")
	return err
}

func wrap(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// listenAdmin opens the admin socket, if one is configured, and returns the function that
// serves it and closes it.
func (a *Agent) listenAdmin() (func(context.Context) error, error) {
	if a.cfg.AdminSocket == "" {
		return func(context.Context) error { return nil }, nil
	}
	lis, err := socket.Listen(a.cfg.AdminSocket, 0o600)
	if err != nil {
		return nil, wrap("admin_socket_path", err)
	}
	server := admin.New(admin.Config{Attestors: a.attestors, Cache: a.cache, Log: a.log})
	return func(ctx context.Context) error {
		var watch sync.WaitGroup
		watch.Go(func() { lis.Watch(ctx, a.log) })
		defer watch.Wait()
		return wrap("admin socket", server.Serve(ctx, lis))
	}, nil
}

// listenMetrics opens the HTTP listener, if one is configured, and returns the function
// that serves it.
func (a *Agent) listenMetrics() (func(context.Context) error, error) {
	if a.cfg.MetricsAddress == "" {
		return func(context.Context) error { return nil }, nil
	}
	listener, err := listen.TCP(a.cfg.MetricsAddress)
	if err != nil {
		return nil, wrap("metrics.address", err)
	}
	a.log.Info("metrics listening", "address", listener.Addr().String(), "web_config_file", a.cfg.WebConfigFile)
	srv, serve := metrics.NewHTTPServer(metrics.HTTPConfig{WebConfigFile: a.cfg.WebConfigFile, Metrics: a.metrics, Ready: a.ready, Log: a.log})
	return func(ctx context.Context) error {
		return wrap("metrics", listen.ServeHTTP(ctx, listen.NewPool(), listener, srv, serve))
	}, nil
}

// connect bootstraps trust and attests the node. It returns at once when the node has a
// trust bundle and a valid identity.
func (a *Agent) connect(ctx context.Context) error {
	if a.trust() == nil {
		first := a.client.Bootstrap
		if a.cfg.TrustSource != nil {
			first = a.firstBundle
		}
		b, err := first(ctx)
		if err != nil {
			return fmt.Errorf("bootstrap trust: %w", err)
		}
		a.bootstrap.Store(b)
	}
	if err := a.client.Attest(ctx); err != nil {
		return fmt.Errorf("attest the node: %w", err)
	}
	return a.checkReattestable()
}
